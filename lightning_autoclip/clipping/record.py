"""The record of past gradient norms, and their exact running percentile."""

from __future__ import annotations

import math
import warnings
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Module
from torchmetrics import Metric

from lightning_autoclip._checks import check_integer, check_number
from lightning_autoclip.clipping import _numbers
from lightning_autoclip.clipping._numbers import Number, single

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FIRST_CAPACITY = 1024
_INF = math.inf


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


def percentile_of(ordered: Tensor, count: Tensor, percentile: float) -> Tensor:
    """Percentile of the first ``count`` entries of a sorted tensor, by linear interpolation.

    Equal to ``numpy.percentile`` (method ``"linear"``) and free of host reads: ``count`` stays on its device.

    Args:
        ordered: Shape ``(n,)``, ascending; entries from ``count`` on are ignored.
        count: Shape ``()``, integer, from 0 to ``n``, on the device of ``ordered``.
        percentile: Between 0 and 100.

    Returns:
        Shape ``()``, dtype of ``ordered``. What it holds for ``count == 0`` means nothing.
    """
    # float64 keeps the fraction exact at a million entries; MPS has none.
    exact = torch.float32 if ordered.device.type == "mps" else torch.float64
    last = count - 1
    rank = last.to(exact) * (percentile / 100)
    below = rank.long()
    above = torch.minimum(below + 1, last)
    return torch.lerp(ordered.take(below), ordered.take(above), (rank - below).to(ordered.dtype))


def percentile_on_host(ordered: Sequence[float], count: int, percentile: float) -> float:
    """Do the same with plain numbers: ``count`` is at least 1."""
    position = (count - 1) * (percentile / 100)
    below = int(position)
    low, between = ordered[below], position - below
    return single(low + between * (ordered[below + 1] - low)) if between else low


