"""The rules that are compared, by name: what clips, as callbacks of the Trainer or as its own argument."""

import math
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_autoclip import AutoClip, Constant, GradientClipping, ZScore

FIXED_NORMS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
FIXED_VALUES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)

Norms = list[float]


class Candidates(Callback):
    """Clips by a rule that is not in the library; each optimizer has its own, with a record of its own.

    Args:
        rule: Builds one.
    """

    def __init__(self, rule: Callable[[], "Candidate"]) -> None:
        self.rules: dict[Optimizer, Candidate] = defaultdict(rule)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self.rules[optimizer].step(optimizer)


class Candidate:
    """A rule that is not in the library: it sees the gradient of each step and may change it in place."""

    def __init__(self, window: int | None = 100) -> None:
        self.window = window
        self.norms: Norms = []
        self.factors: list[float] = []

    def step(self, optimizer: Optimizer) -> None:
        gradients = [parameter.grad for parameter in parameters_of(optimizer) if parameter.grad is not None]
        norm = total_norm(gradients)
        if not norm < math.inf:
            optimizer.zero_grad()
            return
        self.norms.append(norm)
        self.clip(gradients, norm, optimizer)
        self.factors.append(total_norm(gradients) / norm if norm else 1.0)

    def clip(self, gradients: list[Tensor], norm: float, optimizer: Optimizer) -> None:
        raise NotImplementedError

    def percentile(self, percentile: float, norms: Norms | None = None) -> float:
        norms = self.norms if norms is None else norms
        return float(np.percentile(norms if self.window is None else norms[-self.window :], percentile))


class Both(Candidate):
    """Entries clamped at so many times the root-mean-square entry of a typical gradient, then the norm clipped."""

    def __init__(self, percentile: float, times: float) -> None:
        super().__init__()
        self.q, self.times = percentile, times

    def clip(self, gradients: list[Tensor], norm: float, optimizer: Optimizer) -> None:
        threshold = self.percentile(self.q)
        limit = self.times * threshold / math.sqrt(sum(gradient.numel() for gradient in gradients))
        for gradient in gradients:
            gradient.clamp_(-limit, limit)
        scale_to(threshold, gradients)


