"""Runs that ended early, were not clipped or were reported wrongly in silence: each continues, or warns."""

from __future__ import annotations

import math
import warnings
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Net, loader, norm_of, trainer, weights, with_gradient
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities import grad_norm
from models import BadBatches, Gradients, Manual, Noting, WithoutLoss
from torch import nn
from torch.optim import SGD, Adam, AdamW

from lightning_autoclip import AutoClip, Constant, GradientClipper, Percentile


class Stepping(Manual):
    """Manual optimization with what :meth:`step` makes of it."""

    batches = 0

    def training_step(self, batch, batch_idx) -> None:
        self.batches += 1
        optimizer = self.optimizers()
        self.zero_grad()
        self.manual_backward(self.loss(batch))
        self.step(optimizer, batch_idx)

    def step(self, optimizer, batch_idx) -> None:
        optimizer.step()


def ours(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in caught if "AutoClip" in str(w.message)]


def warnings_of(model: Net, **kwargs: Any) -> list[str]:
    """Our warnings in a fit with a row at every second step."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(AutoClip(10), log_every_n_steps=2, **kwargs).fit(model, loader())
    return ours(caught)


def sgd(parameters, **kwargs: Any) -> SGD:
    return SGD(parameters, lr=0.1, **kwargs)


# --- optimizers that change in mid-fit --------------------------------------------------------------------------------


@pytest.mark.parametrize(("way", "model"), [("assigned", "manual"), ("in the list", "automatic")])
def test_an_optimizer_that_takes_anothers_place_in_mid_fit_continues_its_history(way, model):
    class Exchanging(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 5:
                new = AdamW(pl_module.parameters(), lr=0.01)
                if way == "assigned":
                    trainer.optimizers = [new]
                else:
                    trainer.optimizers[0] = new

    before, after, autoclip = Gradients(), Gradients(), AutoClip(40)
    run = trainer(before, Exchanging(), autoclip, after)
    run.fit(Stepping(sgd) if model == "manual" else Net(sgd), loader(scales=[1.0, 5.0]))
    assert run.fit_loop.epoch_loop.batch_progress.total.completed == 16
    assert autoclip.clippers[0].steps == 16
    assert autoclip.clippers[0].history.values.tolist() == pytest.approx(before.norms, rel=1e-5)
    assert max(after.norms) < max(before.norms)


@pytest.mark.parametrize("bad", [math.nan, 1000.0], ids=["non-finite", "outlier"])
@pytest.mark.parametrize("model", [Net, Stepping])
@pytest.mark.parametrize("fused", [False, True])
def test_the_first_step_of_an_optimizer_that_takes_anothers_place_can_be_skipped(model, bad, fused):
    class Exchanging(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 25:
                trainer.strategy.optimizers = [SGD(pl_module.parameters(), lr=0.1, momentum=0.9, fused=fused)]
                self.before = weights(pl_module)

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 25:
                assert torch.equal(weights(pl_module), self.before)

    scales, autoclip = [1.0] * 50 + [bad] * 2 + [1.0] * 12, AutoClip(90, skip_above=20.0)
    net = model(sgd)
    trainer(Exchanging(), autoclip).fit(net, loader(2, scales=scales))
    assert autoclip.clippers[0].steps == 32
    assert [row["step"] for row in autoclip.spikes() if row["skipped"]] == [25]
    assert weights(net).isfinite().all()


def test_an_optimizer_that_joins_in_mid_fit_gets_a_history_of_its_own():
    class Growing(Stepping):
        def step(self, optimizer, batch_idx):
            if batch_idx == 4:
                self.trainer.optimizers = [self.trainer.optimizers[0], Adam(self.net[2].parameters(), lr=0.01)]
            for each in optimizer if isinstance(optimizer, list) else [optimizer]:
                each.step()

    autoclip = AutoClip(40)
    run = trainer(autoclip, log_every_n_steps=4)
    run.fit(Growing(lambda parameters: SGD(list(parameters)[:2], lr=0.1)), loader())
    assert {key: log.names for key, log in autoclip.logs.items()} == {
        "autoclip/": ["net.0.weight", "net.0.bias"],
        "autoclip/Adam/": ["net.2.weight", "net.2.bias"],
    }
    assert [clipper.steps for clipper in autoclip.clippers] == [16, 11]
    assert run.callback_metrics["autoclip/Adam/grad_norm"] > 0


class Doubling(torch.optim.Optimizer):
    """A wrapper around an optimizer, in an attribute that no package uses."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner, self.param_groups, self.state, self.defaults = inner, inner.param_groups, inner.state, {}

    def step(self, closure=None):
        return self.inner.step(closure)

    def zero_grad(self, set_to_none=True):
        self.inner.zero_grad(set_to_none)


