"""`skip_above`: outliers are skipped, counted and named, and never so many in a row that a run ends."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Batches, Net, by_percentile, dataset, loader, read_rows, trainer, weights
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from models import Figures
from test_sharded import STRATEGIES, whole_weights
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from lightning_autoclip import AutoClip, GradientClipper, Percentile
from lightning_autoclip.clipper import clip_together_
from lightning_autoclip.step import LEAST_STEPS, MOST_IN_A_ROW

TIMES, WINDOW = 8.0, 30


def norms_of_a_run(seed: int = 0) -> list[float]:
    """Norms around 1 with single outliers, an early one, a NaN, a zero, seven in a row, and a rise for good."""
    norms = np.random.default_rng(seed).lognormal(0, 0.3, 120)
    norms[[5, 30, 45, 46]] = 50.0
    norms[33], norms[34], norms[35] = math.nan, 0.0, math.inf
    norms[60:67] = 40.0
    norms[80:] *= 30
    return norms.astype(np.float32).tolist()


NORMS = norms_of_a_run()


def outliers_of(norms: list[float], warmup_steps: int = 0) -> list[bool]:
    """Which steps are to be skipped as outliers, computed anew from the description."""
    found, seen, in_a_row = [], [], 0
    for step, norm in enumerate(norms):
        large = bool(math.isfinite(norm) and seen and norm > TIMES * np.median(seen[-WINDOW:]))
        large &= step >= max(LEAST_STEPS, warmup_steps)
        in_a_row = in_a_row + 1 if large else 0
        found.append(large and in_a_row <= MOST_IN_A_ROW)
        seen += [norm] if 0 < norm < math.inf else []
    return found


def clipper_of(times: float = TIMES, **kwargs: Any) -> GradientClipper:
    return GradientClipper(Percentile(50), skip_above=times, **{"window": WINDOW, **kwargs})


def optimizer_of(kind: str = "sgd", fused: bool = False) -> Any:
    parameter = nn.Parameter(torch.ones(4))
    if kind == "sgd":
        return SGD([parameter], lr=1e-3, momentum=0.9, weight_decay=0.1, fused=fused)
    return AdamW([parameter], lr=1e-3, fused=fused)


OPTIMIZERS = {
    "ordinary SGD": partial(optimizer_of, "sgd"),
    "fused SGD": partial(optimizer_of, "sgd", fused=True),
    "ordinary AdamW": partial(optimizer_of, "adamw"),
    "fused AdamW": partial(optimizer_of, "adamw", fused=True),
}
every_optimizer = pytest.mark.parametrize("optimizer_of", OPTIMIZERS.values(), ids=OPTIMIZERS)


def state_of(optimizer: Any) -> list[torch.Tensor]:
    """Copies of the weight and of what the optimizer keeps of it."""
    (parameter,) = optimizer.param_groups[0]["params"]
    values = [parameter.detach(), *optimizer.state.get(parameter, {}).values()]
    return [value.clone() for value in values if value is not None]


def steps_of(
    clipper: GradientClipper, optimizer: Any, norms: list[float], scaler: Any = None
) -> list[tuple[bool, bool, float]]:
    """Per step whether its record says that it is skipped, whether weights or state moved, and the norm afterwards."""
    seen = []
    (parameter,) = optimizer.param_groups[0]["params"]
    for norm in norms:
        scale = 1.0 if scaler is None else float(scaler.scale(torch.ones(())))
        parameter.grad = torch.full((4,), norm / 2 * scale)
        before = state_of(optimizer)
        record = clipper.clip_(optimizer, scaler)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        after = state_of(optimizer)
        moved = len(before) != len(after) or not all(map(torch.equal, before, after))
        seen.append((bool(record.is_skipped), moved, float(parameter.grad.norm())))
    return seen


VARIANTS = [("norm", "skip", 0), ("value", "skip", 0), ("norm", "ignore", 40)]


@pytest.mark.parametrize(("algorithm", "nonfinite", "warmup_steps"), VARIANTS)
@every_optimizer
def test_an_outlier_moves_nothing(form, optimizer_of, algorithm, nonfinite, warmup_steps):
    norms = NORMS
    if nonfinite == "ignore":
        norms = [norm if math.isfinite(norm) else 1.0 for norm in norms]  # what is applied ruins the weights
    clipper = clipper_of(gradient_clip_algorithm=algorithm, nonfinite=nonfinite, warmup_steps=warmup_steps)
    seen = steps_of(clipper, optimizer_of(), norms)
    expected = outliers_of(norms, warmup_steps)
    assert sum(expected) > MOST_IN_A_ROW
    assert [is_skipped for is_skipped, _, _ in seen] == expected
    for norm, is_outlier, (_, moved, after) in zip(norms, expected, seen, strict=True):
        assert moved == (not is_outlier and math.isfinite(norm))
        if is_outlier:
            assert after == pytest.approx(norm)  # the gradient stays readable, as it was
    finite = np.array([norm for norm in norms if 0 < norm < math.inf])[-WINDOW:]
    assert clipper.history.values.numpy() == pytest.approx(finite / (1 if algorithm == "norm" else 2), rel=1e-6)


@every_optimizer
def test_a_loss_scaler_keeps_its_scale(form, optimizer_of):
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=10**6)
    seen = steps_of(clipper_of(), optimizer_of(), NORMS, scaler)
    expected = outliers_of(NORMS)
    assert [is_skipped for is_skipped, _, _ in seen] == expected
    may_move = [not is_outlier and math.isfinite(norm) for is_outlier, norm in zip(expected, NORMS, strict=True)]
    assert [moved for _, moved, _ in seen] == may_move
    assert scaler.get_scale() == 4.0 / 2**2  # of the NaN and of the infinity


def test_norms_that_have_risen_for_good_are_trained_on():
    seen = steps_of(clipper_of(3, window=None), optimizer_of(), [1.0] * 50 + [100.0] * 100)
    assert [is_skipped for is_skipped, _, _ in seen] == [False] * 50 + [True] * MOST_IN_A_ROW + [False] * 95


def test_parameters_alone_lose_the_gradients_of_an_outlier():
    clipper, parameter = clipper_of(), nn.Parameter(torch.ones(4))
    for norm in [1.0] * 30 + [10.0]:
        parameter.grad = torch.full((4,), norm)
        record = clipper.clip_([parameter])
    assert record.is_skipped is True
    assert parameter.grad is None


@pytest.mark.parametrize("each_has_its_turn", [False, True])
def test_an_outlier_in_one_group_skips_all_groups(form, each_has_its_turn):
    parameters = [nn.Parameter(torch.ones(2)) for _ in range(3)]
    optimizer = SGD(parameters, lr=0.1, fused=True)
    clippers, skipped = [clipper_of(5, window=100) for _ in parameters], []
    for step in range(50):
        for i, parameter in enumerate(parameters):  # one after the other has an outlier, or they rise for good
            start = 30 + (MOST_IN_A_ROW * i if each_has_its_turn else i)
            is_large = step >= start if each_has_its_turn else step == start
            parameter.grad = torch.full((2,), 100.0 if is_large else 1.0)
        before = [parameter.detach().clone() for parameter in parameters]
        records = clip_together_([(clipper, [i]) for i, clipper in enumerate(clippers)], optimizer)
        optimizer.step()
        moved = {not torch.equal(old, new) for old, new in zip(before, parameters, strict=True)}
        assert {bool(record.is_skipped) for record in records} == {not moved.pop()}
        assert not moved
        skipped += [step] if records[0].is_skipped else []
    assert skipped == list(range(30, 30 + (MOST_IN_A_ROW if each_has_its_turn else 3)))


def test_outliers_in_a_row_are_counted_without_a_group_that_never_steps(form):
    frozen, trained = parameters = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    frozen.requires_grad_(False)
    optimizer = SGD(parameters, lr=0.1, fused=True)
    clippers, skipped = [clipper_of(5, window=100) for _ in parameters], 0
    for step in range(60):
        trained.grad = torch.full((2,), 1.0 if step < 30 else 100.0)
        records = clip_together_([(clipper, [i]) for i, clipper in enumerate(clippers)], optimizer)
        optimizer.step()
        skipped += bool(records[1].is_skipped)
    assert records[0] is None
    assert skipped == MOST_IN_A_ROW


class Passing(Optimizer):
    """Wraps an optimizer, steps with it, and passes on whatever else it is asked for."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner.param_groups, {})
        self.inner, self.param_groups, self.state = inner, inner.param_groups, inner.state

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


