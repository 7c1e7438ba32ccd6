"""Measure gradients and the weights that they are to move."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_autoclip.clipping import _numbers
from lightning_autoclip.clipping._numbers import Number, Numbers, on_device, single
from lightning_autoclip.clipping.shards import (
    Shard,
    are_shared,
    gradient_of,
    refuse_xla_shards,
    shape_of,
    shard_of_gradient,
    share_of_weights,
    weights_of,
)

LEAST_ENTRY = 0.01
"""Root-mean-square entry that a tensor of weights counts with at least: half of the smallest usual initial one. What
starts at zero could never move otherwise, were no step to be larger than a part of its weights."""

LARGEST_NORM = math.sqrt(torch.finfo(torch.float32).max)
"""Its square is float32's largest number: what is above, 1.8e19, counts as infinite wherever it is measured."""

_LONGEST_SUM = 2**19  # entries; torch adds squares on the CPU one by one, and loses 1e-5 at twice as many


class Measured(NamedTuple):
    """What was measured of some parameters, a number for each; floats where the host knows them.

    Attributes:
        norms: L2 norms of the whole gradients, 0 where there is none.
        numels: Numbers of entries of these gradients, absent ones of sparse gradients included.
        weights: L2 norms of the whole parameters that are trained, 0 of others; none smaller than a root-mean-square
            entry of `LEAST_ENTRY` would make it.
        rates: Numbers of somebody else that were read in the same copy.
    """

    norms: Numbers
    numels: Numbers
    weights: Numbers
    rates: list[float]


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
        if _numbers.compiles_graphs(self.device):
            refuse_xla_shards(parameters)

    def norms(self, read: bool = False) -> Numbers:
        """L2 norm of each parameter's whole gradient, 0 where there is none.

        One collective where gradients are sharded, which every process must join; none elsewhere. The result, and so
        whether it is finite, is the same on every process, since it is taken from the sums. Squares are summed in
        float32 whatever the gradients' own dtype, in float64 if one of them is.

        Args:
            read: Have an accelerator's norms read by the host, in one copy for which it waits.
        """
        return self.measure(read).norms

    def measure(
        self, read: bool = False, *, numels: bool = False, weights: bool = False, rates: Sequence[Tensor] = ()
    ) -> Measured:
        """Do the same, and measure what else is asked for, with no further collective and no further copy.

        Args:
            read: As in :meth:`norms`.
            numels: Whether entries are counted.
            weights: Whether the parameters are measured too: one more read of as many numbers.
            rates: Numbers of shape ``()`` on the accelerator that the host is to have with the norms, if it reads them.
        """
        is_free, many = _numbers.reads_are_free(self.device), len(self.tensors)
        found = self._norms_of(self.tensors)
        if weights:
            found += self._norms_of([weights_of(parameter) for parameter in self._parameters])
        if self.shards is None:
            counts: Numbers = self._held() if numels else []
            if is_free:
                known = [norm.item() for norm in found]
                return Measured(known[:many], counts, self._floored(known[many:]), [])
            stacked = self._stacked([*found, *(rates if read else ())])
            if not read:
                return Measured(stacked[:many], counts, self._floored(stacked[many:]), [])
            known, last = stacked.tolist(), len(found)
            return Measured(known[:many], counts, self._floored(known[many:last]), known[last:])
        sums = self._summed(self._stacked(found), numels)
        if not (read or is_free):
            weighed = self._floored(sums[many : len(found)].sqrt())
            return Measured(sums[:many].sqrt(), sums[len(found) :], weighed, [])
        known = (torch.cat((sums, self._stacked(rates).to(sums))) if rates else sums).tolist()
        norms, counts = [math.sqrt(x) for x in known[: len(found)]], known[len(found) : sums.numel()]
        return Measured(norms[:many], counts, self._floored(norms[many:]), known[sums.numel() :])

    @cached_property
    def shapes(self) -> list[torch.Size | None]:
        """The shape of each whole parameter, as :func:`shape_of` tells it."""
        return [shape_of(parameter, self._given) for parameter in self._parameters]

    def _stacked(self, numbers: Sequence[Tensor]) -> Tensor:
        return torch.stack([number.to(self.device, non_blocking=True) for number in numbers])

    def _norms_of(self, tensors: list[Tensor]) -> list[Tensor]:
        """L2 norm of each tensor, summed as `norms` says: of shape ``()``."""
        dtype = torch.float64 if torch.float64 in {tensor.dtype for tensor in tensors} else torch.float32
        if _numbers.reads_are_free(self.device) and max([tensor.numel() for tensor in tensors]) > _LONGEST_SUM:
            return [_norm_by_parts(tensor, dtype) for tensor in tensors]
        kinds = {tensor.dtype for tensor in tensors}
        if len(kinds) == 1 or _numbers.reads_are_free(self.device):
            return list(torch._foreach_norm(tensors, 2.0, dtype=dtype))
        norms: dict[int, Tensor] = {}  # of a list of several dtypes, each norm would be launches of its own
        for kind in kinds:
            places = [i for i, tensor in enumerate(tensors) if tensor.dtype == kind]
            alike = torch._foreach_norm([tensors[i] for i in places], 2.0, dtype=dtype)
            norms |= zip(places, alike, strict=True)
        return [norms[i] for i in range(len(tensors))]

    def _floored(self, weights: Numbers) -> Numbers:
        """Norms of the parameters, if they were measured, not below what `LEAST_ENTRY` makes of the trained ones."""
        if not len(weights):
            return weights
        least = [0.0 if shape is None else LEAST_ENTRY * math.sqrt(shape.numel()) for shape in self.shapes]
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
        """How many entries of each gradient count as held by this process."""
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
    """L2 norm of some norms, float32: a float of floats, a tensor of shape ``()`` of a tensor."""
    if isinstance(norms, Tensor):
        norm = torch.linalg.vector_norm(norms)
        if norms.dtype == torch.float64:  # else the sum of squares is infinite by itself
            norm = torch.where(norm > LARGEST_NORM, math.inf, norm)
        return norm.to(torch.float32)  # type: ignore[no-any-return]
    whole = math.hypot(*norms)
    return math.inf if whole > LARGEST_NORM else single(whole)


def _norm_by_parts(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """L2 norm of a tensor on the CPU, summed over parts that are short enough for float32."""
    if tensor.numel() <= _LONGEST_SUM:
        return torch._foreach_norm([tensor], 2.0, dtype=dtype)[0]
    rows = tensor.permute(sorted(range(tensor.dim()), key=tensor.stride, reverse=True))  # in the order of the memory
    rows = rows.view(-1) if rows.is_contiguous() else rows
    parts = torch.split(rows, max(1, _LONGEST_SUM * len(rows) // rows.numel()))
    norms: list[Tensor] = list(torch._foreach_norm(parts, 2.0, dtype=dtype))
    return torch.linalg.vector_norm(torch.stack(norms))  # type: ignore[no-any-return]
