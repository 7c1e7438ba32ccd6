"""GradientClipping and AutoClip in a Trainer: what raises, what warns, and several optimizers."""

from __future__ import annotations

import math
import pickle
import re
import warnings
from functools import partial
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from helpers import Net, by_percentile, loader, norm_of, trainer, weights
from lightning.fabric.strategies import XLAFSDPStrategy
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LearningRateFinder, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import HalfPrecision, MixedPrecision, Precision, XLAPrecision
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    SingleDeviceXLAStrategy,
    XLAStrategy,
)
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning_utilities.core.imports import RequirementCache
from models import BadBatches, NaNInLastBias, OneBackward, OptimizerPerLayer, WithoutLoss
from torch import nn

from lightning_autoclip import (
    AutoClip,
    Constant,
    GradientClipping,
    NonFiniteGradientError,
    Percentile,
    Policy,
    ZScore,
)
from lightning_autoclip.lightning.strategies import check_precision, check_strategy


def test_a_fixed_threshold_trains_as_lightnings_own_clipping():
    for algorithm, threshold in (("norm", 0.5), ("value", 0.1)):
        ours, lightnings, unclipped = Net(), Net(), Net()
        callback = GradientClipping(Constant(threshold), gradient_clip_algorithm=algorithm)
        trainer(callback).fit(ours, loader())
        trainer(gradient_clip_val=threshold, gradient_clip_algorithm=algorithm).fit(lightnings, loader())
        trainer().fit(unclipped, loader())
        torch.testing.assert_close(weights(ours), weights(lightnings))
        assert not torch.allclose(weights(ours), weights(unclipped))


def test_autoclip_at_100_trains_as_no_clipping_to_the_bit():
    observed, plain = Net(), Net()
    trainer(AutoClip(100)).fit(observed, loader())
    trainer().fit(plain, loader())
    assert torch.equal(weights(observed), weights(plain))


def test_autoclip_is_gradient_clipping_with_a_percentile_and_defaults_that_follow_the_other_arguments():
    preset, general = Net(), Net()
    trainer(AutoClip(30, window=5, warmup_steps=2)).fit(preset, loader())
    rest = {"window": 5, "warmup_steps": 2, "max_update_ratio": 0.25}
    trainer(GradientClipping(Percentile(30), **rest)).fit(general, loader())
    assert torch.equal(weights(preset), weights(general))
    assert AutoClip().policy == Percentile(50, 1.0)
    assert AutoClip(gradient_clip_algorithm="value").policy == Percentile(50, 3.0)
    assert AutoClip(multiplier=2, gradient_clip_algorithm="value").policy == Percentile(50, 2.0)
    only_observes, has_none = {"percentile": 100}, {"max_update_ratio": None}
    clips = [{"multiplier": 0.5}, {"gradient_clip_algorithm": "value"}]
    arguments = ({"percentile": 90}, only_observes, has_none, *(only_observes | each for each in clips))
    assert [AutoClip(**each).settings["max_update_ratio"] for each in arguments] == [0.25, None, None, 0.25, 0.25]
    assert AutoClip(100, max_update_ratio=0.1).settings["max_update_ratio"] == 0.1
    with pytest.raises(TypeError, match="Expected `max_update_ratio` to be a number above 0"):
        AutoClip(max_update_ratio="none")


def test_without_the_update_ratio_limit_and_with_all_steps_it_is_exactly_the_papers_method():
    class Paper(Callback):
        def __init__(self):
            self.norms = []

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            gradients = [p.grad for p in pl_module.parameters()]
            self.norms.append(math.hypot(*[float(each) for each in torch._foreach_norm(gradients)]))
            threshold = float(np.percentile(self.norms, 10))
            if self.norms[-1] > threshold:
                torch._foreach_mul_(gradients, threshold / self.norms[-1])

    ours, theirs = Net(), Net()
    trainer(AutoClip(percentile=10, window=None, max_update_ratio=None), max_epochs=3).fit(ours, loader())
    trainer(Paper(), max_epochs=3).fit(theirs, loader())
    assert torch.equal(weights(ours), weights(theirs))


