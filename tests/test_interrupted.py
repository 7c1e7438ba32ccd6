"""A run that is interrupted or saved anywhere: its checkpoints hold the steps that were made, and no other."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FORMS, Net, dataset, in_form, trainer, weights
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.utils.data import DataLoader

import lightning_autoclip
from lightning_autoclip import AutoClip, NonFiniteGradientError

KEY, STEPS = "AutoClip", 24
SCALES = [20.0 if step in (9, 15) else 1.0 + step % 3 for step in range(2 * STEPS) for _ in range(4)]


class Resumable(Net):
    """Takes its batches by their index, so that a resumed run sees those that an uninterrupted one would see."""

    def __init__(self, factors: dict[int, float] | None = None) -> None:
        super().__init__(Fragile)
        self.rows, self.factors = dataset(len(SCALES), scales=SCALES), factors or {}

    def batch(self, batch_idx):
        return self.rows[4 * batch_idx : 4 * batch_idx + 4]

    def training_step(self, batch, batch_idx):
        return super().training_step(self.batch(batch_idx), batch_idx) * self.factors.get(batch_idx, 1.0)


class TwoOptimizers(Resumable):
    """One backward pass, then the two layers' steps, one after the other."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.zero_grad()
        self.manual_backward(self.loss(self.batch(batch_idx)))
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.Adam(self.net[place].parameters(), lr=0.01) for place in (0, 2)]


class StopError(BaseException):
    """What interrupts a run, as a `KeyboardInterrupt` does."""


def raise_at(call):
    """A function that interrupts a run when it is called for the so manyth time."""
    calls = iter(range(1, 1000))

    def maybe(*args, **kwargs):
        if next(calls) == call:
            raise StopError

    return maybe


class Fragile(torch.optim.SGD):
    """Its step computes the gradients, and may fail before a weight has moved."""

    def __init__(self, parameters, maybe=lambda: None):
        super().__init__(parameters, lr=0.1, momentum=0.9, fused=True)  # so that an accelerator would not be waited for
        self.maybe = maybe

    def step(self, closure):
        with torch.enable_grad():
            loss = closure()
        self.maybe()
        super().step()
        return loss


class Later(Callback):
    """Stands behind the clipping callback."""

    def __init__(self, do):
        self.do = do

    def on_before_optimizer_step(self, trainer, *args):
        self.do(trainer)


def in_a_later_callback(model, step):
    return [Later(raise_at(step))]


def in_the_modules_hook(model, step):
    model.on_before_optimizer_step = raise_at(step)
    return []


def in_the_step_of_the_optimizer(model, step):
    model.optimizer = partial(Fragile, maybe=raise_at(step))
    return []


PLACES = [in_a_later_callback, in_the_modules_hook, in_the_step_of_the_optimizer]


def fit(model, *callbacks, clip=None, ckpt=None, **options):
    callback = AutoClip(30, **{"window": 7, "log_layers": True, "verbose": False, **(clip or {})})
    accumulated = options.get("accumulate_grad_batches", 1)
    run = trainer(*callbacks[:1], callback, *callbacks[1:], log_every_n_steps=5, enable_checkpointing=True, **options)
    run.fit(model, DataLoader(range(STEPS * accumulated)), ckpt_path=ckpt)
    return callback


def what_counts(callback):
    """Everything of the steps that a resumed run has as the uninterrupted one: all but how Lightning numbers them."""
    figures = []
    for clipper, log in zip(callback.clippers, callback.logs.values(), strict=True):
        bins = [row._replace(first=0, last=0, norm_max_step=0) for row in log.bins]
        large = [[each[1:] for each in largest] for largest in (log.largest, log.nonfinite)]
        figures.append((clipper.state_dict(), bins, large, log.shares))
    return str(figures).replace(".0,", ",")  # what was loaded are floats


def saved_steps(path):
    """Of each group of a checkpoint: the steps of the history, those of the log, and those that wait for their row."""
    checkpoint, callback = torch.load(path, weights_only=True), AutoClip(30, window=7)
    groups = checkpoint["callbacks"][KEY]["groups"]
    callback.load_state_dict(checkpoint["callbacks"][KEY])
    for group, log in zip(groups.values(), callback.logs.values(), strict=True):
        assert sum(row.steps for row in log.bins) == log.steps == group["log"]["steps"]
    return [
        (group["clipper"]["steps"], log.steps, log.span[1] - log.span[0] + 1 if log.span else 0)
        for group, log in zip(groups.values(), callback.logs.values(), strict=True)
    ]


