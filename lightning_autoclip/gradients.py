"""Measure and clip the gradients of a set of parameters."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


def reads_are_free(device: torch.device) -> bool:
    """Whether reading a tensor of ``device`` on the host makes nobody wait.

    The one place that decides between the two forms of every shortcut: a plain ``if`` on the CPU, tensor arithmetic
    on an accelerator.
    """
    return device.type == "cpu"


class Shard(NamedTuple):
    """What this process holds of a gradient.

    Attributes:
        share: The number of distinct shards of the gradient divided by the number of processes, so that a sum of
            ``share * square`` over all processes counts every entry once.
        numel: Number of entries that are held here, where padding makes it differ from the gradient's own.
    """

    share: float
    numel: float | None = None


@dataclass(frozen=True)
class Gradients:
    """The gradients that one optimizer step is about to apply: of each, the part that this process holds.

    Attributes:
        parameters: The parameters that have a gradient.
        tensors: Their gradients as real, dense, local tensors that share the gradients' memory (of a DTensor, its local
            shard; of a sparse gradient, its coalesced values; of a complex one, its real view).
        numels: Number of entries of each, absent entries of sparse ones included.
        shares: Of each, `Shard.share`; ``None`` where every process holds the whole gradient and nothing is summed.
        device: Where the parameters are.
    """

    parameters: list[Tensor]
    tensors: list[Tensor]
    numels: list[float]
    shares: list[float] | None
    device: torch.device

    @classmethod
    def of(cls, parameters: Iterable[Tensor], shards: Mapping[Tensor, Shard] | None = None) -> Gradients:
        """Collect the gradients of ``parameters``; those without one are left out. Coalesces sparse gradients.

        Args:
            parameters: All parameters of the optimizer; at least one, and on every process the same ones.
            shards: What is held of each parameter's gradient, where that does not tell it itself as a DTensor does.
                Of parameters that do not stand there every process is taken to hold the whole.
        """
        parameters = list(parameters)
        dtensor = _dtensor()
        sharded = shards is not None or any(isinstance(parameter, dtensor) for parameter in parameters)
        world = dist.get_world_size() if sharded else 1
        found, tensors, numels, shares = [], [], [], []
        for parameter in parameters:
            gradient = parameter.grad
            if gradient is None:
                continue
            share, numel = 1 / world, None
            if shards is not None:
                share, numel = shards.get(parameter, (share, numel))
            if isinstance(gradient, dtensor):
                gradient, shards_of_it = _local(parameter)
                share = shards_of_it / world
            numels.append(gradient.numel() if numel is None else numel)
            if gradient.layout is not torch.strided:
                gradient = parameter.grad = _coalesced(gradient)
                gradient = gradient._values()
            elif gradient.is_conj() or gradient.is_neg():
                gradient = parameter.grad = gradient.resolve_conj().resolve_neg()
            found.append(parameter)
            tensors.append(torch.view_as_real(gradient) if gradient.is_complex() else gradient)
            shares.append(share)
        device = (tensors or parameters or [torch.empty(0)])[0].device
        return cls(found, tensors, numels, shares if sharded else None, device)

    def norms(self) -> Tensor:
        """L2 norm of each of :attr:`tensors`.

        Returns:
            Shape ``(len(tensors),)``, float32 (float64 if a gradient is), on :attr:`device`. Squares are summed in
            that dtype whatever the gradients' own.
        """
        if not self.tensors:
            return torch.zeros(0, device=self.device)
        dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in self.tensors) else torch.float32
        norms = torch._foreach_norm(self.tensors, 2.0, dtype=dtype)
        return torch.stack([norm.to(self.device, non_blocking=True) for norm in norms])

    def whole(self, norms: Tensor) -> tuple[Tensor, Tensor | float]:
        """L2 norm and number of entries of all gradients of all processes, viewed as one vector.

        One collective where gradients are sharded, which every process must join; none elsewhere. Whether the norm is
        finite is the same on every process, since it is decided from the sum.

        Args:
            norms: What :meth:`norms` returned.

        Returns:
            The norm (shape ``()``, float32, on :attr:`device`, equal on every process) and the number of entries.
        """
        if self.shares is None:
            return torch.linalg.vector_norm(norms).to(torch.float32), sum(self.numels)
        shares = _on_device(tuple(self.shares), norms.dtype, norms.device)
        numel = sum(share * numel for share, numel in zip(self.shares, self.numels, strict=True))
        sums = torch.stack(((norms.square() * shares).sum(), norms.new_full((), numel))).to(torch.float32)
        if dist.get_backend() == "nccl":  # CPU offload: NCCL sums on GPUs only
            sums = sums.cuda()
        dist.all_reduce(sums)
        square, numel_of_all = sums.to(self.device).unbind()
        return square.sqrt(), numel_of_all

    def clip_norm_(self, norm: Tensor, threshold: Tensor) -> None:
        """Multiply every gradient by ``threshold / norm`` in place if the norm is finite and above the threshold.

        At or under the threshold, and when the norm is not finite, no bit changes.

        Args:
            norm: Shape ``()``, float32: the L2 norm of all the gradients, viewed as one vector.
            threshold: Shape ``()``, float32.
        """
        if reads_are_free(norm.device):
            if threshold < norm < math.inf:
                torch._foreach_mul_(self.tensors, (threshold / norm).item())
            return
        clips = (norm > threshold) & norm.isfinite()
        for tensors, (factor,) in self._by_device(torch.where(clips, threshold / norm, 1.0)):
            torch._foreach_mul_(tensors, factor)

    def clip_value_(self, norm: Tensor, threshold: Tensor) -> None:
        """Clamp every entry to ``[-threshold, threshold]`` in place if the norm is finite.

        Args:
            norm: Shape ``()``, float32: the L2 norm of all the gradients. Where it is not finite no bit changes: a
                clamped infinity would hide from a `GradScaler` that looks for it later.
            threshold: Shape ``()``, float32; ``inf`` leaves everything as it is.
        """
        if reads_are_free(norm.device):
            limit = threshold.item()
            if norm < math.inf and limit < math.inf:
                for tensor in self.tensors:
                    bound = min(limit, torch.finfo(tensor.dtype).max)
                    tensor.clamp_(-bound, bound)
            return
        limits = torch.where(norm.isfinite(), threshold, math.inf)
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


@lru_cache(maxsize=64)
def _on_device(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The same few lists at every step: copied to the device once."""
    return torch.tensor(values, dtype=dtype, device=device)


