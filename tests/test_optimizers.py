"""Optimizers from elsewhere: of the user, of packages, with states of 8 bits, wrapped; each against a loop by hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import schedulefree
import torch
from bitsandbytes.optim import AdamW8bit, Lion8bit
from helpers import Net, loader, norm_of, trainer, weights
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Adam, Optimizer

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
# Between its closure and its end such a step keeps the weights elsewhere, and returns only those that have a gradient.
every_ordinary_optimizer = pytest.mark.parametrize("name", [name for name in OPTIMIZERS if "Closure" not in name])


def in_train_mode(optimizer: Any) -> Any:
    """Schedule-free optimizers ask for it before the first step."""
    if isinstance(optimizer, Optimizer) and hasattr(optimizer, "train"):
        optimizer.train()
    return optimizer


class Noting(models.Noting):
    """With an optimizer of the list; batches in ``bad`` have a loss that is not finite. Notes what each step leaves."""

    def __init__(self, name: str, bad: tuple[int, ...] = ()) -> None:
        super().__init__(dict.fromkeys(bad, math.nan), OPTIMIZERS[name])
        self.after: list[tuple[Tensor, Any]] = []

    def on_train_start(self) -> None:
        in_train_mode(self.trainer.optimizers[0])

    def on_train_batch_end(self, *args: Any) -> None:
        state = {id(p): dict(values) for p, values in self.trainer.optimizers[0].state.items()}
        self.after.append((weights(self), copy.deepcopy(state)))


def fit(model: Noting, *, epochs: int = 1, ckpt: Any = None, **kwargs: Any) -> tuple[AutoClip, Any]:
    autoclip = AutoClip(50, window=10, verbose=False, **kwargs)
    run = trainer(autoclip, max_epochs=epochs)
    run.fit(model, loader(scales=SCALES), ckpt_path=ckpt)
    return autoclip, run


def loop_by_hand(name: str, algorithm: str) -> tuple[Noting, list[float]]:
    """The same training without Lightning, clipped by torch at numpy's percentile."""
    model, norms = Noting(name), []
    optimizer, parameters = in_train_mode(OPTIMIZERS[name](model.parameters())), [*model.parameters()]
    entries = sum(p.numel() for p in parameters)

    def closure(batch: Any) -> Tensor:
        optimizer.zero_grad()
        loss = model.loss(batch)
        loss.backward()
        norms.append(norm_of(parameters))
        percentile = float(np.percentile(norms[-10:], 50))
        if algorithm == "norm":
            nn.utils.clip_grad_norm_(parameters, percentile)
        else:
            nn.utils.clip_grad_value_(parameters, 3 * percentile / math.sqrt(entries))
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
    entries = 1 if algorithm == "norm" else sum(p.numel() for p in model.parameters())
    assert autoclip.clippers[0].history.recorded.tolist() == pytest.approx(
        [norm / math.sqrt(entries) for norm in norms[-10:]], rel=1e-3
    )


@every_optimizer
def test_a_resumed_run_takes_the_same_steps_as_an_uninterrupted_one(tmp_path: Path, name: str) -> None:
    whole, half, rest = Noting(name), Noting(name), Noting(name)
    first, _ = fit(whole, epochs=2)
    fit(half)[1].save_checkpoint(tmp_path / "half.ckpt")
    second, _ = fit(rest, epochs=2, ckpt=tmp_path / "half.ckpt")
    assert half.norms + rest.norms == whole.norms
    assert torch.equal(weights(rest), weights(whole))
    assert torch.equal(second.clippers[0].history.recorded, first.clippers[0].history.recorded)


@every_ordinary_optimizer
def test_a_step_that_is_not_finite_moves_neither_weight_nor_state(name: str) -> None:
    model = Noting(name, bad=(7,))
    autoclip, _ = fit(model)
    (before, old), (after, new) = model.after[6:8]
    assert torch.equal(before, after)
    assert old.keys() == new.keys()
    for parameter in old:
        for key, value in old[parameter].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(new[parameter][key])), key
    assert autoclip.clippers[0].nonfinite_total == 1
    assert all(math.isfinite(norm) for norm in model.norms[:7] + model.norms[8:])
    assert not torch.equal(after, model.after[8][0])


@pytest.mark.parametrize("unscale", [True, False], ids=["unscaled before", "still scaled"])
@every_ordinary_optimizer
def test_with_a_scaler_the_steps_are_those_without(name: str, unscale: bool) -> None:
    """The scale is a power of two, so that scaling and unscaling are exact."""
    found = []
    for scaler in (None, GradScaler("cpu", init_scale=2.0**8)):
        model, clipper, norms = Noting(name), GradientClipper(Percentile(50), window=10), []
        optimizer = in_train_mode(OPTIMIZERS[name](model.parameters()))
        for batch in loader(scales=SCALES):
            optimizer.zero_grad()
            loss = model.loss(batch)
            if scaler is None:
                loss.backward()
                norms.append(float(clipper.clip_(optimizer).norm))
                optimizer.step()
                continue
            scaler.scale(loss).backward()
            if unscale:
                scaler.unscale_(optimizer)
            norms.append(float(clipper.clip_(optimizer, scaler).norm))
            scaler.step(optimizer)
            scaler.update()
        found.append((weights(model), norms))
    (plain, norms), (scaled, scaled_norms) = found
    torch.testing.assert_close(scaled, plain, rtol=1e-3, atol=1e-5)
    assert scaled_norms == pytest.approx(norms, rel=1e-3)


class Zeroing(Optimizer):
    """Takes a gradient that is not there for one of zero, as some versions of Muon do."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.mul_(0.99).add_(parameter.grad, alpha=-0.1)
        return loss


def test_an_optimizer_that_moves_weights_without_gradients_is_told_of_once():
    scales = [1.0] * 8 + [math.nan] * 4 + [1.0] * 8 + [math.nan] * 4 + [1.0] * 40
    model = Net(Zeroing)
    with pytest.warns(UserWarning, match="`Zeroing` has moved weights at a step that was left out") as caught:
        trainer(AutoClip(50, verbose=False)).fit(model, loader(scales=scales))
    assert sum("has moved weights" in str(each.message) for each in caught) == 1
    assert weights(model).isfinite().all()
