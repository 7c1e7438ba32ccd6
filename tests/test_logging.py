"""What stands in the loggers' files after real training, against norms that the model noted itself and numpy."""

from __future__ import annotations

import csv
import gc
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

from lightning_autoclip import AutoClip, StepRecord
from lightning_autoclip.monitoring.recorder import Recorder
from lightning_autoclip.monitoring.trace import Trace

Row = dict[str, float]

WINDOW = 8  # shorter than the runs, so that norms leave the record too
KEYS = [
    *("grad_norm", "grad_norm_mean", "grad_norm_max", "grad_norm_max_step", "grad_norm_clipped", "threshold"),
    *("clipped_fraction", "clip_coef_mean", "clip_coef_min", "nonfinite_total"),
]
SETTINGS = {
    "policy": {"name": "Percentile", "percentile": 50.0, "multiplier": 1.0},
    **{
        "gradient_clip_algorithm": "norm",
        "window": WINDOW,
        "warmup_steps": 0,
        "max_threshold": None,
        "max_update_ratio": None,
        "skip_above": None,
    },
    **{"nonfinite": "skip", "groups": None},
}
LOGGERS: dict[str, Callable[..., Logger]] = {
    "csv": lambda path, **kwargs: CSVLogger(path, name="", version="run", **kwargs),
    "tensorboard": lambda path, **kwargs: TensorBoardLogger(path, name="", version="run", **kwargs),
    "wandb": lambda path, **kwargs: WandbLogger(save_dir=path, project="test", id="run", **kwargs),
}
every_logger = pytest.mark.parametrize("kind", LOGGERS)


pytestmark = pytest.mark.usefixtures("wandb_offline")


class Noting(models.Noting):
    """Notes the norm after the clipping too; may break off at the eighth batch."""

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
    """The exact series: one point per step."""
    check(written, f"{prefix}step/grad_norm", dict(enumerate(norms)))
    check(written, f"{prefix}step/threshold", dict(enumerate(thresholds(norms))))


def check_windows(written: list[Row], prefix: str, expected: dict[str, dict[int, float]]) -> None:
    """The summaries: one row per window."""
    for key, points in expected.items():
        check(written, prefix + key, points)


def thresholds(statistics: Sequence[float]) -> list[float]:
    """The median of the last finite statistics, that of the step itself included."""
    past = [[s for s in statistics[: i + 1] if math.isfinite(s)] for i in range(len(statistics))]
    return [float(np.percentile(finite[-WINDOW:], 50)) for finite in past]


def figures(
    norms: Sequence[float],
    ends: Sequence[int],
    entries: int | None = None,
    clipped: Sequence[float] | None = None,
    measured: int = 1,
) -> dict[str, dict[int, float]]:
    """The rows that end at the given steps, by key and step.

    Clipping by norm, or by value with so many entries; ``clipped`` are the norms after clipping, if they were noted,
    of which one in ``measured`` is known to the callback.
    """
    norm = np.array(norms)
    statistic = norm / math.sqrt(entries or 1)
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
    keys = [*KEYS, "grad_rms"] if entries else KEYS
    return {key: {end: float(row[i]) for end, row in rows.items()} for i, key in enumerate(keys)}


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("every", [1, 5, 50])
def test_each_row_sums_up_its_window_and_stands_where_lightning_logs(
    tmp_path: Path, every: int, accumulate: int, algorithm: str
) -> None:
    model, ends = Noting(), [*range(every - 1, 23, every), 23]
    bad = {7: 100.0} if every == 1 else {3: math.nan, 7: 100.0}  # a window needs a finite step here
    options = {"gradient_clip_algorithm": algorithm, "accumulate_grad_batches": accumulate, "log_every_n_steps": every}
    run = fit(model, LOGGERS["csv"](tmp_path), steps=8 * accumulate, max_epochs=3, bad=bad, **options)
    norms, written = model.norms[accumulate - 1 :: accumulate], rows(tmp_path)
    entries = sum(parameter.numel() for parameter in model.parameters()) if algorithm == "value" else None
    measured = 10 if every == 50 and entries else 1  # by value, one in so many steps tells what clipping did
    expected = figures(norms, ends, entries, model.clipped, measured)
    check_windows(written, "autoclip/", expected)
    ours = [set(row) for row in written if "train_loss" not in row]
    assert all(row == {"step", *(f"autoclip/{key}" for key in expected)} for row in ours), "constant from the first row"
    losses = [row["step"] for row in written if "train_loss" in row]
    assert losses == [end for end in ends if (end + 1) % every == 0]  # what is left at the end has a row of ours only
    for key, points in expected.items():
        assert float(run.callback_metrics[f"autoclip/{key}"]) == pytest.approx(points[23], rel=1e-4), key