class History(Metric):
    """The finite values of the last ``window`` updates, or of all of them, in order and sorted.

    Values live on the metric's device. On an accelerator nothing is read back to the host by :meth:`update`: a value is
    put into the sorted record by one clamp (``sorted[i] = clamp(x, sorted[i-1], sorted[i])``) and the oldest one leaves
    it by one select. On the CPU it is a binary search and a shift. Either way a step costs the same from the first to
    the last with a window, and one pass over the record at most without one. A NaN or an infinity never enters.

    The record is the same on every rank if the values are; it is never reduced over processes.

    Args:
        window: How many values to keep, at least 1, or ``None`` for all of them.

    Raises:
        TypeError: ``window`` is neither an integer nor ``None``.
        ValueError: ``window`` is below 1.
    """

    full_state_update = True  # `forward` must not merge two records by a reduction of their tensors
    values: Tensor  # oldest first until the window is full, then a ring; +inf where there is none yet
    count: Tensor  # how many values came in; the ring goes on at `count % window`
    sorted: Tensor  # -inf, the values in ascending order, +inf to the end
    length: Tensor  # of the ring; a state, so that a MetricCollection does not merge records of several windows

    def __init__(self, window: int | None = 100) -> None:
        super().__init__(sync_on_compute=False)
        if window is not None:
            window = check_integer("window", window, "an integer of at least 1, or `None` for the full history", 1)
        self.window = window
        capacity = _FIRST_CAPACITY if window is None else min(window, _FIRST_CAPACITY)
        empty = torch.full((capacity,), _INF, dtype=torch.float32)
        self.add_state("length", torch.tensor(window or 0))  # first: torchmetrics 1.4 compares no other to merge
        self.add_state("values", empty, persistent=True)
        self.add_state("count", torch.zeros((), dtype=torch.int64), persistent=True)
        self.add_state("sorted", torch.cat((-empty[:1], empty, empty[:1])))
        self._spare = self.sorted.clone()  # what the next sorted record is written to
        self._memory: Any = None  # of the tensors above, and which they were

    @torch.no_grad()
    def update(self, value: Tensor | float) -> None:
        """Record one value.

        Args:
            value: Shape ``()`` or ``(1,)``, a real dtype (kept as float32), or a float. Not recorded if not finite.

        Raises:
            ValueError: There is not exactly one value; :meth:`extend` takes many.
        """
        value = torch.as_tensor(value, dtype=torch.float32, device=self.values.device)
        if value.numel() != 1:
            raise ValueError(
                f"Expected one `value`, but got a tensor of shape {tuple(value.shape)}. `extend` takes many."
            )
        self._insert(value.item() if _numbers.reads_are_free(value.device) else value.reshape(()))

    def record(self, value: Number) -> None:
        """Do what :meth:`update` does, without its checks and without what torchmetrics does around it."""
        self.__dict__.update(_update_count=self._update_count + 1, _computed=None)
        self._insert(value)

    def _insert(self, value: Number) -> None:
        if isinstance(value, float):
            if math.isfinite(value):
                self._insert_on_host(value)
            return
        self._make_room()
        old, new = self.sorted, self._spare
        entering = value.nan_to_num(_INF, _INF, _INF)
        finite = entering < _INF
        slot = (self.count if self.window is None else self.count % self.length).reshape(1)
        oldest = self.values.gather(0, slot)  # +inf where the slot is still empty
        self.values.scatter_(0, slot, torch.where(finite, entering, oldest))
        self.count += finite
        if self.window is not None:
            leaving = torch.where(finite, oldest, entering)  # +inf takes nothing out
            torch.where(old[:-1] < leaving, old[:-1], old[1:], out=new[:-1])
            old, new = new, old
        torch.clamp(entering, min=old[:-1], max=old[1:], out=new[1:])  # +inf puts nothing in
        self.sorted, self._spare = new, old

    def _insert_on_host(self, value: float) -> None:
        ordered, ring, counter = self._on_host()
        count = counter[0]
        if count >= len(ring) and self.window != len(ring):
            self._make_room()
            ordered, ring, counter = self._on_host()
        slot, end = count if self.window is None else count % self.window, min(count, len(ring))
        if end == self.window:  # the oldest leaves
            end -= 1
            at = bisect_left(ordered, ring[slot], 0, end)
            ordered[at:end] = ordered[at + 1 : end + 1]
        at = bisect_left(ordered, value, 0, end)
        ordered[at + 1 : end + 1] = ordered[at:end]
        ordered[at] = ring[slot] = value
        counter[0] = count + 1

    def _on_host(self) -> tuple[Any, Any, Any]:
        """The memory of :attr:`ordered`, ``values`` and ``count``, for plain arithmetic on the CPU."""
        if self._memory is None or self._memory[0] is not self.sorted or self._memory[1] is not self.count:
            tensors = self.sorted[1:], self.values, self.count.reshape(1)
            self._memory = self.sorted, self.count, *(tensor.numpy().data for tensor in tensors)
        _, _, ordered, ring, counter = self._memory
        return ordered, ring, counter

    @torch.no_grad()
    def extend(self, values: Tensor) -> None:
        """Record many values at once, oldest first. Reads the host; not for use inside a step.

        Args:
            values: Shape ``(n,)``, a real dtype. Those that are not finite are left out.
        """
        values = torch.as_tensor(values, device=self.values.device).detach().reshape(-1).to(torch.float32)
        values = values[values.isfinite()]
        self._set(torch.cat((self.recorded, values)), int(self.count) + values.numel())
        self._update_count += values.numel()
        self._computed = None

    def compute(self) -> Tensor:
        """Return the recorded values, oldest first: shape ``(n,)``, float32. Reads the host."""
        return self.recorded

    @property
    def recorded(self) -> Tensor:
        """The values in the record, oldest first: shape ``(n,)``, float32. Reads the host."""
        count = int(self.count)
        if self.window is None or count <= self.window:
            return self.values[:count].clone()
        return self.values.roll(-(count % self.window))

    @property
    def size(self) -> Tensor:
        """How many values are in the record: shape ``()``, int64, at most ``window``."""
        return self.count if self.window is None else self.count.clamp(max=self.window)

    @property
    def ordered(self) -> Tensor:
        """The values in ascending order, then ``+inf``: shape ``(n,)``, float32, of which :attr:`size` hold values."""
        return self.sorted[1:]

    def on_host(self) -> tuple[memoryview, int]:
        """:attr:`ordered` as floats that share its memory, and :attr:`size` as an int: only on the CPU."""
        ordered, ring, counter = self._on_host()
        return ordered, min(counter[0], len(ring))

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._spare = self.sorted.clone()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_memory": None}  # a copy has memory of its own

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any) -> Module:
        """Follow a module to another device, but not to another dtype: values are float32, counts are not."""
        return super()._apply(lambda state: state.to(fn(state.new_empty(0)).device), *args)

    def _make_room(self) -> None:
        """Double the capacity if this value could find no room; follow the record to its device. Reads no host."""
        capacity = self.values.numel()  # of as many values as there were updates, this one included, at most
        if self._update_count > capacity and (self.window is None or capacity < self.window):
            more = capacity if self.window is None else min(capacity, self.window - capacity)
            padding = self.values.new_full((more,), _INF)
            self.values = torch.cat((self.values, padding))
            self.sorted = torch.cat((self.sorted, padding))
        if self._spare.shape != self.sorted.shape or self._spare.device != self.sorted.device:
            self._spare = self.sorted.clone()

    def _set(self, recorded: Tensor, count: int) -> None:
        """Make the last ``window`` of these values, oldest first, the record: the newest of ``count`` values."""
        kept = recorded if self.window is None else recorded[-self.window :]
        capacity = self.values.numel()
        while capacity < kept.numel():
            capacity = 2 * capacity if self.window is None else min(2 * capacity, self.window)
        padding = kept.new_full((capacity - kept.numel(),), _INF)
        self.values = torch.cat((kept, padding))
        if kept.numel() == self.window:
            self.values = self.values.roll(count % self.window)
        else:  # a window that has grown since begins as a partly filled one
            count = kept.numel()
        self.count = torch.tensor(count, device=kept.device)
        self.sorted = torch.cat((kept.new_full((1,), -_INF), kept.sort().values, padding, kept.new_full((1,), _INF)))

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The state: ``values`` (shape ``(n,)``, float32, oldest first) and ``count`` (shape ``()``, int64)."""
        state: dict[str, Any] = super().state_dict(*args, **kwargs)
        if (key := f"{kwargs.get('prefix', '')}values") in state:
            state[key] = self.recorded
        return state

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load the record, the newest of it if the window is smaller. What is missing or damaged is an error."""
        values, count = (state_dict.pop(f"{prefix}{key}", None) for key in ("values", "count"))
        if values is None or count is None:
            missing_keys += [prefix + key for key, persistent in self._persistent.items() if persistent]
        elif not _is_record(values, count):
            error_msgs.append(
                f"Expected `{prefix}values` to be finite, float32, of shape (n,), and `{prefix}count` to be an integer"
                f" of at least n, but got {values!r} and {count!r}."
            )
        else:
            self._set(values.detach().to(self.values.device), int(count))
            self._update_count, self._computed = int(self.count), None
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def _is_record(values: Any, count: Any) -> bool:
    plain = all(isinstance(x, Tensor) and x.layout is torch.strided and not x.is_meta for x in (values, count))
    if not plain or values.dtype != torch.float32 or values.dim() != 1:
        return False
    enough = count.dtype == torch.int64 and count.dim() == 0 and int(count) >= values.numel()
    return enough and bool(values.isfinite().all())


