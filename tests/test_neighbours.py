"""The callback beside Lightning's own callbacks and profilers, and a user's: each run against one without them."""

from __future__ import annotations

import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch.callbacks as theirs
import models
import numpy as np
import pytest
import torch
import wandb
from helpers import Net, by_percentile, loader, norm_of, read_csv, trainer, weights
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler
from torch import Tensor
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader
from wandb_reader import read_runs

from lightning_autoclip import AutoClip, NonFiniteGradientError

SCALES = (1.0, 3.0, 0.5, 8.0, 1.5)
EPOCH = 16  # batches of `data()`
OURS = AutoClip().state_key  # how profilers name the callback
data = partial(loader, scales=SCALES)


pytestmark = pytest.mark.usefixtures("wandb_offline")


class Noting(models.Noting):
    """Notes the weights after each step too."""

    def __init__(self) -> None:
        super().__init__(optimizer=lambda parameters: SGD(parameters, lr=self.lr, momentum=0.5))
        self.lr, self.batch_size = 0.02, 4
        self.after: list[Tensor] = []

    def train_dataloader(self) -> DataLoader:
        return data(self.batch_size)

    def on_train_batch_end(self, *args: Any) -> None:
        self.after.append(weights(self))


class ByStep(Noting):
    """The batch depends on the number of steps alone, so that a resume in the middle of an epoch meets the same."""

    def __init__(self, fails_at: int | None = None, bad_at: int | None = None) -> None:
        super().__init__()
        self.fails_at, self.bad_at, self.rows = fails_at, bad_at, [*data()]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        step = self.trainer.global_step
        if step == self.fails_at:
            raise RuntimeError("the disk is full")
        return super().training_step(self.rows[step % EPOCH], batch_idx) * (math.nan if step == self.bad_at else 1.0)


def fit(model: Net, *callbacks: Any, epochs: int = 1, ckpt: Any = None, **kwargs: Any) -> AutoClip:
    """Train beside the callbacks; where none of them is an `AutoClip`, one stands before them."""
    ours = next((callback for callback in callbacks if isinstance(callback, AutoClip)), None)
    autoclip = ours or by_percentile(50, window=20, verbose=False)
    before = () if ours else (autoclip,)
    kwargs["enable_checkpointing"] = any(isinstance(callback, theirs.Checkpoint) for callback in callbacks)
    trainer(*before, *callbacks, max_epochs=epochs, **kwargs).fit(model, ckpt_path=ckpt)
    return autoclip


def history_of(autoclip: AutoClip) -> list[float]:
    (clipper,) = autoclip.clippers
    return clipper.history.values.tolist()


def assert_same_run(first: tuple[Noting, AutoClip], second: tuple[Noting, AutoClip]) -> None:
    """The same weights and the same norm history to the bit, and so the same report and spikes."""
    assert torch.equal(weights(first[0]), weights(second[0]))
    assert history_of(first[1]) == history_of(second[1])
    assert str(first[1].report()) == str(second[1].report())
    assert first[1].spikes() == second[1].spikes()


def percentiles(norms: list[float], window: int = 20) -> list[float]:
    """The median of the last norms at each step, by numpy."""
    return [float(np.percentile(norms[max(0, i + 1 - window) : i + 1], 50)) for i in range(len(norms))]


# --- neighbours that only watch ---------------------------------------------------------------------------------------

WATCHING: dict[str, Any] = {
    "ModelCheckpoint": lambda path: ModelCheckpoint(path, monitor="autoclip/threshold", every_n_train_steps=3),
    "EarlyStopping": lambda path: EarlyStopping("autoclip/threshold", patience=99, check_on_train_epoch_end=True),
    "LearningRateMonitor": lambda path: LearningRateMonitor(),
    "OnExceptionCheckpoint": OnExceptionCheckpoint,
    "DeviceStatsMonitor": lambda path: theirs.DeviceStatsMonitor(cpu_stats=False),
    "Timer": lambda path: theirs.Timer("00:01:00:00"),
    "ModelSummary": lambda path: theirs.ModelSummary(),
    "LambdaCallback": lambda path: theirs.LambdaCallback(on_before_optimizer_step=lambda *args: None),
}


