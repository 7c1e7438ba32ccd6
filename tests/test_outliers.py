"""Steps far above the typical norm are left out, counted and named, and never so many that a training ends."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Batches, Net, by_percentile, dataset, loader, read_csv, trainer, weights
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from models import Figures
from test_sharded import STRATEGIES, whole_weights
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from lightning_autoclip import AutoClip, GradientClipper, Percentile
from lightning_autoclip.clipping.clipper import clip_together_
from lightning_autoclip.clipping.outliers import LEAST_STEPS, MOST_IN_A_ROW

ALGORITHMS = pytest.mark.parametrize("algorithm", ["norm", "value"])
FUSED = pytest.mark.parametrize("fused", [False, True], ids=["ordinary", "fused"])
TIMES, WINDOW = 8.0, 30


def norms_of_a_run(seed: int = 0) -> list[float]:
    """Norms around 1 with single outliers, an early one, a NaN, a zero, seven in a row, and a rise for good."""
    norms = np.random.default_rng(seed).lognormal(0, 0.3, 120)
    norms[[5, 30, 45, 46]] = 50.0
    norms[33], norms[34], norms[35] = math.nan, 0.0, math.inf
    norms[60:67] = 40.0
    norms[80:] *= 30
    return norms.astype(np.float32).tolist()


def left_out_of(norms: list[float], times: float = TIMES, warmup_steps: int = 0) -> list[bool]:
    """Which steps are far too large, told anew from the description."""
    found, seen, in_a_row = [], [], 0
    for step, norm in enumerate(norms):
        large = bool(math.isfinite(norm) and seen and norm > times * np.median(np.float32(seen[-WINDOW:])))
        large &= step >= max(LEAST_STEPS, warmup_steps)
        in_a_row = in_a_row + 1 if large else 0
        found.append(large and in_a_row <= MOST_IN_A_ROW)
        seen += [norm] if 0 < norm < math.inf else []
    return found


def steps_of(
    clipper: GradientClipper, optimizer: Any, norms: list[float], scaler: Any = None
) -> list[tuple[bool, bool, float]]:
    """Per step whether its record says that it was left out, whether a weight moved, and the norm after clipping."""
    seen = []
    (parameter,) = optimizer.param_groups[0]["params"]
    for norm in norms:
        scale = 1.0 if scaler is None else float(scaler.scale(torch.ones(())))
        parameter.grad = torch.full((4,), norm / 2 * scale)
        before = parameter.detach().clone()
        record = clipper.clip_(optimizer, scaler)
        after = math.nan if parameter.grad is None else float(parameter.grad.norm())
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        seen.append((bool(record.left_out), not torch.equal(before, parameter), after))
    return seen


def optimizer_of(kind: str, fused: bool) -> Any:
    parameter = nn.Parameter(torch.ones(4))
    if kind == "sgd":
        return SGD([parameter], lr=1e-3, momentum=0.9, weight_decay=0.1, fused=fused)
    return AdamW([parameter], lr=1e-3, fused=fused)


@ALGORITHMS
@FUSED
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("nonfinite", ["skip", "ignore"])
@pytest.mark.parametrize("warmup_steps", [0, 40])
def test_steps_far_above_the_typical_norm_move_nothing(form, algorithm, fused, kind, nonfinite, warmup_steps):
    norms = norms_of_a_run()
    if nonfinite == "ignore":
        norms = [norm if math.isfinite(norm) else 1.0 for norm in norms]  # what is applied ruins the weights
    arguments = {"gradient_clip_algorithm": algorithm, "nonfinite": nonfinite, "warmup_steps": warmup_steps}
    clipper = GradientClipper(Percentile(50), window=WINDOW, skip_above=TIMES, **arguments)
    seen = steps_of(clipper, optimizer_of(kind, fused), norms)
    expected = left_out_of(norms, warmup_steps=warmup_steps)
    assert sum(expected) > MOST_IN_A_ROW
    assert [left_out for left_out, _, _ in seen] == expected
    for norm, bad, (_, moved, after) in zip(norms, expected, seen, strict=True):
        assert moved == (not bad and math.isfinite(norm))
        if bad:
            assert after == pytest.approx(norm)  # whoever looks sees the gradient as it was
    finite = [norm for norm in norms if 0 < norm < math.inf]
    unit = 1.0 if algorithm == "norm" else 0.5
    torch.testing.assert_close(clipper.history.recorded, torch.tensor(finite[-WINDOW:]) * unit)


@FUSED
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_loss_scaler_does_not_back_off_for_them(form, fused, kind):
    norms = norms_of_a_run()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=10**6)
    clipper = GradientClipper(Percentile(50), window=WINDOW, skip_above=TIMES)
    seen = steps_of(clipper, optimizer_of(kind, fused), norms, scaler)
    assert [left_out for left_out, _, _ in seen] == (expected := left_out_of(norms))
    assert [moved for _, moved, _ in seen] == [
        not bad and math.isfinite(norm) for bad, norm in zip(expected, norms, strict=True)
    ]
    assert scaler.get_scale() == 4.0 / 2**2  # of the NaN and of the infinity


def test_norms_that_have_risen_for_good_are_trained_on():
    norms = [1.0] * 50 + [100.0] * 100
    seen = steps_of(GradientClipper(Percentile(50), window=None, skip_above=3), optimizer_of("sgd", False), norms)
    assert [left_out for left_out, _, _ in seen] == [False] * 50 + [True] * MOST_IN_A_ROW + [False] * 95


@pytest.mark.parametrize("target", ["parameters", "optimizer"])
def test_parameters_alone_lose_the_gradients_of_such_a_step(target):
    optimizer, clipper = optimizer_of("sgd", False), GradientClipper(Percentile(50), skip_above=3)
    (parameter,) = optimizer.param_groups[0]["params"]
    for norm in [1.0] * 30 + [10.0]:
        parameter.grad = torch.full((4,), norm)
        record = clipper.clip_([parameter] if target == "parameters" else optimizer)
        had = parameter.grad is not None
        optimizer.step()
    assert record.left_out == 1.0
    assert had == (target == "optimizer")


def test_a_step_too_large_in_one_group_is_left_out_of_all(form):
    parameters = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = SGD(parameters, lr=0.1, fused=True)
    clippers = [GradientClipper(Percentile(50), skip_above=5) for _ in parameters]
    for step in range(40):
        for i, parameter in enumerate(parameters):
            parameter.grad = torch.full((2,), 100.0 if step == 30 + i else 1.0)
        before = [parameter.detach().clone() for parameter in parameters]
        records = clip_together_([(clipper, [i]) for i, clipper in enumerate(clippers)], optimizer)
        optimizer.step()
        assert [bool(record.left_out) for record in records] == [step in (30, 31)] * 2
        moved = [not torch.equal(old, new) for old, new in zip(before, parameters, strict=True)]
        assert moved == [step not in (30, 31)] * 2


def test_steps_in_a_row_are_counted_for_all_groups_alike(form):
    parameters = [nn.Parameter(torch.ones(2)) for _ in range(3)]
    optimizer = SGD(parameters, lr=0.1, fused=True)
    clippers = [GradientClipper(Percentile(50), skip_above=5) for _ in parameters]
    left_out = []
    for step in range(50):
        for i, parameter in enumerate(parameters):  # one after the other they rise for good
            parameter.grad = torch.full((2,), 100.0 if step >= 30 + MOST_IN_A_ROW * i else 1.0)
        records = clip_together_([(clipper, [i]) for i, clipper in enumerate(clippers)], optimizer)
        optimizer.step()
        left_out += [step for record in records[:1] if record.left_out]
    assert left_out == list(range(30, 30 + MOST_IN_A_ROW))


class Passing(Optimizer):
    """Wraps an optimizer, steps with it, and passes on whatever else it is asked for."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner.param_groups, {})
        self.inner, self.param_groups = inner, inner.param_groups

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


