"""The record of past gradient norms, and their exact running percentile."""

from __future__ import annotations

import math
import warnings
from array import array
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lightning_autoclip._checks import check_integer, check_number
from lightning_autoclip._text import shown
from lightning_autoclip.clipping._numbers import Number, constant, single

_FIRST_CAPACITY = 1024


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


class History:
    """The values of the last ``window`` steps, or of all of them: what a policy decides from.

    It has two forms. Floats are recorded as floats, in order and sorted, by a binary search and a shift. Tensors of an
    accelerator are recorded there, without a read by the host: what does not count goes to a place of its own in a ring
    of ``window`` places, and the ring is sorted anew (the full history, which would be dear to sort, is kept sorted by
    one clamp). The record follows the values from one form to the other. It is the same on every rank if the values
    are, and is never reduced over processes.

    Args:
        window: How many values to keep, at least 1, or ``None`` for all of them.

    Attributes:
        calls: How often :meth:`record` was called.

    Raises:
        TypeError: ``window`` is neither an integer nor ``None``.
        ValueError: ``window`` is below 1.

    Example:
        >>> from lightning_autoclip import History
        >>> history = History(window=3)
        >>> for norm in (9.0, 1.0, 3.0, 2.0):
        ...     history.record(norm)
        >>> history.percentile(50), history.mean(), history.recorded
        (2.0, 2.0, tensor([1., 3., 2.]))
    """

    def __init__(self, window: int | None = 100) -> None:
        if window is not None:
            window = check_integer("window", window, "an integer of at least 1, or `None` for the full history", 1)
        self.window = window
        self.calls = 0
        self._set([], 0)

    def _set(self, values: Sequence[float], count: int) -> None:
        """Make the last ``window`` of these values, oldest first, the record: the newest of ``count`` values."""
        kept = array("f", values if self.window is None else values[-self.window :])
        self._on_device: _OnDevice | None = None
        self._ordered = array("f", sorted(kept))
        if len(kept) == self.window:  # a ring, whose oldest value stands at `count % window`
            start = -count % self.window
            kept = kept[start:] + kept[:start]
        else:  # a window that has grown since begins as a partly filled one
            count = len(kept)
        self._values, self._count = kept, count
        self._replaced: float | None = None  # by the newest value

    def record(self, value: Number, counts: Tensor | None = None) -> None:
        """Record one value.

        Args:
            value: A finite float; or shape ``()``, float32, of an accelerator.
            counts: With a tensor, shape ``()``, bool: whether the value, which may be anything else, is recorded.
        """
        if isinstance(value, Tensor):
            with torch.inference_mode(False):  # what is made in it cannot be written to out of it
                if self._on_device is None or self._on_device.ring.device != value.device:
                    self._on_device = _OnDevice(self.recorded, self.count, self.window, value.device)
                self._on_device.record(value, torch.ones_like(value, dtype=torch.bool) if counts is None else counts)
            self.calls += 1
            return
        if self._on_device is not None:
            self._set(self.recorded.tolist(), self.count)
        if len(self._values) == self.window:
            slot = self._count % self.window
            self._replaced = self._values[slot]
            del self._ordered[bisect_left(self._ordered, self._replaced)]
            self._values[slot] = value
        else:
            self._values.append(value)
        insort(self._ordered, value)
        self._count += 1
        self.calls += 1

    def extend(self, values: Tensor) -> None:
        """Record many values at once, oldest first; those that are not finite are left out. Reads the host.

        Args:
            values: Shape ``(n,)``, a real dtype.
        """
        values = torch.as_tensor(values).detach().reshape(-1).to("cpu", torch.float32)
        values = values[values.isfinite()]
        self._set(torch.cat((self.recorded, values)).tolist(), self.count + values.numel())

    def percentile(self, percentile: float) -> Number:
        """Percentile of the values, by linear interpolation, as ``numpy.percentile``.

        Args:
            percentile: Between 0 and 100.

        Returns:
            A float, or shape ``()``, float32, on the accelerator. NaN while the record is empty.
        """
        if self._on_device is not None:
            return self._on_device.percentile(percentile)
        if not self._ordered:
            return math.nan
        position = (len(self._ordered) - 1) * (percentile / 100)
        below = int(position)
        low, between = self._ordered[below], position - below
        return single(low + between * (self._ordered[below + 1] - low)) if between else low

    def mean(self) -> Number:
        """Mean of the values: as :meth:`percentile` returns it, NaN while the record is empty."""
        return self.moments()[0]

    def std(self) -> Number:
        """Population standard deviation of the values: as :meth:`percentile` returns it, NaN while it is empty."""
        return self.moments()[1]

    def moments(self) -> tuple[Number, Number]:
        """:meth:`mean` and :meth:`std` at once."""
        if self._on_device is not None:
            return self._on_device.moments()
        if not self._ordered:
            return math.nan, math.nan
        std, mean = torch.std_mean(torch.frombuffer(self._ordered, dtype=torch.float32).double(), correction=0)
        return single(mean.item()), single(std.item())

    @property
    def recorded(self) -> Tensor:
        """The values in the record, oldest first: shape ``(n,)``, float32, on the CPU. Reads the host."""
        if self._on_device is not None:
            return self._on_device.recorded()
        values = torch.tensor(self._values, dtype=torch.float32, device="cpu")
        return values.roll(-(self._count % self.window)) if len(values) == self.window else values

    @property
    def count(self) -> int:
        """How many values came in. Reads the host."""
        return self._count if self._on_device is None else int(self._on_device.count)

    def __len__(self) -> int:
        """How many values are in the record. Reads the host."""
        if self._on_device is None:
            return len(self._ordered)
        return self.count if self.window is None else min(self.count, self.window)

    def state_dict(self) -> dict[str, Any]:
        """``values`` (shape ``(n,)``, float32, oldest first) and ``count`` (how many came in)."""
        return {"values": self.recorded, "count": self.count}

    def state_before(self) -> dict[str, Any]:
        """What :meth:`state_dict` returned before the last call of :meth:`record`. Reads the host."""
        if self._on_device is not None:
            return self._on_device.state_before()
        oldest = [] if self._replaced is None else [self._replaced]
        values = torch.tensor([*oldest, *self.recorded.tolist()[:-1]], dtype=torch.float32, device="cpu")
        return {"values": values, "count": self._count - 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the record, the newest of it if the window is smaller.

        Raises:
            KeyError: An entry is missing.
            ValueError: An entry is damaged.
        """
        values, count = state["values"], check_integer("count", state["count"], "a count", 0)
        if len(state) > 2:
            raise ValueError(f"Expected `values` and `count`, but got {', '.join(map(str, state))}.")
        sound = isinstance(values, Tensor) and values.layout is torch.strided and not values.is_meta
        if not sound or values.dtype != torch.float32 or values.dim() != 1 or not bool(values.isfinite().all()):
            raise ValueError(f"Expected `values` to be finite, float32, of shape (n,), but got {shown(values)}.")
        if count < values.numel():
            raise ValueError(f"Expected `count` to be at least {values.numel()}, but got {count}.")
        self._set(values.detach().tolist(), count)


class _OnDevice:
    """The record on an accelerator: ``ring`` and ``count`` grow there, ``ordered`` is the ring sorted, then ``inf``.

    The last place of the ring takes what does not count; ``ordered`` is without it.
    """

    def __init__(self, values: Tensor, count: int, window: int | None, device: torch.device) -> None:
        self.window, self._most = window, count  # at most so many values came in
        capacity = _FIRST_CAPACITY if window is None else min(window, _FIRST_CAPACITY)
        while capacity < values.numel():
            capacity = 2 * capacity if window is None else min(2 * capacity, window)
        self.ring = values.new_full((capacity + 1,), math.inf)
        self.ring[: values.numel()] = values.roll(count % window) if values.numel() == window else values
        self.ring, self.count = self.ring.to(device), torch.tensor(count, device=device)
        self.ordered = self.ring[:-1].sort().values
        self._before: tuple[Tensor, Tensor] | None = None  # `ordered` before the newest value; whether that counts

    def record(self, value: Tensor, counts: Tensor) -> None:
        self._most += 1
        places = self.ring.numel() - 1
        if self._most > places and (self.window is None or places < self.window):
            self._grow(places if self.window is None else min(places, self.window - places))
            places = self.ring.numel() - 1
        self._before = self.ordered, counts
        device = self.ring.device
        next_slot = self.count if self.window is None else self.count % self.window
        slot = torch.where(counts, next_slot, constant(places, device, torch.int64))
        self.ring.scatter_(0, slot.view(1), value.view(1))
        self.count.add_(counts)
        if self.window is not None:
            self.ordered = self.ring[:-1].sort().values
        else:  # each value lies between its neighbours, or moves up by one
            entering = torch.where(counts, value, constant(math.inf, device))
            below = torch.cat((constant(-math.inf, device).view(1), self.ordered[:-1]))
            self.ordered = torch.clamp(entering, min=below, max=self.ordered)

    def _grow(self, more: int) -> None:
        padding = self.ring.new_full((more + 1,), math.inf)
        self.ring = torch.cat((self.ring[:-1], padding))
        self.ordered = torch.cat((self.ordered, padding[:more]))

    def percentile(self, percentile: float) -> Tensor:
        count = self.count if self.window is None else self.count.clamp(max=self.window)
        places, weights = _ranks(percentile, self.ring.numel(), self.ring.device)
        low, high = self.ordered.index_select(0, places.index_select(0, count.view(1)).view(2)).unbind()
        return torch.lerp(low, high, weights.index_select(0, count.view(1)).view(()))

    def moments(self) -> tuple[Tensor, Tensor]:
        is_value = self.ordered < math.inf
        count = is_value.sum()
        mean = torch.where(is_value, self.ordered, 0.0).sum() / count
        variance = torch.where(is_value, self.ordered - mean, 0.0).square().sum() / count
        return mean, variance.sqrt()

    def recorded(self) -> Tensor:
        count, values = int(self.count), self.ring[:-1].cpu()
        if self.window is None or count < self.window:
            return values[:count].clone()
        return values.roll(-(count % self.window))

    def state_before(self) -> dict[str, Any]:
        values, count = self.recorded(), int(self.count)
        if self._before is None or not bool(self._before[1]):
            return {"values": values, "count": count}
        kept = values[:-1].tolist()
        if count - 1 >= (self.window or math.inf):  # what was replaced stands nowhere but among those of before
            replaced = Counter(self._before[0].tolist())
            replaced.subtract(kept)
            kept = [*replaced.elements(), *kept]
        return {"values": torch.tensor(kept, dtype=torch.float32, device="cpu"), "count": count - 1}


@lru_cache(maxsize=64)
def _ranks(percentile: float, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each count below ``length`` the two ranks that a percentile lies between, and how far from the first."""
    position = (torch.arange(length, dtype=torch.float64, device="cpu") - 1).clamp(min=0) * (percentile / 100)
    below, above = position.floor(), position.ceil()  # equal where a value is hit: what stands above may be infinite
    places = torch.stack((below, above), 1).long()
    return places.to(device), (position - below).to(torch.float32).to(device)