def test_an_optimizer_that_wraps_one_of_the_trainers_is_clipped_in_its_place():
    class Wrapping(Stepping):
        def step(self, optimizer, batch_idx):
            wrapper = LightningOptimizer(Doubling(self.trainer.optimizers[0]))
            wrapper._strategy = self.trainer.strategy
            wrapper.step()

    before, autoclip = Gradients(), AutoClip(40)
    model = Wrapping(sgd)
    trainer(before, autoclip).fit(model, loader(scales=[1.0, 5.0]))
    assert model.batches == autoclip.clippers[0].steps == 16
    assert autoclip.clippers[0].history.values.tolist() == pytest.approx(before.norms, rel=1e-5)


def test_an_optimizer_that_is_in_no_place_of_the_trainer_raises():
    class Foreign(Stepping):
        def step(self, optimizer, batch_idx):
            other = LightningOptimizer(AdamW(self.parameters()))
            other._strategy = self.trainer.strategy
            other.step()

    with pytest.raises(MisconfigurationException, match=r"`AdamW` steps, but it neither is one of `trainer\."):
        trainer(AutoClip()).fit(Foreign(), loader())


def test_a_run_that_an_optimizer_has_joined_is_resumed(tmp_path):
    class Growing(Stepping):
        def step(self, optimizer, batch_idx):
            if (self.current_epoch, batch_idx) in ((0, 4), (1, 4)):
                self.trainer.optimizers = [self.trainer.optimizers[0], Adam(self.net[2].parameters(), lr=0.01)]
            for each in optimizer if isinstance(optimizer, list) else [optimizer]:
                each.step()

        def configure_optimizers(self):
            return SGD(list(self.parameters())[:2], lr=0.1)

        def on_save_checkpoint(self, checkpoint):
            del checkpoint["optimizer_states"][1:]  # Lightning takes back only what is configured

    first, second = AutoClip(40), AutoClip(40)
    run = trainer(first)
    run.fit(Growing(), loader())
    run.save_checkpoint(tmp_path / "it.ckpt")
    trainer(second, max_epochs=2).fit(Growing(), loader(), ckpt_path=tmp_path / "it.ckpt")
    assert list(second.logs) == list(first.logs) == ["autoclip/", "autoclip/Adam/"]
    assert [clipper.steps for clipper in second.clippers] == [32, 22]


# --- steps that are not clipped ---------------------------------------------------------------------------------------


class Counting(Callback):
    """Counts our warnings after each batch."""

    def __init__(self, caught: list[warnings.WarningMessage]) -> None:
        self.caught, self.after = caught, list[int]()

    def on_train_batch_end(self, *args: Any) -> None:
        self.after.append(len(ours(self.caught)))


class WithinTheBackwardPass(Net):
    """Each parameter is stepped as soon as its gradient is there; Lightning's optimizer is a dummy."""

    def configure_optimizers(self):
        inner = {parameter: SGD([parameter], lr=0.1) for parameter in self.parameters()}

        def step(parameter):
            inner[parameter].step()
            parameter.grad = None

        for parameter in self.parameters():
            parameter.register_post_accumulate_grad_hook(step)
        return SGD([nn.Parameter(torch.zeros(1))], lr=0.1)


class MasterCopies(Net):
    """The optimizer has copies of the weights, which get their gradients within its step."""

    def configure_optimizers(self):
        model = list(self.parameters())

        class Copying(SGD):
            def step(self, closure=None):
                loss = closure()
                for copied, parameter in zip(self.param_groups[0]["params"], model, strict=True):
                    copied.grad = parameter.grad
                super().step()
                for copied, parameter in zip(self.param_groups[0]["params"], model, strict=True):
                    parameter.data.copy_(copied.data)
                    copied.grad = None
                return loss

        return Copying([nn.Parameter(parameter.detach().clone()) for parameter in model], lr=0.1)


class RawSteps(Stepping):
    def step(self, optimizer, batch_idx):
        optimizer.optimizer.step()


class Shim(Stepping):
    """Something else trains; what Lightning was given is never stepped."""

    def configure_optimizers(self):
        self.real = SGD(self.parameters(), lr=0.1)
        return SGD([nn.Parameter(torch.zeros(1))], lr=0.1)

    def step(self, optimizer, batch_idx):
        self.real.step()