@every_optimizer
def test_a_wrapper_that_passes_everything_on_skips_too(form, optimizer_of):
    seen = steps_of(clipper_of(), Passing(optimizer_of()), NORMS)
    expected = zip(outliers_of(NORMS), NORMS, strict=True)
    assert [moved for _, moved, _ in seen] == [not outlier and math.isfinite(norm) for outlier, norm in expected]


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_the_record_of_a_skipped_step_is_not_clipped(form, algorithm):
    clipper, optimizer = clipper_of(3, gradient_clip_algorithm=algorithm), optimizer_of(fused=True)
    steps_of(clipper, optimizer, [2.0] * 30)
    (parameter,) = optimizer.param_groups[0]["params"]
    parameter.grad = torch.full((4,), 10.0)
    clipper.clip_(optimizer)
    record = clipper.commit()
    assert record.is_skipped is True
    assert record.clipped_norm == pytest.approx(20.0)
    assert torch.equal(parameter.grad, torch.full((4,), 10.0))


@pytest.mark.parametrize("cut", [47, 63], ids=["after two outliers", "in the middle of seven"])
def test_a_clipper_that_is_saved_and_loaded_skips_the_same_steps(form, cut):
    half, rest = clipper_of(), clipper_of()
    seen = steps_of(half, optimizer_of("adamw", fused=True), NORMS[:cut])
    rest.load_state_dict(half.state_dict())
    seen += steps_of(rest, optimizer_of("adamw", fused=True), NORMS[cut:])
    assert [is_skipped for is_skipped, _, _ in seen] == outliers_of(NORMS)