def test_a_policy_of_ones_own_sets_the_threshold():
    class Quarter(Policy):
        def __call__(self, history):
            return 0.25

    seen = []

    class After(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            seen.append(math.sqrt(sum(float(p.grad.square().sum()) for p in pl_module.parameters())))

    trainer(GradientClipping(Quarter()), After()).fit(Net(), loader(scales=[100.0]))
    assert seen == pytest.approx([0.25] * 16, rel=1e-5)


def test_a_history_that_is_loaded_by_hand_is_the_one_that_the_next_run_continues():
    first, second = AutoClip(), AutoClip()
    trainer(first).fit(Net(), loader())
    second.load_state_dict(first.state_dict())
    trainer(second).fit(Net(), loader())
    assert torch.equal(second.clippers[0].history.values[:16], first.clippers[0].history.values)
    trainer(second).fit(Net(), loader())  # a new run with the same callback begins with an empty history
    assert len(second.clippers[0].history) == 16
    copy = pickle.loads(pickle.dumps(second))  # without the model, whose optimizer is a lambda and does not pickle
    assert torch.equal(copy.clippers[0].history.values, second.clippers[0].history.values)


@pytest.mark.skipif(
    not RequirementCache("pytorch-lightning>=2.6"),
    reason="Before 2.6 its Trainer asks for its own Callback class: tests/test_pytorch_lightning.py has it.",
)
def test_it_works_in_a_trainer_of_pytorch_lightning():
    class Theirs(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Net().net

        training_step, loss = Net.training_step, Net.loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_epochs": 1}
    theirs, ours = Theirs(), Net()
    pl.Trainer(accelerator="cpu", callbacks=[AutoClip(30)], **quiet).fit(theirs, loader())
    trainer(AutoClip(30)).fit(ours, loader())
    assert torch.equal(weights(theirs), weights(ours))
    with pytest.raises(MisconfigurationException, match="would both clip"):
        pl.Trainer(accelerator="cpu", callbacks=[AutoClip()], gradient_clip_val=1.0, **quiet).fit(theirs, loader())


def test_a_callback_shows_its_arguments():
    assert repr(AutoClip(90, window=None)) == (
        "AutoClip(Percentile(percentile=90.0, multiplier=1.0), gradient_clip_algorithm='norm', window=None,"
        " warmup_steps=0, max_threshold=None, max_update_ratio=0.25,"
        " skip_above=None, nonfinite='skip')"
    )


def test_lightnings_own_names_of_the_algorithms_are_plain_strings_in_a_checkpoint(tmp_path):
    run = trainer(AutoClip(gradient_clip_algorithm=GradClipAlgorithmType.VALUE))
    run.fit(Net(), loader())
    run.save_checkpoint(tmp_path / "it.ckpt")
    resumed = AutoClip(gradient_clip_algorithm="value")
    trainer(resumed, max_epochs=2).fit(Net(), loader(), ckpt_path=tmp_path / "it.ckpt")
    assert resumed.clippers[0].steps == 32


def test_what_a_failed_resume_has_loaded_does_not_enter_a_new_run(tmp_path):
    class Failing(Callback):
        def on_train_start(self, trainer, pl_module):
            raise ValueError("not today")

    run = trainer(AutoClip())
    run.fit(Net(), loader())
    run.save_checkpoint(tmp_path / "it.ckpt")
    autoclip = AutoClip()
    with pytest.raises(ValueError, match="not today"):
        trainer(Failing(), autoclip, max_epochs=2).fit(Net(), loader(), ckpt_path=tmp_path / "it.ckpt")
    trainer(autoclip).fit(Net(), loader())
    assert autoclip.clippers[0].steps == 16


@pytest.mark.skipif(
    not RequirementCache("lightning>=2.5.3"),
    reason="Before 2.5.3 Lightning skips, after the search, as many batches as the search took.",
)
@pytest.mark.parametrize("trained", [False, True], ids=["new", "trained"])
def test_the_learning_rate_finder_changes_no_history_and_gives_no_warning(trained):
    autoclip, model = AutoClip(), Net()
    model.lr = 0.1
    if trained:
        trainer(autoclip).fit(Net(), loader())
    run = trainer(autoclip, LearningRateFinder(num_training_steps=5, update_attr=True))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(model, loader())
    assert autoclip.clippers[0].steps == 16
    assert not [w for w in caught if "AutoClip" in str(w.message)]


# --- several optimizers -----------------------------------------------------------------------------------------------


class TwoOptimizers(OneBackward):
    """While one optimizer steps, the other's parameters hold gradients too."""

    def __init__(self) -> None:
        super().__init__(*[partial(torch.optim.SGD, lr=0.1)] * 2)
        self.seen: list[list[tuple[float, float]]] = [[], []]

    def on_before_optimizer_step(self, optimizer) -> None:
        index = self.trainer.optimizers.index(optimizer)
        self.seen[index].append(tuple(norm_of(layer.parameters()) for layer in (self.net[0], self.net[2])))


def test_each_optimizer_has_a_history_of_its_own_and_touches_only_its_own_parameters():
    class Before(Callback):
        def __init__(self) -> None:
            self.norms: list[list[tuple[float, float]]] = [[], []]

        def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
            index = trainer.optimizers.index(optimizer)
            layers = pl_module.net[0], pl_module.net[2]
            self.norms[index].append(tuple(norm_of(layer.parameters()) for layer in layers))

    before, autoclip, model = Before(), by_percentile(40), TwoOptimizers()
    trainer(before, autoclip).fit(model, loader(scales=[1.0, 4.0, 0.5]))
    assert [len(clipper.history) for clipper in autoclip.clippers] == [16, 8]
    for own in (0, 1):
        raw = np.array(before.norms[own])
        np.testing.assert_allclose(autoclip.clippers[own].history.values.numpy(), raw[:, own], rtol=1e-6)
        for i, (was, now) in enumerate(zip(raw, model.seen[own], strict=True)):
            assert now[own] == pytest.approx(min(was[own], np.percentile(raw[: i + 1, own], 40)), rel=1e-5)
            assert now[1 - own] == was[1 - own]


# --- raised at the start of fit ---------------------------------------------------------------------------------------


class ClipsInItsHook(Net):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.clip_gradients(optimizer, 1.0, "norm")


class BringsACallback(Net):
    def configure_callbacks(self):
        return [GradientClipping(ZScore())]


class Twice(torch.optim.SGD):
    def step(self, closure):
        closure()
        return super().step(closure)


@pytest.mark.parametrize(
    ("match", "model", "kwargs"),
    [
        ("`Trainer(gradient_clip_val=1.0)` and `AutoClip` would both clip", Net, {"gradient_clip_val": 1.0}),
        ("give `gradient_clip_algorithm` to the callback", Net, {"gradient_clip_algorithm": "value"}),
        ("a Trainer takes one `AutoClip`. Keep one; for several thresholds use `groups`", BringsACallback, {}),
        ("`ClipsInItsHook.configure_gradient_clipping` is overridden", ClipsInItsHook, {}),
        ("LBFGS", partial(Net, torch.optim.LBFGS), {}),
        ("`Twice` computes its gradients several times per step", partial(Net, partial(Twice, lr=0.1)), {}),
    ],
)
def test_what_would_clip_twice_or_wrongly_raises(match, model, kwargs):
    with pytest.raises(MisconfigurationException, match=re.escape(match)):
        trainer(AutoClip(), **kwargs).fit(model(), loader())


def test_two_clipping_callbacks_in_the_trainer_raise_lightnings_own_error():
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `GradientClipping`"):
        trainer(AutoClip(), GradientClipping(ZScore()))  # they have one `state_key`


def subclass_of(base: type) -> Any:
    """A third party's strategy."""

    class Custom(base):
        def __init__(self) -> None:
            """Starts nothing."""

    return Custom()


@pytest.mark.parametrize(
    "base",
    [SingleDeviceStrategy, DDPStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceXLAStrategy, XLAStrategy],
)
def test_a_subclass_counts_as_the_strategy_that_it_extends(base):
    for algorithm in ("norm", "value"):
        check_strategy(subclass_of(base), algorithm)


@pytest.mark.parametrize(
    ("base", "warns"), [(Precision, True), (MixedPrecision, False), (HalfPrecision, False), (XLAPrecision, False)]
)
def test_an_unknown_precision_plugin_is_warned_of(base, warns):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_precision(subclass_of(base))
        check_precision(Precision())
    assert ["`Custom` is not known" in str(warning.message) for warning in caught] == [True] * warns


def test_deepspeed_clips_by_norm_only():
    check_strategy(subclass_of(DeepSpeedStrategy), "norm")
    with pytest.raises(MisconfigurationException, match=r"Under `Custom` the engine .* clips them by norm only"):
        check_strategy(subclass_of(DeepSpeedStrategy), "value")


@pytest.mark.parametrize("base", [object, XLAFSDPStrategy])
def test_an_unknown_strategy_raises(base):
    with pytest.raises(MisconfigurationException, match=r"does not support the strategy `Custom`.*\"ddp\""):
        check_strategy(subclass_of(base), "norm")


@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        ({"percentile": 101}, ValueError, "percentile"),
        ({"percentile": math.nan}, ValueError, "percentile"),
        ({"percentile": True}, TypeError, "percentile"),
        ({"percentile": "10"}, TypeError, "percentile"),
        ({"multiplier": 0}, ValueError, "multiplier"),
        ({"window": 0}, ValueError, "window"),
        ({"window": 2.5}, TypeError, "window"),
        ({"warmup_steps": -1}, ValueError, "warmup_steps"),
        ({"max_threshold": 0}, ValueError, "max_threshold"),
        ({"gradient_clip_algorithm": "l2"}, ValueError, "gradient_clip_algorithm"),
        ({"nonfinite": "warn"}, ValueError, "nonfinite"),
        ({"log_every_step": 1}, TypeError, "log_every_step"),
    ],
    ids=repr,
)
def test_a_bad_argument_raises_at_construction(arguments, error, name):
    with pytest.raises(error, match=f"Expected `{name}` to be"):
        AutoClip(**arguments)