class Rewriting(Doubling):
    """Writes gradients anew inside its own step, as Opacus' optimizer."""

    def step(self, closure=None):
        loss = None if closure is None else closure()
        for parameter in self.param_groups[0]["params"]:
            parameter.grad = parameter.grad + 0.01
        self.inner.step()
        return loss


def rewriting(model):
    return lambda: model(lambda parameters: Rewriting(sgd(parameters)))


class ClipsInItsHook(Net):
    """Its hook runs after those of callbacks."""

    def on_before_optimizer_step(self, optimizer):
        nn.utils.clip_grad_norm_(self.parameters(), 0.1)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (WithinTheBackwardPass, "saw 4 steps of `SGD` so far, and none of its parameters had a gradient"),
        (MasterCopies, "saw 4 steps of `Copying` so far, and none of its parameters had a gradient"),
        (RawSteps, "saw none of the 4 steps of `SGD` so far"),
        (Shim, "saw no step of `SGD` so far"),
        (rewriting(Net), "clips gradients that `Rewriting` does not use: at 4 of 4 steps"),
        (rewriting(Stepping), "clips gradients that `Rewriting` does not use: at 4 of 4 steps"),
        (ClipsInItsHook, "clips gradients that `SGD` does not use: at 4 of 4 steps"),
    ],
)
def test_an_optimizer_whose_steps_are_not_clipped_is_named_within_the_first_rows(model, why):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(AutoClip(), counting := Counting(caught), log_every_n_steps=4).fit(model(), loader(n=240))
    (warning,) = ours(caught)
    assert warning.startswith(f"`AutoClip` {why}")
    assert counting.after[51 if model is Shim else 3] == 1  # gradients may be accumulated by hand for a while


@pytest.mark.parametrize("model", [BadBatches, Stepping], ids=["automatic", "manual"])
@pytest.mark.filterwarnings("ignore:.*clips gradients that `Rewriting` does not use")
def test_a_nan_moves_no_weight_where_the_optimizer_writes_gradients_anew(model):
    class Spoiled(model):
        def loss(self, batch):
            return super().loss(batch) * (math.nan if len(after) == 3 else 1.0)

    after, net = [], Spoiled(optimizer=lambda parameters: Rewriting(sgd(parameters)))

    class Watch(Callback):
        def on_train_batch_end(self, *args):
            after.append(weights(net).clone())

    trainer(AutoClip(), Watch()).fit(net, loader(n=24))
    assert [torch.equal(before, now) for before, now in pairwise(after)] == [False, False, True, False, False]


def with_scaler(init_scale: float = 2.0, **kwargs: Any) -> dict[str, Any]:
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, **kwargs)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}


@pytest.mark.parametrize("fused", [False, True], ids=["ordinary", "fused"])
@pytest.mark.parametrize("case", ["plain", "scaler", "accumulation"])
def test_an_ordinary_run_gives_no_warning(form, case, fused):
    options = {"plain": {}, "scaler": with_scaler(1024.0), "accumulation": {"accumulate_grad_batches": 3}}[case]
    for model in (Net, Stepping) if case == "plain" else (Net,):
        assert warnings_of(model(lambda parameters: sgd(parameters, momentum=0.9, fused=fused)), **options) == []


def test_an_optimizer_that_begins_late_is_not_warned_of_unless_it_never_steps():
    class Alternating(Stepping):
        last = 12

        def configure_optimizers(self):
            return [SGD(self.net[i].parameters(), lr=0.1) for i in (0, 2)]

        def step(self, optimizers, batch_idx):
            optimizers[0].step()
            if batch_idx >= self.last:
                optimizers[1].step()

    class Never(Alternating):
        last = 99

    assert warnings_of(Alternating()) == []
    assert [message.partition(" so far")[0] for message in warnings_of(Never())] == [
        "`AutoClip` saw no step of `SGD-1`"
    ]


class ByHand(Stepping):
    def step(self, optimizer, batch_idx):
        if batch_idx % 8 == 7:
            optimizer.step()


@pytest.mark.parametrize("model", [ByHand, lambda optimizer: WithoutLoss(range(6), optimizer)])
def test_a_run_that_steps_seldom_is_not_warned_of(model):
    assert warnings_of(model(sgd)) == []


@pytest.mark.parametrize("off", [0, -1.0])
def test_lightnings_ways_to_say_that_it_does_not_clip_are_accepted(off):
    trainer(autoclip := AutoClip(), gradient_clip_val=off).fit(Net(), loader(n=8))
    assert autoclip.clippers[0].steps == 2


