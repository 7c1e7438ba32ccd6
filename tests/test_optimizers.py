"""Optimizers of torch, of the user, of packages, with states of 8 bits, wrapped; each against a loop by hand."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import warnings
from collections.abc import Callable, Iterable
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import schedulefree
import torch
from bitsandbytes.optim import AdamW8bit, Lion8bit
from helpers import loader, norm_of, trainer, weights, with_gradient
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import ASGD, SGD, Adam, AdamW, Muon, NAdam, Optimizer, RAdam, Rprop
from torch.utils._pytree import tree_flatten

from lightning_autoclip import AutoClip, GradientClipper, Percentile

SCALES = (1.0, 3.0, 0.5, 8.0, 1.5)


class Lion(Optimizer):
    """As users write it: the sign of an interpolation, one momentum, decoupled weight decay, no flag of torch's."""

    def __init__(self, params: Iterable[Tensor], lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.99), "weight_decay": 0.1})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            first, second = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(momentum.lerp(p.grad, 1 - first).sign(), alpha=-group["lr"])
                momentum.lerp_(p.grad, 1 - second)
        return loss


class Lookahead:
    """Wraps an optimizer without being one: every few steps the weights go half of the way back.

    References:
        Zhang et al., `Lookahead Optimizer: k steps forward, 1 step back <https://arxiv.org/abs/1907.08610>`_, 2019.
    """

    def __init__(self, base: Optimizer, every: int = 5) -> None:
        self.base, self.every, self.steps = base, every, 0
        self.slow = [p.detach().clone() for group in base.param_groups for p in group["params"]]

    param_groups = property(lambda self: self.base.param_groups)
    defaults = property(lambda self: self.base.defaults)
    state = property(lambda self: self.base.state)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base.zero_grad(set_to_none)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = self.base.step(closure)
        self.steps += 1
        if self.steps % self.every == 0:
            fast = [p for group in self.param_groups for p in group["params"]]
            with torch.no_grad():
                for p, slow in zip(fast, self.slow, strict=True):
                    p.copy_(slow.lerp_(p, 0.5))
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"base": self.base.state_dict(), "slow": self.slow, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.base.load_state_dict(state["base"])
        self.slow, self.steps = [slow.clone() for slow in state["slow"]], state["steps"]


OPTIMIZERS: dict[str, Callable[[Iterable[Tensor]], Any]] = {
    "Lion": partial(Lion, lr=0.01),
    "SGDScheduleFree": partial(schedulefree.SGDScheduleFree, lr=0.05),
    "AdamWScheduleFree": partial(schedulefree.AdamWScheduleFree, lr=0.01, warmup_steps=5),
    "RAdamScheduleFree": partial(schedulefree.RAdamScheduleFree, lr=0.01),
    "AdamWScheduleFreeClosure": partial(schedulefree.AdamWScheduleFreeClosure, lr=0.01),
    "AdamW8bit": partial(AdamW8bit, lr=0.01, min_8bit_size=0),
    "Lion8bit": partial(Lion8bit, lr=0.01, min_8bit_size=0),
    "Lookahead": lambda parameters: Lookahead(Adam(parameters, lr=0.01)),
    "Lookahead of a fused one": lambda parameters: Lookahead(Adam(parameters, lr=0.01, fused=True)),
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def in_train_mode(optimizer: Any) -> Any:
    """Schedule-free optimizers ask for it before the first step."""
    if isinstance(optimizer, Optimizer) and hasattr(optimizer, "train"):
        optimizer.train()
    return optimizer


class Noting(models.Noting):
    """With an optimizer of the list."""

    def __init__(self, name: str) -> None:
        super().__init__(optimizer=OPTIMIZERS[name])

    def on_train_start(self) -> None:
        in_train_mode(self.trainer.optimizers[0])


def fit(model: Noting, *, epochs: int = 1, ckpt: Any = None, **kwargs: Any) -> tuple[AutoClip, Any]:
    autoclip = AutoClip(50, window=10, verbose=False, **kwargs)
    run = trainer(autoclip, max_epochs=epochs)
    run.fit(model, loader(scales=SCALES), ckpt_path=ckpt)
    return autoclip, run


def loop_by_hand(name: str, algorithm: str) -> tuple[Noting, list[float]]:
    """The same run without Lightning, clipped by torch at numpy's percentile."""
    model, norms = Noting(name), []
    optimizer, parameters = in_train_mode(OPTIMIZERS[name](model.parameters())), [*model.parameters()]
    numel = sum(p.numel() for p in parameters)

    def closure(batch: Any) -> Tensor:
        optimizer.zero_grad()
        loss = model.loss(batch)
        loss.backward()
        norms.append(norm_of(parameters))
        percentile = float(np.percentile(norms[-10:], 50))
        if algorithm == "norm":
            nn.utils.clip_grad_norm_(parameters, percentile)
        else:
            nn.utils.clip_grad_value_(parameters, 3 * percentile / math.sqrt(numel))
        return loss

    for batch in loader(scales=SCALES):
        optimizer.step(partial(closure, batch))
    return model, norms


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@every_optimizer
def test_the_weights_are_those_of_a_loop_that_torch_clips(name: str, algorithm: str) -> None:
    by_hand, norms = loop_by_hand(name, algorithm)
    model = Noting(name)
    autoclip, _ = fit(model, gradient_clip_algorithm=algorithm)
    torch.testing.assert_close(weights(model), weights(by_hand), rtol=1e-3, atol=1e-5)
    numel = 1 if algorithm == "norm" else sum(p.numel() for p in model.parameters())
    assert autoclip.clippers[0].history.values.tolist() == pytest.approx(
        [norm / math.sqrt(numel) for norm in norms[-10:]], rel=1e-3
    )


@every_optimizer
def test_a_resumed_run_takes_the_same_steps_as_an_uninterrupted_one(tmp_path: Path, name: str) -> None:
    whole, half, rest = Noting(name), Noting(name), Noting(name)
    first, _ = fit(whole, epochs=2)
    fit(half)[1].save_checkpoint(tmp_path / "half.ckpt")
    second, _ = fit(rest, epochs=2, ckpt=tmp_path / "half.ckpt")
    assert half.norms + rest.norms == whole.norms
    assert torch.equal(weights(rest), weights(whole))
    assert torch.equal(second.clippers[0].history.values, first.clippers[0].history.values)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if "Closure" not in name])