def assert_the_resumed_run_is_as_an_uninterrupted_one(folder, model, interrupt, step, **options):
    whole, broken, resumed, stay = model(), model(), model(), Callback()
    expected = fit(whole, stay, **options)
    saved = ModelCheckpoint(folder, "{step}", every_n_train_steps=1000, save_on_exception=True)
    with pytest.raises(StopError):
        fit(broken, stay, *interrupt(broken, step), saved, **options)
    (path,) = folder.glob("*.ckpt")
    groups = torch.load(path, weights_only=True)["callbacks"][KEY]["groups"].values()
    assert [(group["clipper"]["steps"], group["log"]["steps"]) for group in groups] == [(step - 1, step - 1)]
    callback = fit(resumed, stay, ckpt=path, **options)
    assert torch.equal(weights(resumed), weights(whole))
    assert what_counts(callback) == what_counts(expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("interrupt", PLACES, ids=lambda place: place.__name__)
def test_a_step_that_was_not_made_is_not_in_the_checkpoint(interrupt, algorithm, form, tmp_path):
    with in_form(form):
        assert_the_resumed_run_is_as_an_uninterrupted_one(
            tmp_path, Resumable, interrupt, 13, clip={"gradient_clip_algorithm": algorithm}
        )


@pytest.mark.parametrize(("step", "window"), [(2, 7), (23, None)])
@pytest.mark.parametrize("form", FORMS)
def test_at_whatever_step_it_is_interrupted(step, window, form, tmp_path):
    with in_form(form):
        assert_the_resumed_run_is_as_an_uninterrupted_one(
            tmp_path, Resumable, in_a_later_callback, step, clip={"window": window, "skip_above": 4.0}
        )


def test_a_checkpoint_that_a_callback_saves_within_a_step_holds_the_steps_before(tmp_path):
    calls, path = iter(range(1, 1000)), tmp_path / "within.ckpt"
    whole, model, resumed, stay = Resumable(), Resumable(), Resumable(), Callback()
    expected = what_counts(fit(whole, stay))
    callback = fit(model, stay, Later(lambda trainer: next(calls) == 13 and trainer.save_checkpoint(path)))
    assert saved_steps(path) == [(12, 12, 2)]
    assert what_counts(callback) == expected  # the step was made
    assert what_counts(fit(resumed, ckpt=path)) == expected
    assert torch.equal(weights(resumed), weights(whole))


@pytest.mark.parametrize(("call", "made"), [(13, [6, 6]), (14, [7, 6])], ids=["before the first", "between the two"])
def test_each_of_several_optimizers_keeps_the_steps_that_it_made(call, made, tmp_path):
    saved = OnExceptionCheckpoint(tmp_path)
    with pytest.raises(StopError):
        fit(TwoOptimizers(), Callback(), Later(raise_at(call)), saved)
    assert [steps for steps, _, _ in saved_steps(saved.ckpt_path)] == made
    assert [steps for _, steps, _ in saved_steps(saved.ckpt_path)] == made


def test_with_accumulation(tmp_path):
    saved = OnExceptionCheckpoint(tmp_path)
    with pytest.raises(StopError):
        fit(Resumable(), Callback(), Later(raise_at(7)), saved, accumulate_grad_batches=2)
    assert saved_steps(saved.ckpt_path)[0][:2] == (6, 6)


class Before(Callback):
    """Stands before the clipping callback, and interrupts the run when a batch is through."""

    def __init__(self, step):
        self.on_train_batch_end = raise_at(step)


@pytest.mark.parametrize(
    ("interrupt", "steps"),
    [([Before(13)], 13), ([Callback(), Later(raise_at(13))], 12)],
    ids=["after the step that the scaler skipped", "before it"],
)
def test_a_step_that_a_loss_scaler_skips_is_in_the_checkpoint_once_it_was_skipped(interrupt, steps, tmp_path):
    model, saved = Resumable({12: float("inf")}), OnExceptionCheckpoint(tmp_path)
    model.optimizer = partial(torch.optim.SGD, lr=0.1)
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1.0))
    with pytest.raises(StopError):
        fit(model, *interrupt, saved, plugins=[plugin])
    assert [(made, logged) for made, logged, _ in saved_steps(saved.ckpt_path)] == [(steps, steps)]
    (group,) = torch.load(saved.ckpt_path, weights_only=True)["callbacks"][KEY]["groups"].values()
    assert group["clipper"]["nonfinite_steps"] == steps - 12