def test_an_iterator_of_parameters_that_is_used_up_is_warned_of():
    clipper, parameters = GradientClipper(Constant(1.0)), iter([with_gradient([3.0, 4.0])])
    assert clipper.clip_(parameters).norm == 5
    with pytest.warns(UserWarning, match="`clip_` got no parameters, so nothing was clipped"):
        assert clipper.clip_(parameters) is None


# --- batches of a step ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("accumulate", "batches"), [(1, "0"), (4, "0-3")])
def test_a_step_after_an_epoch_that_ended_early_names_its_own_batches(accumulate, batches):
    class EndsEarly(Net):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if (self.current_epoch, batch_idx) == (0, 6) else None

        def loss(self, batch):
            at = self.current_epoch, self.trainer.fit_loop.epoch_loop.batch_idx
            return super().loss(batch) * (math.nan if at == (1, 0) else 1.0)

    autoclip = AutoClip()
    trainer(autoclip, max_epochs=2, accumulate_grad_batches=accumulate).fit(EndsEarly(), loader())
    (spike,) = (row for row in autoclip.spikes() if row["skipped"] == "non-finite")
    assert (spike["epoch"], spike["batches"]) == (1, batches)


def test_a_step_whose_gradients_were_zeroed_since_names_the_batches_that_are_left():
    class EveryThird(Net):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
            if batch_idx % 3 == 2:
                super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
            else:
                optimizer_closure()  # which zeroes gradients first

    autoclip = AutoClip()
    trainer(autoclip).fit(EveryThird(), loader())
    assert {row["batches"] for row in autoclip.spikes()} == {"2", "5", "8", "11", "14"}


@pytest.mark.parametrize("automatic", [True, False], ids=["automatic", "manual"])
def test_a_step_names_the_batch_that_was_taken_from_the_iterator(automatic):
    class Taking(Net):
        def __init__(self) -> None:
            super().__init__(sgd)
            self.automatic_optimization, self.norms = automatic, dict[tuple[int, str], float]()

        def training_step(self, dataloader_iter):
            batch, self.taken, _ = next(dataloader_iter)
            if automatic:
                return self.loss(batch)
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()
            return None

        def on_after_backward(self) -> None:
            self.norms[self.current_epoch, str(self.taken)] = norm_of(self.parameters())

    model, autoclip = Taking(), AutoClip()
    trainer(autoclip, max_epochs=2).fit(model, loader(n=40, scales=[1.0, 3.0, 0.5]))
    assert len(model.norms) == 20
    rows = {(row["epoch"], row["batches"]): row["norm"] for row in autoclip.spikes()}
    assert rows == pytest.approx(model.norms, rel=1e-5)


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_a_learning_rate_of_1_is_one_of_1_0():
    """The limit regards a tenth of the rate that a schedule was made with."""
    clipped = []
    for lr in (1, 1.0):
        weight = nn.Parameter(torch.ones(2, 2))
        optimizer = SGD([weight], lr=lr, momentum=0.9)
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.001)
        weight.grad = torch.full((2, 2), 8.0)
        GradientClipper(Percentile(100), max_update_ratio=0.25).clip_(optimizer)
        clipped.append(weight.grad.tolist())
    assert clipped[0] == clipped[1] == [pytest.approx([0.25, 0.25], rel=1e-6)] * 2  # of 1: 10 times a tenth of the rate


@pytest.mark.parametrize("percentile", [np.int64(100), np.float32(100)], ids=["int64", "float32"])
def test_numpys_100_only_observes_too(percentile):
    assert AutoClip(percentile).settings["max_update_ratio"] is None


def test_no_element_of_a_float64_gradient_is_left_above_a_constant_threshold(form):
    parameter = with_gradient([1.0, -1.0, 0.1, 0.3], torch.float64)
    GradientClipper(Constant(0.3), gradient_clip_algorithm="value").clip_([parameter])
    assert parameter.grad.abs().max() <= 0.3


# --- scalers ----------------------------------------------------------------------------------------------------------


class Accelerated:
    """As Accelerate's wrapper: not Lightning's, and not the object that the scaler knows."""

    def __init__(self, optimizer) -> None:
        self.optimizer, self.step = optimizer, optimizer.step

    @property
    def param_groups(self):
        return self.optimizer.param_groups


class ByAnotherName(Accelerated):
    def __init__(self, optimizer) -> None:
        self._base, self.step = optimizer, optimizer.step

    @property
    def param_groups(self):
        return self._base.param_groups