@pytest.mark.parametrize("name", WATCHING)
def test_a_callback_that_only_watches_changes_neither_steps_nor_history(tmp_path: Path, name: str) -> None:
    alone, beside = Noting(), Noting()
    neighbour, ours = WATCHING[name](tmp_path / "theirs"), by_percentile(50, window=20, verbose=False)
    order = (ours, neighbour) if list(WATCHING).index(name) % 2 else (neighbour, ours)
    options = {"epochs": 2, "logger": CSVLogger(tmp_path), "log_every_n_steps": 5}
    assert_same_run((beside, fit(beside, *order, **options)), (alone, fit(alone, epochs=2, log_every_n_steps=5)))


class Reading(Callback):
    """Notes the norm and the largest element of the gradients that it meets before a step."""

    def __init__(self) -> None:
        self.norms: list[float] = []
        self.largest: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Optimizer) -> None:
        self.norms.append(norm_of(pl_module.parameters()))
        self.largest.append(max(float(p.grad.abs().max()) for p in pl_module.parameters()))


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_a_callback_before_ours_reads_raw_gradients_and_one_behind_it_clipped_ones(algorithm: str) -> None:
    model, before, behind = Noting(), Reading(), Reading()
    ours = by_percentile(50, window=20, gradient_clip_algorithm=algorithm, multiplier=1, verbose=False)
    fit(model, before, ours, behind)
    assert before.norms == model.norms
    limits = percentiles(model.norms)
    if algorithm == "norm":
        assert behind.norms == pytest.approx(np.minimum(model.norms, limits), rel=1e-5)
    else:
        limits = np.array(limits) / math.sqrt(sum(p.numel() for p in model.parameters()))
        assert behind.largest == pytest.approx(np.minimum(before.largest, limits), rel=1e-5)
    assert sum(np.less(behind.norms, before.norms)) >= 5


@pytest.mark.parametrize("kind", [SimpleProfiler, AdvancedProfiler, PyTorchProfiler], ids=lambda kind: kind.__name__)
def test_a_profiler_meets_every_clipping_and_changes_nothing(tmp_path: Path, kind: Any) -> None:
    counts: list[int] = []

    class Counting(kind):  # type: ignore[misc]
        def start(self, action_name: str) -> None:
            if OURS in action_name and action_name.endswith("on_before_optimizer_step"):
                counts.append(1)
            super().start(action_name)

    alone, beside = Noting(), Noting()
    profiler = Counting(dirpath=tmp_path, filename="profile")
    assert_same_run((beside, fit(beside, profiler=profiler)), (alone, fit(alone)))
    assert len(counts) == EPOCH
    (table,) = tmp_path.glob("*profile*.txt")
    operators_only = kind is PyTorchProfiler  # its table has no callbacks
    assert ("ProfilerStep" if operators_only else f"{OURS}.on_before_optimizer_step") in table.read_text()


def test_wandb_watch_logs_the_gradients_before_clipping(tmp_path: Path) -> None:
    ranges: list[tuple[float, float]] = []

    class Ranging(Noting):
        def on_after_backward(self) -> None:
            super().on_after_backward()
            gradient = self.net[2].weight.grad
            ranges.append((float(gradient.min()), float(gradient.max())))

    alone, beside, logger = Noting(), Ranging(), WandbLogger(save_dir=tmp_path, project="test")
    logger.watch(beside, log="gradients", log_freq=1)
    autoclip = partial(AutoClip, 10, verbose=False)
    options = {"log_every_n_steps": 1, "logger": logger}
    assert_same_run((beside, fit(beside, autoclip(), **options)), (alone, fit(alone, autoclip(), log_every_n_steps=1)))
    wandb.finish()
    (run,) = read_runs(tmp_path)
    watched = re.compile(r"gradients/(graph_\d+)?net\.2\.weight\.bins")  # numbered if the process has watched before
    bins = [value for row in run.history for key, value in row.items() if watched.fullmatch(key)]
    assert len(bins) == EPOCH
    np.testing.assert_allclose([(edges[0], edges[-1]) for edges in bins], ranges, rtol=1e-4)


# --- neighbours that monitor ------------------------------------------------------------------------------------------


