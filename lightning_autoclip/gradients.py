"""Measure gradients, and the weights that they are to move."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_autoclip.history import Number
from lightning_autoclip.shards import (
    Shard,
    are_shared,
    gradient_of,
    refuse_xla_shards,
    shape_of,
    shard_of_gradient,
    share_of_weights,
    weights_of,
)

Numbers: TypeAlias = list[float] | Tensor
"""A number for each parameter: floats, or shape ``(n,)`` on an accelerator where the host does not read them."""

LEAST_RMS = 0.01
"""RMS element that a tensor of weights counts with at least: half of the smallest usual initial one. What starts at
zero could never move otherwise, were no step to be larger than a part of its weights."""

LARGEST_NORM = math.sqrt(torch.finfo(torch.float32).max)
"""Its square is float32's largest number: what is above, 1.8e19, counts as infinite wherever it is measured."""

_LONGEST_SUM = 2**19  # elements; torch adds squares on the CPU one by one, and loses 1e-5 at twice as many


def can_read_later(device: torch.device) -> bool:
    """Whether a number can come to the host while the device works on: by a copy to pinned memory and an event.

    The one place that decides whether the norm of a step is a tensor. Elsewhere it is read at the step: on the CPU that
    is free, and MPS and XLA would wait for everything queued at any later time too.
    """
    return device.type in ("cuda", "xpu")


class Arrival:
    """Numbers of a device on their way to the host.

    Args:
        numbers: Shape ``(n,)``.
    """

    def __init__(self, numbers: Tensor) -> None:
        self._event = None
        if not can_read_later(numbers.device) or numbers.device.type == "cpu":
            self._numbers = numbers.clone()
            return
        self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, device="cpu", pin_memory=True)
        self._numbers.copy_(numbers, non_blocking=True)
        self._event = torch.Event(numbers.device)
        self._event.record()

    def wait(self) -> list[float]:
        """Return the numbers; wait for the copy alone, not for what was queued after it."""
        if self._event is not None:
            self._event.synchronize()
        numbers: list[float] = self._numbers.tolist()
        return numbers


class Measured(NamedTuple):
    """What was measured of some parameters, a number for each.

    Attributes:
        norms: L2 norms of the whole gradients, 0 where there is none.
        numels: Numbers of elements of these gradients, absent ones of sparse gradients included.
        weights: L2 norms of the whole parameters that are trained, 0 of others; none smaller than an RMS element of
            `LEAST_RMS` would make it.
    """

    norms: Numbers
    numels: Numbers
    weights: Numbers