@pytest.mark.parametrize(
    ("wrapper", "fused", "unscale"),
    [
        (Accelerated, False, "outside"),
        (Accelerated, True, "not"),
        (ByAnotherName, True, "inside"),
        (lambda optimizer: Accelerated(ByAnotherName(optimizer)), False, "not"),
        (lambda optimizer: Accelerated(ByAnotherName(optimizer)), True, "outside"),
    ],
)
def test_a_wrapped_optimizer_is_measured_at_its_true_scale_whichever_of_both_the_scaler_knows(
    form, wrapper, fused, unscale
):
    weight = nn.Parameter(torch.zeros(2))
    optimizer, scaler = SGD([weight], lr=1.0, fused=fused), torch.amp.GradScaler("cpu", init_scale=1024.0)
    wrapped = wrapper(optimizer)
    scaler.scale((weight * torch.tensor([3.0, 4.0])).sum()).backward()
    if unscale != "not":
        scaler.unscale_(wrapped if unscale == "outside" else optimizer)
    record = GradientClipper(Constant(1.0)).clip_(wrapped, scaler)
    assert float(record.norm) == 5
    scaler.step(optimizer)
    scaler.update()
    assert weight.tolist() == pytest.approx([-0.6, -0.8])


@pytest.mark.parametrize("fused", [False, True], ids=["ordinary", "fused"])
def test_a_scaler_on_two_devices_gets_one_overflow(fused):
    """The scaler adds up what it finds per device, and fused kernels skip at exactly 1."""
    weight = nn.Parameter(torch.ones(2))
    optimizer, scaler = AdamW([weight], lr=0.1, fused=fused), torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale((weight * math.inf).sum()).backward()
    scaler.unscale_(optimizer)
    found = scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
    found[torch.device("meta")] = torch.ones(())  # stands for a second device that has found it too
    GradientClipper(Constant(1.0)).clip_(optimizer, scaler)
    scaler.step(optimizer)
    assert weight.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("enabled", [True, False])
def test_a_scaler_that_is_disabled_hides_no_nonfinite_step(enabled):
    autoclip, model = AutoClip(), BadBatches({3: math.nan, 9: math.nan})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(autoclip, **with_scaler(enabled=enabled)).fit(model, loader())
    assert bool([w for w in caught if "2 of 16 optimizer steps" in str(w.message)]) == (not enabled)
    names = [diagnosis.name for diagnosis in autoclip.report().diagnoses]
    assert names == ([] if enabled else ["non-finite gradients"])
    assert autoclip.clippers[0].nonfinite_steps == 2


@pytest.mark.parametrize("fused", [False, True], ids=["ordinary", "fused"])
def test_an_optimizer_that_refers_to_another_does_not_wrap_it(form, fused):
    ours_, theirs = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    first, second = (SGD([weight], lr=1.0, fused=fused) for weight in (ours_, theirs))
    first.partner, scaler = second, torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale((ours_ * torch.tensor([3.0, 4.0]) + theirs * torch.tensor([6.0, 8.0])).sum()).backward()
    norms = [float(GradientClipper(Constant(1.0)).clip_(optimizer, scaler).norm) for optimizer in (first, second)]
    for optimizer in (first, second):
        scaler.step(optimizer)
    scaler.update()
    assert norms == [5, 10]
    assert ours_.tolist() == theirs.tolist() == pytest.approx([-0.6, -0.8])


# --- skipped steps ----------------------------------------------------------------------------------------------------


def read_by(module, batch_idx) -> list[Any]:
    gradients = [parameter.grad for parameter in module.parameters()]
    total = torch.nn.utils.get_total_norm(gradients)
    return [batch_idx, float(total), float(grad_norm(module, 2)["grad_2.0_norm_total"])]


class Reading(Callback):
    """Reads gradients in the hook behind the clipping callback, and after the step."""

    def __init__(self) -> None:
        self.read: list[Any] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self.read.append(read_by(pl_module, "before"))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.read.append(read_by(pl_module, "after"))