def test_the_step_that_raises_at_a_nan_is_not_saved(tmp_path):
    saved = OnExceptionCheckpoint(tmp_path)
    with pytest.raises(NonFiniteGradientError, match="step 12"):
        fit(Resumable({12: float("nan")}), Callback(), saved, clip={"nonfinite": "raise"})
    assert saved_steps(saved.ckpt_path)[0][:2] == (12, 12)


def test_where_warnings_are_errors_the_error_of_the_fit_is_shown(tmp_path):
    class Full(CSVLogger):
        def log_metrics(self, metrics, step=None):
            raise OSError("no space left on device")

    with pytest.raises(StopError):  # the tests have errors of the callback's warnings
        fit(Resumable(), Callback(), Later(raise_at(4)), logger=Full(tmp_path))


def test_the_same_trainer_continues_with_the_steps_that_were_made():
    callback, model = AutoClip(30, window=7, verbose=False), Resumable()
    run = trainer(callback, Later(raise_at(13)), max_epochs=2)
    with pytest.raises(StopError):
        run.fit(model, DataLoader(range(STEPS)))
    assert callback.clippers[0].steps == callback.logs["autoclip/"].steps == 12
    run.fit(model, DataLoader(range(STEPS)))
    assert callback.clippers[0].steps == run.global_step


# --- at any line ------------------------------------------------------------------------------------------------------

PACKAGE = str(Path(lightning_autoclip.__file__).parent)
TRACED = {5, 6, 7, 8, 22, 23}  # the weights are measured at some and not at others; outliers are skipped at others
FACTORS = {6: float("nan"), 21: 100.0}  # of the 7th and the 22nd step
CLIP = {
    "groups": {"first": "net.0.*", "last": "net.2.*"},
    "log_every_step": True,
    "max_update_ratio": 0.1,
    "skip_above": 4.0,
}
ANY_LINE = pytest.mark.parametrize("form", FORMS), pytest.mark.parametrize("algorithm", ["norm", "value"])


class Rows(Logger):
    """Keeps the rows."""

    name, version = "rows", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[str] = []

    def log_metrics(self, metrics, step=None):
        self.rows.append(str((step, {key: value for key, value in metrics.items() if key.startswith("autoclip")})))

    def log_hyperparams(self, *args, **kwargs): ...


class Tracing(Callback):
    """Calls a function before each line of the package that runs within some steps; keeps the weights after each."""

    def __init__(self, at_line: Callable[[tuple[str, int]], Any] | None = None) -> None:
        self.at_line, self.after, self._outer = at_line, list[torch.Tensor](), sys.gettrace()

    def on_train_batch_start(self, trainer, pl_module, *args):
        self.trainer, self.model = trainer, pl_module
        self.after.append(weights(pl_module).clone())
        if self.at_line is not None:
            sys.settrace(self._call if trainer.global_step + 1 in TRACED else self._outer)

    def on_train_end(self, trainer, pl_module):
        self.after.append(weights(pl_module).clone())

    def _call(self, frame, event, arg):
        return self._line if frame.f_code.co_filename.startswith(PACKAGE) else None

    def _line(self, frame, event, arg):
        if event == "line":  # Python traces nothing that runs in here
            self.at_line((frame.f_code.co_filename[len(PACKAGE) + 1 :], frame.f_lineno))
        return self._line

    def stop(self):
        sys.settrace(self._outer)


def traced_fit(algorithm, tracing, *callbacks, **options):
    """The callback, the rows and the weights at the end of a run of which the package's lines are traced."""
    model, rows = Resumable(FACTORS), Rows()
    try:
        callback = fit(
            model, tracing, *callbacks, clip={**CLIP, "gradient_clip_algorithm": algorithm}, logger=rows, **options
        )
    finally:
        tracing.stop()
    return callback, rows.rows, weights(model)


