"""The largest steps and the layers of a run, against gradients that another callback has noted."""

from __future__ import annotations

import csv
import math
import multiprocessing
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from helpers import Net, by_percentile, loader, trainer, with_gradient
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BackboneFinetuning, Checkpoint, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from models import OneBackward
from processes import TIME_LIMIT
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim import SGD, Adam, Optimizer

from lightning_autoclip import AutoClip, Constant, GradientClipper, StepRecord

WINDOW, PERCENTILE = 8, 50
SPIKES, AROUND = 20, 50  # what is documented
BAD = {3: math.nan, 7: 100.0, 12: math.inf, 17: 30.0}  # the factors on the loss of some of 25 batches
ALGORITHMS = pytest.mark.parametrize("algorithm", ["norm", "value"])


class Step(NamedTuple):
    """An optimizer step as Lightning took it."""

    step: int
    epoch: int
    batches: list[int]
    squares: dict[str, float]
    elements: int

    @property
    def norm(self) -> float:
        return math.sqrt(sum(self.squares.values()))


class Noting(Callback):
    """Notes every optimizer step with the squared norm of each parameter's gradient. Stands before `AutoClip`."""

    def __init__(self) -> None:
        self.steps: dict[int, list[Step]] = {}  # by optimizer, as the following
        self.clipped: dict[int, list[float]] = {}
        self.windows: dict[int, list[int]] = {}
        self.begun = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.begun += 1
        for index in range(len(trainer.optimizers)):
            self.windows.setdefault(index, []).append(batch_idx)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        index, mine = trainer.optimizers.index(optimizer), [p for g in optimizer.param_groups for p in g["params"]]
        squares = {
            name: 0.0 if parameter.grad is None else float(parameter.grad.double().square().sum())
            for name, parameter in pl_module.named_parameters()
            if any(parameter is other for other in mine)
        }
        elements = sum(parameter.numel() for parameter in mine if parameter.grad is not None)
        steps = self.steps.setdefault(index, [])
        # In manual optimization Lightning's loggers count batches, whether anything steps or not.
        step = len(steps) if pl_module.automatic_optimization else self.begun - 1
        steps.append(Step(step, trainer.current_epoch, self.windows.pop(index), squares, elements))


class NotingAfter(Callback):
    """Notes the norm that is left of every gradient. Stands after `AutoClip`."""

    def __init__(self, noting: Noting) -> None:
        self.noting = noting

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients))
        self.noting.clipped.setdefault(trainer.optimizers.index(optimizer), []).append(norm)


