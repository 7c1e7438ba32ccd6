"""Measure and clip the gradients of a set of parameters."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_autoclip.clipping import _numbers
from lightning_autoclip.clipping._numbers import Number, single

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


@dataclass(slots=True)
class Gradients:
    """The gradients that one optimizer step is about to apply: of each, the part that this process holds.

    Attributes:
        parameters: The parameters that have a gradient.
        tensors: Their gradients as real, dense, local tensors that share the gradients' memory (of a DTensor, its local
            shard; of a sparse gradient, its coalesced values; of a complex one, its real view).
        shards: What is held here of each; ``None`` where every process holds the whole gradient and nothing is summed.
        positions: Where they stand among all parameters of the optimizer, ``count`` of them.
        device: Where the parameters are.
    """

    parameters: list[Tensor]
    tensors: list[Tensor]
    shards: list[Shard] | None
    positions: list[int]
    count: int
    device: torch.device

    @classmethod
    def of(cls, parameters: Iterable[Tensor], shards: Mapping[Tensor, Shard] | None = None) -> Gradients:
        """Collect the gradients of ``parameters``; those without one are left out. Coalesces sparse gradients.

        Args:
            parameters: All parameters of the optimizer; at least one, and on every process the same ones.
            shards: What is held of each parameter's gradient, where that does not tell it itself as a DTensor does.
                Of parameters that do not stand there every process is taken to hold the whole.
        """
        dtensor, sharded = _dtensor(), shards is not None
        found, tensors, positions, parameter, position = [], [], [], None, -1
        for position, parameter in enumerate(parameters):
            is_dtensor = dtensor is not None and isinstance(parameter, dtensor)
            sharded = sharded or is_dtensor
            gradient = parameter.grad
            if gradient is None:
                continue
            if is_dtensor:
                gradient = _local(parameter)
            elif gradient.layout is not torch.strided or gradient.is_complex() or gradient.is_neg():
                gradient = _plain(parameter)
            found.append(parameter)
            tensors.append(gradient)
            positions.append(position)
        held = [_shard(parameter, shards or {}) for parameter in found] if sharded else None
        one = tensors[0] if tensors else parameter
        return cls(found, tensors, held, positions, position + 1, torch.device("cpu") if one is None else one.device)

    def norms(self) -> list[float] | Tensor:
        """L2 norm of each of :attr:`tensors`.

        Returns:
            On the CPU one float for each; else shape ``(len(tensors),)``, on :attr:`device`, float32 (float64 if a
            gradient is). Squares are summed in that dtype whatever the gradients' own.
        """
        on_host = _numbers.reads_are_free(self.device)
        if not self.tensors:
            return [] if on_host else torch.zeros(0, device=self.device)
        dtype = torch.float64 if torch.float64 in {tensor.dtype for tensor in self.tensors} else torch.float32
        if on_host and max([tensor.numel() for tensor in self.tensors]) > _LONGEST_SUM:
            norms = [_norm_by_parts(tensor, dtype) for tensor in self.tensors]
        else:
            norms = list(torch._foreach_norm(self.tensors, 2.0, dtype=dtype))
        if on_host:
            return [norm.item() for norm in norms]
        return torch.stack([norm.to(self.device, non_blocking=True) for norm in norms])

    def numel(self) -> float:
        """How many entries count as held by this process, absent ones of sparse gradients included."""
        if self.shards is None:
            return sum(parameter.numel() for parameter in self.parameters)
        return sum(
            shard.share * (parameter.numel() if shard.numel is None else shard.numel)
            for parameter, shard in zip(self.parameters, self.shards, strict=True)
        )

    def of_all(self, norms: list[float] | Tensor) -> list[float] | Tensor:
        """The norms at the places of all parameters of the optimizer, 0 where there is no gradient: ``(count,)``."""
        if len(self.positions) == self.count:
            return norms
        if isinstance(norms, Tensor):
            places = _on_device(tuple(self.positions), torch.int64, norms.device)
            return norms.new_zeros(self.count).index_copy(0, places, norms)
        spread = [0.0] * self.count
        for position, norm in zip(self.positions, norms, strict=True):
            spread[position] = norm
        return spread

    def parts(self, groups: Sequence[Sequence[int]]) -> list[Gradients]:
        """Of each group those of its parameters, which are given by their positions."""
        places = {position: place for place, position in enumerate(self.positions)}
        return [self._part([places[at] for at in group if at in places]) for group in groups]

    def _part(self, places: list[int]) -> Gradients:
        return Gradients(
            [self.parameters[place] for place in places],
            [self.tensors[place] for place in places],
            None if self.shards is None else [self.shards[place] for place in places],
            [self.positions[place] for place in places],
            self.count,
            self.device,
        )

    def whole(
        self, norms: list[float] | Tensor, numels: Sequence[float] = ()
    ) -> tuple[Number, list[Number], list[float] | Tensor]:
        """L2 norm of all gradients of all processes, viewed as one vector.

        One collective where gradients are sharded, which every process must join; none elsewhere. Whether the norm is
        finite is the same on every process, since it is decided from the sum.

        Args:
            norms: What :meth:`norms` returned.
            numels: Counts of entries that are held here, to be summed over all processes as well.

        Returns:
            The norm (a float32, equal on every process), the sums of ``numels``, and the norm of each parameter's whole
            gradient as :meth:`of_all` arranges them.
        """
        if self.shards is None:
            return norm_of(norms), list(numels), self.of_all(norms)
        shares = tuple(shard.share for shard in self.shards)
        if isinstance(norms, Tensor):
            squares = self.of_all(norms.square() * _on_device(shares, norms.dtype, norms.device))
            counts = _on_device(tuple(numels), torch.float32, norms.device)
            sums = torch.cat((torch.as_tensor(squares).to(torch.float32), counts))
        else:
            squares = self.of_all([share * norm * norm for share, norm in zip(shares, norms, strict=True)])
            sums = torch.tensor([*squares, *numels], dtype=torch.float64)
        if dist.get_backend() == "nccl":  # CPU offload: NCCL sums on GPUs only
            sums = sums.cuda()
        dist.all_reduce(sums)
        if isinstance(norms, Tensor):
            sums = sums.to(self.device)
            squares = sums[: self.count]
            return squares.sum().sqrt(), list(sums[self.count :]), squares.sqrt()
        on_host = sums.tolist()
        squares = on_host[: self.count]
        return single(math.sqrt(math.fsum(squares))), on_host[self.count :], [math.sqrt(square) for square in squares]

    def clip_norm_(self, norm: Number, threshold: Number) -> None:
        """Multiply every gradient by ``threshold / norm`` in place if the norm is finite and above the threshold.

        At or under the threshold, and when the norm is not finite, no bit changes.

        Args:
            norm: The L2 norm of all the gradients, viewed as one vector.
            threshold: In the same units.
        """
        if isinstance(norm, float):
            if threshold < norm < math.inf and self.tensors:  # a rank may hold nothing of a group
                torch._foreach_mul_(self.tensors, threshold / norm)
            return
        clips = (norm > threshold) & (norm < math.inf)
        for tensors, (factor,) in self._by_device(torch.where(clips, threshold / norm, 1.0)):
            torch._foreach_mul_(tensors, factor)

    def clip_value_(self, norm: Number, threshold: Number) -> None:
        """Clamp every entry to ``[-threshold, threshold]`` in place if the norm is finite.

        Args:
            norm: The L2 norm of all the gradients. Where it is not finite no bit changes: a clamped infinity would
                hide from a `GradScaler` that looks for it later.
            threshold: In units of an entry; ``inf`` leaves everything as it is.
        """
        if not isinstance(norm, Tensor) or not isinstance(threshold, Tensor):
            if norm < math.inf and threshold < math.inf:
                kinds = {tensor.dtype for tensor in self.tensors}
                bounds = {dtype: min(float(threshold), torch.finfo(dtype).max) for dtype in kinds}
                for tensor in self.tensors:
                    tensor.clamp_(-bounds[tensor.dtype], bounds[tensor.dtype])
            return
        limits = torch.where((norm < math.inf) & (threshold < math.inf), threshold, math.inf)
        for tensors, (low, high) in self._by_device(-limits, limits):
            for tensor in tensors:
                tensor.clamp_(low, high)

    def _by_device(self, *scalars: Tensor) -> Iterable[tuple[list[Tensor], list[Tensor]]]:
        """The gradients of each device, with the scalars moved there."""
        groups: dict[torch.device, list[Tensor]] = {}
        for tensor in self.tensors:
            groups.setdefault(tensor.device, []).append(tensor)
        for device, tensors in groups.items():
            yield tensors, [scalar.to(device, non_blocking=True) for scalar in scalars]


def norm_of(norms: list[float] | Tensor) -> Number:
    """L2 norm of some norms, float32: a float of floats, a tensor of shape ``()`` of a tensor."""
    if isinstance(norms, Tensor):
        return torch.linalg.vector_norm(norms).to(torch.float32)  # type: ignore[no-any-return]
    return single(math.hypot(*norms))


def at_positions(norms: list[float] | Tensor, positions: Sequence[int]) -> list[float] | Tensor:
    """Those of the norms of all parameters that stand at these positions, in their order."""
    if isinstance(norms, Tensor):
        return norms.index_select(0, _on_device(tuple(positions), torch.int64, norms.device))
    return [norms[position] for position in positions]


@lru_cache(maxsize=1024)  # an optimizer may have hundreds of groups
def _on_device(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The same few lists at every step: copied to the device once."""
    return torch.tensor(values, dtype=dtype, device=device)


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
