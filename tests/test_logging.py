"""The rows in the loggers' files after real training, against norms that the model noted itself and numpy."""

from __future__ import annotations

import csv
import json
import math
import multiprocessing
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import torch
import wandb
from helpers import Net, by_percentile, loader, norm_of, trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from processes import TIME_LIMIT
from ranks import SpawnedDDP
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer
from wandb_reader import finish, read_runs

Row = dict[str, float]

WINDOW = 8  # shorter than the runs, so that norms leave the history too
KEYS = [
    *("grad_norm", "grad_norm_mean", "grad_norm_max", "grad_norm_max_step", "grad_norm_clipped", "threshold"),
    *("clipped_fraction", "clip_coef_mean", "clip_coef_min", "nonfinite_total"),
]
SETTINGS = {
    **{"policy": "Percentile", "percentile": 50.0, "multiplier": 1.0, "gradient_clip_algorithm": "norm"},
    **{"window": WINDOW, "warmup_steps": 0, "nonfinite": "skip"},
    **dict.fromkeys(("max_threshold", "max_update_ratio", "skip_above", "groups")),
}
LOGGERS: dict[str, Callable[..., Logger]] = {
    "csv": lambda path, **kwargs: CSVLogger(path, name="", version="run", **kwargs),
    "tensorboard": lambda path, **kwargs: TensorBoardLogger(path, name="", version="run", **kwargs),
    "wandb": lambda path, **kwargs: WandbLogger(save_dir=path, project="test", id="run", **kwargs),
}
pytestmark = pytest.mark.usefixtures("wandb_offline")


class Noting(models.Noting):
    """Notes the norm after clipping too; may raise at the eighth batch."""

    def __init__(self, error: type[BaseException] | None = None) -> None:
        super().__init__(optimizer=partial(SGD, lr=0.1, momentum=0.9))  # pickles, for the processes that are spawned
        self.clipped: list[float] = []
        self.error = error

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        if self.error is not None and batch_idx == 7:
            raise self.error("stop")
        return super().training_step(batch, batch_idx)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:  # the module's hook comes after the callbacks'
        self.clipped.append(norm_of(self.parameters()))


