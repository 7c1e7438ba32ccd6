"""A bound on the step relative to the weights, for optimizers whose step is proportional to the gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from inspect import unwrap
from operator import mul
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD

from lightning_autoclip._checks import check_positive, is_infinite
from lightning_autoclip._text import shown
from lightning_autoclip.clipping import _numbers
from lightning_autoclip.clipping._numbers import Number, Numbers, at, constant, on_device, single
from lightning_autoclip.clipping.optimizers import wrapped_in

_PROPORTIONAL = ("FusedSGD", "SGDW")  # Apex and DeepSpeed, timm; beside torch's SGD
_EACH = 16  # so many first steps measure the weights, and later one step of so many
_LEAST_LEFT = 1e-3  # of 1 - momentum
_LEAST_OF_INITIAL = 0.1  # of the rate that a schedule was made with: what is small now may be multiplied by that soon


def is_proportional(optimizer: Any) -> bool:
    """Whether a gradient twice as large makes the optimizer, or the one that it wraps, take a step twice as long.

    A subclass of torch's SGD counts as long as its step is that of SGD.
    """
    kind = type(wrapped_in(optimizer)[-1])
    return kind.__name__ in _PROPORTIONAL or (issubclass(kind, SGD) and unwrap(kind.step) is unwrap(SGD.step))


class Rates:
    """How far an optimizer moves a weight per unit of a gradient that stays as it is, in each of its groups.

    The learning rate times (1 - dampening) / (1 - momentum), at least times 1, with or without Nesterov's variant: what
    a gradient adds to the momentum buffer comes to so much over the steps that follow, unless the rate rises.

    Args:
        optimizer: The optimizer that makes the step.
        parameters: Of the optimizer that is measured, which may wrap it: the same ones, maybe in another order.

    Attributes:
        of_groups: By the number of the group.
        unread: Those that the host does not know: of learning rates that are tensors of an accelerator.
        common: That of all groups; ``None`` if they differ, or if the host cannot tell.
    """

    __slots__ = ("_groups", "_parameters", "common", "of_groups", "unread")

    def __init__(self, optimizer: Any, parameters: Sequence[Tensor]) -> None:
        self._groups = groups = optimizer.param_groups
        self._parameters = parameters
        self._take([_rate(group) for group in groups] if len(groups) > 1 else [_rate(groups[0])])

    def _take(self, rates: list[Number]) -> None:
        self.of_groups, self.unread, first = rates, [], rates[0]
        self.common: Number | None = first
        if len(rates) > 1 or type(first) is not float:  # of one group, which is what a step mostly has, all is said
            self.unread = [rate for rate in rates if isinstance(rate, Tensor)]
            is_one = len(rates) == 1 or (not self.unread and rates.count(first) == len(rates))
            self.common = first if is_one else None

    def read(self, values: Sequence[float]) -> None:
        """Take the values of :attr:`unread`."""
        left = iter(values)
        self._take([next(left) if isinstance(rate, Tensor) else rate for rate in self.of_groups])

    def of_parameters(self, positions: Sequence[int] | None, like: Numbers) -> tuple[Numbers, float]:
        """The rate of each parameter, in units of a number that comes with them.

        Args:
            positions: Where the parameters stand among all of the optimizer; ``None``: they are all.
            like: Numbers of these parameters: floats, or on an accelerator.
        """
        rates, group_of = self.of_groups, at(self._group_of(), positions)
        if not isinstance(like, Tensor):
            return [float(rates[group]) for group in group_of], 1.0
        if self.unread:
            there = (rate if isinstance(rate, Tensor) else constant(rate, like.device) for rate in rates)
            each = torch.stack([rate.to(like.device, non_blocking=True) for rate in there])
            return each.index_select(0, on_device(tuple(group_of), torch.int64, like.device)), 1.0
        largest = max(map(float, rates)) or 1.0
        # Schedules change all rates alike: what they are relative to each other is copied to the device once.
        parts = [float(f"{rate / largest:.6g}") for rate in rates]
        return on_device(tuple(parts[group] for group in group_of), like.dtype, like.device), largest

    def _group_of(self) -> list[int]:
        """For each parameter the number of its group."""
        found: dict[int, int] = {}
        for number, group in enumerate(self._groups):
            for key in map(id, group["params"]):
                found.setdefault(key, number)
        return [found[id(parameter)] for parameter in self._parameters]


def _rate(group: dict[str, Any]) -> Number:
    rate, momentum, gain = group["lr"], group.get("momentum"), 1.0
    least = 0.0
    if momentum:
        left = 1 - momentum
        gain = max((1 - group.get("dampening", 0.0)) / (left if left > _LEAST_LEFT else _LEAST_LEFT), 1.0)
        initial = group.get("initial_lr", 0.0)  # which schedulers leave here
        least = _LEAST_OF_INITIAL * initial if type(initial) is float else 0.0
    if type(rate) is not float and isinstance(rate, Tensor):
        if not _numbers.reads_are_free(rate.device):
            return rate.detach().reshape(()).to(torch.float32).abs() * gain
        rate = rate.item()
    rate = abs(rate)
    return float((rate if rate > least else least) * gain)


class StepBound:
    """No step moves a weight matrix by more than a part of its own norm.

    A weight matrix is a parameter of two dimensions or more; where there is none, every parameter counts as one.

    Args:
        ratio: That part, above 0; ``inf``: no bound.

    Attributes:
        weights: The norms of the weights as they were measured last; infinite of those that do not count.

    Raises:
        TypeError: ``ratio`` is no number.
        ValueError: ``ratio`` is not above 0.
    """

    def __init__(self, ratio: float) -> None:
        self.ratio = ratio if is_infinite(ratio) else check_positive("max_update_ratio", ratio)
        self.forget()

    def forget(self) -> None:
        """Have the weights measured anew."""
        self._trained: tuple[bool, ...] | None = None
        self._set([])

    def _set(self, weights: Numbers) -> None:
        self.weights = weights
        self._inverse: Numbers = weights.reciprocal() if isinstance(weights, Tensor) else [1 / w for w in weights]

    @property
    def is_on(self) -> bool:
        """Whether there is one."""
        return self.ratio < math.inf

    def weighs(self, step: int, parameters: int, trained: tuple[bool, ...]) -> bool:
        """Whether the weights are to be measured at a step, counted from 1; from one to the next they change little.

        Args:
            step: The step.
            parameters: How many there are.
            trained: Which parameters of the optimizer are: others than before are measured at once.
        """
        before, self._trained = self._trained, trained
        is_new = len(self.weights) != parameters or (before is not None and before != trained)
        return step <= _EACH or step % _EACH == 0 or is_new

    def weigh(self, weights: Numbers, shapes: Sequence[torch.Size | None]) -> None:
        """Take the norms of the parameters.

        Args:
            weights: 0 of what does not count at all.
            shapes: Of each; ``None`` of what does not count.
        """
        dims = [-1 if shape is None else len(shape) for shape in shapes]
        least = 1 if max(dims, default=0) > 1 else -1
        if isinstance(weights, Tensor):
            others = on_device(tuple(0.0 if dim > least else math.inf for dim in dims), weights.dtype, weights.device)
            weights = torch.where(weights > 0, weights + others, constant(math.inf, weights.device, weights.dtype))
            self._set(weights)
        else:
            pairs = zip(weights, dims, strict=True)
            self._set([weight if dim > least and weight > 0 else math.inf for weight, dim in pairs])

    def max_norm(self, norm: Number, norms: Numbers, rates: Rates, positions: Sequence[int] | None) -> Number:
        """The largest norm of the gradient that the bound lets through; ``inf`` where no gradient moves anything.

        Args:
            norm: L2 norm of the gradients of some parameters.
            norms: Of each of them.
            rates: Of the optimizer.
            positions: As in :meth:`Rates.of_parameters`.

        Returns:
            A float of floats, a tensor of shape ``()`` of tensors.
        """
        rate = rates.common
        if type(norm) is float:  # quicker than `isinstance`, which counts here
            inverse = self._inverse if type(self._inverse) is list else self._on_host()
            if rate is None:
                norms, rate = list(map(mul, norms, rates.of_parameters(positions, norms)[0])), 1.0
            update = max(map(mul, norms, inverse)) * float(rate)
            return single(norm * (self.ratio / update)) if update > 0 else math.inf
        there: Any = norms
        if not isinstance(self.weights, Tensor) or self.weights.device != there.device:
            self._set(torch.as_tensor(self.weights, dtype=there.dtype).to(there.device))
        if rate is None:
            each, rate = rates.of_parameters(positions, there)
            there = there * each
        most = (there * self._inverse).max()  # `amax` without dimensions reduces nothing on XLA (2.9)
        if isinstance(rate, Tensor):
            most, rate = most * rate.to(most.device), 1.0
        bound: Tensor = norm * (self.ratio / rate) / most if rate > 0 else constant(math.inf, most.device)
        return bound.to(torch.float32)

    def _on_host(self) -> list[float]:
        """The same after a step that was not read: a read."""
        self._set(torch.as_tensor(self.weights).tolist())
        return list(self._inverse)

    def load_state_dict(self, weights: Any) -> None:
        """Restore :attr:`weights`, as a tensor of shape ``(n,)``, float64.

        Raises:
            ValueError: It is damaged.
        """
        sound = isinstance(weights, Tensor) and weights.layout is torch.strided and not weights.is_meta
        if not sound or weights.dtype != torch.float64 or weights.dim() != 1 or not bool((weights > 0).all()):
            came = shown(weights)
            raise ValueError(f"Expected `weight_norms` to be above 0, float64, of shape (n,), but got {came}.")
        self._set(weights.detach().tolist())