def _dtensor() -> type | tuple[()]:
    """The class DTensor if anybody has imported it, for `isinstance`; importing it takes a second."""
    module = sys.modules.get("torch.distributed.tensor")
    return module.DTensor if module is not None else ()


def _local(parameter: Any) -> tuple[Tensor, int]:
    """What this process holds of a DTensor's gradient, and in how many distinct shards it lies on its mesh.

    Gradients that are still to be summed (sequence parallelism leaves such for replicated parameters) are summed here.
    """
    gradient = parameter.grad
    if any(placement.is_partial() for placement in gradient.placements):
        gradient = parameter.grad = gradient.redistribute(placements=parameter.placements)
    local: Tensor = gradient.to_local()
    if local.is_conj() or local.is_neg() or local.layout is not torch.strided:
        raise TypeError("Expected gradients of DTensors to be dense and not lazily conjugated or negated.")
    sizes = (gradient.device_mesh.size(i) for i, placement in enumerate(gradient.placements) if placement.is_shard())
    return local, math.prod(sizes)


def _coalesced(gradient: Tensor) -> Tensor:
    if gradient.layout is not torch.sparse_coo:
        raise TypeError(f"Expected dense or sparse COO gradients, but got one of layout {gradient.layout}.")
    return gradient.coalesce()