class RunningPercentile(History):
    """Exact percentile of the last ``window`` values, or of all of them.

    A `torchmetrics.Metric` with the verbs of that library. Agrees with ``numpy.percentile`` (linear interpolation) for
    every history length and percentile; a NaN or an infinity never enters; no host read in ``update`` and ``compute``.

    Args:
        percentile: Between 0 and 100.
        window: How many values to keep, at least 1, or ``None`` for the full history as in the AutoClip paper.

    Raises:
        TypeError: ``percentile`` is no number, ``window`` is neither an integer nor ``None``.
        ValueError: ``percentile`` is outside [0, 100] or NaN, ``window`` is below 1.

    Example:
        >>> from lightning_autoclip import RunningPercentile
        >>> metric = RunningPercentile(percentile=50, window=3)
        >>> for norm in (9.0, 1.0, 3.0, float("nan"), 2.0):
        ...     metric.update(norm)
        >>> metric.compute()
        tensor(2.)

    References:
        Seetharaman et al., `AutoClip: Adaptive Gradient Clipping for Source Separation Networks
        <https://arxiv.org/abs/2007.14469>`_, 2020.
    """

    def __init__(self, percentile: float, window: int | None = 100) -> None:
        super().__init__(window)
        self.percentile = check_percentile(percentile)

    def compute(self) -> Tensor:
        """Return the percentile: shape ``()``, float32, on the metric's device; NaN before the first value."""
        if _numbers.reads_are_free(self.count.device):
            ordered, count = self.on_host()
            percentile = percentile_on_host(ordered, count, self.percentile) if count else math.nan
            return torch.tensor(percentile, dtype=torch.float32, device=self.count.device)
        size = self.size
        return torch.where(size > 0, percentile_of(self.ordered, size, self.percentile), math.nan)

    def plot(self, val: Tensor | None = None, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Plot the recorded values in order, with the percentile as a line. Needs matplotlib.

        Args:
            val: The percentile to draw; the present one if ``None``.
            ax: The axes to draw on; new ones if ``None``.

        Returns:
            The matplotlib figure and axes.
        """
        import matplotlib.pyplot as plt

        recorded = self.recorded.cpu()
        last = int(self.count)
        val = self.compute() if val is None else val
        if ax is None:
            _, ax = plt.subplots()
        ax.plot(range(last - recorded.numel() + 1, last + 1), recorded, lw=0.8, label="recorded")
        ax.axhline(float(val), color="C3", ls="--", label=f"percentile {self.percentile:g}: {float(val):.4g}")
        if recorded.numel() and float(recorded.min()) > 0:
            ax.set_yscale("log")
        ax.set(xlabel="update", ylabel="value")
        ax.legend()
        return ax.figure, ax  # type: ignore[return-value]
