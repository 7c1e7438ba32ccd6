"""Multiply and clamp gradients in place, in as few launches as an accelerator allows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

_UNSCALE_FLOAT16 = ("cpu", "cuda", "xpu")  # kinds of device
_SMALL = 2**16  # elements: to copy so many there and back takes a GPU less than a launch takes the host
_FEWEST_GATHERED, _MOST_GATHERED = 4, 256  # tensors; the copy has at most 2**24 elements, then


def multiply_(tensors: list[Tensor], coef: float) -> None:
    """Multiply tensors in place by a number that the host knows."""
    if tensors[0].device.type == "cpu":
        wide = [tensor for tensor in tensors if tensor.dtype.itemsize >= 4]
        if wide:
            torch._foreach_mul_(wide, coef)
        for tensor in tensors if len(wide) < len(tensors) else ():
            if tensor.dtype.itemsize < 4:  # there, the call for many rounds the number to their dtype
                tensor.mul_(coef)
        return
    for (device, _), alike in _grouped(tensors).items():
        # A number would be compiled into the graph of XLA, anew at each step.
        factor = torch.tensor(coef, dtype=torch.float32, device=device) if device.type == "xla" else coef
        torch._foreach_mul_(alike, factor)


def multiply_unread_(tensors: Sequence[Tensor], coef: Tensor) -> None:
    """Multiply tensors in place by a number between 0 and 1 that the host does not know; at 1 no bit changes.

    `_foreach_mul_` launches a kernel for each tensor unless the number has their dtype. Rounded to bfloat16, towards 0
    so that no norm is above its threshold, it is up to 0.8 % smaller. float16 has no room for small numbers; for that
    dtype there is the kernel that unscales gradients, which takes a float32.

    Args:
        tensors: Gradients, or what this process holds of them.
        coef: Shape ``()``, float32 or float64.
    """
    for (device, dtype), alike in _grouped(tensors).items():
        factor = coef.to(device, dtype if dtype == torch.float64 else torch.float32, non_blocking=True)
        if dtype == torch.float16 and device.type in _UNSCALE_FLOAT16:
            torch._amp_foreach_non_finite_check_and_unscale_(alike, _unread(device), factor)
        elif dtype == torch.bfloat16:
            truncated = factor.view(torch.int32).bitwise_and(-(2**16)).view(torch.float32)
            torch._foreach_mul_(alike, truncated.to(dtype))
        else:
            torch._foreach_mul_(alike, factor)


def clamp_(tensors: Sequence[Tensor], limit: float) -> None:
    """Clamp every element to ``[-limit, limit]`` in place."""
    if tensors[0].device.type == "cpu":
        for tensor in tensors:  # one pass over the memory instead of two
            bound = _bound(limit, tensor.dtype)
            tensor.clamp_(-bound, bound)
        return
    for (device, dtype), alike in _grouped(tensors).items():
        bound = _bound(limit, dtype)
        if device.type == "xla":
            _clamp_unread_(alike, torch.tensor(-bound, device=device), torch.tensor(bound, device=device))
        else:
            torch._foreach_clamp_min_(alike, -bound)  # two launches instead of one for each
            torch._foreach_clamp_max_(alike, bound)


def _bound(limit: float, dtype: torch.dtype) -> float:
    """The largest number of a dtype up to a limit."""
    return min(limit, torch.finfo(dtype).max)


def clamp_unread_(tensors: Sequence[Tensor], limit: Tensor) -> None:
    """Clamp every element to ``[-limit, limit]`` in place, where the host does not know the limit: shape ``()``."""
    low = -limit
    for (device, _), alike in _grouped(tensors).items():
        there = (bound.to(device, non_blocking=True) for bound in (low, limit))
        _clamp_unread_(alike, *there)


def _clamp_unread_(tensors: list[Tensor], low: Tensor, high: Tensor) -> None:
    """Clamp tensors of one device and dtype to bounds on their device, in place.

    No call does that for many. What is smaller than a launch is dear is clamped as one tensor, in a copy.
    """
    small = [each for each in tensors if 0 < each.numel() <= _SMALL and each.is_contiguous()]
    if len(small) < _FEWEST_GATHERED or low.device.type == "xla":
        small = []
    for first in range(0, len(small), _MOST_GATHERED):
        gathered = small[first : first + _MOST_GATHERED]
        whole = _flatten_dense_tensors(gathered).clamp_(low, high)  # type: ignore[no-untyped-call]
        torch._foreach_copy_(gathered, _unflatten_dense_tensors(whole, gathered))  # type: ignore[no-untyped-call]
    done = {id(each) for each in small}
    for tensor in tensors:
        if id(tensor) not in done:
            tensor.clamp_(low, high)


def _grouped(tensors: Iterable[Tensor]) -> dict[tuple[torch.device, torch.dtype], list[Tensor]]:
    """The tensors by what a call for many must have in common to launch one kernel for them."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return groups


@lru_cache(maxsize=64)
def _unread(device: torch.device) -> Tensor:
    """Where a kernel writes a flag that is not used."""
    return torch.zeros((), dtype=torch.float32, device=device)
