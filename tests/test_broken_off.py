"""A step that was clipped and never made: the checkpoints of a run that is broken off there do not hold it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from helpers import Net, dataset, in_form, trainer, weights
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.utils.data import DataLoader

from lightning_autoclip import AutoClip, NonFiniteGradientError

KEY, STEPS = "GradientClipping", 24
SCALES = [20.0 if step in (9, 15) else 1.0 + step % 3 for step in range(2 * STEPS) for _ in range(4)]
FORMS = pytest.mark.parametrize("form", ["cpu form", "accelerator form"])


class Resumable(Net):
    """Takes its batches by their index, so that a resumed run sees those that an uninterrupted one would see."""

    def __init__(self):
        super().__init__(Fragile)
        self.rows = dataset(len(SCALES), scales=SCALES)

    def batch(self, batch_idx):
        return self.rows[4 * batch_idx : 4 * batch_idx + 4]

    def training_step(self, batch, batch_idx):
        return super().training_step(self.batch(batch_idx), batch_idx)


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


class StopError(Exception):
    """What breaks a run off."""


def raise_at(step):
    """A function that breaks a run off when it is called for the so manyth time."""
    calls = iter(range(1, 1000))

    def maybe(*args, **kwargs):
        if next(calls) == step:
            raise StopError

    return maybe


class Fragile(torch.optim.SGD):
    """Its step computes the gradients, and may fail before a weight has moved."""

    def __init__(self, parameters, maybe=lambda: None):
        super().__init__(parameters, lr=0.1, momentum=0.9)
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


def in_a_later_callback_that_reads_the_figures(model, step):
    maybe = raise_at(step)
    return [Later(lambda trainer: (dict(trainer.callback_metrics), maybe()))]


PLACES = [
    in_a_later_callback,
    in_the_modules_hook,
    in_the_step_of_the_optimizer,
    in_a_later_callback_that_reads_the_figures,
]


def fit(model, *callbacks, clip=None, ckpt=None, **options):
    callback = AutoClip(30, window=7, log_layers=True, verbose=False, **(clip or {}))
    accumulated = options.get("accumulate_grad_batches", 1)
    run = trainer(callback, *callbacks, log_every_n_steps=5, enable_checkpointing=True, **options)
    run.fit(model, DataLoader(range(STEPS * accumulated)), ckpt_path=ckpt)
    return callback


def what_counts(callback):
    """Everything of the record that a resumed run has as the uninterrupted one has it."""
    state = callback.state_dict()["scopes"]
    return [
        [
            scope["clipper"]["history"]["values"].tolist(),
            scope["clipper"]["history"]["count"],
            scope["clipper"]["steps"],
            scope["clipper"]["outliers_in_a_row"],
            scope["clipper"]["weight_norms"].tolist(),
            [spike[1:] for spike in scope["trace"]["largest"]],
            scope["trace"]["bins"][:, 2:].tolist(),
            scope["trace"]["share_sums"].tolist(),
        ]
        for scope in state.values()
    ]


def assert_the_resumed_run_is_as_an_uninterrupted_one(tmp_path, model, break_off, step, **options):
    whole, broken, resumed = model(), model(), model()
    expected = fit(whole, **options)
    saved = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1000, save_on_exception=True)
    with pytest.raises(StopError):
        fit(broken, *break_off(broken, step), saved, **options)
    (path,) = tmp_path.glob("*.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    scopes = checkpoint["callbacks"][KEY]["scopes"]
    assert sum(scope["clipper"]["steps"] for scope in scopes.values()) == step - 1 == checkpoint["global_step"]
    assert sum(scope["trace"]["bins"][:, 2].sum() for scope in scopes.values()) == step - 1
    callback = fit(resumed, ckpt=path, **options)
    assert torch.equal(weights(resumed), weights(whole))
    assert str(what_counts(callback)) == str(what_counts(expected))


@FORMS
@pytest.mark.parametrize("clip", [{}, {"gradient_clip_algorithm": "value"}], ids=["norm", "value"])
@pytest.mark.parametrize("break_off", PLACES, ids=lambda place: place.__name__)
def test_a_step_that_was_not_made_is_not_in_the_checkpoint(break_off, clip, form, tmp_path):
    with in_form(form):
        assert_the_resumed_run_is_as_an_uninterrupted_one(tmp_path, Resumable, break_off, 13, clip=clip)


@pytest.mark.parametrize("step", [2, 8, 17])
@FORMS
@pytest.mark.parametrize("window", [7, None])
def test_at_whatever_step_it_is_broken_off(step, window, form, tmp_path):
    clip = {"skip_above": 4.0} if step > 8 else {}
    with in_form(form):
        assert_the_resumed_run_is_as_an_uninterrupted_one(tmp_path, Resumable, in_a_later_callback, step, clip=clip)


def saved_steps(path):
    """Of each scope of a checkpoint: the steps of the record, those of the trace, and those that wait for their row."""
    scopes = torch.load(path, weights_only=True)["callbacks"][KEY]["scopes"].values()
    return [
        (each["clipper"]["steps"], int(each["trace"]["bins"][:, 2].sum()), len(each["held"]["points"]))
        for each in scopes
    ]


def test_a_checkpoint_that_a_callback_saves_within_a_step_holds_the_steps_before(tmp_path):
    calls, path = iter(range(1, 1000)), tmp_path / "within.ckpt"
    whole, model, resumed = Resumable(), Resumable(), Resumable()
    expected = fit(whole)
    callback = fit(model, Later(lambda trainer: next(calls) == 13 and trainer.save_checkpoint(path)))
    assert saved_steps(path) == [(12, 12, 2)]
    assert str(what_counts(callback)) == str(what_counts(expected))  # the step was made
    assert str(what_counts(fit(resumed, ckpt=path))) == str(what_counts(expected))
    assert torch.equal(weights(resumed), weights(whole))


@pytest.mark.parametrize(("call", "made"), [(13, [6, 6]), (14, [7, 6])], ids=["before the first", "between the two"])
def test_each_of_several_optimizers_keeps_the_steps_that_it_made(call, made, tmp_path):
    saved = OnExceptionCheckpoint(tmp_path)
    with pytest.raises(StopError):
        fit(TwoOptimizers(), Later(raise_at(call)), saved)
    assert [steps for steps, _, _ in saved_steps(saved.ckpt_path)] == made
    assert [steps for _, steps, _ in saved_steps(saved.ckpt_path)] == made


def test_with_accumulation(tmp_path):
    saved = OnExceptionCheckpoint(tmp_path)
    with pytest.raises(StopError):
        fit(Resumable(), Later(raise_at(7)), saved, accumulate_grad_batches=2)
    assert saved_steps(saved.ckpt_path)[0][:2] == (6, 6)


class Overflowing(Resumable):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (float("inf") if batch_idx == 12 else 1.0)


def with_scaler():
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1.0))


class Before(Callback):
    """Stands before the clipping callback, and breaks the run off when a batch is through."""

    def __init__(self, step):
        self.on_train_batch_end = raise_at(step)


def test_a_step_that_a_loss_scaler_left_out_counts_though_the_run_is_broken_off_after_it(tmp_path):
    saved, plugin = (
        OnExceptionCheckpoint(tmp_path),
        MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1.0)),
    )
    model, callback = Overflowing(), AutoClip(30, window=7)
    model.optimizer = partial(torch.optim.SGD, lr=0.1)
    run = trainer(Before(13), callback, saved, enable_checkpointing=True, plugins=[plugin])
    with pytest.raises(StopError):
        run.fit(model, DataLoader(range(STEPS)))
    scopes = torch.load(saved.ckpt_path, weights_only=True)["callbacks"][KEY]["scopes"]
    assert scopes["autoclip/"]["clipper"]["steps"] == 13
    assert scopes["autoclip/"]["clipper"]["nonfinite_total"] == 1


def test_a_step_with_a_loss_scaler_that_is_broken_off_does_not_count(tmp_path):
    saved, plugin = (
        OnExceptionCheckpoint(tmp_path),
        MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1.0)),
    )
    model = Overflowing()
    model.optimizer = partial(torch.optim.SGD, lr=0.1)
    run = trainer(AutoClip(30, window=7), Later(raise_at(13)), saved, enable_checkpointing=True, plugins=[plugin])
    with pytest.raises(StopError):
        run.fit(model, DataLoader(range(STEPS)))
    assert saved_steps(saved.ckpt_path)[0][:2] == (12, 12)


def test_the_step_that_raises_at_a_nan_is_told_of_and_not_saved(tmp_path):
    saved, callback = OnExceptionCheckpoint(tmp_path), AutoClip(30, window=7, nonfinite="raise")
    with pytest.raises(NonFiniteGradientError):
        trainer(callback, saved, enable_checkpointing=True).fit(Overflowing(), DataLoader(range(STEPS)))
    assert saved_steps(saved.ckpt_path)[0][:2] == (12, 12)
    assert callback.spikes()[0]["step"] == 12


def test_where_warnings_are_errors_the_one_of_the_fit_is_shown(tmp_path):
    class Full(CSVLogger):
        def log_metrics(self, metrics, step=None):
            raise OSError("no space left on device")

    run = trainer(AutoClip(30), Later(raise_at(4)), logger=Full(tmp_path))
    with pytest.raises(StopError):
        run.fit(Resumable(), DataLoader(range(STEPS)))  # the tests have errors of the callback's warnings


def test_the_same_trainer_goes_on_with_the_steps_that_were_made(tmp_path):
    callback, model = AutoClip(30, window=7, verbose=False), Resumable()
    run = trainer(callback, Later(raise_at(13)), max_epochs=2)
    with pytest.raises(StopError):
        run.fit(model, DataLoader(range(STEPS)))
    assert callback.clippers[0].steps == 13  # the report tells of the step
    run.fit(model, DataLoader(range(STEPS)))
    assert callback.clippers[0].steps == run.global_step
