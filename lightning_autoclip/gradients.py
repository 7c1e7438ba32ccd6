"""Measure and clip the gradients of a set of parameters."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


def reads_are_free(device: torch.device) -> bool:
    """Whether reading a tensor of ``device`` on the host makes nobody wait.

    The one place that decides between the two forms of every shortcut: a plain ``if`` on the CPU, tensor arithmetic
    on an accelerator.
    """
    return device.type == "cpu"


@dataclass(frozen=True)
class Gradients:
    """The gradients that one optimizer step is about to apply.

    Attributes:
        parameters: The parameters that have a gradient.
        tensors: Their gradients as real, dense tensors that share the gradients' memory (of a sparse gradient, its
            coalesced values; of a complex one, its real view).
        numel: Number of entries of all gradients, absent entries of sparse ones included.
    """

    parameters: list[Tensor]
    tensors: list[Tensor]
    numel: int

    @classmethod
    def of(cls, parameters: Iterable[Tensor]) -> Gradients:
        """Collect the gradients of ``parameters``; those without one are left out. Coalesces sparse gradients."""
        owners, tensors, numel = [], [], 0
        for parameter in parameters:
            gradient = parameter.grad
            if gradient is None:
                continue
            numel += gradient.numel()
            if gradient.layout is not torch.strided:
                gradient = parameter.grad = _coalesced(gradient)
                gradient = gradient._values()
            elif gradient.is_conj() or gradient.is_neg():
                gradient = parameter.grad = gradient.resolve_conj().resolve_neg()
            owners.append(parameter)
            tensors.append(torch.view_as_real(gradient) if gradient.is_complex() else gradient)
        return cls(owners, tensors, numel)

    def norms(self) -> Tensor:
        """L2 norm of each gradient.

        Returns:
            Shape ``(len(tensors),)``, float32 (float64 if a gradient is), on the device of the first gradient. Squares
            are summed in that dtype whatever the gradients' own.
        """
        dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in self.tensors) else torch.float32
        norms = torch._foreach_norm(self.tensors, 2.0, dtype=dtype)
        device = norms[0].device
        return torch.stack([norm.to(device, non_blocking=True) for norm in norms])

    def norm(self) -> Tensor:
        """L2 norm of all gradients viewed as one vector: shape ``()``, float32, on the first gradient's device."""
        return total(self.norms())

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


def total(norms: Tensor) -> Tensor:
    """L2 norm of the whole from the L2 norms of its parts: shape ``()``, float32."""
    norm: Tensor = torch.linalg.vector_norm(norms)
    return norm.to(torch.float32)


def _coalesced(gradient: Tensor) -> Tensor:
    if gradient.layout is not torch.sparse_coo:
        raise TypeError(f"Expected dense or sparse COO gradients, but got one of layout {gradient.layout}.")
    return gradient.coalesce()