# --- warnings ---------------------------------------------------------------------------------------------------------


def test_steps_of_the_raw_optimizer_are_warned_of():
    class Raw(TwoOptimizers):
        def training_step(self, batch, batch_idx) -> None:
            first, second = self.optimizers()
            self.manual_backward(self.loss(batch))
            first.step()
            second.optimizer.step()

    with pytest.warns(
        UserWarning, match=r"saw none of the 16 steps of `SGD-1` so far: none was.*not `optimizer\.optimizer\.step\(\)`"
    ):
        trainer(AutoClip()).fit(Raw(), loader())


@pytest.mark.parametrize("at", [range(3, 16), [2]], ids=["diverged", "once"])
@pytest.mark.parametrize(("nonfinite", "done"), [("skip", "skipped"), ("ignore", "applied as they were")])
def test_nonfinite_steps_are_warned_of_when_they_are_logged_and_at_the_end(at, nonfinite, done):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        diverging = BadBatches(dict.fromkeys(at, math.nan))
        trainer(AutoClip(nonfinite=nonfinite), log_every_n_steps=4).fit(diverging, loader())
    found = [str(w.message) for w in caught if "had non-finite gradients (NaN or Inf)" in str(w.message)]
    logged = "1 of 4" if nonfinite == "skip" or len(at) > 1 else "2 of 4"
    total = 16 - min(at) if nonfinite == "ignore" else len(at)  # once applied, a NaN stays
    expected = [logged] if (total, logged) == (1, "1 of 4") else [logged, f"{total} of 16"]
    assert [message.partition(" optimizer steps")[0] for message in found] == expected
    assert all(done in message for message in found)