def test_the_checkpoint_with_the_best_threshold_is_kept_under_its_name(tmp_path: Path) -> None:
    name = "step={step}-threshold={autoclip/threshold:.4f}"
    options = {"every_n_train_steps": 4, "mode": "max", "auto_insert_metric_name": False}
    model, best = Noting(), ModelCheckpoint(tmp_path, name, monitor="autoclip/threshold", **options)
    fit(model, best, log_every_n_steps=4)
    thresholds = {end + 1: percentiles(model.norms)[end] for end in (3, 7, 11, 15)}
    step = max(thresholds, key=thresholds.__getitem__)
    assert float(best.best_model_score) == pytest.approx(thresholds[step], rel=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == [f"step={step}-threshold={thresholds[step]:.4f}.ckpt"]


def test_training_stops_after_the_epoch_in_which_the_threshold_falls_below_a_limit() -> None:
    whole = Noting()
    fit(whole, epochs=6)
    ends = percentiles(whole.norms)[EPOCH - 1 :: EPOCH]
    limit = (min(ends[:3]) + min(ends)) / 2  # not reached in the first three epochs
    epochs = next(i for i, threshold in enumerate(ends) if threshold < limit) + 1
    assert 3 < epochs < 6
    model = Noting()
    stopping = EarlyStopping("autoclip/threshold", stopping_threshold=limit, patience=99, check_on_train_epoch_end=True)
    autoclip = fit(model, stopping, epochs=6)
    assert autoclip.clippers[0].steps == epochs * EPOCH
    assert model.norms == whole.norms[: epochs * EPOCH]


def test_learning_rates_and_thresholds_are_logged_at_the_same_steps(tmp_path: Path) -> None:
    class Decaying(Noting):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    model = Decaying()
    fit(model, LearningRateMonitor("step"), logger=CSVLogger(tmp_path, "", "run"), log_every_n_steps=4)
    written = read_csv(tmp_path / "run" / "metrics.csv")
    rates = {int(row["step"]): float(row["lr-SGD"]) for row in written if row["lr-SGD"]}
    thresholds = {int(row["step"]): float(row["autoclip/threshold"]) for row in written if row["autoclip/threshold"]}
    assert rates == pytest.approx({step: 0.02 * 0.9**step for step in (3, 7, 11, 15)})
    assert thresholds == pytest.approx({step: percentiles(model.norms)[step] for step in (3, 7, 11, 15)}, rel=1e-5)


# --- neighbours that average ------------------------------------------------------------------------------------------

if hasattr(theirs, "EMAWeightAveraging"):  # Lightning 2.6

    def test_a_moving_average_is_that_of_the_clipped_steps() -> None:
        alone, beside = Noting(), Noting()
        options = {"epochs": 2, "accumulate_grad_batches": 2}
        without, autoclip = fit(alone, **options), fit(beside, theirs.EMAWeightAveraging(decay=0.75), **options)
        steps = alone.after[1::2]
        average = steps[0]
        for after in steps[1:]:
            average = 0.75 * average + 0.25 * after
        torch.testing.assert_close(weights(beside), average)
        assert history_of(autoclip) == history_of(without)

    def test_a_moving_average_is_resumed_with_the_norm_history(tmp_path: Path) -> None:
        whole, half, rest = Noting(), Noting(), Noting()
        average = partial(theirs.EMAWeightAveraging, decay=0.75)
        saving = ModelCheckpoint(tmp_path, "half", every_n_epochs=1)
        first = fit(whole, average(), epochs=2)
        fit(half, average(), saving, epochs=1)
        second = fit(rest, average(), epochs=2, ckpt=tmp_path / "half.ckpt")
        assert_same_run((whole, first), (rest, second))


def test_stochastic_weight_averaging_averages_clipped_steps() -> None:
    model = Noting()
    autoclip = fit(model, StochasticWeightAveraging(0.05, swa_epoch_start=3, annealing_epochs=1), epochs=5)
    ends = model.after[EPOCH - 1 :: EPOCH]
    torch.testing.assert_close(weights(model), torch.stack(ends[1:4]).mean(0))  # at the starts of epochs 2 to 4
    assert len(model.norms) == 5 * EPOCH
    assert history_of(autoclip) == pytest.approx(model.norms[-20:], rel=1e-6)


# --- neighbours that change the training ------------------------------------------------------------------------------


def test_under_an_accumulation_schedule_each_window_is_one_step() -> None:
    model, autoclip = Noting(), by_percentile(50, window=None, verbose=False)
    fit(model, autoclip, GradientAccumulationScheduler({0: 1, 1: 2, 2: 5}), epochs=3)
    ends = [*range(16), *range(17, 32, 2), 36, 41, 46, 47]  # backward passes that fill a window or end the epoch
    assert history_of(autoclip) == pytest.approx([model.norms[end] for end in ends], rel=1e-6)
    batches = {spike["step"]: spike["batches"] for spike in autoclip.spikes()}
    expected = dict(enumerate([f"{i}" for i in range(16)] + [f"{i}-{i + 1}" for i in range(0, 16, 2)]))
    expected |= {24: "0-4", 25: "5-9", 26: "10-14", 27: "15"}
    assert {step: batches[step].replace(" to ", "-") for step in batches} == {step: expected[step] for step in batches}


def test_trial_steps_of_the_learning_rate_finder_enter_neither_history_nor_logs(tmp_path: Path) -> None:
    found, direct = Noting(), Noting()
    finder = LearningRateFinder(min_lr=1e-5, num_training_steps=30, early_stop_threshold=None)
    options = {"epochs": 2, "log_every_n_steps": 4}
    second = fit(found, finder, logger=CSVLogger(tmp_path, "", "found"), **options)
    assert len(found.norms) > 2 * EPOCH  # there were trial steps
    direct.lr = found.lr
    assert direct.lr != 0.02
    first = fit(direct, logger=CSVLogger(tmp_path, "", "direct"), **options)
    assert_same_run((direct, first), (found, second))
    assert read_csv(tmp_path / "found" / "metrics.csv") == read_csv(tmp_path / "direct" / "metrics.csv")


def test_the_learning_rate_finder_may_run_in_the_middle_of_training(tmp_path: Path) -> None:
    class Again(LearningRateFinder):
        """As in Lightning's documentation of the finder."""

        def on_fit_start(self, *args: Any) -> None:
            return

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 2:
                self.lr_find(trainer, pl_module)

    found, direct = Noting(), Noting()
    finder = Again(num_training_steps=10, early_stop_threshold=None, update_attr=False)
    options = {"epochs": 4, "log_every_n_steps": 4}
    second = fit(found, finder, logger=CSVLogger(tmp_path, "", "found"), **options)
    first = fit(direct, logger=CSVLogger(tmp_path, "", "direct"), **options)
    assert len(found.norms) == len(direct.norms) + 10
    assert_same_run((direct, first), (found, second))
    assert read_csv(tmp_path / "found" / "metrics.csv") == read_csv(tmp_path / "direct" / "metrics.csv")


def test_trial_steps_of_the_batch_size_finder_enter_neither_history_nor_logs(tmp_path: Path) -> None:
    found, direct = Noting(), Noting()
    finder = BatchSizeFinder(steps_per_trial=2, init_val=4, max_trials=2)
    second = fit(found, finder, logger=CSVLogger(tmp_path, "", "found"), log_every_n_steps=2)
    direct.batch_size = found.batch_size
    assert (direct.batch_size, second.clippers[0].steps) == (8, 8)
    first = fit(direct, logger=CSVLogger(tmp_path, "", "direct"), log_every_n_steps=2)
    assert_same_run((direct, first), (found, second))
    assert read_csv(tmp_path / "found" / "metrics.csv") == read_csv(tmp_path / "direct" / "metrics.csv")


@pytest.mark.parametrize(("why", "place"), [("failure", "before"), ("failure", "behind"), ("a NaN", "before")])
def test_a_run_resumed_from_a_checkpoint_at_an_exception_is_an_uninterrupted_one(
    tmp_path: Path, why: str, place: str
) -> None:
    """In the middle of an epoch, from a failure of the user's code or from the callback's own error."""

    failure = why == "failure"
    broken = ByStep(fails_at=21) if failure else ByStep(bad_at=21)
    settings = {"window": 20, "verbose": False, "nonfinite": "raise"}
    ours, keeping = by_percentile(50, **settings), OnExceptionCheckpoint(tmp_path)
    with pytest.raises(RuntimeError if failure else NonFiniteGradientError):
        fit(broken, *((keeping, ours) if place == "before" else (ours, keeping)), epochs=3)
    whole, rest = ByStep(), ByStep()
    first, second = by_percentile(50, **settings), by_percentile(50, **settings)
    fit(whole, first, max_steps=40, epochs=5)
    fit(rest, second, max_steps=40, epochs=5, ckpt=tmp_path / "on_exception.ckpt")
    assert len(rest.norms) == 40 - 21
    assert torch.equal(weights(whole), weights(rest))
    assert history_of(first) == history_of(second)
    assert second.clippers[0].nonfinite_steps == 0  # the step that raised was not made