def test_with_a_scaler_the_steps_are_those_without(name: str) -> None:
    """The scale is a power of two, so that scaling and unscaling are exact."""
    found = []
    for how in ("no scaler", "unscaled before", "still scaled"):
        scaler = GradScaler("cpu", init_scale=2.0**8, enabled=how != "no scaler")
        model, clipper, norms = Noting(name), GradientClipper(Percentile(50), window=10), []
        optimizer = in_train_mode(OPTIMIZERS[name](model.parameters()))
        for batch in loader(scales=SCALES):
            optimizer.zero_grad()
            scaler.scale(model.loss(batch)).backward()
            if how == "unscaled before":
                scaler.unscale_(optimizer)
            norms.append(float(clipper.clip_(optimizer, scaler).norm))
            scaler.step(optimizer)
            scaler.update()
        found.append((weights(model), norms))
    for (scaled, scaled_norms), (plain, norms) in pairwise(found):
        torch.testing.assert_close(scaled, plain, rtol=1e-3, atol=1e-5)
        assert scaled_norms == pytest.approx(norms, rel=1e-3)


# --- a skipped step was never made ------------------------------------------------------------------------------------

BAD = (0, 1, 7, 10)  # batches whose loss is a NaN


class Counting(Optimizer):
    """Counts its steps and estimates its rate outside of its loop over the parameters.

    As DAdaptSGD does it divides by the sum of all squared gradients: without gradients it would raise.
    """

    def __init__(self, params: Iterable[Tensor]) -> None:
        super().__init__(params, {"lr": 0.1, "k": 0, "d": 1.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            gradients = [(p, p.grad) for p in group["params"] if p.grad is not None]
            squares = sum(float(gradient.square().sum()) for _, gradient in gradients)
            group["d"] = 0.9 * group["d"] + 0.1 / squares
            for p, gradient in gradients:
                p.add_(gradient, alpha=-group["lr"] * min(group["d"], 1.0) / math.sqrt(group["k"] + 1))
            group["k"] += 1
        return loss


SKIPPING: dict[str, Callable[[Iterable[Tensor]], Any]] = {
    "SGD": partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.1),
    "AdamW": partial(AdamW, lr=0.01),
    "RAdam": partial(RAdam, lr=0.01),
    "ASGD": partial(ASGD, lr=0.05, t0=3),
    "Rprop": partial(Rprop, lr=0.01),
    "NAdam": partial(NAdam, lr=0.01),
    "Muon": partial(Muon, lr=0.01),
    "fused SGD": partial(SGD, lr=0.1, momentum=0.9, fused=True),
    "AdamWScheduleFree": partial(schedulefree.AdamWScheduleFree, lr=0.01, warmup_steps=5),
    "AdamW8bit": partial(AdamW8bit, lr=0.01, min_8bit_size=0),
    "Lookahead": lambda parameters: Lookahead(Adam(parameters, lr=0.01)),
    "Counting": Counting,
}


class Matrices(models.BadBatches):
    """Weights of two dimensions alone, which Muon asks for; notes at which batches gradients were there at the end."""

    def __init__(self, name: str, *, scheduled: bool = False, manual: bool = False, bad: tuple[int, ...] = BAD) -> None:
        super().__init__(dict.fromkeys(bad, math.nan), SKIPPING[name])
        self.net = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Tanh(), nn.Linear(8, 1, bias=False))
        self.scheduled, self.automatic_optimization = scheduled, not manual
        self.has_gradients: list[bool] = []

    def configure_optimizers(self) -> Any:
        optimizer = in_train_mode(super().configure_optimizers())
        return ([optimizer], [scheduler_of(optimizer)]) if self.scheduled else optimizer

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        loss = super().training_step(batch, batch_idx)
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None

    def note_gradients(self) -> None:
        self.has_gradients.append(all(p.grad is not None and bool(p.grad.any()) for p in self.parameters()))

    def on_train_batch_end(self, *args: Any) -> None:
        self.note_gradients()


