"""Clip gradients in place, by norm or by value: in as few launches as an accelerator lets us."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from lightning_autoclip.clipping import _numbers
from lightning_autoclip.clipping._numbers import Number, constant, smaller

_UNSCALE_FLOAT16 = ("cpu", "cuda", "xpu")  # kinds of device

_SMALL = 2**16  # entries: to copy so many there and back takes a GPU less than a launch takes the host
_FEWEST_GATHERED, _MOST_GATHERED = 4, 256  # tensors; the copy has at most 2**24 entries, then


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
            is_free = _numbers.reads_are_free(tensors[0].device)
            for alike in [tensors] if is_free else _grouped(tensors).values():
                torch._foreach_mul_(alike, float(threshold / norm))
        return
    unchanged = constant(1.0, norm.device)
    factor = smaller(torch.where(is_finite, threshold / norm, unchanged), unchanged)
    for (device, dtype), alike in _grouped(tensors).items():
        _multiply_(alike, dtype, factor.to(device, non_blocking=True))


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
            for (_, dtype), alike in _grouped(tensors).items():
                torch._foreach_clamp_min_(alike, -bounds[dtype])  # two launches instead of one for each
                torch._foreach_clamp_max_(alike, bounds[dtype])
        return
    limit = torch.where(is_finite, threshold, constant(math.inf, threshold.device))
    low = -limit
    for (device, _), alike in _grouped(tensors).items():
        low_there, high_there = low.to(device, non_blocking=True), limit.to(device, non_blocking=True)
        _clamp_(alike, low_there, high_there)


def _grouped(tensors: Iterable[Tensor]) -> dict[tuple[torch.device, torch.dtype], list[Tensor]]:
    """The tensors by what a call for many must have in common to launch one kernel for them."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return groups


def _multiply_(tensors: list[Tensor], dtype: torch.dtype, factor: Tensor) -> None:
    """Multiply tensors of one dtype by a factor between 0 and 1, float32, in place; no bit changes at 1.

    `_foreach_mul_` launches a kernel for each tensor unless the factor has their dtype. Rounded to bfloat16, towards 0
    so that no norm is above its threshold, it is up to 0.8 % smaller. float16 has no room for small factors; for that
    dtype there is the kernel that unscales gradients, whose factor is float32.
    """
    if dtype == torch.float16 and factor.device.type in _UNSCALE_FLOAT16:
        torch._amp_foreach_non_finite_check_and_unscale_(tensors, _unread(factor.device), factor)
    elif dtype == torch.bfloat16 and not _numbers.compiles_graphs(factor.device):
        torch._foreach_mul_(tensors, factor.view(torch.int32).bitwise_and(-(2**16)).view(torch.float32).to(dtype))
    else:
        torch._foreach_mul_(tensors, factor)


def _clamp_(tensors: list[Tensor], low: Tensor, high: Tensor) -> None:
    """Clamp tensors of one device and dtype to bounds that the host does not know, in place.

    No call does that for many. What is smaller than a launch is dear is clamped as one tensor, in a copy.
    """
    small = [each for each in tensors if 0 < each.numel() <= _SMALL and each.is_contiguous()]
    if len(small) < _FEWEST_GATHERED or _numbers.compiles_graphs(low.device):
        small = []
    for first in range(0, len(small), _MOST_GATHERED):
        gathered = small[first : first + _MOST_GATHERED]
        whole = _flatten_dense_tensors(gathered).clamp_(low, high)  # type: ignore[no-untyped-call]
        torch._foreach_copy_(gathered, _unflatten_dense_tensors(whole, gathered))  # type: ignore[no-untyped-call]
    own = {id(each) for each in small}
    for tensor in tensors:
        if id(tensor) not in own:
            tensor.clamp_(low, high)


@lru_cache(maxsize=64)
def _unread(device: torch.device) -> Tensor:
    """Where a kernel writes down what nobody asks for."""
    return torch.zeros((), dtype=torch.float32, device=device)