@FUSED
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_wrapper_that_passes_everything_on_leaves_steps_out_too(form, fused, kind):
    norms = norms_of_a_run()
    clipper = GradientClipper(Percentile(50), window=WINDOW, skip_above=TIMES)
    seen = steps_of(clipper, Passing(optimizer_of(kind, fused)), norms)
    expected = left_out_of(norms)
    assert [moved for _, moved, _ in seen] == [
        not bad and math.isfinite(norm) for bad, norm in zip(expected, norms, strict=True)
    ]


@ALGORITHMS
def test_a_record_says_that_a_step_that_is_left_out_is_not_clipped(form, algorithm):
    clipper = GradientClipper(Percentile(50), skip_above=3, gradient_clip_algorithm=algorithm)
    optimizer = optimizer_of("sgd", True)
    (parameter,) = optimizer.param_groups[0]["params"]
    for norm in [1.0] * 30 + [10.0]:
        parameter.grad = torch.full((4,), norm)
        record = clipper.clip_(optimizer)
        optimizer.step()
    assert record.left_out == 1.0
    assert float(record.clipped_norm) == pytest.approx(20.0)
    assert torch.equal(parameter.grad, torch.full((4,), 10.0))


@pytest.mark.parametrize("cut", [25, 47, 62, 63, 66])
def test_a_clipper_that_is_saved_and_loaded_goes_on_alike(form, cut):
    norms = norms_of_a_run()
    whole, half, rest = (GradientClipper(Percentile(50), window=WINDOW, skip_above=TIMES) for _ in range(3))
    optimizers = [optimizer_of("adamw", True) for _ in range(3)]
    expected = steps_of(whole, optimizers[0], norms)
    first = steps_of(half, optimizers[1], norms[:cut])
    rest.load_state_dict(half.state_dict())
    second = steps_of(rest, optimizers[2], norms[cut:])
    assert [left_out for left_out, _, _ in first + second] == [left_out for left_out, _, _ in expected]