def fit(
    model: LightningModule, autoclip: AutoClip, *callbacks: Any, batches: int = 25, ckpt: Any = None, **kwargs: Any
) -> Noting:
    """Train on so many batches per epoch; those in ``bad`` have their loss multiplied by its value."""
    noting, bad = Noting(), kwargs.pop("bad", BAD)
    data = loader(n=4 * batches, scales=[bad.get(i // 4, 1.0 + i // 4 / 50) for i in range(4 * batches)])
    if any(isinstance(callback, Checkpoint) for callback in callbacks):
        kwargs["enable_checkpointing"] = True
    run = trainer(noting, *callbacks, autoclip, NotingAfter(noting), **{"log_every_n_steps": 5, **kwargs})
    run.fit(model, data, ckpt_path=ckpt)
    return noting


def clipper(**kwargs: Any) -> AutoClip:
    return by_percentile(PERCENTILE, window=WINDOW, multiplier=1.0, verbose=False, **kwargs)


def expected_spikes(steps: Sequence[Step], clipped: Sequence[float] | None = None, by_value: bool = False) -> list[Any]:
    """The rows of a run of which every step was noted."""
    norms = np.array([step.norm for step in steps])
    statistic = norms / np.sqrt([step.elements for step in steps]) if by_value else norms
    finite = np.isfinite(norms)
    pasts = [past[np.isfinite(past)][-WINDOW:] for past in (statistic[: i + 1] for i in range(len(steps)))]
    thresholds = [np.percentile(past, PERCENTILE) if finite[i] else math.inf for i, past in enumerate(pasts)]
    chosen = [*np.flatnonzero(~finite)[:SPIKES], *[i for i in np.argsort(-norms, kind="stable") if finite[i]][:SPIKES]]
    rows = []
    for i in chosen:
        around = statistic[max(i + 1 - AROUND, 0) : i + 1]
        around = around[np.isfinite(around)]
        first, last = steps[i].batches[0], steps[i].batches[-1]
        row = {
            "step": steps[i].step,
            "epoch": steps[i].epoch,
            "batches": str(first) if first == last else f"{first}-{last}",
            "norm": norms[i],
            "times": statistic[i] / np.exp(np.log(around).mean()) if len(around) else math.nan,
            "threshold": thresholds[i],
            "skipped": "" if finite[i] else "non-finite",
            "parameters": named_of(steps[i].squares),
        }
        after = clipped[i] if clipped else thresholds[i]
        rows.append({**row, "clip_coef": min(after / norms[i], 1.0)})
    return rows


def named_of(squares: dict[str, float]) -> list[tuple[str, float]]:
    """The three parameters with the largest shares, or the first three with non-finite gradients."""
    bad = [(name, math.nan) for name, square in squares.items() if not math.isfinite(square)]
    total = sum(squares.values())
    shares = [(name, square / total) for name, square in sorted(squares.items(), key=lambda pair: -pair[1])]
    return (bad or shares)[:3]


def check_spikes(autoclip: AutoClip, expected: list[Any], optimizer: str = "autoclip") -> None:
    rows = [row for row in autoclip.spikes() if row["optimizer"] == optimizer]
    log = autoclip.logs[f"{optimizer}/"]
    spikes = [*log.nonfinite, *log.largest]
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    for row, spike, wanted in zip(rows, spikes, expected, strict=True):
        assert set(row) == {"optimizer", *wanted}
        for key in ("epoch", "batches", "skipped"):
            assert row[key] == wanted[key], (key, wanted)
        assert math.isfinite(row["norm"]) == math.isfinite(wanted["norm"])
        keys = {"norm", "times", "threshold", "clip_coef"} if math.isfinite(row["norm"]) else {"threshold"}
        for key in keys:
            assert row[key] == pytest.approx(wanted[key], rel=1e-4), (key, wanted)
        assert [name for name, _ in spike.parameters] == [name for name, _ in wanted["parameters"]]
        shares = [share for _, share in wanted["parameters"]]
        assert [share for _, share in spike.parameters] == pytest.approx(shares, rel=1e-4, abs=1e-6, nan_ok=True)
        assert row["parameters"].split(", ") == [
            name if math.isnan(share) else f"{name} ({share:.0%})" for name, share in spike.parameters
        ]


def mean_shares(steps: Sequence[Step]) -> dict[str, float]:
    """The mean share of each parameter in the squared norm of the steps with a finite norm above 0."""
    counted = [step for step in steps if 0 < step.norm < math.inf]
    if not counted:
        return dict.fromkeys(steps[0].squares, math.nan)
    return {
        name: float(np.mean([step.squares[name] / sum(step.squares.values()) for step in counted]))
        for name in steps[0].squares
    }


def check_shares(autoclip: AutoClip, steps: Sequence[Step], optimizer: str = "autoclip") -> None:
    shares, expected = autoclip.logs[f"{optimizer}/"].shares, mean_shares(steps)
    assert list(shares) == list(expected)
    assert shares == pytest.approx(expected, rel=1e-4, abs=1e-6)


# --- spikes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("algorithm", "accumulate"), [("norm", 3), ("value", 1)])
def test_spikes_name_step_epoch_batches_and_parameters(form: str, algorithm: str, accumulate: int) -> None:
    autoclip = clipper(gradient_clip_algorithm=algorithm)
    options = {"max_epochs": 2, "accumulate_grad_batches": accumulate}
    noting = fit(Net(), autoclip, **options)
    steps, clipped = noting.steps[0], noting.clipped[0]
    assert len(steps) == (50 if accumulate == 1 else 18)
    assert steps[-1].batches == [24], "the last window of an epoch is shorter"
    check_spikes(autoclip, expected_spikes(steps, clipped if algorithm == "value" else None, algorithm == "value"))
    check_shares(autoclip, steps)
    assert [row["epoch"] for row in autoclip.spikes()][:4] == [0, 0, 1, 1]


def test_only_the_first_nonfinite_steps_are_kept() -> None:
    autoclip = clipper()
    noting = fit(Net(), autoclip, bad=dict.fromkeys(range(0, 50, 2), math.nan), batches=50)
    check_spikes(autoclip, expected_spikes(noting.steps[0]))
    assert [row["step"] for row in autoclip.spikes()[:SPIKES]] == [*range(0, 40, 2)]


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_step_with_non_finite_gradients_names_their_parameters(form: str, value: float) -> None:
    class Spoiled(Net):
        def on_after_backward(self) -> None:
            if self.trainer.global_step == 4:
                self.net[2].weight.grad[0, 3] = self.net[0].bias.grad[1] = value

    autoclip = clipper()
    noting = fit(Spoiled(), autoclip, bad={})
    first = autoclip.spikes()[0]
    assert (first["step"], first["batches"]) == (4, "4")
    assert first["parameters"] == "net.0.bias, net.2.weight"
    check_spikes(autoclip, expected_spikes(noting.steps[0]))


class TwoOptimizers(OneBackward):
    def __init__(self) -> None:
        super().__init__(partial(SGD, lr=0.05), partial(Adam, lr=0.01))


def test_each_optimizer_has_spikes_of_its_own(form: str) -> None:
    autoclip = clipper()
    noting = fit(TwoOptimizers(), autoclip, batches=26, max_epochs=2)
    first, second = noting.steps[0], noting.steps[1]
    assert {name for step in first for name in step.squares} == {"net.0.weight", "net.0.bias"}
    assert [step.step for step in second] == [*range(1, 52, 2)]
    assert second[14].batches == [2, 3]
    check_spikes(autoclip, expected_spikes(first), "autoclip/SGD")
    check_spikes(autoclip, expected_spikes(second), "autoclip/Adam")
    check_shares(autoclip, first, "autoclip/SGD")
    check_shares(autoclip, second, "autoclip/Adam")


class OwnAccumulation(Net):
    """Manual optimization with one optimizer that steps at every third batch of the run, over the ends of epochs."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization, self.seen = False, 0

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        self.manual_backward(self.loss(batch))
        self.seen += 1
        if self.seen % 3 == 0:
            optimizer.step()
            optimizer.zero_grad()


def test_in_manual_optimization_the_batches_are_those_since_the_last_step_or_the_start_of_the_epoch() -> None:
    autoclip = clipper()
    noting = fit(OwnAccumulation(), autoclip, batches=14, max_epochs=2)
    steps = noting.steps[0]
    assert [step.batches for step in steps[3:6]] == [[9, 10, 11], [12, 13, 0], [1, 2, 3]]
    steps[4] = steps[4]._replace(batches=[0])
    check_spikes(autoclip, expected_spikes(steps))


class PartlyUnused(Net):
    """Has a frozen layer whose parameters the optimizer has too, and a layer that no loss depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.unused = nn.Linear(4, 4), nn.Linear(4, 1)
        self.frozen.requires_grad_(False)

    def loss(self, batch: list[Tensor]) -> Tensor:
        x, y, scale = batch
        return super().loss([self.frozen(x), y, scale])


@ALGORITHMS
def test_parameters_without_a_gradient_have_no_share(form: str, algorithm: str, tmp_path: Path) -> None:
    autoclip = clipper(gradient_clip_algorithm=algorithm, log_layers=1)
    noting = fit(PartlyUnused(), autoclip, logger=CSVLogger(tmp_path, name="", version="run"))
    steps, clipped = noting.steps[0], noting.clipped[0]
    check_spikes(autoclip, expected_spikes(steps, clipped if algorithm == "value" else None, algorithm == "value"))
    check_shares(autoclip, steps)
    shares = autoclip.logs["autoclip/"].shares
    assert {name for name, share in shares.items() if share == 0} == {
        f"{layer}.{parameter}" for layer in ("frozen", "unused") for parameter in ("weight", "bias")
    }
    for row in layer_rows(tmp_path):
        assert (row["autoclip_layers/frozen"], row["autoclip_layers/unused"]) == (0, 0)
        assert row["autoclip_layers/net"] == pytest.approx(1)
        assert (row["autoclip_layers_norm/frozen"], row["autoclip_layers_norm/unused"]) == (0, 0)
        assert row["autoclip_layers_norm/net"] == pytest.approx(row["autoclip/grad_norm_mean"])


# --- resumed runs -----------------------------------------------------------------------------------------------------


class Dying(Callback):
    def __init__(self, step: int, hard: bool) -> None:
        self.step, self.hard = step, hard

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step >= self.step:
            if self.hard:
                os._exit(9)
            raise ZeroDivisionError


def everything(autoclip: AutoClip) -> str:
    """As text in which NaN equals NaN."""
    logs = {key: (log.state_dict()["bins"], log.shares) for key, log in autoclip.logs.items()}
    return repr((autoclip.spikes(), logs))


@pytest.mark.parametrize(
    ("how", "model", "accumulate", "algorithm"),
    [("end of epoch", Net, 1, "value"), ("exception", Net, 3, "norm"), ("killed", TwoOptimizers, 1, "norm")],
    ids=["end of epoch", "exception while accumulating", "killed with two optimizers"],
)
def test_a_resumed_run_has_the_spikes_and_shares_of_an_uninterrupted_one(
    tmp_path: Path, how: str, model: type[Net], accumulate: int, algorithm: str
) -> None:
    options: dict[str, Any] = {"accumulate_grad_batches": accumulate, "batches": 26}

    def interrupted() -> None:
        saving = ModelCheckpoint(tmp_path, "saved", enable_version_counter=False)  # at the end of each epoch
        dying = [] if how == "end of epoch" else [Dying(saved + 5, how == "killed")]
        epochs = 1 if how == "end of epoch" else 2
        fit(model(), clipper(gradient_clip_algorithm=algorithm), saving, *dying, max_epochs=epochs, **options)

    saved = 39 if model is TwoOptimizers else math.ceil(26 / accumulate)  # steps of an epoch
    if how == "killed":
        process = multiprocessing.get_context("fork").Process(target=interrupted)
        process.start()
        process.join(TIME_LIMIT)
        assert process.exitcode == 9
    elif how == "exception":
        with pytest.raises(ZeroDivisionError):
            interrupted()
    else:
        interrupted()
    assert torch.load(tmp_path / "saved.ckpt", weights_only=True)["global_step"] == saved
    whole, resumed = (clipper(gradient_clip_algorithm=algorithm) for _ in range(2))
    fit(model(), whole, max_epochs=2, **options)
    fit(model(), resumed, max_epochs=2, ckpt=tmp_path / "saved.ckpt", **options)
    assert everything(resumed) == everything(whole)
    assert len(resumed.spikes()) > 15


def test_a_run_that_is_resumed_within_an_epoch_counts_each_step_once(tmp_path: Path) -> None:
    """Lightning continues with the next batch's index but with the first batch's data: another run than in one go."""
    saving, notings, accumulate = ModelCheckpoint(tmp_path, "saved", every_n_train_steps=7), [], 3

    class Crashing(Net):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            notings.append(next(callback for callback in self.trainer.callbacks if isinstance(callback, Noting)))
            if self.trainer.global_step == 9:
                raise ZeroDivisionError

    options: dict[str, Any] = {"accumulate_grad_batches": accumulate, "batches": 12 * accumulate, "max_epochs": 2}
    with pytest.raises(ZeroDivisionError):
        fit(Crashing(), clipper(), saving, **options)
    autoclip = clipper()
    resumed = fit(Net(), autoclip, ckpt=tmp_path / "saved.ckpt", **options)
    steps = [*notings[0].steps[0][:7], *resumed.steps[0]]
    steps = [step._replace(step=i) for i, step in enumerate(steps)]
    assert len(steps) == 24
    assert steps[7].batches == [*range(7 * accumulate, 8 * accumulate)]
    check_spikes(autoclip, expected_spikes(steps))
    check_shares(autoclip, steps)


def test_a_second_fit_of_the_same_trainer_continues_and_one_of_another_begins_anew() -> None:
    autoclip, noting = clipper(), Noting()
    run = trainer(noting, autoclip, max_epochs=1)
    run.fit(Net(), loader(n=60))
    run.fit_loop.max_epochs = 2
    run.fit(Net(), loader(n=60))
    assert [step.step for step in noting.steps[0]] == [*range(30)]
    check_spikes(autoclip, expected_spikes(noting.steps[0]))
    check_shares(autoclip, noting.steps[0])
    noting = fit(Net(), autoclip)
    check_spikes(autoclip, expected_spikes(noting.steps[0]))
    check_shares(autoclip, noting.steps[0])


# --- log_layers -------------------------------------------------------------------------------------------------------


class Deep(Net):
    """Modules three names deep, and a parameter that belongs to none."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Sequential(nn.Linear(4, 6), nn.Tanh()), nn.ModuleDict({"out": nn.Linear(6, 4)}))
        self.factor = nn.Parameter(torch.ones(()))

    def loss(self, batch: list[Tensor]) -> Tensor:
        x, y, scale = batch
        return super().loss([self.body[1]["out"](self.body[0](x)) * self.factor, y, scale])


LAYERS = ("autoclip_layers", "autoclip_layers_norm")  # the sections of shares and of norms
MODULES = {  # by the depth
    1: ["net", "body", "factor"],
    2: ["net.0", "net.2", "body.0", "body.1", "factor"],
    3: ["net.0", "net.2", "body.0.0", "body.1.out", "factor"],
}


def of_module(values: dict[str, float], module: str) -> float:
    """The sum over the parameters of a module."""
    return sum(value for name, value in values.items() if f"{name}.".startswith(f"{module}."))


def layer_rows(directory: Path) -> list[dict[str, float]]:
    """Rows with columns of layers, of which an empty cell is a NaN."""
    (path,) = directory.rglob("metrics.csv")
    with path.open() as file:
        rows = [row for row in csv.DictReader(file) if any(row[key] for key in row if key.endswith("/nonfinite_total"))]
    known = [{key: value for key, value in row.items() if value or "autoclip_layers" in key} for row in rows]
    found = [{key: float(value or math.nan) for key, value in row.items()} for row in known]
    return [row for row in found if any(key.startswith("autoclip_layers") for key in row)]


def layer_keys(rows: Sequence[dict[str, float]]) -> set[str]:
    return {key for row in rows for key in row if key.startswith("autoclip_layers")}


def mean_norms(steps: Sequence[Step], modules: Sequence[str]) -> dict[str, float]:
    """The mean norm of each module over the finite steps."""
    squares = [step.squares for step in steps if math.isfinite(step.norm)]
    return {
        module: float(np.mean([math.sqrt(of_module(each, module)) for each in squares])) if squares else math.nan
        for module in modules
    }


@pytest.mark.parametrize(("log_layers", "accumulate"), [(1, 1), (True, 3), (3, 1)], ids=["1", "True-accumulating", "3"])
def test_rows_of_layers_are_the_mean_shares_and_norms_of_their_interval(
    form: str, log_layers: Any, accumulate: int, tmp_path: Path
) -> None:
    autoclip = clipper(log_layers=log_layers)
    bad = {2: math.nan, 7: 100.0, 12: math.inf} | dict.fromkeys(range(15, 20), math.nan)
    options = {"accumulate_grad_batches": accumulate, "logger": CSVLogger(tmp_path, name="", version="run")}
    noting = fit(Deep(), autoclip, bad=bad, batches=23, max_epochs=2, **options)
    steps, rows = noting.steps[0], layer_rows(tmp_path)
    modules = MODULES[2 if log_layers is True else log_layers]
    ends = [*range(4, len(steps), 5)]
    ends += [len(steps) - 1] if len(steps) % 5 else []
    assert [row["step"] for row in rows] == ends
    keys = layer_keys(rows)
    assert keys == {f"{section}/{module}" for section in LAYERS for module in modules}
    assert all(keys <= set(row) for row in rows), "constant"
    for row, start, end in zip(rows, [-1, *ends], ends, strict=False):
        shares = mean_shares(steps[start + 1 : end + 1])
        sums = {module: of_module(shares, module) for module in modules}
        written = {module: row[f"autoclip_layers/{module}"] for module in modules}
        assert written == pytest.approx(sums, rel=1e-4, abs=1e-6, nan_ok=True)
        norms = {module: row[f"autoclip_layers_norm/{module}"] for module in modules}
        assert norms == pytest.approx(mean_norms(steps[start + 1 : end + 1], modules), rel=1e-4, nan_ok=True)
        assert sum(written.values()) == pytest.approx(1) or math.isnan(shares["factor"])
    assert any(math.isnan(row["autoclip_layers/factor"]) for row in rows) == (accumulate == 1)


def test_a_gradient_of_zero_has_a_norm_and_no_share(tmp_path: Path) -> None:
    autoclip, logger = clipper(log_layers=1), CSVLogger(tmp_path, name="", version="run")
    noting = fit(Net(), autoclip, bad={4: 0.0}, batches=10, log_every_n_steps=10, logger=logger)
    check_shares(autoclip, noting.steps[0])
    (row,) = layer_rows(tmp_path)
    assert row["autoclip_layers/net"] == pytest.approx(1)
    assert row["autoclip_layers_norm/net"] == pytest.approx(np.mean([step.norm for step in noting.steps[0]]), rel=1e-4)


def test_each_optimizer_has_layers_of_its_own(tmp_path: Path) -> None:
    noting = fit(
        TwoOptimizers(), clipper(log_layers=2), batches=26, logger=CSVLogger(tmp_path, name="", version="run"), bad={}
    )
    keys = layer_keys(layer_rows(tmp_path))
    assert keys == {f"{section}/{layer}" for section in LAYERS for layer in ("SGD/net.0", "Adam/net.2")}
    assert len(noting.steps[0]) == 26


@pytest.mark.parametrize("options", [{}, {"log_layers": 0}], ids=str)
def test_layers_are_logged_on_demand_only(options: dict[str, Any], tmp_path: Path) -> None:
    autoclip = clipper(**options)
    noting = fit(Net(), autoclip, logger=CSVLogger(tmp_path, name="", version="run"))
    assert layer_rows(tmp_path) == []
    check_shares(autoclip, noting.steps[0])


@pytest.mark.parametrize("value", [-1, 1.5, None], ids=str)
def test_a_depth_that_is_none_raises(value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="Expected `log_layers` to be a bool, or a number of names"):
        by_percentile(log_layers=value)


def test_names_do_not_have_what_wrappers_put_into_them(tmp_path: Path) -> None:
    model = Net()
    model.net[0] = checkpoint_wrapper(model.net[0])
    model.net = torch.compile(model.net, backend="eager")
    assert "net.0.weight" not in dict(model.named_parameters())
    autoclip = clipper(log_layers=True)
    fit(model, autoclip, logger=CSVLogger(tmp_path, name="", version="run"), batches=5)
    names = ["net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias"]
    assert list(autoclip.logs["autoclip/"].shares) == names
    assert {name for spike in autoclip.logs["autoclip/"].largest for name, _ in spike.parameters} <= {*names}
    (row,) = layer_rows(tmp_path)
    assert layer_keys([row]) == {f"{section}/net.{i}" for section in LAYERS for i in (0, 2)}


@pytest.mark.parametrize("before", [2, 1, False], ids=["same depth", "another depth", "without layers before"])
def test_a_resumed_run_completes_the_row_of_layers_that_had_begun(tmp_path: Path, before: Any) -> None:
    class Crashing(Callback):
        def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
            if trainer.global_step == 9:
                raise ZeroDivisionError

    noting, saving = Noting(), ModelCheckpoint(tmp_path, "saved", every_n_train_steps=7)
    run = trainer(noting, saving, clipper(log_layers=before), Crashing(), enable_checkpointing=True)
    with pytest.raises(ZeroDivisionError):
        run.fit(Deep(), loader(n=96))
    logger = CSVLogger(tmp_path, name="", version="run")
    options = {"batches": 24, "bad": {}, "logger": logger, "log_every_n_steps": 10}
    second = fit(Deep(), clipper(log_layers=2), ckpt=tmp_path / "saved.ckpt", **options)
    steps, (first, *_) = [*noting.steps[0][:7], *second.steps[0]], layer_rows(tmp_path)
    assert first["step"] == 9
    counted = steps[:10] if before == 2 else steps[7:10]
    norms = {module: first[f"autoclip_layers_norm/{module}"] for module in MODULES[2]}
    assert norms == pytest.approx(mean_norms(counted, MODULES[2]), rel=1e-4)


# --- models that change, and odd surroundings -------------------------------------------------------------------------


class Finetuned(Net):
    """A network on a backbone that is frozen at first and joins the optimizer in the second epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(4, 4)

    def loss(self, batch: list[Tensor]) -> Tensor:
        x, y, scale = batch
        return super().loss([self.backbone(x), y, scale])

    def configure_optimizers(self) -> Optimizer:
        return SGD([p for p in self.parameters() if p.requires_grad], lr=0.05)


@pytest.mark.parametrize("every", [5, 7], ids=["between rows", "within a row"])
def test_parameters_that_join_the_optimizer_during_the_fit_join_the_shares(
    form: str, every: int, tmp_path: Path
) -> None:
    autoclip = clipper(log_layers=True)
    finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_ratio_lr=0.5)
    options = {"log_every_n_steps": every, "logger": CSVLogger(tmp_path, name="", version="run")}
    noting = fit(Finetuned(), autoclip, finetuning, batches=10, max_epochs=2, bad={}, **options)
    (first, *_, last) = noting.steps[0]
    assert (len(first.squares), len(last.squares)) == (4, 6)
    assert len(autoclip.spikes()) == 20
    assert autoclip.logs["autoclip/"].shares["backbone.weight"] > 0
    rows = layer_rows(tmp_path)
    met = {
        row["step"]: row["autoclip_layers_norm/backbone"] for row in rows if row.get("autoclip_layers_norm/backbone")
    }
    ends = {5: [14, 19], 7: [13, 19]}[every]
    assert [step for step, norm in met.items() if not math.isnan(norm)] == ends
    for start, end in zip([9, ends[0]], ends, strict=True):  # of the steps at which it was there
        norms = mean_norms(noting.steps[0][start + 1 : end + 1], ["backbone"])
        assert met[end] == pytest.approx(norms["backbone"], rel=1e-4)
    named = {name for spike in autoclip.logs["autoclip/"].largest for name, _ in spike.parameters}
    assert named <= {*last.squares}


def test_the_default_dtype_does_not_coarsen_the_shares() -> None:
    autoclip = clipper()
    torch.set_default_dtype(torch.bfloat16)
    try:
        noting = fit(Net(), autoclip, bad={7: 30.0})
    finally:
        torch.set_default_dtype(torch.float32)
    check_shares(autoclip, noting.steps[0])


@pytest.mark.gpu
def test_spikes_on_a_gpu_are_those_of_its_gradients(tmp_path: Path) -> None:
    autoclip, logger = clipper(log_layers=True), CSVLogger(tmp_path, name="", version="run")
    noting = fit(Net(), autoclip, accelerator="gpu", max_epochs=2, logger=logger)
    check_spikes(autoclip, expected_spikes(noting.steps[0]))
    check_shares(autoclip, noting.steps[0])
    assert len(layer_rows(tmp_path)) == 10


# --- a bare loop ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("algorithm", "target"), [("norm", "optimizer"), ("value", "parameters")])
def test_a_record_holds_the_norm_of_each_parameter_before_clipping(form: str, algorithm: str, target: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2), nn.Linear(9, 9))  # the last one is not used
    groups = [{"params": net[2].parameters()}, {"params": net[0].parameters()}, {"params": net[3].parameters()}]
    optimizer, seen = SGD(groups, lr=0.1), GradientClipper(Constant(0.1), gradient_clip_algorithm=algorithm)
    ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for _ in range(4):
        optimizer.zero_grad()
        net[:3](torch.randn(6, 3)).square().mean().backward()
        expected = [0.0 if p.grad is None else float(np.linalg.norm(p.grad.numpy())) for p in ordered]
        record = seen.clip_(optimizer if target == "optimizer" else ordered)
        assert_norms(record, form, expected)
        assert expected[4:] == [0, 0]
        optimizer.step()


def test_the_norms_of_odd_gradients_are_those_of_their_elements(form: str) -> None:
    table, phase, half = nn.Embedding(9, 2, sparse=True), nn.Parameter(torch.zeros(2, dtype=torch.complex64)), 0.25
    table(torch.tensor([1, 1, 4])).sum().backward()  # 2 2 in one row, 1 1 in another
    phase.grad = torch.tensor([3 + 4j, 0])
    coarse = with_gradient([300.0] * 400, torch.float16)  # its square is beyond float16
    spoiled = with_gradient([1.0, math.nan])
    fine = with_gradient([half] * 4, torch.float64)
    record = GradientClipper(Constant(1.0), nonfinite="ignore").clip_([table.weight, phase, coarse, spoiled, fine])
    assert_norms(record, form, [math.sqrt(10), 5, 6000, math.nan, 0.5])


def assert_norms(record: StepRecord | None, form: str, expected: Sequence[float]) -> None:
    assert record is not None
    norms = record.parameter_norms
    assert isinstance(record.norm, float) or form != "cpu form"
    if isinstance(record.norm, float):  # the host has read the step
        assert isinstance(norms, list)
        assert all(type(norm) is float for norm in norms)
    else:
        assert isinstance(norms, Tensor)
        assert norms.shape == (len(expected),)
        norms = norms.tolist()
    assert norms == pytest.approx(list(expected), rel=1e-5, nan_ok=True)
