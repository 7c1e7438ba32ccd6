"""Measure and clip gradients: plain, sparse and complex ones, DTensors, flat shards."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_autoclip.clipping import _numbers
from lightning_autoclip.clipping._numbers import Number, constant, single

Numbers: TypeAlias = list[float] | Tensor
"""A number for each parameter: floats where the host knows them, else shape ``(n,)`` on the accelerator."""

_LONGEST_SUM = 2**19  # entries; torch adds squares on the CPU one by one, and loses 1e-5 at twice as many


class Shard(NamedTuple):
    """What this process holds of a gradient.

    Attributes:
        share: The number of distinct shards of the gradient divided by the number of processes, so that a sum of
            ``share * square`` over all processes counts every entry once.
        numel: Number of entries that are held here, where padding makes it differ from the gradient's own.
    """

    share: float
    numel: float | None = None


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
        dtensor, shared, first = _dtensor(), shards is not None, None
        self._parameters = parameters
        self.tensors: list[Tensor] = []
        for parameter in parameters:
            gradient, is_dtensor = parameter.grad, dtensor is not None and isinstance(parameter, dtensor)
            shared = shared or is_dtensor
            if gradient is None:
                gradient = _nothing(parameter.dtype, parameter.device)
            else:
                if is_dtensor:
                    gradient = _local(parameter)
                elif gradient.layout is not torch.strided or gradient.is_complex() or gradient.is_neg():
                    gradient = _plain(parameter)
                first = gradient if first is None else first
            self.tensors.append(gradient)
        self.shards = [_shard(parameter, shards or {}) for parameter in parameters] if shared else None
        self.device = (parameters[0] if first is None else first).device

    def norms(self, read: bool = False) -> Numbers:
        """L2 norm of each parameter's whole gradient, 0 where there is none.

        One collective where gradients are sharded, which every process must join; none elsewhere. The result, and so
        whether it is finite, is the same on every process, since it is taken from the sums. Squares are summed in
        float32 whatever the gradients' own dtype, in float64 if one of them is.

        Args:
            read: Have an accelerator's norms read by the host, in one copy for which it waits.
        """
        return self.norms_and_numels(read, False)[0]

    def norms_and_numels(self, read: bool = False, numels: bool = True) -> tuple[Numbers, Numbers]:
        """Do the same, and count the entries of each gradient, absent ones of sparse gradients included."""
        dtype = torch.float64 if torch.float64 in {tensor.dtype for tensor in self.tensors} else torch.float32
        is_free = _numbers.reads_are_free(self.device)
        if is_free and max([tensor.numel() for tensor in self.tensors]) > _LONGEST_SUM:
            norms = [_norm_by_parts(tensor, dtype) for tensor in self.tensors]
        else:
            norms = list(torch._foreach_norm(self.tensors, 2.0, dtype=dtype))
        if self.shards is None:
            counts: Numbers = self._held() if numels else []
            if is_free:
                return [norm.item() for norm in norms], counts
            stacked = torch.stack([norm.to(self.device, non_blocking=True) for norm in norms])
            return stacked.tolist() if read else stacked, counts
        sums = self._summed(torch.stack([norm.to(self.device, non_blocking=True) for norm in norms]), numels)
        found: Any = sums.tolist() if read or is_free else sums
        many = len(self.tensors)
        return ([math.sqrt(x) for x in found[:many]] if read or is_free else sums[:many].sqrt()), found[many:]

    def _summed(self, norms: Tensor, numels: bool) -> Tensor:
        """Squares over all processes, then counts of entries if they are asked for: shape ``(n,)`` or ``(2n,)``."""
        assert self.shards is not None
        if norms.device.type == "cpu":
            norms = norms.double()
        shares = tuple(shard.share for shard in self.shards)
        sums = norms.square() * _on_device(shares, norms.dtype, norms.device)
        if numels:
            sums = torch.cat((sums, _on_device(tuple(self._held()), norms.dtype, norms.device)))
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


def are_shared(parameters: Iterable[Tensor], shards: Mapping[Tensor, Shard] | None) -> bool:
    """Whether processes share the gradients of some parameters: whether each has to take part in a sum."""
    dtensor = _dtensor()
    return shards is not None or (dtensor is not None and any(isinstance(each, dtensor) for each in parameters))


def clip_norm_(tensors: list[Tensor], norm: Number, threshold: Number, is_finite: bool | Tensor) -> None:
    """Multiply tensors by ``threshold / norm`` in place if the norm is above the threshold.

    At or under the threshold no bit changes.

    Args:
        tensors: Gradients, or what this process holds of them.
        norm: The L2 norm of all the gradients, viewed as one vector.
        threshold: In the same units.
        is_finite: Whether there is anything to clip: else no bit changes either.
    """
    if not isinstance(norm, Tensor) or not isinstance(threshold, Tensor) or not isinstance(is_finite, Tensor):
        if is_finite and threshold < norm:
            torch._foreach_mul_(tensors, float(threshold / norm))
        return
    unchanged = constant(1.0, norm.device)
    factor = torch.fmin(torch.where(is_finite, threshold / norm, unchanged), unchanged)
    for of_device, (factor_there,) in _by_device(tensors, factor):
        torch._foreach_mul_(of_device, factor_there)


def clip_value_(tensors: list[Tensor], threshold: Number, is_finite: bool | Tensor) -> None:
    """Clamp every entry to ``[-threshold, threshold]`` in place.

    Args:
        tensors: Gradients, or what this process holds of them.
        threshold: In units of an entry; ``inf`` leaves everything as it is.
        is_finite: Whether there is anything to clamp: else no bit changes.
    """
    if not isinstance(threshold, Tensor) or not isinstance(is_finite, Tensor):
        if is_finite and threshold < math.inf:
            bounds = {dtype: min(float(threshold), torch.finfo(dtype).max) for dtype in {t.dtype for t in tensors}}
            if _numbers.reads_are_free(tensors[0].device):
                for tensor in tensors:  # one pass over the memory instead of two
                    tensor.clamp_(-bounds[tensor.dtype], bounds[tensor.dtype])
                return
            for (_, dtype), alike in _grouped(tensors, lambda tensor: (tensor.device, tensor.dtype)).items():
                torch._foreach_clamp_min_(alike, -bounds[dtype])  # two launches instead of one for each
                torch._foreach_clamp_max_(alike, bounds[dtype])
        return
    limit = torch.where(is_finite, threshold, constant(math.inf, threshold.device))
    for of_device, (low, high) in _by_device(tensors, -limit, limit):
        for tensor in of_device:
            tensor.clamp_(low, high)


def norm_of(norms: Numbers) -> Number:
    """L2 norm of some norms, float32: a float of floats, a tensor of shape ``()`` of a tensor."""
    if isinstance(norms, Tensor):
        return torch.linalg.vector_norm(norms).to(torch.float32)  # type: ignore[no-any-return]
    return single(math.hypot(*norms))


def at(numbers: Any, positions: Sequence[int] | None) -> Any:
    """What a list or tensor holds of the parameters at these positions, in their order; of all of them at ``None``."""
    if positions is None:
        return numbers
    if isinstance(numbers, Tensor):
        return numbers.index_select(0, _on_device(tuple(positions), torch.int64, numbers.device))
    return [numbers[position] for position in positions]


def _grouped(tensors: Iterable[Tensor], key: Any) -> dict[Any, list[Tensor]]:
    groups: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(key(tensor), []).append(tensor)
    return groups


def _by_device(tensors: Iterable[Tensor], *scalars: Tensor) -> Iterable[tuple[list[Tensor], list[Tensor]]]:
    """The tensors of each device, with the scalars moved there."""
    for device, of_device in _grouped(tensors, lambda tensor: tensor.device).items():
        yield of_device, [scalar.to(device, non_blocking=True) for scalar in scalars]


@lru_cache(maxsize=1024)  # an optimizer may have hundreds of groups
def _on_device(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The same few lists at every step: copied to the device once."""
    return torch.tensor(values, dtype=dtype, device=device)


