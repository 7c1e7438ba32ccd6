"""The norm history on the host, and what a policy sees of it: the history together with the current norm."""

from __future__ import annotations

import math
import warnings
from array import array
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_autoclip._checks import check_integer, check_number

Number: TypeAlias = float | Tensor
"""A float; or shape ``()`` on an accelerator, where the norm of the current step comes to the host one step later."""

_SPARE = 1024  # norms that a window may keep beyond its length before they are dropped


def check_percentile(percentile: float) -> float:
    """Return ``percentile`` as a float in [0, 100]; warn if it looks like a fraction."""
    number = check_number("percentile", percentile, "a number between 0 and 100", 0, 100)
    if 0 < number < 1:
        warnings.warn(
            f"`percentile={number:g}` asks for the {number:g}th percentile of 100."
            f" If a fraction was meant, write `percentile={100 * number:g}`.",
            stacklevel=4,
        )
    return number


class _Sorted:
    """The norms of a window in ascending order: a cache, which copies of a history share."""

    __slots__ = ("count", "values")

    def __init__(self) -> None:
        self.values, self.count = array("d"), 0


class History:
    """The norms of the last ``window`` steps, or of all steps, as floats on the host.

    Copies by ``copy.copy`` are independent and share their memory: a copy can be appended to and then take the place
    of the original in one assignment.

    Args:
        window: How many norms count, at least 1; ``None`` for all of them.

    Attributes:
        count: How many norms were ever appended.

    Raises:
        TypeError: ``window`` is neither an integer nor ``None``.
        ValueError: ``window`` is below 1.

    Example:
        >>> from lightning_autoclip import History
        >>> history = History(window=3)
        >>> for norm in (9.0, 1.0, 3.0, 2.0):
        ...     history.append(norm)
        >>> history.percentile(50), history.mean(), history.values.tolist()
        (2.0, 2.0, [1.0, 3.0, 2.0])
    """

    def __init__(self, window: int | None = 100) -> None:
        if window is not None:
            window = check_integer("window", window, "an integer of at least 1, or `None` for the full history", 1)
        self.window = window
        self.count = 0
        self._set(array("d"))

    def _set(self, norms: array[float]) -> None:
        self._norms, self._length = norms, len(norms)
        self._sorted = _Sorted()

    def __copy__(self) -> History:
        other = History.__new__(History)
        other.__dict__ = self.__dict__.copy()
        return other

    def append(self, norm: float) -> None:
        """Append a finite norm."""
        is_full = self.window is not None and self._length >= self.window + _SPARE
        if is_full or len(self._norms) > self._length:  # beyond it are norms of another copy
            self._set(self._counted())
        self._norms.append(norm)
        self.count, self._length = self.count + 1, self._length + 1

    def extend(self, norms: Iterable[float]) -> None:
        """Append norms, oldest first; those that are not finite are skipped."""
        for norm in norms:
            if math.isfinite(norm):
                self.append(float(norm))

    def __len__(self) -> int:
        return self._length if self.window is None else min(self._length, self.window)

    @property
    def values(self) -> Tensor:
        """The norms that count, oldest first: shape ``(n,)``, float64, on the CPU."""
        return torch.tensor(self._counted(), dtype=torch.float64, device="cpu")

    def _counted(self) -> array[float]:
        return self._norms[self._length - len(self) : self._length]

    def _ascending(self) -> array[float]:
        """The norms that count, in ascending order; brought up to date by a binary search and a shift."""
        cache = self._sorted
        if cache.count == self.count:
            return cache.values
        if cache.count == self.count - 1 and cache.count:
            cache.count, values = -1, cache.values  # until it is whole again
            if self.window is not None and self._length > self.window:
                del values[bisect_left(values, self._norms[self._length - self.window - 1])]
            insort(values, self._norms[self._length - 1])
        else:
            cache.values = array("d", sorted(self._counted()))
        cache.count = self.count
        return cache.values

    def percentile(self, percentile: float) -> float:
        """Percentile of the norms by linear interpolation, as ``numpy.percentile``; NaN without any.

        Args:
            percentile: Between 0 and 100.
        """
        ascending = self._ascending()
        if not ascending:
            return math.nan
        result = _interpolated((len(ascending) - 1) * (percentile / 100), ascending.__getitem__)
        return float(result)

    def mean(self) -> float:
        """Mean of the norms; NaN without any."""
        return self._moments()[0]

    def std(self) -> float:
        """Population standard deviation of the norms; NaN without any."""
        norms = len(self)
        return math.sqrt(self._moments()[1] / norms) if norms else math.nan

    def _moments(self, without_oldest: bool = False) -> tuple[float, float]:
        """The mean, and the sum of the squared deviations from it."""
        norms = self._counted()[1 if without_oldest else 0 :]
        if not norms:
            return math.nan, 0.0
        values = torch.frombuffer(norms, dtype=torch.float64)
        variance, mean = torch.stack(torch.var_mean(values, correction=0)).tolist()
        return mean, variance * len(norms)

    def with_current(self, norm: Number) -> WithCurrent:
        """What a policy sees at a step: this history and the norm of the step, which is not appended."""
        return WithCurrent(self, norm)

    def state_dict(self) -> dict[str, Any]:
        """``values`` (the norms, oldest first) and ``count``."""
        return {"values": self._counted().tolist(), "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the norms, the newest of them if the window is smaller."""
        norms = array("d", state["values"])
        self._set(norms if self.window is None else norms[-self.window :])
        self.count = state["count"]


class WithCurrent:
    """The last ``window`` norms, the current one included: what a policy turns into a threshold.

    Its methods return floats where the current norm is a float. On an accelerator they may return tensors of shape
    ``()``, which can be calculated with but not read: no ``if``, ``float()`` or ``.item()``.
    """

    __slots__ = ("_ascending", "_history", "_is_full", "_norm", "_oldest")

    def __init__(self, history: History, norm: Number) -> None:
        self._history, self._norm = history, norm
        self._ascending = history._ascending()
        self._is_full = len(history) == history.window  # the current norm takes the place of the oldest one
        self._oldest = len(self._ascending)
        if self._is_full:
            self._oldest = bisect_left(self._ascending, history._norms[history._length - len(history)])

    @property
    def unread(self) -> Tensor | None:
        """The current norm if it is a tensor, which must not be read."""
        return self._norm if isinstance(self._norm, Tensor) else None

    def percentile(self, percentile: float) -> Number:
        """Percentile by linear interpolation, as ``numpy.percentile``.

        Args:
            percentile: Between 0 and 100.
        """
        others = len(self._ascending) - self._is_full
        return _interpolated(others * (percentile / 100), self._ranked)

    def _ranked(self, rank: int) -> Number:
        """The norm of this rank, from 0: that of the others below it, but at least and at most its neighbours'."""
        norm, ascending, oldest = self._norm, self._ascending, self._oldest
        low = rank - 1 if rank - 1 < oldest else rank
        high = rank if rank < oldest else rank + 1
        below = ascending[low] if rank else None
        above = ascending[high] if high < len(ascending) else None
        if isinstance(norm, Tensor):
            return norm if below is above is None else norm.clamp(min=below, max=above)
        if below is not None and norm < below:
            return below
        return above if above is not None and norm > above else norm

    def mean(self) -> Number:
        """Mean of the norms."""
        norms, mean, _ = self._others()
        return (norms * mean + self._norm) / (norms + 1) if norms else self._norm

    def std(self) -> Number:
        """Population standard deviation of the norms."""
        norms, mean, squares = self._others()
        if not norms:
            return 0.0 * self._norm
        deviation = self._norm - mean
        variance = (squares + deviation * deviation * (norms / (norms + 1))) / (norms + 1)
        return variance**0.5

    def _others(self) -> tuple[int, float, float]:
        return len(self._ascending) - self._is_full, *self._history._moments(without_oldest=self._is_full)


@lru_cache(maxsize=1024)
def constant(number: float, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """A number that each step needs on the device, copied there once: shape ``()``. Not to be written to."""
    return torch.tensor(number, dtype=dtype, device=device)


def _interpolated(position: float, ranked: Callable[[int], Number]) -> Number:
    """Between the two norms whose ranks a position lies between."""
    rank = int(position)
    low, weight = ranked(rank), position - rank
    if not weight:
        return low
    high = ranked(rank + 1)
    if isinstance(low, Tensor) and isinstance(high, Tensor):
        return torch.lerp(low, high, weight)
    return low + (high - low) * weight if weight < 0.5 else high - (high - low) * (1 - weight)