@pytest.mark.parametrize(
    ("model", "fused", "scaled", "at"),
    [(Net, False, False, 0), (Net, True, True, 5), (Manual, True, False, 0), (Manual, False, True, 5)],
    ids=["automatic", "automatic-fused-scaler", "manual-fused", "manual-scaler"],
)
def test_callbacks_that_read_gradients_at_a_skipped_step_see_what_lightning_shows(form, model, fused, scaled, at):
    class Spoiled(model):
        def loss(self, batch):
            self.seen = getattr(self, "seen", -1) + 1
            return super().loss(batch) * (math.nan if self.seen == at else 1.0)

    def fit(*callbacks):
        reading, net = Reading(), Spoiled(lambda parameters: sgd(parameters, momentum=0.9, fused=fused))
        trainer(*callbacks, reading, max_steps=at + 1, **(with_scaler() if scaled else {})).fit(net, loader())
        return net, reading.read

    plain, shown = fit()
    clipped, read = fit(AutoClip(100))
    if fused and scaled:  # plain Lightning shows them still scaled before the step, which unscales them
        shown = [[when, *(norm / (2 if when == "before" else 1) for norm in norms)] for when, *norms in shown]
    assert len(read) == len(shown)
    for (when, *seen), (then, *expected) in zip(read, shown, strict=True):
        assert when == then
        assert seen == pytest.approx(expected, rel=1e-5, nan_ok=True)
    assert weights(clipped).isfinite().all()
    assert bool(weights(plain).isfinite().all()) == scaled


def test_a_skipped_step_of_a_subclass_that_calls_its_parent_moves_nothing(form):
    class Noisy(SGD):
        def step(self, closure=None):
            loss = super().step(closure)
            for parameter in self.param_groups[0]["params"]:
                if parameter.grad is not None:
                    parameter.data.add_(parameter.grad, alpha=-0.01)
            return loss

    SGD([nn.Parameter(torch.zeros(1))], lr=0.1)  # now both classes have torch's hooks
    model, autoclip = BadBatches({3: math.nan}, lambda parameters: Noisy(parameters, lr=0.1)), AutoClip()
    trainer(autoclip).fit(model, loader())
    assert weights(model).isfinite().all()
    assert (autoclip.clippers[0].steps, autoclip.clippers[0].nonfinite_steps) == (16, 1)


def test_a_skipped_step_that_was_never_made_skips_no_later_one():
    class GivingUp(Stepping):
        def loss(self, batch):
            return super().loss(batch) * (math.nan if self.batches == 4 else 1.0)

        def step(self, optimizer, batch_idx):
            if batch_idx == 3:
                self.trainer.precision_plugin._after_closure(self, optimizer.optimizer)  # the hooks, and no step
            else:
                optimizer.optimizer.step()

    model, after = GivingUp(sgd), []

    class Watch(Callback):
        def on_train_batch_end(self, *args):
            after.append(weights(model).clone())

    with pytest.warns(UserWarning, match="saw 1 of the 16 steps of `SGD`"):
        trainer(AutoClip(), Watch()).fit(model, loader())
    moved = [not torch.equal(before, now) for before, now in pairwise(after)]
    assert moved == [i != 2 for i in range(15)]


@pytest.mark.parametrize("every", [1, 5])
def test_early_stopping_does_not_end_a_run_for_a_skipped_step(form, every):
    stop = EarlyStopping("autoclip/grad_norm", patience=10, check_on_train_epoch_end=True)
    run = trainer(AutoClip(), stop, max_epochs=3, log_every_n_steps=every)
    run.fit(BadBatches({15: math.nan}), loader())
    assert run.current_epoch == 3


# --- figures in `trainer.callback_metrics` ----------------------------------------------------------------------------


def spiky(at: int) -> Noting:
    """The loss of one batch is a thousand times that of the others."""
    return Noting({at: 1000.0}, lambda parameters: SGD(parameters, lr=1e-4))


def test_a_checkpoint_that_monitors_a_figure_sees_that_of_its_own_step(form, tmp_path):
    model = spiky(57)
    checkpoints = ModelCheckpoint(
        tmp_path, "{step}", monitor="autoclip/grad_norm_max", mode="max", every_n_train_steps=10, save_top_k=1
    )
    trainer(AutoClip(100), checkpoints, enable_checkpointing=True, log_every_n_steps=50).fit(model, loader(n=400))
    assert checkpoints.best_model_path.endswith("step=60.ckpt")
    assert float(checkpoints.best_model_score) == pytest.approx(model.norms[57], rel=1e-5)


class Reporter(Callback):
    """Notes the figures at each call of a hook."""

    def __init__(self, when: str) -> None:
        self.read: list[tuple[int, dict[str, Any]]] = []
        setattr(self, when, self.note)

    def note(self, trainer, *args):
        if not trainer.sanity_checking:
            self.read.append((trainer.global_step, dict(trainer.callback_metrics)))

    def of(self, key: str) -> dict[int, float]:
        return {step: float(metrics[key]) for step, metrics in self.read}