@pytest.mark.parametrize("save_every", [None, 3, 7, 13])
def test_by_value_every_row_knows_what_clipping_did(tmp_path: Path, save_every: int | None) -> None:
    """Also the last one, which may be short: a NaN would stop `EarlyStopping`."""
    save = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=save_every)
    stop = EarlyStopping("autoclip/clip_coef_mean", mode="max", patience=100, check_on_train_epoch_end=True)
    options = {"gradient_clip_algorithm": "value", "max_epochs": 6, "steps": 8, "enable_checkpointing": True}
    run = fit(Noting(), LOGGERS["csv"](tmp_path), save, stop, log_every_n_steps=47, bad={}, **options)
    assert run.global_step == 48
    ours = [row for row in rows(tmp_path) if "autoclip/grad_norm" in row]
    assert [row["step"] for row in ours] == [46, 47]
    assert all(math.isfinite(row["autoclip/clip_coef_mean"]) for row in ours)
    assert all(math.isfinite(row["autoclip/grad_norm_clipped"]) for row in ours)


@pytest.mark.parametrize(("every", "measured"), [(1, 1), (5, 1), (20, 4), (50, 10), (500, 10), (0, 10)])
def test_by_value_what_clipping_did_is_measured_five_times_per_row(every: int, measured: int) -> None:
    run = fit(Noting(), gradient_clip_algorithm="value", log_every_n_steps=every)
    autoclip = next(callback for callback in run.callbacks if isinstance(callback, AutoClip))
    assert autoclip.clippers[0].clipped_norm_every == measured


def test_a_spike_between_two_rows_is_not_lost(tmp_path: Path) -> None:
    model = Noting()
    fit(model, LOGGERS["csv"](tmp_path), steps=7, log_every_n_steps=7, bad={4: 1000.0})
    (row,) = (row for row in rows(tmp_path) if "autoclip/grad_norm" in row)
    assert row["autoclip/grad_norm"] < model.norms[4] / 10
    assert row["autoclip/grad_norm_max"] == pytest.approx(model.norms[4], rel=1e-4)
    assert row["autoclip/grad_norm_max_step"] == 4


@every_logger
@pytest.mark.parametrize(("prefix", "accumulate"), [("", 1), ("trial", 2)])
def test_each_step_is_logged_at_its_own_step(tmp_path: Path, kind: str, prefix: str, accumulate: int) -> None:
    model, logger, name = Noting(), LOGGERS[kind](tmp_path, prefix=prefix), f"{prefix}-autoclip/".lstrip("-")
    fit(model, logger, steps=16 * accumulate, accumulate_grad_batches=accumulate, log_every_step=True)
    norms, written = model.norms[accumulate - 1 :: accumulate], rows(tmp_path)
    check_steps(written, name, norms)
    check_windows(written, name, figures(norms, [4, 9, 14, 15]))


def test_by_value_each_step_logs_what_the_threshold_is_compared_with(tmp_path: Path) -> None:
    model = Noting()
    fit(model, LOGGERS["csv"](tmp_path), gradient_clip_algorithm="value", log_every_step=True)
    rms = [norm / math.sqrt(sum(parameter.numel() for parameter in model.parameters())) for norm in model.norms]
    check(rows(tmp_path), "autoclip/step/grad_rms", dict(enumerate(rms)))
    check(rows(tmp_path), "autoclip/step/threshold", dict(enumerate(thresholds(rms))))


def test_several_loggers_get_the_same_rows(tmp_path: Path) -> None:
    model = Noting()
    fit(model, [make(tmp_path / kind) for kind, make in LOGGERS.items()])
    for kind in LOGGERS:
        check_windows(rows(tmp_path / kind), "autoclip/", figures(model.norms, [4, 9, 14, 15]))