@pytest.mark.parametrize(("value", "error"), [(0.5, ValueError), (math.nan, ValueError), ("3", TypeError)])
def test_a_value_that_is_no_multiple_raises(value, error):
    with pytest.raises(error, match="Expected `skip_above` to be a number of at least 1"):
        AutoClip(skip_above=value)


# --- in a Trainer -----------------------------------------------------------------------------------------------------

ROWS = [1.0] * 320
ROWS[100:104] = ROWS[200:204] = [300.0] * 4  # steps 25 and 50 of batches of four


def autoclip_of(**kwargs: Any) -> AutoClip:
    return by_percentile(50, skip_above=10, **{"verbose": False, **kwargs})


def fit(autoclip: AutoClip, *callbacks: Any, fused: bool = False, rows: Any = ROWS, ckpt_path: Any = None, **kwargs):
    model = Net(partial(SGD, lr=0.01, momentum=0.9, fused=fused))
    run = trainer(autoclip, *callbacks, **{"log_every_n_steps": 20, **kwargs})
    run.fit(model, loader(n=len(rows), scales=rows), ckpt_path=ckpt_path)
    return weights(model)


RUNS = [
    ("norm", False, "32-true"),
    ("value", True, "32-true"),
    ("norm", True, "bf16-mixed"),
    ("norm", False, "16-mixed"),
    ("value", True, "16-mixed"),
]