def scheduler_of(optimizer: Any) -> Any:
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    return {"scheduler": schedule, "interval": "step"}


@cache
def never_made(name: str, bad: tuple[int, ...], scheduled: bool, accumulated: int) -> tuple[Matrices, Any]:
    """A loop of torch alone, without clipping, that does not call `step` where a batch is bad."""
    model = Matrices(name)
    optimizer = in_train_mode(SKIPPING[name](model.parameters()))
    schedule = scheduler_of(optimizer)["scheduler"] if scheduled else None
    for batch_idx, batch in enumerate(loader()):
        if batch_idx % accumulated == 0:
            optimizer.zero_grad()
        (model.loss(batch) / accumulated).backward()
        if (batch_idx + 1) % accumulated == 0:
            if batch_idx not in bad and batch_idx - accumulated + 1 not in bad:
                optimizer.step()
            if schedule is not None:
                schedule.step()
    return model, optimizer


def by_hand(name: str, has_closure: bool, bad: tuple[int, ...] = BAD) -> tuple[Matrices, Any]:
    """A loop that clips with the library, and calls `step` at each batch."""
    model, clipper = Matrices(name, bad=bad), GradientClipper(Percentile(100))
    optimizer = in_train_mode(SKIPPING[name](model.parameters()))

    def closure(batch_idx: int, batch: Any) -> Tensor:
        optimizer.zero_grad()
        loss = model.loss(batch) * model.factors.get(batch_idx, 1.0)
        loss.backward()
        clipper.clip_(optimizer)
        return loss

    for batch_idx, batch in enumerate(loader()):
        if has_closure:
            assert math.isnan(optimizer.step(partial(closure, batch_idx, batch))) == (batch_idx in bad)
        else:
            closure(batch_idx, batch)
            optimizer.step()
        model.note_gradients()
    assert (clipper.steps, clipper.nonfinite_steps) == (16, len(bad))
    clipper.release()
    return model, optimizer


def in_trainer(name: str, *, accumulated: int = 1, **kwargs: Any) -> tuple[Matrices, Any]:
    model, autoclip = Matrices(name, **kwargs), AutoClip(100, verbose=False)
    run = trainer(autoclip, accumulate_grad_batches=accumulated)
    run.fit(model, loader())
    assert autoclip.clippers[0].steps == 16 / accumulated
    return model, run.optimizers[0]


RUNS: dict[str, Callable[[str], tuple[Matrices, Any]]] = {
    "plain step": partial(by_hand, has_closure=False),
    "step with closure": partial(by_hand, has_closure=True, bad=BAD[1:]),  # of the first, see below
    "automatic": in_trainer,
    "automatic, scheduled": partial(in_trainer, scheduled=True),
    "automatic, accumulated": partial(in_trainer, accumulated=2),
    "manual": partial(in_trainer, manual=True),
}


# Torch's schedulers take optimizers of torch alone.
CASES = [(name, how) for name in SKIPPING for how in RUNS if (name, how) != ("Lookahead", "automatic, scheduled")]


