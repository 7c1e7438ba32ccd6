"""`max_update_ratio`: a limit on how far a step of SGD may move a weight matrix, relative to its norm."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from inspect import unwrap
from numbers import Real
from operator import add, mul
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import SGD

from lightning_autoclip.gradients import Numbers, at, on_device
from lightning_autoclip.history import constant
from lightning_autoclip.optimizers import wrapped_in

_SGD_LIKE = ("FusedSGD", "SGDW")  # Apex and DeepSpeed, timm; beside torch's SGD
_EACH = 16  # so many first steps measure the weights, and later one step of so many
_LEAST_LEFT = 1e-3  # of 1 - momentum
_LEAST_OF_INITIAL = 0.1  # of the rate that a schedule was made with: what is small now may be multiplied by that soon


def is_sgd_like(optimizer: Any) -> bool:
    """Whether a gradient twice as large makes the optimizer, or the one that it wraps, take a step twice as long.

    A subclass of torch's SGD counts as long as its step is that of SGD.
    """
    kind = type(wrapped_in(optimizer)[-1])
    return kind.__name__ in _SGD_LIKE or (issubclass(kind, SGD) and unwrap(kind.step) is unwrap(SGD.step))


class Rates:
    """How far an optimizer moves a weight per unit of a gradient that stays as it is, in each of its groups.

    The learning rate times (1 - dampening) / (1 - momentum), at least times 1, with or without Nesterov's variant: what
    a gradient adds to the momentum buffer comes to so much over the steps that follow, unless the rate rises. A rate
    that is a tensor of an accelerator is read by the host.

    Args:
        optimizer: The optimizer that makes the step.
        parameters: Of the optimizer that is measured, which may wrap it: the same ones, maybe in another order.

    Attributes:
        common: The rate of all groups; ``None`` if they differ.
    """

    __slots__ = ("_groups", "_of_groups", "_parameters", "common")

    def __init__(self, optimizer: Any, parameters: Sequence[Tensor]) -> None:
        self._groups, self._parameters = optimizer.param_groups, parameters
        self._of_groups = rates = [_rate(group) for group in self._groups]
        self.common = rates[0] if rates.count(rates[0]) == len(rates) else None

    def of_parameters(self, positions: Sequence[int] | None) -> list[float]:
        """The rate of each parameter; of those at these positions, if there are some."""
        return [self._of_groups[group] for group in at(self._group_of(), positions)]

    def on_device(self, positions: Sequence[int] | None, like: Tensor) -> tuple[Tensor, float]:
        """The rate of each parameter on a device, in units of a number that comes with them."""
        rates = self.of_parameters(positions)
        largest = max(rates) or 1.0
        # Schedules change all rates alike: what they are relative to each other is copied to the device once.
        parts = tuple(float(f"{rate / largest:.6g}") for rate in rates)
        return on_device(parts, like.dtype, like.device), largest

    def _group_of(self) -> Any:
        """For each parameter the number of its group."""
        numbers: dict[int, int] = {}
        for number, group in enumerate(self._groups):
            for key in map(id, group["params"]):
                numbers.setdefault(key, number)
        return [numbers[id(parameter)] for parameter in self._parameters]


def _rate(group: dict[str, Any]) -> float:
    momentum, gain, least = group.get("momentum"), 1.0, 0.0
    if momentum:
        gain = max((1 - group.get("dampening", 0.0)) / max(1 - momentum, _LEAST_LEFT), 1.0)
        initial = group.get("initial_lr", 0.0)  # which schedulers leave here
        least = _LEAST_OF_INITIAL * float(initial) if isinstance(initial, Real) else 0.0
    return max(abs(float(group["lr"])), least) * gain


def _inverse_of(norm: float) -> float:
    return 1 / norm if norm else 0.0


def _is_new(shape: torch.Size | None, norm: float) -> bool:
    return shape is not None and norm == 0


class WeightNorms(NamedTuple):
    """The norms of the parameters as they were measured last.

    Attributes:
        step: At which step; 0 before any.
        norms: Of each parameter; infinite of those that the limit does not regard, 0 of those that were not trained.
    """

    step: int = 0
    norms: Numbers = []  # noqa: RUF012


class UpdateRatioLimit:
    """No step moves a weight matrix by more than a part of its own norm.

    A weight matrix is a parameter of two dimensions or more; where there is none, every parameter counts as one.

    Args:
        ratio: That part, above 0.
    """

    def __init__(self, ratio: float) -> None:
        self.ratio = ratio
        self.reset()

    def reset(self) -> None:
        """Have the weights measured anew."""
        self._inverse: tuple[int, list[float]] = (-1, [])  # of the weights that were measured at a step
        self._inverse_on_device: tuple[int, Tensor] = (-1, torch.empty(0))

    @staticmethod
    def is_due(step: int, weights: WeightNorms, count: int, shapes: Callable[[], Sequence[torch.Size | None]]) -> bool:
        """Whether the weights are to be measured at a step, counted from 1; from one to the next they change little.

        Args:
            step: The step.
            weights: As they were measured last.
            count: Of the parameters.
            shapes: Returns their shapes, ``None`` of what is not trained: what is trained since is measured at once.
        """
        if step <= _EACH or step % _EACH == 0 or len(weights.norms) != count:
            return True
        return 0.0 in weights.norms and any(map(_is_new, shapes(), weights.norms))

    def measured(self, step: int, norms: Any, shapes: Sequence[torch.Size | None], is_read: bool) -> WeightNorms:
        """Keep the norms of the matrices among the parameters.

        Args:
            step: The step at which they were measured.
            norms: 0 of what is not trained.
            shapes: Of each parameter; ``None`` of what does not count.
            is_read: Whether the norms are floats.
        """
        dims = [-1 if shape is None else len(shape) for shape in shapes]
        least = 1 if max(dims, default=0) > 1 else -1
        others = tuple(0.0 if dim < 0 or dim > least else math.inf for dim in dims)
        if is_read:
            norms = list(map(add, norms, others))
            self._inverse = step, list(map(_inverse_of, norms))
        else:
            is_trained, norms = norms > 0, norms + on_device(others, norms.dtype, norms.device)
            inverse = torch.where(is_trained, norms.reciprocal(), constant(0.0, norms.device, norms.dtype))
            self._inverse_on_device = step, inverse
        return WeightNorms(step, norms)

    def update_ratio(
        self, norms: list[float], weights: WeightNorms, rates: Rates, positions: Sequence[int] | None
    ) -> float:
        """By what part of its norm the gradients would move the weight matrix that they move most.

        Args:
            norms: L2 norm of the gradient of each parameter.
            weights: Of the same parameters.
            rates: Of the optimizer.
            positions: Where the parameters stand among all of the optimizer; ``None``: they are all.
        """
        if self._inverse[0] != weights.step:
            self._inverse = weights.step, list(map(_inverse_of, weights.norms))
        if (rate := rates.common) is None:
            norms, rate = list(map(mul, norms, rates.of_parameters(positions))), 1.0
        update: float = max(map(mul, norms, self._inverse[1]))
        return update * rate

    def update_ratio_unread(
        self, norms: Tensor, weights: WeightNorms, rates: Rates, positions: Sequence[int] | None
    ) -> Tensor:
        """Do the same where the host does not know the norms: shape ``()``."""
        step, inverse = self._inverse_on_device
        if step != weights.step or inverse.device != norms.device:
            known = torch.tensor(list(map(_inverse_of, weights.norms)), dtype=norms.dtype)
            known = known.pin_memory() if norms.is_cuda else known
            inverse = known.to(norms.device, non_blocking=True)
            self._inverse_on_device = weights.step, inverse
        if (rate := rates.common) is not None:
            return (norms * inverse).max() * rate
        each, unit = rates.on_device(positions, norms)
        return (norms * each * inverse).max() * unit