@pytest.mark.parametrize(
    ("value", "error"),
    [(0.5, ValueError), (0, ValueError), (math.nan, ValueError), ("3", TypeError), (True, TypeError)],
)
def test_another_limit_is_refused(value, error):
    with pytest.raises(error, match="Expected `skip_above` to be a number of at least 1"):
        AutoClip(skip_above=value)


def test_without_it_a_step_has_the_operations_that_it_had():
    assert GradientClipper(Percentile(50)).outliers.is_on is False
    assert AutoClip().settings["skip_above"] is None


# --- in a Trainer -----------------------------------------------------------------------------------------------------

ROWS = [1.0] * 320
ROWS[100:104] = ROWS[200:204] = [300.0] * 4  # steps 25 and 50 of batches of four


def autoclip_of(**kwargs: Any) -> AutoClip:
    return AutoClip(50, skip_above=10, **{"max_update_ratio": None, "verbose": False, **kwargs})


def fit(autoclip: AutoClip, *callbacks: Any, fused: bool = False, ckpt_path: Any = None, **kwargs: Any) -> Net:
    model = Net(partial(SGD, lr=0.01, momentum=0.9, fused=fused))
    run = trainer(autoclip, *callbacks, log_every_n_steps=20, **kwargs)
    run.fit(model, loader(n=320, scales=ROWS), ckpt_path=ckpt_path)
    return model


@ALGORITHMS
@FUSED
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_a_trainer_leaves_them_out_and_tells(tmp_path, algorithm, fused, precision, capsys):
    logger = CSVLogger(tmp_path, name="", version="run")
    autoclip = autoclip_of(gradient_clip_algorithm=algorithm, verbose=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=10**6)
    plugin = MixedPrecision("16-mixed", "cpu", scaler) if precision == "16-mixed" else None
    others = {"plugins": plugin} if plugin else {"precision": precision}
    fit(autoclip, fused=fused, logger=logger, **others)
    rows = read_csv(tmp_path / "run" / "metrics.csv")
    assert [float(row["autoclip/skipped_total"]) for row in rows if row["autoclip/skipped_total"]] == [0, 1, 2, 2]
    assert all(float(row["autoclip/grad_norm_clipped"]) < 10 for row in rows if row["autoclip/grad_norm_clipped"])
    told = {spike["step"]: spike for spike in autoclip.spikes()}
    assert {step for step, spike in told.items() if spike["left_out"]} == {25, 50}
    assert (told[25]["batches"], math.isnan(told[25]["clip_coef"])) == ("25", True)
    (section,) = autoclip.report().sections
    assert (section.figures.left_out, section.figures.nonfinite) == (2, 0)
    assert [verdict.name for verdict in section.verdicts if "left out" in verdict.name] == ["many steps left out"]
    assert "2 steps left out, far above the typical norm" in " ".join(capsys.readouterr().out.split())
    assert scaler.get_scale() == 8.0