@pytest.mark.parametrize(("algorithm", "fused", "precision"), RUNS)
def test_a_trainer_skips_outliers_and_reports_them(tmp_path, algorithm, fused, precision, capsys):
    autoclip = autoclip_of(gradient_clip_algorithm=algorithm, verbose=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=10**6)
    plugin = MixedPrecision("16-mixed", "cpu", scaler) if precision == "16-mixed" else None
    others = {"plugins": plugin} if plugin else {"precision": precision}
    fit(autoclip, fused=fused, logger=CSVLogger(tmp_path, name="", version=""), **others)
    rows = read_rows(tmp_path / "metrics.csv")
    assert [row["autoclip/skipped_total"] for row in rows if "autoclip/skipped_total" in row] == [0, 1, 2, 2]
    assert all(row["autoclip/grad_norm_clipped"] < 10 for row in rows if "autoclip/grad_norm_clipped" in row)
    spikes = {spike["step"]: spike for spike in autoclip.spikes()}
    assert {step: spike["skipped"] for step, spike in spikes.items() if spike["skipped"]} == {
        25: "outlier",
        50: "outlier",
    }
    assert (spikes[25]["batches"], math.isnan(spikes[25]["clip_coef"])) == ("25", True)
    (section,) = autoclip.report().sections
    assert (section.figures.skipped, section.figures.nonfinite) == (2, 0)
    assert "many steps skipped" in [diagnosis.name for diagnosis in section.diagnoses]
    assert "2 steps skipped as outliers" in " ".join(capsys.readouterr().out.split())
    assert scaler.get_scale() == 8.0


def test_it_trains_where_the_two_batches_ruin_it_otherwise():
    skipped, applied = fit(autoclip_of()), fit(AutoClip(100, verbose=False))
    clean = fit(by_percentile(50, verbose=False), rows=[1.0] * 320)
    assert (skipped - clean).norm() < 0.2 * (applied - clean).norm()


def test_rows_without_it_have_no_such_key(tmp_path):
    fit(by_percentile(50, verbose=False), logger=CSVLogger(tmp_path, name="", version=""))
    rows = read_rows(tmp_path / "metrics.csv")
    assert rows
    assert not any("skipped" in key for row in rows for key in row)


def test_a_resumed_run_takes_the_same_steps_and_counts_on(tmp_path):
    """The last batch of each epoch is skipped."""
    path, rows = tmp_path / "end.ckpt", ROWS[:104]
    whole, resumed = autoclip_of(), autoclip_of()
    expected = fit(whole, rows=rows, max_epochs=3)
    fit(autoclip_of(), ModelCheckpoint(tmp_path, "end"), rows=rows, max_epochs=1, enable_checkpointing=True)
    assert torch.equal(fit(resumed, rows=rows, max_epochs=3, ckpt_path=path), expected)
    assert resumed.report().sections[0].figures.skipped == 3
    assert resumed.report() == whole.report()
    assert repr(resumed.spikes()) == repr(whole.spikes())  # of which some coefficients are NaN
    with pytest.warns(UserWarning, match=r"continues with: skip_above 10\.0 → None"):
        fit(by_percentile(50, verbose=False), rows=rows, max_epochs=2, ckpt_path=path)


# --- on two processes -------------------------------------------------------------------------------------------------

FACTORS = [100.0 if row in range(208, 216) else 1.0 + row % 3 for row in range(320)]  # step 26 of batches of eight


class Many(Batches):
    """More batches than the others have: nothing is skipped before step 20."""

    def __init__(self) -> None:
        super().__init__(FACTORS[:80])
        self.rows = dataset(320, scales=FACTORS)


def train(strategy: Any = "auto", net: type[Net] = Net, devices: int = 1) -> dict[str, Any]:
    torch.manual_seed(0)
    watch = Figures("autoclip/grad_norm", "autoclip/threshold", "autoclip/skipped_total")
    watch.on_train_end = lambda trainer, module: setattr(watch, "weights", whole_weights(trainer.strategy.model))
    run = trainer(
        autoclip_of(), watch, strategy=strategy, devices=devices, log_every_n_steps=1, use_distributed_sampler=False
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


@pytest.fixture(scope="module")
def one():
    """What one process saw."""
    return train()


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["ddp", *SHARED])
def test_two_processes_skip_what_one_does(name, ranks, one):
    first, second = ranks(name)
    assert torch.equal(first["steps"], second["steps"])
    torch.testing.assert_close(first["steps"], one["steps"], rtol=1e-5, atol=1e-6)
    assert one["steps"][:, 2].tolist() == [0.0] * 26 + [1.0] * 14
    weights_of_two = {key.removeprefix("module."): value for key, value in first["weights"].items()}
    torch.testing.assert_close(weights_of_two, one["weights"], rtol=0, atol=1e-5)