def steps_in(state):
    """Those of the history and of the log, which are the same in all groups."""
    pairs = {(group["clipper"]["steps"], group["log"]["steps"]) for group in state["groups"].values()}
    return pairs.pop() if len(pairs) == 1 else pairs


def is_after(vector, steps, line, whole):
    """Whether the weights are those after so many steps; within the wrapper around `step`, after one more."""
    possible = whole.after[steps : steps + (2 if line[0] == "skip.py" else 1)]
    return any(torch.equal(vector, each) for each in possible)


ARGUMENTS: dict[str, Any] = {"window": 7, "verbose": False, "log_layers": True, **CLIP}


@ANY_LINE[0]
@ANY_LINE[1]
def test_a_checkpoint_that_is_saved_at_any_line_loads_and_changes_nothing(algorithm, form):
    faults, lines, seen = dict[tuple[str, int], Any](), set[tuple[str, int]](), set[Any]()

    def save(line):
        made = tracing.trainer.global_step
        if (line, len(tracing.after)) in seen:  # once per step
            return
        seen.add((line, len(tracing.after)))
        is_new = line not in lines
        lines.add(line)
        (callback,) = (each for each in tracing.trainer.callbacks if isinstance(each, AutoClip))
        state, loaded = callback.state_dict(), AutoClip(30, gradient_clip_algorithm=algorithm, **ARGUMENTS)
        loaded.load_state_dict(state)
        steps, logged = steps_in(state)
        # The optimizer has made the step before Lightning counts it.
        if steps != logged or steps - made not in (0, 1):
            faults.setdefault(line, (steps, logged, made))
        if is_new and str(loaded.state_dict()) != str(state):
            faults.setdefault(line, "another state once it was loaded")
        if not is_after(weights(tracing.model), steps, line, whole):
            faults.setdefault(line, f"other weights than after {steps} steps")

    with in_form(form):
        callback, rows, vector = traced_fit(algorithm, whole := Tracing())
        saved, saved_rows, saved_vector = traced_fit(algorithm, tracing := Tracing(save))
    assert not faults
    assert len(lines) > 300
    assert torch.equal(saved_vector, vector)
    assert str(saved.state_dict()) == str(callback.state_dict())
    assert saved_rows == rows


@ANY_LINE[0]
@ANY_LINE[1]
def test_a_run_that_is_interrupted_at_any_line_resumes(algorithm, form, tmp_path):
    lines, faults, resumed = dict[tuple[str, int], None](), dict[tuple[str, int], Any](), 0

    def stop_at(wanted):
        def stop(line):
            if line == wanted:
                raise StopError

        return stop

    with in_form(form):
        _, _, vector = traced_fit(algorithm, whole := Tracing(lambda line: lines.setdefault(line)))
        first = 3 * FORMS.index(form) + 7 * (algorithm == "value")  # so that each is tried at other lines
        for number, line in enumerate([*lines][first::14]):
            saved = OnExceptionCheckpoint(tmp_path, str(number))
            with pytest.raises(StopError):
                traced_fit(algorithm, Tracing(stop_at(line)), saved)
            checkpoint = torch.load(saved.ckpt_path, weights_only=True)
            state, made = checkpoint["callbacks"][KEY], checkpoint["global_step"]
            AutoClip(30, gradient_clip_algorithm=algorithm, **ARGUMENTS).load_state_dict(state)
            steps, logged = steps_in(state)
            batches = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["completed"]
            moved = torch.cat([each.flatten() for each in checkpoint["state_dict"].values()])
            if steps != logged or steps - made not in (0, 1) or not is_after(moved, steps, line, whole):
                faults[line] = (steps, logged, made)
            if made == batches == steps and torch.equal(moved, whole.after[made]):  # the step was not made
                resumed += 1
                _, _, again = traced_fit(algorithm, Tracing(), ckpt=saved.ckpt_path)
                if not torch.equal(again, vector):
                    faults[line] = "other weights at the end"
    assert not faults
    assert resumed > 10