@pytest.mark.parametrize(("name", "how"), CASES)
def test_a_skipped_step_was_never_made(name: str, how: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, optimizer = RUNS[how](name)
    expected, untouched = never_made(name, (*model.factors,), "scheduled" in how, 2 if "accumulated" in how else 1)
    assert torch.equal(weights(model), weights(expected))
    found, structure = tree_flatten(optimizer.state_dict())
    wanted, wanted_structure = tree_flatten(untouched.state_dict())
    assert structure == wanted_structure
    for value, other in zip(found, wanted, strict=True):
        assert torch.equal(value, other) if isinstance(value, Tensor) else value == other
    assert model.has_gradients == [True] * 16
    assert not [each for each in caught if "lr_scheduler.step()" in str(each.message)]
    assert ("step" in vars(optimizer)) == ("scheduled" in how)  # the scheduler's own


def test_the_first_step_can_be_skipped_within_its_closure() -> None:
    model, _ = by_hand("SGD", has_closure=True, bad=(0,))
    assert torch.equal(weights(model), weights(never_made("SGD", (0,), False, 1)[0]))


def test_a_first_step_that_calls_the_clipper_from_its_closure_counts() -> None:
    parameter, clipper, steps = with_gradient([3.0, 4.0]), GradientClipper(Percentile(50)), []
    optimizer = SGD([parameter], lr=0.1)

    def closure() -> None:
        parameter.grad = torch.tensor([3.0, 4.0])
        clipper.clip_(optimizer)

    for _ in range(3):
        optimizer.step(closure)
        steps.append(clipper.state_dict()["steps"])
    assert steps == [1, 2, 3]


class OfDict(SGD):
    """Has all of its attributes copied."""

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_a_copy_of_an_optimizer_steps_and_skips_by_itself(copied) -> None:
    optimizer = OfDict([with_gradient([3.0, 4.0])], lr=0.1)
    clipper = GradientClipper(Percentile(50))
    clipper.clip_(optimizer)
    optimizer.step()
    other = copied(optimizer)
    (own,), (theirs,) = (each.param_groups[0]["params"] for each in (optimizer, other))
    before = own.detach().clone()
    theirs.grad = torch.ones(2)
    other.step()
    assert torch.equal(own, before)
    assert torch.allclose(theirs, before - 0.1)
    theirs.grad = torch.full((2,), math.nan)
    GradientClipper(Percentile(50)).clip_(other)
    other.step()
    assert theirs.isfinite().all()
    optimizer.step()
    assert clipper.steps == 1
    assert not torch.equal(own, before)


def test_a_clipper_keeps_no_optimizer_alive() -> None:
    clipper = GradientClipper(Percentile(50))
    for _ in range(2):
        optimizer = SGD([with_gradient([3.0, 4.0])], lr=0.1)
        clipper.clip_(optimizer)
        optimizer.step()
        del optimizer
        gc.collect()
    assert clipper.steps == 2


class Clipping(SGD):
    """Clips in its own step."""

    def step(self, closure: None = None) -> None:
        self.clipper.clip_(self)
        super().step(closure)


class ClippingAround(Optimizer):
    """Clips in its own step, and wraps the optimizer that makes it."""

    def __init__(self, parameters: Iterable[Tensor], lr: float) -> None:
        self.inner = SGD(parameters, lr=lr)
        self.param_groups, self.state, self.defaults = self.inner.param_groups, self.inner.state, {}

    def step(self, closure: None = None) -> None:
        self.clipper.clip_(self)
        self.inner.step(closure)


@pytest.mark.parametrize("kind", [Clipping, ClippingAround, SGD])
@pytest.mark.parametrize("bad", [0, 1, 2])
def test_a_clipper_that_is_called_within_the_step_skips_and_counts_it(kind: type[Optimizer], bad: int) -> None:
    parameter, clipper, moved = with_gradient([3.0, 4.0]), GradientClipper(Percentile(100)), []
    optimizer = kind([parameter], lr=0.1)
    optimizer.clipper = clipper
    if kind is SGD:
        optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: clipper.clip_(optimizer) and None)
    for step in range(4):
        parameter.grad, before = torch.full((2,), math.nan if step == bad else 1.0), parameter.detach().clone()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.step()
        moved.append(not torch.equal(parameter, before))
        assert clipper.steps == step + 1
    assert moved == [step != bad for step in range(4)]
    assert clipper.nonfinite_steps == 1


def test_release_puts_back_the_steps_of_a_wrapper_and_of_what_it_wraps() -> None:
    parameter, clipper = with_gradient([3.0, 4.0]), GradientClipper(Percentile(100))
    outer = ClippingAround([parameter], lr=0.1)
    outer.clipper = GradientClipper(Percentile(100))
    for each in (outer, outer.inner):
        clipper.clip_(each)
        each.step()
    clipper.release()
    assert not {"step"} & {*vars(outer), *vars(outer.inner)}