def test_an_ordinary_fit_gives_no_warning_of_ours():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(AutoClip()).fit(Net(), loader())
    assert not [str(w.message) for w in caught if "AutoClip" in str(w.message) or "lightning_autoclip" in w.filename]


# --- steps that are none, or non-finite -------------------------------------------------------------------------------


def test_averaging_of_batchnorm_statistics_is_no_step():
    class Normed(Net):
        def __init__(self) -> None:
            super().__init__()
            self.net.insert(1, nn.BatchNorm1d(8))

    autoclip = AutoClip()
    trainer(autoclip, StochasticWeightAveraging(0.05, swa_epoch_start=1), max_epochs=3).fit(Normed(), loader())
    assert len(autoclip.clippers[0].history) == 3 * 16  # the pass over the data at the end takes no step


@pytest.mark.parametrize(("at", "bad"), [(0, math.nan), (5, math.inf), (15, math.nan)], ids=["first", "middle", "last"])
def test_a_bad_batch_is_skipped_as_if_it_had_not_been_there(bad, at):
    spoiled, without = BadBatches({at: bad}), WithoutLoss([at])
    callbacks = [AutoClip(), AutoClip()]
    for model, callback in zip((spoiled, without), callbacks, strict=True):
        trainer(callback).fit(model, loader())
    assert torch.equal(weights(spoiled), weights(without))
    assert torch.equal(*(callback.clippers[0].history.values for callback in callbacks))
    assert [callback.clippers[0].nonfinite_steps for callback in callbacks] == [1, 0]