@pytest.mark.parametrize(("first", "when"), [(True, "on_train_epoch_end"), (False, "on_validation_end")])
def test_a_callback_at_the_end_of_an_epoch_reads_the_figures_of_its_last_step(form, first, when):
    model, autoclip, reporter = spiky(2), AutoClip(100), Reporter(when)
    model.validation_step = lambda batch, batch_idx: None
    callbacks = [reporter, autoclip] if first else [autoclip, reporter]
    run = trainer(*callbacks, max_epochs=2, log_every_n_steps=50)
    run.fit(model, loader(n=20), loader(n=4))
    expected = {step: model.norms[step - 1] for step in (5, 10)}
    assert reporter.of("autoclip/grad_norm") == pytest.approx(expected, rel=1e-5)
    assert float(run.callback_metrics["autoclip/grad_norm_mean"]) == pytest.approx(sum(model.norms) / 10, rel=1e-5)


def test_a_validation_within_an_epoch_reads_the_figures_of_the_steps_so_far(form):
    model, reporter = spiky(2), Reporter("on_validation_end")
    model.validation_step = lambda batch, batch_idx: None
    trainer(reporter, AutoClip(100), log_every_n_steps=50, val_check_interval=4).fit(model, loader(n=40), loader(n=4))
    expected = {step: max(model.norms[:step]) for step in (4, 8)}
    assert reporter.of("autoclip/grad_norm_max") == pytest.approx(expected, rel=1e-5)


def test_between_two_rows_the_figures_are_those_of_the_last_one(form):
    model, reporter = spiky(2), Reporter("on_train_batch_end")
    trainer(AutoClip(100), reporter, log_every_n_steps=4).fit(model, loader(n=40))
    known = {step: metrics["autoclip/grad_norm"] for step, metrics in reporter.read if "autoclip/grad_norm" in metrics}
    expected = {step: model.norms[step - step % 4 - 1] for step in range(4, 10)} | {10: model.norms[9]}
    assert known == pytest.approx(expected, rel=1e-5)


def test_the_figures_are_plain_tensors_of_which_a_finite_one_stays(form):
    """A callback that stops a run at a NaN must not stop it for a skipped step."""
    model, reporter = BadBatches({6: math.nan, 7: math.nan}), Reporter("on_train_batch_end")
    trainer(AutoClip(warmup_steps=100, max_update_ratio=None), reporter, log_every_n_steps=2).fit(model, loader(n=40))
    metrics = dict(reporter.read)
    assert all(
        type(each[key]) is torch.Tensor for each in metrics.values() for key in each if key.startswith("autoclip/")
    )
    assert all(value.dtype == torch.float32 for value in metrics[10].values())
    norms = {step: metrics["autoclip/grad_norm"] for step, metrics in reporter.read if step >= 2}
    assert norms[8] == norms[6] != norms[10]
    assert metrics[8]["autoclip/nonfinite_total"] == 2
    assert math.isnan(metrics[10]["autoclip/threshold"])  # during the warm-up nothing is clipped


def test_early_stopping_may_read_in_an_epoch_without_a_row():
    stop = EarlyStopping("autoclip/grad_norm", patience=3, check_on_train_epoch_end=True)
    trainer(stop, AutoClip(), log_every_n_steps=50, max_epochs=2).fit(Net(), loader())
    assert stop.best_score.isfinite()


def test_a_run_of_which_only_the_first_step_is_read_by_the_host_is_logged_whole(form):
    """Fused SGD allocates its momentum at the first step, which only the host can skip."""
    model = Noting(optimizer=lambda parameters: sgd(parameters, momentum=0.9, fused=True))
    run = trainer(autoclip := AutoClip(40), log_every_n_steps=50)
    run.fit(model, loader())
    assert float(run.callback_metrics["autoclip/grad_norm_mean"]) == pytest.approx(sum(model.norms) / 16, rel=1e-5)
    assert [row.statistic_max for row in autoclip.logs["autoclip/"].bins] == pytest.approx(model.norms, rel=1e-5)