class Growing(Candidate):
    """The percentile of the last half of the run, and of 100 steps at least."""

    def __init__(self, percentile: float) -> None:
        super().__init__()
        self.q = percentile

    def clip(self, gradients: list[Tensor], norm: float, optimizer: Optimizer) -> None:
        self.window = max(100, len(self.norms) // 2)
        scale_to(self.percentile(self.q), gradients)


class Trend(Candidate):
    """The percentile of what the logarithms of the norms leave of a straight line through them."""

    def __init__(self, percentile: float) -> None:
        super().__init__()
        self.q = percentile

    def clip(self, gradients: list[Tensor], norm: float, optimizer: Optimizer) -> None:
        logarithms = np.log(np.maximum(self.norms[-100:], 1e-30))
        steps = np.arange(len(logarithms))
        line = np.polyval(np.polyfit(steps, logarithms, 1), steps) if len(steps) > 10 else np.zeros(len(steps))
        scale_to(math.exp(line[-1] + np.percentile(logarithms - line, self.q)), gradients)


class Relative(Candidate):
    """The percentile of the norm of the gradient relative to that of the parameters."""

    def __init__(self, percentile: float) -> None:
        super().__init__()
        self.q, self.ratios = percentile, []

    def clip(self, gradients: list[Tensor], norm: float, optimizer: Optimizer) -> None:
        size = total_norm([parameter.detach() for parameter in parameters_of(optimizer)])
        self.ratios.append(norm / size)
        scale_to(self.percentile(self.q, self.ratios) * size, gradients)


class PerTensor(Candidate):
    """A record and a threshold for each tensor by itself."""

    def __init__(self, percentile: float) -> None:
        super().__init__()
        self.q, self.records = percentile, {}

    def clip(self, gradients: list[Tensor], norm: float, optimizer: Optimizer) -> None:
        for i, gradient in enumerate(gradients):
            record = self.records.setdefault(i, [])
            if (norm := float(gradient.norm())) > 0:
                record.append(norm)
                scale_to(self.percentile(self.q, record), [gradient])


class ZClip(Candidate):
    """Kumar et al. 2025, arXiv:2504.02507: running mean and variance of the norms after clipping; 0.97, z of 2.5."""

    mean = variance = 0.0

    def clip(self, gradients: list[Tensor], norm: float, optimizer: Optimizer) -> None:
        seen, z = len(self.norms), 2.5
        if seen <= 25:
            self.mean, self.variance = float(np.mean(self.norms)), float(np.var(self.norms))
            return
        spread = math.sqrt(self.variance) + 1e-12
        if (norm - self.mean) / spread > z:
            norm = self.mean + z * z * spread / ((norm - self.mean) / spread)
            scale_to(norm, gradients)
        self.mean += 0.03 * (norm - self.mean)
        self.variance = 0.97 * self.variance + 0.03 * (norm - self.mean) ** 2


class AGC(Candidate):
    """Brock et al. 2021, arXiv:2102.06171: each unit's gradient at most so many times the norm of its weights.

    A unit is a row of a matrix or a filter, or a whole vector; the last linear layer is left alone, as in the paper,
    which takes 0.01 with batches of 4,096, and up to 0.16 with small ones.
    """

    def __init__(self, most: float) -> None:
        super().__init__()
        self.most = most

    def clip(self, gradients: list[Tensor], norm: float, optimizer: Optimizer) -> None:
        *parameters, _, _ = parameters_of(optimizer)
        for parameter in (parameter for parameter in parameters if parameter.grad is not None):
            over = tuple(range(1, parameter.dim())) or (0,)
            weight, gradient = (
                tensor.square().sum(over, keepdim=True).sqrt() for tensor in (parameter.detach(), parameter.grad)
            )
            parameter.grad.mul_((self.most * weight.clamp(min=1e-3) / gradient.clamp(min=1e-6)).clamp(max=1))


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def total_norm(gradients: list[Tensor]) -> float:
    return math.hypot(*[float(norm) for norm in torch._foreach_norm(gradients)])


def scale_to(threshold: float, gradients: list[Tensor]) -> None:
    norm = total_norm(gradients)
    if norm > threshold:
        torch._foreach_mul_(gradients, threshold / norm)


def fixed(algorithm: str, threshold: float) -> dict[str, Any]:
    return {"gradient_clip_algorithm": algorithm, "gradient_clip_val": threshold}


def by_callback(gradient_clip_algorithm: str, gradient_clip_val: float) -> dict[str, Any]:
    """The same for manual optimization, where the Trainer refuses its own argument."""
    kind = partial(GradientClipping, gradient_clip_algorithm=gradient_clip_algorithm, nonfinite="ignore", verbose=False)
    return {"callbacks": [kind(Constant(gradient_clip_val))]}


def ours(*args: Any, **kwargs: Any) -> dict[str, Any]:
    return {"callbacks": [AutoClip(*args, verbose=False, **{"max_update_ratio": None, **kwargs})]}


def candidate(kind: type[Candidate], *args: Any) -> dict[str, Any]:
    return {"callbacks": [Candidates(partial(kind, *args))]}


BASELINES: dict[str, Callable[[], dict[str, Any]]] = {"none": dict}
BASELINES |= {f"fixed norm {c:g}": partial(fixed, "norm", c) for c in FIXED_NORMS}
BASELINES |= {f"fixed value {c:g}": partial(fixed, "value", c) for c in FIXED_VALUES}

OURS: dict[str, Callable[[], dict[str, Any]]] = {f"norm p{p}": partial(ours, p) for p in (5, 10, 25, 50, 90, 99)}
OURS |= {f"value p{p}": partial(ours, p, gradient_clip_algorithm="value") for p in (10, 25, 50, 90)}
OURS |= {"norm p90 full": partial(ours, 90, window=None)}
OURS |= {
    "norm p10 x 1.5": partial(ours, 10, multiplier=1.5),
    "norm p50 x 0.7": partial(ours, 50, multiplier=0.7),
    "z-score 2.5": lambda: {"callbacks": [GradientClipping(ZScore(2.5), verbose=False)]},
}

# A percentile, and beside it a bound on the step relative to the weights, where the optimizer is SGD.
BOUNDED: dict[str, Callable[[], dict[str, Any]]] = {
    f"norm p{p} r{r:g}": partial(ours, p, max_update_ratio=r) for p, r in ((50, 0.25), (50, 0.12))
}

PUBLISHED: dict[str, Callable[[], dict[str, Any]]] = {
    "norm p10 full": partial(ours, 10, window=None),  # AutoClip as published
    "2 x median": partial(ours, 50, multiplier=2.0),  # icefall
    "ZClip": partial(candidate, ZClip),
    "AGC 0.01": partial(candidate, AGC, 0.01),
    "AGC 0.16": partial(candidate, AGC, 0.16),
}

CANDIDATES: dict[str, Callable[[], dict[str, Any]]] = {
    f"both p{p} x {times:g}": partial(candidate, Both, p, times)
    for p, times in ((5, 3), (10, 3), (10, 5), (10, 10), (25, 3), (50, 3))
}
CANDIDATES |= {
    "growing p10": partial(candidate, Growing, 10),
    "trend p10": partial(candidate, Trend, 10),
    "relative p10": partial(candidate, Relative, 10),
    "per tensor p10": partial(candidate, PerTensor, 10),
}

RULES = BASELINES | OURS | BOUNDED | PUBLISHED | CANDIDATES
DEFAULT = "norm p50 r0.25"
TABLE = {f"norm p{p}": partial(ours, p) for p in (0, 1, 10, 25, 50, 90, 100)}
TABLE |= {f"norm p{p} full": partial(ours, p, window=None) for p in (0, 1, 10, 25, 50, 90)}