@lru_cache(maxsize=64)
def _nothing(dtype: torch.dtype, device: torch.device) -> Tensor:
    """What stands for a gradient that is not there; of the parameters' dtype, for calls that want one for all."""
    return torch.empty(0, dtype=dtype if dtype.is_floating_point else torch.float32, device=device)


def _norm_by_parts(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """L2 norm of a tensor on the CPU, summed over parts that are short enough for float32."""
    if tensor.numel() <= _LONGEST_SUM:
        return torch._foreach_norm([tensor], 2.0, dtype=dtype)[0]
    rows = tensor.permute(sorted(range(tensor.dim()), key=tensor.stride, reverse=True))  # in the order of the memory
    rows = rows.view(-1) if rows.is_contiguous() else rows
    parts = torch.split(rows, max(1, _LONGEST_SUM * len(rows) // rows.numel()))
    norms: list[Tensor] = list(torch._foreach_norm(parts, 2.0, dtype=dtype))
    return torch.linalg.vector_norm(torch.stack(norms))  # type: ignore[no-any-return]


def _dtensor() -> type | None:
    """The class DTensor if anybody has imported it, for `isinstance`; importing it takes a second."""
    module = sys.modules.get("torch.distributed.tensor")
    return None if module is None else module.DTensor


def _local(parameter: Any) -> Tensor:
    """What this process holds of a DTensor's gradient.

    Gradients that are still to be summed (sequence parallelism leaves such for replicated parameters) are summed here.
    """
    gradient = parameter.grad
    if any(placement.is_partial() for placement in gradient.placements):
        gradient = parameter.grad = gradient.redistribute(placements=parameter.placements)
    local: Tensor = gradient.to_local()
    if local.is_conj() or local.is_neg() or local.layout is not torch.strided:
        raise TypeError("Expected gradients of DTensors to be dense and not lazily conjugated or negated.")
    return torch.view_as_real(local) if local.is_complex() else local


def _shard(parameter: Any, shards: Mapping[Tensor, Shard]) -> Shard:
    """How much of a gradient this process holds: known of a DTensor by itself."""
    gradient, world = parameter.grad, dist.get_world_size()
    if gradient is None:
        return Shard(0.0, 0.0)
    if not hasattr(gradient, "placements"):
        return shards.get(parameter, Shard(1 / world))
    sizes = (gradient.device_mesh.size(i) for i, placement in enumerate(gradient.placements) if placement.is_shard())
    return Shard(math.prod(sizes) / world, gradient.to_local().numel())


def _plain(parameter: Tensor) -> Tensor:
    """A gradient that is sparse, complex or lazily negated, as a real, dense tensor that shares its memory."""
    gradient: Any = parameter.grad
    if gradient.layout is torch.sparse_coo:
        gradient = parameter.grad = gradient.coalesce()
        gradient = gradient._values()
    elif gradient.layout is not torch.strided:
        raise TypeError(f"Expected dense or sparse COO gradients, but got one of layout {gradient.layout}.")
    elif gradient.is_neg() or gradient.is_conj():
        gradient = parameter.grad = gradient.resolve_conj().resolve_neg()
    return torch.view_as_real(gradient) if gradient.is_complex() else gradient