class Gradients:
    """The gradients of some parameters, of each the part that this process holds.

    Args:
        parameters: At least one; on every process the same ones, in the same order.
        shards: What is held of each parameter's gradient, where that does not tell it itself as a DTensor does. Of
            parameters that do not stand there every process is taken to hold the whole.

    Attributes:
        tensors: For each parameter its gradient as a real, dense, local tensor that shares the gradient's memory (of a
            DTensor its local shard; of a sparse gradient its coalesced values; of a complex one its real view). Empty
            where there is no gradient.
        shards: What is held here of each; ``None`` where every process holds whole gradients and nothing is summed.
        device: Where the first gradient is.
    """

    def __init__(self, parameters: Sequence[Tensor], shards: Mapping[Tensor, Shard] | None = None) -> None:
        self._parameters, self._given = parameters, shards or {}
        self.tensors = [gradient_of(parameter) for parameter in parameters]
        self.shards: list[Shard] | None = None
        if are_shared(parameters, shards):
            self.shards = [shard_of_gradient(parameter, self._given) for parameter in parameters]
        pairs = zip(parameters, self.tensors, strict=True)
        self.device = next((own.device for each, own in pairs if each.grad is not None), parameters[0].device)
        if self.device.type == "xla":
            refuse_xla_shards(parameters)

    def measure(self, read: bool, *, numels: bool = False, weights: bool = False) -> Measured:
        """Measure the L2 norm of each parameter's whole gradient, 0 where there is none, and what else is asked for.

        One collective where gradients are sharded, which every process must join; none elsewhere. The result, and so
        whether it is finite, is the same on every process, since it is taken from the sums. Squares are summed in
        float32 whatever the gradients' own dtype, in float64 if one of them is.

        Args:
            read: Have the host read all numbers, in one copy for which it waits on an accelerator.
            numels: Whether elements are counted.
            weights: Whether the parameters are measured too: one more read of as many numbers.
        """
        many, found = len(self.tensors), self._norms_of(self.tensors)
        if weights:
            found += self._norms_of([weights_of(parameter) for parameter in self._parameters])
        last = len(found)
        numbers: Any
        if self.shards is not None:
            sums = self._summed(self._stacked(found), numels)
            numbers = torch.cat((sums[:last].sqrt(), sums[last:])) if numels else sums.sqrt()
        elif read and self.device.type == "cpu" and not can_read_later(self.device):
            numbers = [norm.item() for norm in found]
        else:
            numbers = self._stacked(found)
        if read and isinstance(numbers, Tensor):
            numbers = numbers.tolist()
        counts = self._held() if numels and self.shards is None else numbers[last:]
        return Measured(numbers[:many], counts, self._floored(numbers[many:last]))

    @cached_property
    def shapes(self) -> list[torch.Size | None]:
        """The shape of each whole parameter, as :func:`shape_of` tells it."""
        return [shape_of(parameter, self._given) for parameter in self._parameters]

    def _stacked(self, numbers: Sequence[Tensor]) -> Tensor:
        return torch.stack([number.to(self.device, non_blocking=True) for number in numbers])

    def _norms_of(self, tensors: list[Tensor]) -> list[Tensor]:
        """L2 norm of each tensor, summed as :meth:`measure` says: of shape ``()``."""
        dtype = torch.float64 if torch.float64 in {tensor.dtype for tensor in tensors} else torch.float32
        is_cpu = self.device.type == "cpu"
        if is_cpu and max([tensor.numel() for tensor in tensors]) > _LONGEST_SUM:
            return [_norm_by_parts(tensor, dtype) for tensor in tensors]
        kinds = {tensor.dtype for tensor in tensors}
        if len(kinds) == 1 or is_cpu:
            return list(torch._foreach_norm(tensors, 2.0, dtype=dtype))
        norms: dict[int, Tensor] = {}  # of a list of several dtypes, each norm would be launches of its own
        for kind in kinds:
            places = [i for i, tensor in enumerate(tensors) if tensor.dtype == kind]
            alike = torch._foreach_norm([tensors[i] for i in places], 2.0, dtype=dtype)
            norms |= zip(places, alike, strict=True)
        return [norms[i] for i in range(len(tensors))]

    def _floored(self, weights: Numbers) -> Numbers:
        """Norms of the parameters, if they were measured, not below what `LEAST_RMS` makes of the trained ones."""
        if not len(weights):
            return weights
        least = [0.0 if shape is None else LEAST_RMS * math.sqrt(shape.numel()) for shape in self.shapes]
        if isinstance(weights, Tensor):
            return torch.maximum(weights, on_device(tuple(least), weights.dtype, weights.device))
        return [most if most > norm else norm for norm, most in zip(weights, least, strict=True)]

    def _summed(self, norms: Tensor, numels: bool) -> Tensor:
        """Squares over all processes, of gradients and, if they are there, of parameters; counts if asked for."""
        assert self.shards is not None
        if norms.device.type == "cpu":
            norms = norms.double()
        shares = [shard.share for shard in self.shards]
        if len(norms) > len(shares):
            shares += [share_of_weights(parameter, self._given) for parameter in self._parameters]
        sums = norms.square() * on_device(tuple(shares), norms.dtype, norms.device)
        if numels:
            sums = torch.cat((sums, on_device(tuple(self._held()), norms.dtype, norms.device)))
        if dist.get_backend() == "nccl":  # CPU offload: NCCL sums on GPUs only
            sums = sums.cuda()
        dist.all_reduce(sums)
        return sums.to(self.device)

    def _held(self) -> list[float]:
        """How many elements of each gradient count as held by this process."""
        numels = [
            parameter.numel() if tensor.numel() else 0  # also of a sparse gradient, which holds fewer
            for parameter, tensor in zip(self._parameters, self.tensors, strict=True)
        ]
        if self.shards is None:
            return numels  # type: ignore[return-value]
        return [
            shard.share * (numel if shard.numel is None else shard.numel)
            for shard, numel in zip(self.shards, numels, strict=True)
        ]


def norm_of(norms: Numbers) -> Number:
    """L2 norm of some norms: a float of floats, shape ``()`` of a tensor."""
    if isinstance(norms, Tensor):
        norm = torch.linalg.vector_norm(norms)
        if norms.dtype == torch.float64:  # else the sum of squares is infinite by itself
            norm = torch.where(norm > LARGEST_NORM, math.inf, norm)
        return norm  # type: ignore[no-any-return]
    whole = math.hypot(*norms)
    return math.inf if whole > LARGEST_NORM else whole


def rms_of(norm: Number, numels: Numbers) -> Number:
    """RMS element: 0 where there are no elements, as where there are only zeros."""
    if isinstance(numels, Tensor):
        return norm / numels.sum().clamp(min=1).sqrt()
    return norm / math.sqrt(math.fsum(numels) or 1.0)


def at(numbers: Any, positions: Sequence[int] | None) -> Any:
    """What a list or tensor holds of the parameters at these positions, in their order; of all of them at ``None``."""
    if positions is None:
        return numbers
    if isinstance(numbers, Tensor):
        first, last = positions[0], positions[-1] + 1
        if list(positions) == list(range(first, last)):  # a view, as of the optimizer's own groups
            return numbers[first:last]
        return numbers.index_select(0, on_device(tuple(positions), torch.int64, numbers.device))
    return [numbers[position] for position in positions]


def _norm_by_parts(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """L2 norm of a tensor on the CPU, summed over parts that are short enough for float32."""
    if tensor.numel() <= _LONGEST_SUM:
        return torch._foreach_norm([tensor], 2.0, dtype=dtype)[0]
    rows = tensor.permute(sorted(range(tensor.dim()), key=tensor.stride, reverse=True))  # in the order of the memory
    rows = rows.view(-1) if rows.is_contiguous() else rows
    parts = torch.split(rows, max(1, _LONGEST_SUM * len(rows) // rows.numel()))
    norms: list[Tensor] = list(torch._foreach_norm(parts, 2.0, dtype=dtype))
    return torch.linalg.vector_norm(torch.stack(norms))  # type: ignore[no-any-return]


@lru_cache(maxsize=1024)  # an optimizer may have hundreds of groups
def on_device(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The same few lists at every step: copied to the device once."""
    return torch.tensor(values, dtype=dtype, device=device)