def test_it_trains_where_the_two_batches_ruin_it_else():
    with_it, without = autoclip_of(), AutoClip(100, verbose=False)
    left_out, applied = weights(fit(with_it)), weights(fit(without))
    clean = Net(partial(SGD, lr=0.01, momentum=0.9))
    trainer(AutoClip(50, max_update_ratio=None, verbose=False)).fit(clean, loader(n=320))
    assert (left_out - weights(clean)).norm() < 0.2 * (applied - weights(clean)).norm()


def test_rows_without_it_have_no_such_key(tmp_path):
    fit(by_percentile(50, verbose=False), logger=CSVLogger(tmp_path, name="", version="run"))
    assert not any("skipped_total" in key for row in read_csv(tmp_path / "run" / "metrics.csv") for key in row)


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_resumed_run_takes_the_same_steps_and_counts_on(tmp_path, epochs):
    def fit_epochs(autoclip: AutoClip, until: int, *callbacks: Any, **kwargs: Any) -> torch.Tensor:
        model = Net(partial(SGD, lr=0.01, momentum=0.9))
        run = trainer(autoclip, *callbacks, max_epochs=until, enable_checkpointing=bool(callbacks))
        run.fit(model, loader(n=104, scales=ROWS[:104]), **kwargs)  # the last batch of each epoch is left out
        return weights(model)

    whole, resumed = autoclip_of(), autoclip_of()
    expected = fit_epochs(whole, 3)
    fit_epochs(autoclip_of(), epochs, ModelCheckpoint(tmp_path, filename="end"))
    assert torch.equal(fit_epochs(resumed, 3, ckpt_path=tmp_path / "end.ckpt"), expected)
    assert resumed.report().sections[0].figures.left_out == 3
    assert resumed.report() == whole.report()
    assert repr(resumed.spikes()) == repr(whole.spikes())  # of which some factors are NaN


def test_another_limit_at_a_resume_is_told(tmp_path):
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=30, filename="half")
    fit(autoclip_of(), saving, max_steps=30, enable_checkpointing=True)
    with pytest.warns(UserWarning, match="skip_above=10.0; this run goes on with skip_above=None"):
        fit(by_percentile(50, verbose=False), ckpt_path=tmp_path / "half.ckpt")


FACTORS = [100.0 if row in range(208, 216) else 1.0 + row % 3 for row in range(320)]  # step 26 of batches of eight


class Many(Batches):
    """More batches than the others have: nothing is left out before step 20."""

    def __init__(self) -> None:
        super().__init__(FACTORS[:80])
        self.rows = dataset(320, scales=FACTORS)


def train(strategy: Any = "auto", net: type[Net] = Net, devices: int = 1) -> dict[str, Any]:
    torch.manual_seed(0)
    autoclip = autoclip_of()
    watch = Figures("autoclip/grad_norm", "autoclip/threshold", "autoclip/skipped_total")
    watch.on_train_end = lambda trainer, module: setattr(watch, "weights", whole_weights(trainer.strategy.model))
    run = trainer(
        autoclip, watch, strategy=strategy, devices=devices, log_every_n_steps=1, use_distributed_sampler=False
    )
    run.fit(net(partial(SGD, lr=0.02, momentum=0.9)), datamodule=Many())
    return {"steps": torch.tensor(list(watch.steps.values())), "weights": watch.weights}


SHARED = ["FSDP2", "FSDP1 FULL_SHARD original", "FSDP1 FULL_SHARD flat"]


def on_two(name: str) -> dict[str, Any]:
    if name == "ddp":
        return train("ddp", devices=2)
    net, strategy = STRATEGIES[name]
    return train(strategy(), net, devices=2)


@pytest.fixture(scope="module")
def ranks(two_ranks):
    """What the two ranks saw in a run."""
    return two_ranks.start({name: partial(on_two, name) for name in ("ddp", *SHARED)})


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["ddp", *SHARED])
def test_two_processes_leave_out_what_one_does(name, ranks):
    first, second = ranks(name)
    assert torch.equal(first["steps"], second["steps"])
    one = train()
    torch.testing.assert_close(first["steps"], one["steps"], rtol=1e-5, atol=1e-6)
    assert one["steps"][:, 2].tolist() == [0.0] * 26 + [1.0] * 14
    theirs = {key.removeprefix("module."): value for key, value in first["weights"].items()}
    torch.testing.assert_close(theirs, one["weights"], rtol=0, atol=1e-5)