def fit(model: Net, logger: Any = False, *callbacks: Any, steps: int = 16, ckpt: Any = None, **kwargs: Any) -> Any:
    """Train on ``steps`` batches per epoch; in every 8, those in ``bad`` have their loss multiplied by its value."""
    clip = {key: kwargs.pop(key) for key in ("log_every_step", "gradient_clip_algorithm") if key in kwargs}
    bad = kwargs.pop("bad", {3: math.nan, 7: 100.0})
    data = loader(n=4 * steps, scales=[bad.get(i // 4, 1.0) for i in range(32)])
    autoclip = by_percentile(50, window=WINDOW, multiplier=1.0, **clip)
    run = trainer(autoclip, *callbacks, logger=logger, **{"log_every_n_steps": 5, **kwargs})
    run.fit(model, data, ckpt_path=ckpt)
    return run


def every_logger(directory: Path, **kwargs: Any) -> list[Logger]:
    return [make(directory / kind, **kwargs) for kind, make in LOGGERS.items()]


def rows(directory: Path) -> list[Row]:
    """Every row that a logger has written below a directory, in order of writing."""
    wandb.finish()
    found: list[Row] = []
    for path in directory.rglob("metrics.csv"):
        with path.open() as file:
            found += [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
    for path in sorted(directory.rglob("events.out.tfevents.*"), key=os.path.getctime):
        for event in EventFileLoader(str(path)).Load():
            values = [value for value in event.summary.value if value.tensor.float_val]
            found += [{"step": event.step, value.tag: value.tensor.float_val[0]} for value in values]
    for run in read_runs(directory):
        found += [{**row, "step": row["trainer/global_step"]} for row in run.history]
    return found


def check(written: list[Row], key: str, points: dict[int, float]) -> None:
    """The points of a key, each once, in order, at its step, with its value: the finite ones."""
    points = {step: value for step, value in points.items() if math.isfinite(value)}
    series = [(row["step"], row[key]) for row in written if key in row]
    assert [step for step, _ in series] == list(points), key
    assert [value for _, value in series] == pytest.approx(list(points.values()), rel=1e-4), key


def check_steps(written: list[Row], prefix: str, norms: list[float]) -> None:
    """The exact series: one point per step, of finite gradients."""
    known = {step: threshold for step, threshold in enumerate(thresholds(norms)) if math.isfinite(norms[step])}
    check(written, f"{prefix}step/grad_norm", dict(enumerate(norms)))
    check(written, f"{prefix}step/threshold", known)


def check_intervals(written: list[Row], prefix: str, expected: dict[str, dict[int, float]]) -> None:
    """The summaries: one row per logging interval."""
    for key, points in expected.items():
        check(written, prefix + key, points)


def thresholds(statistics: Sequence[float]) -> list[float]:
    """The median of the last finite statistics, that of the step itself included."""
    past = [[s for s in statistics[: i + 1] if math.isfinite(s)] for i in range(len(statistics))]
    return [float(np.percentile(finite[-WINDOW:], 50)) for finite in past]


def figures(
    norms: Sequence[float],
    ends: Sequence[int],
    elements: int | None = None,
    clipped: Sequence[float] | None = None,
    measured: int = 1,
) -> dict[str, dict[int, float]]:
    """The rows that end at the given steps, by key and step.

    Clipping by norm, or by value with so many elements; ``clipped`` are the norms after clipping, if they were noted,
    of which one in ``measured`` is known to the callback.
    """
    norm = np.array(norms)
    statistic = norm / math.sqrt(elements or 1)
    threshold = np.array(thresholds(list(statistic)))
    rows = {}
    for start, end in zip([-1, *ends], ends, strict=False):
        steps = np.arange(start + 1, end + 1)
        steps = steps[np.isfinite(norm[steps])]
        after = np.minimum(norm, threshold)[steps] if clipped is None else np.array(clipped)[steps]
        coefs = (after / norm[steps])[steps % measured == 0]
        last, largest = norm[steps[-1]], steps[norm[steps].argmax()]
        nonfinite = (~np.isfinite(norm[: end + 1])).sum()
        known = after[steps % measured == 0].mean()
        rows[end] = [last, norm[steps].mean(), norm[largest], largest, known, threshold[steps[-1]]]
        rows[end] += [(coefs < 1).mean(), coefs.mean(), coefs.min(), nonfinite, statistic[steps[-1]]]
    keys = [*KEYS, "grad_rms"] if elements else KEYS
    return {key: {end: float(row[i]) for end, row in rows.items()} for i, key in enumerate(keys)}


@pytest.mark.parametrize(
    ("every", "accumulate", "algorithm"),
    [(1, 1, "norm"), (5, 2, "norm"), (5, 1, "value"), (50, 1, "norm"), (50, 2, "value")],
)
def test_each_row_sums_up_its_interval_and_is_logged_where_lightning_logs(
    tmp_path: Path, every: int, accumulate: int, algorithm: str
) -> None:
    model, ends = Noting(), [*range(every - 1, 23, every), 23]
    bad = {7: 100.0} if every == 1 else {3: math.nan, 7: 100.0}  # an interval needs a finite step here
    options = {"gradient_clip_algorithm": algorithm, "accumulate_grad_batches": accumulate, "log_every_n_steps": every}
    run = fit(model, LOGGERS["csv"](tmp_path), steps=8 * accumulate, max_epochs=3, bad=bad, **options)
    norms, written = model.norms[accumulate - 1 :: accumulate], rows(tmp_path)
    elements = sum(parameter.numel() for parameter in model.parameters()) if algorithm == "value" else None
    measured = 10 if every == 50 and elements else 1  # by value, one in so many steps tells what clipping did
    expected = figures(norms, ends, elements, model.clipped, measured)
    check_intervals(written, "autoclip/", expected)
    ours = [set(row) for row in written if "train_loss" not in row]
    assert all(row == {"step", *(f"autoclip/{key}" for key in expected)} for row in ours), "constant from the first row"
    losses = [row["step"] for row in written if "train_loss" in row]
    assert losses == [end for end in ends if (end + 1) % every == 0]  # what is left at the end has a row of ours only
    for key, points in expected.items():
        assert float(run.callback_metrics[f"autoclip/{key}"]) == pytest.approx(points[23], rel=1e-4), key


def test_by_value_every_row_of_a_whole_interval_has_the_norm_after_clipping(tmp_path: Path) -> None:
    """It is measured at one step of nine here: the last row, of a single step, need not have it."""
    options = {"gradient_clip_algorithm": "value", "max_epochs": 6, "steps": 8}
    fit(Noting(), LOGGERS["csv"](tmp_path), log_every_n_steps=47, bad={}, **options)
    ours = [row for row in rows(tmp_path) if "autoclip/grad_norm" in row]
    assert [row["step"] for row in ours] == [46, 47]
    assert ours[0].keys() >= {"autoclip/clip_coef_mean", "autoclip/grad_norm_clipped"}


@pytest.mark.parametrize(("prefix", "accumulate"), [("", 1), ("trial", 2)])
def test_every_logger_has_each_step_at_its_own_step_and_the_same_rows(
    tmp_path: Path, prefix: str, accumulate: int
) -> None:
    model, name = Noting(), f"{prefix}-autoclip/".lstrip("-")
    options = {"steps": 16 * accumulate, "accumulate_grad_batches": accumulate, "log_every_step": True}
    fit(model, every_logger(tmp_path, prefix=prefix), **options)
    norms = model.norms[accumulate - 1 :: accumulate]
    for kind in LOGGERS:
        check_steps(rows(tmp_path / kind), name, norms)
        check_intervals(rows(tmp_path / kind), name, figures(norms, [4, 9, 14, 15]))


def test_by_value_each_step_logs_what_the_threshold_is_compared_with(tmp_path: Path) -> None:
    model = Noting()
    fit(model, LOGGERS["csv"](tmp_path), gradient_clip_algorithm="value", log_every_step=True)
    rms = [norm / math.sqrt(sum(parameter.numel() for parameter in model.parameters())) for norm in model.norms]
    check(rows(tmp_path), "autoclip/step/grad_rms", dict(enumerate(rms)))
    known = {step: threshold for step, threshold in enumerate(thresholds(rms)) if math.isfinite(rms[step])}
    check(rows(tmp_path), "autoclip/step/threshold", known)


def test_a_row_of_nonfinite_steps_counts_them_and_has_no_number_that_is_not_finite(tmp_path: Path) -> None:
    options = {"log_every_step": True, "gradient_clip_algorithm": "value"}
    fit(Noting(), every_logger(tmp_path), bad=dict.fromkeys(range(5), math.nan), steps=10, **options)
    for kind in LOGGERS:
        found = [
            (row["step"], *item) for row in rows(tmp_path / kind) for item in row.items() if "/spikes" not in item[0]
        ]
        ours = [
            (step, key, value) for step, key, value in found if key.startswith("autoclip/") and "/spikes" not in key
        ]
        assert all(math.isfinite(value) for _, _, value in ours)
        assert [key for step, key, _ in ours if step < 5] == ["autoclip/nonfinite_total"]
        for key in KEYS:
            (last,) = (value for step, found, value in ours if step == 9 and found == f"autoclip/{key}")
            assert last == 7 if key == "nonfinite_total" else math.isfinite(last)
    (run,) = read_runs(tmp_path)
    for key in [*KEYS, "step/grad_norm", "step/threshold"]:
        assert all(math.isfinite(value) for value in run.summary[f"autoclip/{key}"].values()), key


def test_the_columns_of_a_csv_file_are_there_from_the_first_row(tmp_path: Path) -> None:
    headers = []

    class Header(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            headers.append((tmp_path / "run" / "metrics.csv").read_text().splitlines()[0].split(","))

    autoclip = by_percentile(50, warmup_steps=8, log_every_step=True)
    data = loader(scales=[math.nan if row < 12 else 1.0 for row in range(64)])
    run = trainer(autoclip, Header(), logger=LOGGERS["csv"](tmp_path), log_every_n_steps=2)
    run.fit(models.Noting(), data)
    ours = [{key for key in header if key.startswith("autoclip/")} for header in headers]
    steps = {f"autoclip/step/{key}" for key in ("grad_norm", "threshold")}
    assert ours == [steps] + [{f"autoclip/{key}" for key in KEYS} | steps] * 15


# --- callback_metrics -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "logs", "ends"),
    [
        ({}, False, [14, 15]),
        ({"log_every_n_steps": 0}, True, [15]),
        ({"log_every_n_steps": None, "barebones": True}, False, [15]),
        ({"fast_dev_run": 6}, True, [4, 5]),
    ],
    ids=["no logger", "log_every_n_steps=0", "barebones", "fast_dev_run"],
)
def test_where_nothing_is_logged_callback_metrics_have_the_last_figures(
    tmp_path: Path, options: dict[str, Any], logs: bool, ends: list[int]
) -> None:
    model = Noting()
    run = fit(model, LOGGERS["csv"](tmp_path) if logs else False, log_every_step=True, **options)
    for key, points in figures(model.norms, ends).items():
        assert float(run.callback_metrics[f"autoclip/{key}"]) == pytest.approx(points[ends[-1]], rel=1e-4), key
    assert not any("autoclip/" in key for row in rows(tmp_path) for key in row)


def test_callback_metrics_have_a_row_when_it_is_due_and_plain_tensors_of_every_layer() -> None:
    """And nothing before the first row; between two rows, the one before."""

    class Deep(Noting):
        def __init__(self) -> None:
            super().__init__()
            self.more = torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(200))

        def loss(self, batch: list[Tensor]) -> Tensor:
            return super().loss(batch) + sum(layer.weight.square().sum() for layer in self.more)

    seen: list[dict[str, Any]] = []

    class Seeing(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            seen.append({key: value for key, value in {**trainer.callback_metrics}.items() if "autoclip" in key})

    model = Deep()
    trainer(by_percentile(50, window=WINDOW, log_layers=99), Seeing(), log_every_n_steps=5).fit(model, loader())
    assert not any(seen[:4])
    assert len(seen[4]) == len(KEYS) + 2 * 202
    assert {(type(value), value.dtype, value.shape) for value in seen[4].values()} == {
        (Tensor, torch.float32, torch.Size([]))
    }
    expected = figures(model.norms, [4, 9, 14, 15])
    for at, end in ((4, 4), (8, 4), (9, 9), (14, 14), (15, 15)):
        for key, points in expected.items():
            assert float(seen[at][f"autoclip/{key}"]) == pytest.approx(points[end], rel=1e-4), (at, key)


def test_a_checkpoint_can_be_chosen_by_the_mean_norm(tmp_path: Path) -> None:
    """Where a `ModelCheckpoint` saves, within an interval, the figures are those of its steps so far."""
    model = Noting()
    best = ModelCheckpoint(tmp_path, "{step}", monitor="autoclip/grad_norm_mean", every_n_train_steps=5)
    fit(model, False, best, enable_checkpointing=True, bad={}, log_every_n_steps=8)
    means = {end: np.mean(model.norms[start : end + 1]) for start, end in ((0, 4), (8, 9), (8, 14))}
    end = min(means, key=means.__getitem__)
    assert float(best.best_model_score) == pytest.approx(means[end], rel=1e-4)
    assert Path(best.best_model_path).name == f"step={end + 1}.ckpt"


@pytest.mark.parametrize("validates", [False, True], ids=["epoch end", "validation"])
def test_an_epoch_shorter_than_an_interval_can_be_monitored(tmp_path: Path, validates: bool) -> None:
    model, best = Validating(), ModelCheckpoint(tmp_path, monitor="autoclip/grad_norm_mean")
    stopping = EarlyStopping("autoclip/grad_norm_mean", patience=9)
    options = {"max_epochs": 2, "enable_checkpointing": True, "num_sanity_val_steps": 1}
    trainer(by_percentile(50), best, stopping, **options).fit(model, loader(), loader(n=4) if validates else None)
    means = [np.mean(model.norms[:end]) for end in (16, 32)]
    assert float(best.best_model_score) == pytest.approx(min(means), rel=1e-4)
    assert float(stopping.best_score) == pytest.approx(min(means), rel=1e-4)


class Validating(Noting):
    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.loss(batch)


# --- interrupted and resumed runs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_run_that_is_interrupted_has_logged_every_step(tmp_path: Path, error: type[BaseException]) -> None:
    model = Noting(error)
    with pytest.raises((ValueError, SystemExit)):
        fit(model, every_logger(tmp_path), log_every_step=True)
    assert len(model.norms) == 7
    for kind in LOGGERS:
        check_steps(rows(tmp_path / kind), "autoclip/", model.norms)
        check_intervals(rows(tmp_path / kind), "autoclip/", figures(model.norms, [4, 6]))


@pytest.mark.parametrize(("per_epoch", "accumulate"), [(7, 1), (16, 2)], ids=["end of epoch", "accumulate"])
def test_over_a_resume_each_step_is_logged_once(tmp_path: Path, per_epoch: int, accumulate: int) -> None:
    first, second, saving = Noting(), Noting(), ModelCheckpoint(tmp_path, "saved", every_n_train_steps=7)
    options = {"steps": per_epoch * accumulate, "accumulate_grad_batches": accumulate, "bad": {}, "max_epochs": 3}
    options |= {"log_every_step": True, "enable_checkpointing": True}
    fit(first, every_logger(tmp_path / "1"), saving, max_steps=7, **options)
    finish(tmp_path)
    (tmp_path / "2").mkdir()
    (tmp_path / "1" / "tensorboard").rename(tmp_path / "2" / "tensorboard")  # the others begin new files
    fit(second, every_logger(tmp_path / "2"), saving, max_steps=16, ckpt=tmp_path / "saved.ckpt", **options)
    norms = (first.norms + second.norms)[accumulate - 1 :: accumulate]
    assert len(norms) == 16
    for kind in LOGGERS:
        written = [row for part in "12" for row in rows(tmp_path / part / kind)]
        check_steps(written, "autoclip/", norms)
        check_intervals(written, "autoclip/", figures(norms, [4, 6, 9, 14, 15]))


class Killed(Noting):
    """Its process dies at a step, as of SIGKILL."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        if self.trainer.global_step == 13:
            np.save("norms.npy", self.norms)
            os._exit(9)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("every", [5, 50])
def test_a_run_that_was_killed_continues_with_the_row_that_had_begun(tmp_path: Path, every: int) -> None:
    options = {"log_every_step": True, "enable_checkpointing": True, "log_every_n_steps": every, "max_epochs": 2}

    def run(model: Noting, directory: str, ckpt: Path | None = None) -> None:
        saving = ModelCheckpoint(tmp_path, "saved", every_n_train_steps=7)
        fit(model, LOGGERS["csv"](tmp_path / directory), saving, bad={}, ckpt=ckpt, **options)

    process = multiprocessing.get_context("fork").Process(target=run, args=(Killed(), "1"))
    process.start()
    process.join(TIME_LIMIT)
    assert process.exitcode == 9
    second = Noting()
    run(second, "2", tmp_path / "saved.ckpt")
    norms = [*np.load("norms.npy")[:7], *second.norms]  # steps 7 to 12 are made, and logged, once more
    first_rows, second_rows = rows(tmp_path / "1"), rows(tmp_path / "2")
    assert [row["step"] for row in first_rows if "autoclip/step/grad_norm" in row] == [*range(13)]
    kept = [row for row in first_rows if row["step"] < 7] + second_rows
    check_steps(kept, "autoclip/", norms)
    ends = [*range(4, len(norms), 5), len(norms) - 1] if every == 5 else [len(norms) - 1]
    check_intervals(kept, "autoclip/", figures(norms, ends))


def test_checkpoints_and_validations_cut_no_row_short(tmp_path: Path) -> None:
    """The row of a step and the summary up to it are one. Of equal rows the mean is the run's, in W&B's summary."""
    model, saving = Validating(), ModelCheckpoint(tmp_path, every_n_train_steps=3)
    autoclip = by_percentile(50, window=WINDOW, log_every_step=True)
    options = {"max_epochs": 3, "enable_checkpointing": True, "log_every_n_steps": 5}
    run = trainer(autoclip, saving, logger=every_logger(tmp_path), **options)
    run.fit(model, loader(n=20, scales=[1.0] * 12 + [100.0] * 4 + [1.0] * 4), loader(n=4))
    for kind in LOGGERS:
        written = rows(tmp_path / kind)
        check_intervals(written, "autoclip/", figures(model.norms, [4, 9, 14]))
        check_steps(written, "autoclip/", model.norms)
        if kind != "tensorboard":  # has no rows
            assert sum("autoclip/step/grad_norm" in row or "autoclip/grad_norm" in row for row in written) == 15
    (run,) = read_runs(tmp_path)
    assert run.summary["autoclip/grad_norm_mean"]["mean"] == pytest.approx(np.mean(model.norms), rel=1e-5)


# --- several optimizers -----------------------------------------------------------------------------------------------


def test_each_of_several_optimizers_has_figures_of_its_own_in_the_same_rows(tmp_path: Path) -> None:
    model = models.OptimizerPerLayer(*[partial(Adam, lr=0.01)] * 2)
    prefixes = ("autoclip/Adam/", "autoclip/Adam-1/")
    fit(model, every_logger(tmp_path), log_every_step=True, bad={7: 100.0})
    for kind in LOGGERS:
        written = rows(tmp_path / kind)
        for prefix, norms in zip(prefixes, model.norms, strict=True):
            check_steps(written, prefix, norms)
            check_intervals(written, prefix, figures(norms, [4, 9, 14, 15]))
        ours = {key for row in written for key in row if "autoclip" in key}
        assert all(key.startswith((*prefixes, "autoclip/spikes")) for key in ours)
        if kind != "tensorboard":
            of_steps = [{f"{prefix}step/threshold" in row for prefix in prefixes} for row in written]
            assert of_steps.count({True}) == 16
            assert {True, False} not in of_steps


def test_of_several_steps_in_a_batch_each_is_logged(tmp_path: Path) -> None:
    class Twice(models.Manual):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            super().training_step(batch, batch_idx)
            super().training_step(batch, batch_idx)

    fit(Twice(), LOGGERS["csv"](tmp_path), log_every_step=True, bad={})
    steps = [row["step"] for row in rows(tmp_path) if "autoclip/step/grad_norm" in row]
    assert steps == [*np.repeat(range(16), 2)]


# --- Weights & Biases -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prefix", "begun"), [("", True), ("trial", False)], ids=["the user's run", "the logger's run"]
)
def test_wandb_knows_each_metric_by_name_and_the_settings(tmp_path: Path, prefix: str, begun: bool) -> None:
    if begun:
        wandb.init(dir=tmp_path, project="test")
    fit(Noting(), LOGGERS["wandb"](tmp_path, prefix=prefix), log_every_step=True, bad={})
    wandb.finish()
    (run,), name = read_runs(tmp_path), f"{prefix}-autoclip/".lstrip("-")
    logged = {key for row in run.history for key in row if "autoclip" in key and "/spikes" not in key}
    assert logged == {name + key for key in [*KEYS, "step/grad_norm", "step/threshold"]}
    tables = {metric.name: metric for metric in run.metrics if "/spikes." in metric.name}
    assert {*tables} == {f"{name}spikes.{number}" for number in ("ncols", "nrows", "size")}
    assert all(metric.options.hidden for metric in tables.values())
    assert logged == {metric.name for metric in run.metrics if "autoclip" in metric.name} - tables.keys()
    hidden = {metric.name for metric in run.metrics if metric.options.hidden and metric.name not in tables}
    assert hidden == {f"{name}grad_norm_max_step"}
    assert not any("autoclip" in metric.glob_name for metric in run.metrics)
    for metric in run.metrics:
        if metric.name in logged:
            assert (metric.step_metric, metric.options.step_sync) == ("trainer/global_step", True)
            assert all(getattr(metric.summary, figure) for figure in ("min", "max", "mean", "last"))
    values = [row[f"{name}grad_norm_max"] for row in run.history if f"{name}grad_norm_max" in row]
    summary = {"min": min(values), "max": max(values), "mean": sum(values) / 4, "last": values[-1]}
    assert run.summary[f"{name}grad_norm_max"] == pytest.approx(summary)
    assert run.config["lightning_autoclip"] == SETTINGS


class Joining(Noting):
    """The second layer joins the optimizer in mid-fit."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 7:
            self.trainer.optimizers[0].add_param_group({"params": [*self.net[2].parameters()], "name": "late"})

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Notes nothing."""

    def configure_optimizers(self) -> Any:
        return SGD([{"params": [*self.net[0].parameters()], "name": "early"}], lr=0.01)


@pytest.mark.parametrize("groups", ["param_groups", None], ids=["a group", "parameters"])
def test_wandb_knows_metrics_that_join_in_mid_fit_as_it_knows_the_others(tmp_path: Path, groups: Any) -> None:
    autoclip = by_percentile(50, window=WINDOW, groups=groups, log_layers=True, log_every_step=True)
    model, logger = Joining(), LOGGERS["wandb"](tmp_path)
    trainer(autoclip, logger=logger, log_every_n_steps=5).fit(model, loader())
    wandb.finish()
    (run,) = read_runs(tmp_path)
    ours = {key for row in run.history for key in row if key.startswith("autoclip") and "/spikes" not in key}
    named = {metric.name.replace("\\.", ".") for metric in run.metrics if metric.name.startswith("autoclip")}
    assert ours == {name for name in named if "/spikes." not in name}
    late = "autoclip/late/grad_norm" if groups else "autoclip_layers/net.2"
    for key in (late, late.replace("late", "early").replace("net.2", "net.0")):
        values = [row[key] for row in run.history if key in row]
        summary = {"min": min(values), "max": max(values), "mean": np.mean(values), "last": values[-1]}
        assert run.summary[key] == pytest.approx(summary), key
    first = "autoclip/early/grad_norm" if groups else "autoclip/grad_norm"
    assert [row["trainer/global_step"] for row in run.history if first in row] == [4, 9, 14, 15], "no row is cut short"
    if not groups:
        shares = {row["trainer/global_step"]: row[late] for row in run.history if late in row}
        assert [*shares] == [9, 14, 15]
        assert 0 < shares[9] < 3 / 5, "of two of the five steps it has none"


@pytest.mark.parametrize(
    ("config", "locked"),
    [({"autoclip": True}, True), ({"autoclip": "on", "lightning_autoclip": {"policy": "mine"}}, False)],
    ids=["locked by a sweep", "both keys"],
)
def test_the_users_own_keys_in_the_config_of_wandb_survive(
    tmp_path: Path, config: dict[str, Any], locked: bool
) -> None:
    run = wandb.init(dir=tmp_path, project="test", config=None if locked else config)
    if locked:
        run.config.update_locked(config, user="sweep")
    taken = "lightning_autoclip" in config
    with pytest.warns(UserWarning, match="a key `lightning_autoclip` of your own") if taken else nullcontext():
        fit(Noting(), LOGGERS["wandb"](tmp_path), bad={})
    assert {key: run.config[key] for key in config} == config
    assert taken or run.config["lightning_autoclip"] == SETTINGS
    wandb.finish()
    read_runs(tmp_path)  # waits for the end of the file


def test_the_settings_of_a_run_that_is_resumed_are_those_of_its_last_fit(tmp_path: Path) -> None:
    logger = LOGGERS["wandb"](tmp_path)
    fit(Noting(), logger)
    logger.experiment.config.update({"lightning_autoclip": {**SETTINGS, "window": 3}}, allow_val_change=True)
    fit(Noting(), logger)
    assert logger.experiment.config["lightning_autoclip"] == SETTINGS
    wandb.finish()


class FilePerRank(Logger):
    """Lets every rank write, which Lightning's own loggers do not."""

    name = version = "files"

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.directory = directory

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        with (self.directory / str(torch.distributed.get_rank())).open("a") as file:
            file.write(json.dumps({**metrics, "step": step}) + "\n")

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """There are none."""


@pytest.mark.distributed
def test_only_rank_zero_logs(tmp_path: Path) -> None:
    strategy = SpawnedDDP(tmp_path, "forkserver")
    fit(Noting(), FilePerRank(tmp_path), log_every_step=True, devices=2, strategy=strategy, bad={})
    zero, one = ([json.loads(line) for line in (tmp_path / rank).read_text().splitlines()] for rank in "01")
    assert [row["step"] for row in zero if "autoclip/grad_norm" in row] == [4, 7]
    assert [row["step"] for row in zero if "autoclip/step/threshold" in row] == [*range(8)]
    assert [row["step"] for row in one if "train_loss" in row] == [4]  # what rank 1 logs does reach its file
    assert not any("autoclip" in key for row in one for key in row)