# --- parameters -------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
@pytest.mark.parametrize("groups", [None, "param_groups"], ids=["whole", "groups"])
def test_a_parameter_that_an_optimizer_lists_twice_is_counted_and_scaled_once(form, groups):
    twice, other = with_gradient([3.0, 4.0]), with_gradient([12.0])
    record = GradientClipper(Constant(6.5)).clip_(SGD([twice, twice, other], lr=0.1))
    assert float(record.norm) == 13
    assert norm_of([twice, other]) == pytest.approx(6.5)

    listing_twice = lambda parameters: SGD([*(each := list(parameters)), each[0]], lr=0.01)  # noqa: E731
    model, autoclip = Noting(optimizer=listing_twice), AutoClip(40, groups=groups)
    trainer(autoclip).fit(model, loader())
    assert autoclip.clippers[0].history.values.tolist() == pytest.approx(model.norms, rel=1e-5)
    assert [log.names for log in autoclip.logs.values()] == [
        ["net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias"]
    ]


@pytest.mark.parametrize(("algorithm", "log_layers"), [("norm", True), ("value", False)])
def test_a_lazy_module_trains_and_its_sizes_are_known_once_it_has_them(algorithm, log_layers):
    class Lazy(Net):
        def __init__(self) -> None:
            super().__init__(sgd)
            self.net = nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.LazyLinear(1))

    autoclip, model = AutoClip(40, gradient_clip_algorithm=algorithm, log_layers=log_layers), Lazy()
    trainer(autoclip).fit(model, loader())
    assert autoclip.clippers[0].steps == 16
    assert autoclip.logs["autoclip/"].numels == [32, 8, 8, 1]
    assert isinstance(model.net[0], nn.Linear)


# --- steps in odd numbers ---------------------------------------------------------------------------------------------


def test_several_steps_that_the_trainer_counts_as_one_are_each_clipped():
    """A common workaround in GANs: only one optimizer counts towards `global_step`."""

    class Gan(Stepping):
        def configure_optimizers(self):
            return [SGD(self.net[i].parameters(), lr=0.1) for i in (0, 2)]

        def step(self, optimizers, batch_idx):
            generator, discriminator = optimizers
            discriminator._on_before_step = discriminator._on_after_step = lambda: None
            for _ in range(3):
                discriminator.step()
            generator.step()

    autoclip = AutoClip(40)
    run = trainer(autoclip)
    run.fit(Gan(), loader())
    assert run.global_step == 16
    assert [clipper.steps for clipper in autoclip.clippers] == [16, 48]


@pytest.mark.parametrize("fails", ["in the closure", "in the update", "afterwards"])
def test_a_step_that_is_tried_again_is_clipped_again(fails):
    class Failing(SGD):
        failed = False

        def step(self, closure=None):
            loss = closure()
            if fails == "in the update" and not self.failed:
                Failing.failed = True
                raise MemoryError
            super().step()
            return loss

    class Retrying(Net):
        tries = 0

        def training_step(self, batch, batch_idx):
            Retrying.tries += 1
            if fails == "in the closure" and self.tries == 3:
                raise MemoryError
            return super().training_step(batch, batch_idx)

        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
            try:
                super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
                if fails == "afterwards" and batch_idx == 3:
                    raise MemoryError
            except MemoryError:
                super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    before, autoclip = Gradients(), AutoClip(40)
    trainer(before, autoclip).fit(Retrying(lambda parameters: Failing(parameters, lr=0.1)), loader())
    assert autoclip.clippers[0].history.values.tolist() == pytest.approx(before.norms, rel=1e-5)
    assert autoclip.clippers[0].steps == (16 if fails == "in the closure" else 17)


def test_the_error_about_the_trainers_own_clipping_says_what_to_do_where_a_package_has_set_it():
    class Off(Callback):
        def setup(self, trainer, pl_module, stage):
            trainer.gradient_clip_val = None

    run = trainer(autoclip := AutoClip())
    run.gradient_clip_val = 0.5
    with pytest.raises(MisconfigurationException, match=r"a package did \(its model or its tuner\): set `trainer\."):
        run.fit(Net(), loader())
    run = trainer(Off(), autoclip)
    run.gradient_clip_val = 0.5
    run.fit(Net(), loader())
    assert autoclip.clippers[0].steps == 16


class Bare(Manual):
    """Manual optimization that calls `backward` itself; beside its optimizer stands one without parameters."""

    def configure_optimizers(self):
        return [SGD(self.parameters(), lr=0.01), SGD([{"params": []}], lr=0.01)]

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.loss(batch).backward()
        for optimizer in self.optimizers():
            optimizer.step()


def test_a_loop_that_calls_backward_itself_is_clipped_and_not_warned_of():
    autoclip = AutoClip(50, verbose=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(autoclip, log_every_n_steps=2, max_epochs=4).fit(Bare(), loader())
    assert [clipper.steps for clipper in autoclip.clippers] == [64, 0]
    assert ours(caught) == []