@every_logger
@pytest.mark.parametrize("options", [{}, {"log_every_step": True, "gradient_clip_algorithm": "value"}], ids=str)
def test_a_row_of_nonfinite_steps_counts_them_and_holds_no_number_that_is_not_finite(
    tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    fit(Noting(), LOGGERS[kind](tmp_path), bad=dict.fromkeys(range(5), math.nan), steps=10, **options)
    written = rows(tmp_path)
    ours = [(row["step"], key, value) for row in written for key, value in row.items() if key.startswith("autoclip/")]
    ours = [entry for entry in ours if not entry[1].startswith("autoclip/spikes")]  # W&B's table
    assert all(math.isfinite(value) for _, _, value in ours)
    assert [key for step, key, _ in ours if step < 5] == ["autoclip/nonfinite_total"]
    for key in KEYS:
        (last,) = (value for step, found, value in ours if step == 9 and found == f"autoclip/{key}")
        assert last == 7 if key == "nonfinite_total" else math.isfinite(last)


@every_logger
def test_while_nothing_is_clipped_there_is_no_threshold_rather_than_an_infinite_one(tmp_path: Path, kind: str) -> None:
    autoclip = by_percentile(50, window=WINDOW, warmup_steps=10, log_every_step=True)
    trainer(autoclip, logger=LOGGERS[kind](tmp_path), log_every_n_steps=5).fit(model := Noting(), loader())
    written, infinite = rows(tmp_path), dict.fromkeys(range(10), math.inf)
    known = dict(enumerate(thresholds(model.norms)))
    check(written, "autoclip/step/threshold", known | infinite)
    check(written, "autoclip/threshold", {14: known[14], 15: known[15]})
    check(written, "autoclip/grad_norm", {step: model.norms[step] for step in (4, 9, 14, 15)})


@pytest.mark.parametrize("log_every_step", [False, True])
def test_the_columns_of_a_csv_file_are_there_from_the_first_row(tmp_path: Path, log_every_step: bool) -> None:
    logger = LOGGERS["csv"](tmp_path)
    headers = []

    class Header(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            if (file := tmp_path / "run" / "metrics.csv").exists():
                headers.append(file.read_text().splitlines()[0].split(","))

    autoclip = by_percentile(50, warmup_steps=8, log_every_step=log_every_step)
    data = loader(scales=[math.nan if row < 12 else 1.0 for row in range(64)])
    trainer(autoclip, Header(), logger=logger, log_every_n_steps=2).fit(models.Noting(), data)
    ours = [{key for key in header if key.startswith("autoclip/")} for header in headers]
    steps = {"step/grad_norm", "step/threshold"} if log_every_step else set()
    assert ours == [{f"autoclip/{key}" for key in {*KEYS, *steps}}] * 15


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
def test_where_nothing_is_logged_the_last_figures_stand_in_callback_metrics(
    tmp_path: Path, options: dict[str, Any], logs: bool, ends: list[int]
) -> None:
    model = Noting()
    run = fit(model, LOGGERS["csv"](tmp_path) if logs else False, log_every_step=True, **options)
    for key, points in figures(model.norms, ends).items():
        assert float(run.callback_metrics[f"autoclip/{key}"]) == pytest.approx(points[ends[-1]], rel=1e-4), key
    assert not any("autoclip/" in key for row in rows(tmp_path) for key in row)


def test_a_checkpoint_can_be_chosen_by_the_mean_norm(tmp_path: Path) -> None:
    model = Noting()
    best = ModelCheckpoint(tmp_path, "{step}", monitor="autoclip/grad_norm_mean", every_n_train_steps=5)
    fit(model, False, best, enable_checkpointing=True, bad={})
    means = figures(model.norms, [4, 9, 14])["grad_norm_mean"]
    end = min(means, key=means.__getitem__)
    assert float(best.best_model_score) == pytest.approx(means[end], rel=1e-4)
    assert Path(best.best_model_path).name == f"step={end + 1}.ckpt"


@pytest.mark.parametrize("validates", [False, True], ids=["epoch end", "validation"])
def test_an_epoch_shorter_than_a_window_can_be_monitored(tmp_path: Path, validates: bool) -> None:
    class Validating(Noting):
        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.loss(batch)

    model, best = Validating(), ModelCheckpoint(tmp_path, monitor="autoclip/grad_norm_mean")
    stopping = EarlyStopping("autoclip/grad_norm_mean", patience=9)
    autoclip = by_percentile(50)
    validation = loader(n=4) if validates else None
    trainer(autoclip, best, stopping, max_epochs=2, enable_checkpointing=True, num_sanity_val_steps=1).fit(
        model, loader(), validation
    )
    means = [np.mean(model.norms[:end]) for end in (16, 32)]
    assert float(best.best_model_score) == pytest.approx(min(means), rel=1e-4)
    assert float(stopping.best_score) == pytest.approx(min(means), rel=1e-4)


def test_what_a_checkpoint_counts_as_done_is_on_disk_when_the_process_dies(tmp_path: Path) -> None:
    class Dying(Noting):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
            if batch_idx == 9:
                os._exit(9)
            return super().training_step(batch, batch_idx)

    def run() -> None:
        saving = ModelCheckpoint(tmp_path, "saved", every_n_train_steps=7)
        options = {"log_every_step": True, "enable_checkpointing": True, "bad": {}}
        fit(Dying(), LOGGERS["csv"](tmp_path), saving, **options)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(TIME_LIMIT)
    assert process.exitcode == 9
    assert [row["step"] for row in rows(tmp_path) if "autoclip/step/grad_norm" in row] == [*range(7)]


def test_a_bad_step_does_not_stay_in_the_summaries_of_wandb(tmp_path: Path) -> None:
    fit(Noting(), LOGGERS["wandb"](tmp_path), bad=dict.fromkeys(range(5), math.nan), log_every_step=True)
    wandb.finish()
    (run,) = read_runs(tmp_path)
    for key in [*KEYS, "step/grad_norm", "step/threshold"]:
        assert all(math.isfinite(value) for value in run.summary[f"autoclip/{key}"].values()), key


@every_logger
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_run_that_breaks_off_has_logged_every_step(tmp_path: Path, kind: str, error: type[BaseException]) -> None:
    model = Noting(error)
    with pytest.raises((ValueError, SystemExit)):
        fit(model, LOGGERS[kind](tmp_path), log_every_step=True)
    assert len(model.norms) == 7
    check_steps(rows(tmp_path), "autoclip/", model.norms)
    check_windows(rows(tmp_path), "autoclip/", figures(model.norms, [4, 6]))


@every_logger
@pytest.mark.parametrize(("per_epoch", "accumulate"), [(16, 1), (7, 1), (16, 2)], ids=["mid", "end", "accumulate"])
def test_over_a_resume_each_step_is_logged_once(tmp_path: Path, kind: str, per_epoch: int, accumulate: int) -> None:
    first, second, saving = Noting(), Noting(), ModelCheckpoint(tmp_path, "saved", every_n_train_steps=7)
    options = {"steps": per_epoch * accumulate, "accumulate_grad_batches": accumulate, "bad": {}, "max_epochs": 3}
    options |= {"log_every_step": True, "enable_checkpointing": True}
    logger = LOGGERS[kind](tmp_path / "1")
    fit(first, logger, saving, max_steps=7, **options)
    finish(tmp_path)
    if kind != "csv":  # a new CSVLogger deletes what stands in its directory
        logger = LOGGERS[kind](tmp_path / ("2" if kind == "wandb" else "1"))
    fit(second, logger, saving, max_steps=16, ckpt=tmp_path / "saved.ckpt", **options)
    norms, written = (first.norms + second.norms)[accumulate - 1 :: accumulate], rows(tmp_path)
    assert len(norms) == 16
    check_steps(written, "autoclip/", norms)
    check_windows(written, "autoclip/", figures(norms, [4, 6, 9, 14, 15]))


@every_logger
@pytest.mark.parametrize("log_every_step", [False, True], ids=["summaries", "each step too"])
def test_checkpoints_cut_no_row_short(tmp_path: Path, kind: str, log_every_step: bool) -> None:
    """Of equal rows the mean is the run's: W&B's summary has it."""
    model, saving = Noting(), ModelCheckpoint(tmp_path, every_n_train_steps=3)
    fit(
        *(model, LOGGERS[kind](tmp_path), saving),
        **{"log_every_step": log_every_step, "enable_checkpointing": True, "bad": {7: 100.0}, "steps": 5},
        **{"max_epochs": 3},
    )
    written = rows(tmp_path)
    check_windows(written, "autoclip/", figures(model.norms, [4, 9, 14]))
    check_steps(written, "autoclip/", model.norms if log_every_step else [])
    if kind == "wandb":
        (run,) = read_runs(tmp_path)
        assert run.summary["autoclip/grad_norm_mean"]["mean"] == pytest.approx(np.mean(model.norms), rel=1e-5)


class Killed(Noting):
    """Its process dies at a step, as of SIGKILL."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        if self.trainer.global_step == 13:
            np.save("norms.npy", self.norms)
            os._exit(9)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("every", [5, 1, 50])
def test_a_run_that_was_killed_goes_on_with_the_row_that_had_begun(tmp_path: Path, every: int) -> None:
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
    assert [row["step"] for row in first_rows if "autoclip/step/grad_norm" in row] == [
        *range({5: 10, 1: 13, 50: 7}[every])
    ]
    kept = [row for row in first_rows if row["step"] < 7] + second_rows
    check_steps(kept, "autoclip/", norms)
    ends = {5: [*range(4, len(norms), 5), len(norms) - 1], 1: [*range(len(norms))], 50: [len(norms) - 1]}[every]
    check_windows(kept, "autoclip/", figures(norms, ends))


@pytest.mark.parametrize("every", [5, 16])
@pytest.mark.parametrize("validates", [False, True])
@every_logger
def test_the_row_of_a_step_and_the_summary_up_to_it_are_one(
    tmp_path: Path, kind: str, validates: bool, every: int
) -> None:
    class Validating(Noting):
        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.loss(batch)

    model = Validating() if validates else Noting()
    autoclip, saving = by_percentile(50, window=WINDOW, log_every_step=True), ModelCheckpoint(tmp_path)
    run = trainer(autoclip, saving, logger=LOGGERS[kind](tmp_path), log_every_n_steps=every, enable_checkpointing=True)
    run.fit(model, loader(), loader(n=4) if validates else None)
    written = [row for row in rows(tmp_path) if any(key.startswith("autoclip/step/") for key in row)]
    if kind == "tensorboard":  # has no rows
        check_steps(written, "autoclip/", model.norms)
        return
    assert [row["step"] for row in written] == [*range(16)]
    ends = [row["step"] for row in written if "autoclip/grad_norm" in row]
    assert ends == ([4, 9, 14, 15] if every == 5 else [15])


def test_the_rows_of_several_optimizers_at_a_step_are_one(tmp_path: Path) -> None:
    model = models.OptimizerPerLayer(partial(Adam, lr=0.01), partial(SGD, lr=0.01))
    fit(model, LOGGERS["csv"](tmp_path), log_every_step=True, bad={})
    ours = [row for row in rows(tmp_path) if "autoclip/Adam/step/grad_norm" in row]
    assert [row["step"] for row in ours] == [*range(16)]
    assert all("autoclip/SGD/step/grad_norm" in row for row in ours)


def test_of_several_steps_in_a_batch_none_is_lost(tmp_path: Path) -> None:
    class Twice(models.Manual):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            super().training_step(batch, batch_idx)
            super().training_step(batch, batch_idx)

    fit(Twice(), LOGGERS["csv"](tmp_path), log_every_step=True, bad={})
    steps = [row["step"] for row in rows(tmp_path) if "autoclip/step/grad_norm" in row]
    assert steps == [*np.repeat(range(16), 2)]


@every_logger
@pytest.mark.parametrize("classes", [(Adam, SGD), (Adam, Adam)], ids=["Adam+SGD", "Adam+Adam"])
def test_each_of_several_optimizers_has_rows_of_its_own(
    tmp_path: Path, kind: str, classes: tuple[type[Optimizer], type[Optimizer]]
) -> None:
    model = models.OptimizerPerLayer(*(partial(cls, lr=0.01) for cls in classes))
    prefixes = ("autoclip/Adam/", "autoclip/SGD/" if SGD in classes else "autoclip/Adam-1/")
    fit(model, LOGGERS[kind](tmp_path), log_every_step=True)
    written = rows(tmp_path)
    for prefix, norms in zip(prefixes, model.norms, strict=True):
        check_steps(written, prefix, norms)
        check_windows(written, prefix, figures(norms, [4, 9, 14, 15]))
    assert all(key.startswith((*prefixes, "autoclip/spikes")) for row in written for key in row if "autoclip" in key)


@pytest.mark.parametrize("prefix", ["", "trial"])
@pytest.mark.parametrize("begun", [False, True], ids=["run of the logger", "run of the user"])
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
    """The second layer joins the optimizer before a batch."""

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


USERS = {"a switch": {"autoclip": True}, "both keys": {"autoclip": "on", "lightning_autoclip": {"policy": "mine"}}}


@pytest.mark.parametrize("locked", [False, True], ids=["plain", "locked by a sweep"])
@pytest.mark.parametrize("config", USERS.values(), ids=USERS)
def test_the_users_own_keys_in_the_config_of_wandb_survive(
    tmp_path: Path, config: dict[str, Any], locked: bool
) -> None:
    run = wandb.init(dir=tmp_path, project="test", config=None if locked else config)
    if locked:
        run.config.update_locked(config, user="sweep")
    taken = "lightning_autoclip" in config
    with pytest.warns(UserWarning, match="a key `lightning_autoclip` of your own") if taken else nullcontext():
        fit(Noting(), LOGGERS["wandb"](tmp_path), bad={}, steps=60)
    assert {key: run.config[key] for key in config} == config
    assert taken or run.config["lightning_autoclip"]["policy"]["percentile"] == 50
    wandb.finish()
    read_runs(tmp_path)  # waits for the end of the file


def test_the_settings_of_a_run_that_is_resumed_are_those_of_its_last_fit(tmp_path: Path) -> None:
    logger = LOGGERS["wandb"](tmp_path)
    fit(Noting(), logger)
    logger.experiment.config.update({"lightning_autoclip": {**SETTINGS, "window": 3}}, allow_val_change=True)
    fit(Noting(), logger)
    assert logger.experiment.config["lightning_autoclip"] == SETTINGS
    wandb.finish()


def test_few_records_wait_on_the_device_however_far_apart_the_rows_are() -> None:
    def waiting() -> int:
        gc.collect()
        tuples = (thing for thing in gc.get_objects() if type(thing) is tuple and len(thing) == 7)
        return sum(isinstance(thing[0], torch.Tensor) for thing in tuples)  # the numbers of a step

    recorder, before, most = Recorder("autoclip/"), waiting(), 0
    for step in range(2500):
        norm, threshold = torch.tensor(float(step)), torch.tensor(999.5)
        record = StepRecord(norm, norm.minimum(threshold), norm, threshold, torch.tensor(0.0), torch.tensor(math.nan))
        record = record._replace(left_out=torch.tensor(0.0))
        recorder.add(record, step=step, epoch=0, first_batch=step, last_batch=step)
        assert recorder.is_due(2500) == (step == 2499)
        most = max(most, waiting() - before) if step in (1000, 1022, 1500, 2046, 2499) else most
    assert 1000 < most <= 1024
    ((step, row),), points = recorder.flush()
    assert (step, row["autoclip/grad_norm_max_step"], row["autoclip/clipped_fraction"]) == (2499, 2499, 0.6)
    assert row["autoclip/grad_norm_mean"] == 1249.5
    assert [point.step for point in points] == [*range(2500)]
    assert recorder.flush() == ([], [])
    assert recorder.summarise() == row, "of the last flush"


@pytest.mark.parametrize("by_value", [False, True], ids=["norm", "value"])
@pytest.mark.parametrize("layer_depth", [0, 2])
def test_before_any_step_a_row_has_every_key_and_no_figure(by_value: bool, layer_depth: int) -> None:
    recorder = Recorder("autoclip/", by_value, layer_depth=layer_depth, trace=Trace(["net.0.weight"], [4]))
    row = recorder.summarise()
    assert list(row) == recorder.keys
    assert all(math.isnan(value) for value in row.values())
    assert recorder.flush() == ([], [])


def test_a_row_can_be_read_at_every_step() -> None:
    """At whatever step somebody looks, the row is that of the steps since the last flush; zeros are steps too."""
    norms = [3.0, 0.0, math.nan, 5.0, 5.0, math.inf, 2.0, math.nan, math.inf, 1.0]
    recorder = Recorder("autoclip/", trace=Trace())
    for step, norm in enumerate(norms):
        if step == 7:
            recorder.flush()
        recorder.add(StepRecord(norm, min(norm, 2.5), norm, 2.5, 0.0), step=step, epoch=0, first_batch=0, last_batch=0)
        row, held = recorder.summarise(), np.array(norms[7 if step >= 7 else 0 : step + 1])
        finite = held[np.isfinite(held)]
        coefs = [min(2.5 / value, 1) if value else 1.0 for value in finite]
        figures = [finite[-1], finite.mean(), finite.max()] if len(finite) else 3 * [math.nan]
        assert [*row.values()][:3] == pytest.approx(figures, nan_ok=True)
        figures = [np.mean([coef < 1 for coef in coefs]), np.mean(coefs), min(coefs)] if coefs else 3 * [math.nan]
        assert [row[f"autoclip/{key}"] for key in KEYS[6:9]] == pytest.approx(figures, nan_ok=True)
        after = np.minimum(finite, 2.5).mean() if len(finite) else math.nan
        assert row["autoclip/grad_norm_clipped"] == pytest.approx(after, nan_ok=True)
        first = norms.index(finite.max(), 7 if step >= 7 else 0) if len(finite) else math.nan
        assert row["autoclip/grad_norm_max_step"] == pytest.approx(first, nan_ok=True)


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