def test_raise_names_step_batch_and_parameters(tmp_path):
    clipping = AutoClip(nonfinite="raise")
    where = r"At optimizer step 19 \(epoch 1, batch 3\): .* is nan: .* of 1 of 4 parameters\. They are: net\.2\.bias\."
    with pytest.raises(NonFiniteGradientError, match=where):
        trainer(clipping, max_epochs=2, logger=CSVLogger(tmp_path)).fit(NaNInLastBias(1, 3), loader())
    assert clipping.clippers[0].steps == 19  # the step that raises is not made
    (health,) = tmp_path.rglob("autoclip_health.txt")
    assert health.read_text() == "stopped at non-finite gradients\n"
    assert all(row["skipped"] == "" for row in clipping.spikes())


def test_raise_names_the_step_of_the_loggers_and_all_batches_of_an_accumulation():
    class Bad(Net):
        def on_after_backward(self):
            if self.trainer.fit_loop.epoch_loop.batch_idx == 6:
                self.net[0].weight.grad[0, 0] = math.nan

    where = r"At optimizer step 3 \(epoch 0, batch 6 to 7\): .*net\.0\.weight"
    with pytest.raises(NonFiniteGradientError, match=where):
        trainer(AutoClip(50, nonfinite="raise"), accumulate_grad_batches=2).fit(Bad(), loader())


def test_raise_counts_steps_as_the_report_does_with_two_optimizers():
    class Bad(OptimizerPerLayer):
        def training_step(self, batch, batch_idx):
            super().training_step([*batch[:2], batch[2] * math.nan] if batch_idx == 5 else batch, batch_idx)

    sgd = partial(torch.optim.SGD, lr=0.01)
    with pytest.raises(NonFiniteGradientError, match=r"At optimizer step 5 \(epoch 0, batch 5\)"):
        trainer(AutoClip(50, nonfinite="raise")).fit(Bad(sgd, sgd), loader())
