"""The few numbers of a step: plain floats where the host reads them for free, tensors where it would have to wait."""

from __future__ import annotations

import math
from collections.abc import Sequence
from ctypes import c_float
from functools import lru_cache
from typing import Any, TypeAlias

import torch
from torch import Tensor

Number: TypeAlias = float | Tensor
"""A float on the CPU; on an accelerator a tensor of shape ``()``, float32, which nobody may read in a step."""

Numbers: TypeAlias = list[float] | Tensor
"""A number for each parameter: floats where the host knows them, else shape ``(n,)`` on the accelerator."""


def reads_are_free(device: torch.device) -> bool:
    """Whether reading a tensor of ``device`` on the host makes nobody wait.

    The one place that decides between the two forms of a `Number`, and with it of every shortcut: plain arithmetic and
    a plain ``if`` with floats, tensor arithmetic without.
    """
    return device.type == "cpu"


def compiles_graphs(device: torch.device) -> bool:
    """Whether operations are gathered until somebody looks, and compiled as one graph (XLA).

    Each new shape or number of tensors costs a compilation there.
    """
    return device.type == "xla"


def smaller(first: Tensor, second: Tensor) -> Tensor:
    """The smaller of two numbers of an accelerator; of a number and a NaN the number."""
    if not compiles_graphs(first.device):
        return torch.fmin(first, second)
    return torch.where((first <= second) | second.isnan(), first, second)  # there `fmin` is a read by the host


def on_host(rows: Sequence[Tensor]) -> Tensor:
    """Rows of equal shape that wait on an accelerator that compiles graphs, stacked on the CPU.

    One copy for each power of two that their number is made of, so that few numbers of rows are ever compiled, whatever
    number waits.
    """
    parts, first = [], 0
    while first < len(rows):
        length = 1 << ((len(rows) - first).bit_length() - 1)
        parts.append(torch.stack(list(rows[first : first + length])).cpu())
        first += length
    return torch.cat(parts)


def single(number: float) -> float:
    """The nearest float32, which is what a record keeps: a norm must equal itself when it is compared with it."""
    return c_float(number).value


@lru_cache(maxsize=1024)
def constant(number: float, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """A number that each step needs on the device, copied there once: shape ``()``. Not to be written to."""
    return torch.tensor(number, dtype=dtype, device=device)


def as_there(number: float, like: Number) -> Number:
    """A number in the form, and on the device, of another."""
    return constant(number, like.device) if isinstance(like, Tensor) else number


def unknown(like: Number) -> Number:
    """NaN, where the other number is."""
    return as_there(math.nan, like)


def flag(condition: Tensor, yes: float = 1.0, no: float = 0.0) -> Tensor:
    """One of two numbers: shape ``()``, float32, on the condition's device."""
    return torch.where(condition, constant(yes, condition.device), constant(no, condition.device))


def count_unless(condition: Tensor, so_far: Number) -> Tensor:
    """One more than so far unless a condition is true: shape ``()``, on the condition's device.

    Float32, as all that is recorded; int64 where graphs are compiled, since XLA makes bfloat16 of all float32 under
    ``precision="bf16-true"``, in which 256 + 1 is 256.
    """
    if compiles_graphs(condition.device):
        return condition.logical_not() + (so_far if isinstance(so_far, Tensor) else int(so_far))
    return flag(condition, 0.0, 1.0) + so_far


def negation(condition: bool | Tensor) -> bool | Tensor:
    """The contrary, in the same form."""
    return condition.logical_not() if isinstance(condition, Tensor) else not condition


def minimum(number: Number, other: Number) -> Number:
    """The smaller one of two numbers of one form; NaN if one is."""
    if isinstance(number, Tensor) and isinstance(other, Tensor):
        return torch.minimum(number, other)
    return min(number, other)


def at(numbers: Any, positions: Sequence[int] | None) -> Any:
    """What a list or tensor holds of the parameters at these positions, in their order; of all of them at ``None``."""
    if positions is None:
        return numbers
    if isinstance(numbers, Tensor):
        return numbers.index_select(0, on_device(tuple(positions), torch.int64, numbers.device))
    return [numbers[position] for position in positions]


@lru_cache(maxsize=1024)  # an optimizer may have hundreds of groups
def on_device(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The same few lists at every step: copied to the device once."""
    return torch.tensor(values, dtype=dtype, device=device)
