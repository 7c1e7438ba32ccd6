"""From step records on the device to rows for the loggers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_autoclip._text import as_keys
from lightning_autoclip.clipping._numbers import compiles_graphs, on_host
from lightning_autoclip.clipping.step import StepRecord
from lightning_autoclip.monitoring.held import NOTHING, Held
from lightning_autoclip.monitoring.summary import Point
from lightning_autoclip.monitoring.trace import Trace, by_module, norms_by_module

_TOTAL = StepRecord._fields.index("nonfinite_total")
_NUMBERS = 7  # of a `StepRecord` and of a `Point`, one after the other: all but the parameters' norms
SECTIONS = ("autoclip_layers", "autoclip_layers_norm")  # of the layers' shares and norms
_MAX_ON_DEVICE = 1024  # records that may wait on the device, however far apart the rows are

Row = tuple[int, dict[str, float]]
"""What is logged at a step."""


class Recorder:
    """Holds the step records of one optimizer and sums them up in rows.

    Records of an accelerator stay there until a row is due: one copy of them to the host per row, none per step.

    Args:
        prefix: What the keys of the rows start with, for example ``"autoclip/"``.
        by_value: Whether the gradients are clipped by value: the rows then carry ``grad_rms`` too, which is what the
            threshold is compared with.
        every_step: Whether each step gets a row of its own beside the summary.
        layer_depth: The rows also carry the mean share of each module in the squared norm and its mean norm, of modules
            so many names deep; 0 for none.
        trace: Takes in every step, for report and plot.
        skips: Whether steps can be left out for their size: the rows then carry ``skipped_total`` too.

    Attributes:
        max_update_ratio: The bound that the optimizer's steps have; ``None`` where they have none. With it the rows
            also carry ``bounded_fraction`` and ``update_ratio``.
        held: The steps that wait for their row, as far as they are on the host.
    """

    def __init__(
        self,
        prefix: str,
        by_value: bool = False,
        every_step: bool = False,
        layer_depth: int = 0,
        trace: Trace | None = None,
        skips: bool = False,
    ) -> None:
        self.prefix, self.by_value, self.every_step, self.layer_depth = prefix, by_value, every_step, layer_depth
        self.trace, self.skips = Trace() if trace is None else trace, skips
        self.max_update_ratio: float | None = None
        self._on_device: list[tuple[tuple[int, int, int, int], Any, Any]] = []  # or on the host, of the CPU
        self.held = Held()
        self._is_last_open = False  # whether the last record is of the step that is being made
        self._before: tuple[Trace, Held] | None = None  # that step, if it is among them
        self._last_row: dict[str, float] | None = None

    @property
    def keys(self) -> list[str]:
        """Every key that the rows of this recorder can have."""
        return [*self._row(), *(self._step_row(NOTHING) if self.every_step else ())]

    def begin_step(self) -> None:
        """Say that the steps so far have been made; of the one that begins, that is not known yet."""
        self._is_last_open, self._before = False, None

    def add(self, record: StepRecord, *, step: int, epoch: int, first_batch: int, last_batch: int) -> None:
        """Hold a record until the next row: with what the clipper does not know of it, as `Point` says."""
        numbers: Any = record[:_NUMBERS]
        if isinstance(record.norm, Tensor) and compiles_graphs(record.norm.device):
            numbers = torch.stack(numbers)  # now, as a part of the step
        if self._on_device and isinstance(numbers[0], Tensor) != isinstance(self._on_device[-1][1][0], Tensor):
            self._fetch()  # the host has read the one step, but not the other
        self._on_device.append(((step, epoch, first_batch, last_batch), numbers, record.parameter_norms))
        self._is_last_open = True
        if len(self._on_device) >= _MAX_ON_DEVICE:
            self._fetch()

    def is_due(self, every_n_steps: int) -> bool:
        """Whether the records that are held reach a multiple of ``every_n_steps``. Needs no host read."""
        points = self.held.points
        if not self._on_device and not points:
            return False
        first = points[0].step if points else self._on_device[0][0][0]
        last = self._on_device[-1][0][0] if self._on_device else points[-1].step
        return (last + 1) // every_n_steps > first // every_n_steps

    def _fetch(self) -> None:
        """Copy to the host what is held on the device, and sum it up: all of it or, if that is broken off, nothing."""
        if not self._on_device:
            return
        points, squares = self._read()
        open_ones = 1 if self._is_last_open else 0
        first = len(points) - open_ones
        before = after = self.trace, self.held
        if first:
            before = after = self._with(before, points[:first], None if squares is None else squares[:first])
        if open_ones:
            after = self._with(before, points[first:], None if squares is None else squares[first:])
            self._before = before
        (self.trace, self.held), self._on_device = after, []

    def _read(self) -> tuple[list[Point], Tensor | None]:
        """What is held on the device: the steps, and the squared norm of each parameter's gradient."""
        places: Any
        numbers: Any
        norms: Any
        places, numbers, norms = zip(*self._on_device, strict=True)
        if isinstance(numbers[0], Tensor):
            numbers = on_host(numbers).tolist()
            norms = norms if norms[0] is None else on_host(norms)
        elif isinstance(numbers[0][0], Tensor):
            there = torch.stack([number for those in numbers for number in those]).view(len(numbers), -1)
            there = there if norms[0] is None else torch.cat((there, torch.stack(norms)), 1)
            here = there.cpu()  # in one copy
            numbers, norms = here[:, :_NUMBERS].tolist(), norms if norms[0] is None else here[:, _NUMBERS:]
        totals = [self.trace.nonfinite_total, *(those[_TOTAL] for those in numbers)]
        points = [self._point(*those) for those in zip(places, numbers, totals[:-1], strict=True)]
        squares = None if norms[0] is None else torch.as_tensor(norms, dtype=torch.float64, device="cpu").square()
        return points, squares

    def _with(self, so_far: tuple[Trace, Held], points: Sequence[Point], squares: Tensor | None) -> tuple[Trace, Held]:
        """The trace and the steps that wait, with some more steps; those that are given stay as they are."""
        trace, held = so_far[0].copy(), so_far[1].copy()
        shares = trace.extend(points, squares)
        for point in points:
            held.add(point)
        if squares is not None and self.layer_depth:
            finite = squares[[i for i, point in enumerate(points) if point.finite]]
            held.add_shares(trace.names, shares.sum(0).tolist(), len(shares))
            held.add_norms(norms_by_module(finite, trace.names, self.layer_depth), len(finite))
        return trace, held

    def _point(self, place: tuple[int, int, int, int], numbers: Sequence[float], bad_before: float) -> Point:
        """A step with what only the host calculates: how far it would carry the weights, and whether any group is bad.

        Args:
            place: The first fields.
            numbers: Those of a `StepRecord`.
            bad_before: How many steps before it were not finite.
        """
        point = Point(*place, *numbers)
        if point.nonfinite_total > bad_before:
            point = point._replace(bad=1.0)
        if self.max_update_ratio is None or not point.max_norm > 0:
            return point
        return point._replace(update_ratio=self.max_update_ratio * point.norm / point.max_norm)

    def follow(self, names: Sequence[str], numels: Sequence[int]) -> None:
        """Go on with these parameters, as `Trace.follow` says; the row that has begun goes on too."""
        self._fetch()  # these records have the places of before
        self.trace.follow(names, numels)

    def summarise(self) -> dict[str, float]:
        """The summary of everything that is held; of the last flush if nothing is; NaN before any step."""
        self._fetch()
        return self._row() if self.held.points or self._last_row is None else self._last_row

    def flush(self) -> tuple[list[Row], list[Point]]:
        """Hold nothing any more.

        Returns:
            What is to be logged of the steps that were held: rows, each with its step; and these steps.
        """
        row, points = self.summarise(), self.held.points
        if not points:
            return [], []
        *rows, last = self.flush_steps() or [(points[-1].step, {})]
        self._last_row = row
        self.held = Held()
        self._before = self._before and (self._before[0], Held())
        return [*rows, (last[0], last[1] | row)], points  # the last step's row and the summary are one

    def flush_steps(self) -> list[Row]:
        """The rows of single steps alone: the steps are held until the summary is due."""
        self._fetch()
        points, self.held.told = self.held.points[self.held.told :], len(self.held.points)
        return [(point.step, self._step_row(point)) for point in points] if self.every_step else []

    def state_dict(self, before_step: bool = False) -> dict[str, Any]:
        """What happened, and the steps that wait for their row.

        Args:
            before_step: Leave out the step that was added since :meth:`begin_step`.
        """
        self._fetch()
        trace, _ = self._up_to(before_step)
        return {"trace": trace.state_dict(), "held": self.held_state(before_step)}

    def held_state(self, before_step: bool = False) -> dict[str, Any]:
        """The steps that wait for their row alone."""
        self._fetch()
        _, held = self._up_to(before_step)
        return held.state_dict(min(self.held.told, len(held.points)))

    def _up_to(self, before_step: bool) -> tuple[Trace, Held]:
        return self._before if before_step and self._before is not None else (self.trace, self.held)

    def waiting(self) -> Callable[[], None]:
        """What waits for its row: called, it waits again, as if it had not been flushed."""
        self._fetch()
        held, told, before = self.held, self.held.told, self._before

        def put_back() -> None:
            self.held, self.held.told, self._before = held, told, before

        return put_back

    def restore(self, trace: Trace, held: Held) -> None:
        """Go on from what was saved; whatever happened since is taken back."""
        self.trace, self.held, self._on_device = trace, held, []
        self.begin_step()

    def _row(self) -> dict[str, float]:
        """One row for the steps that are held. Non-finite steps are counted and otherwise left out."""
        summary, latest, largest = self.held.summary, self.held.latest, self.held.largest
        if not latest.finite:
            latest = latest._replace(norm=math.nan, statistic=math.nan)
        row = {
            "grad_norm": latest.norm,
            "grad_norm_mean": summary.mean,
            "grad_norm_max": largest.norm,
            "grad_norm_max_step": float(largest.step) if largest.finite else math.nan,
            "grad_norm_clipped": self.held.clipped_mean,
            "threshold": latest.threshold,
            "clipped_fraction": summary.clipped_fraction,
            "clip_coef_mean": summary.clip_coef_mean,
            "clip_coef_min": summary.clip_coef_min,
            "nonfinite_total": self.held.points[-1].nonfinite_total if self.held.points else math.nan,
        }
        if self.skips:
            row["skipped_total"] = self.trace.left_out if self.held.points else math.nan
        if self.by_value:
            row["grad_rms"] = latest.statistic
        if self.max_update_ratio is not None:
            row |= {"bounded_fraction": summary.bounded_fraction, "update_ratio": summary.update_ratio}
        return {self.prefix + key: value for key, value in row.items()} | self._layers()

    def _layers(self) -> dict[str, float]:
        """The mean share of each module in the squared norm of the steps that are held, then its mean norm.

        NaN if none is finite. The norms have a section of their own: the names of modules and groups may be any.
        """
        if not self.layer_depth:
            return {}
        shares = by_module(self.held.shares(self.trace.names), self.layer_depth)
        of_share, of_norm = (self.prefix.replace("autoclip/", f"{section}/", 1) for section in SECTIONS)
        keys = as_keys(shares)
        norms = {of_norm + keys[module]: norm for module, norm in self.held.norms(shares).items()}
        return {of_share + keys[module]: share for module, share in shares.items()} | norms

    def _step_row(self, point: Point) -> dict[str, float]:
        row = {"grad_norm": point.norm, "threshold": point.threshold}
        if self.by_value:
            row["grad_rms"] = point.statistic
        return {f"{self.prefix}step/{key}": value for key, value in row.items()}


def joined(parts: Iterable[Sequence[Row]]) -> list[Row]:
    """The rows of several scopes as one row per step; of a scope with several at one step, the first with the first."""
    found: dict[tuple[int, int], dict[str, float]] = {}
    for part in parts:
        seen: Counter[int] = Counter()
        for step, row in part:
            found.setdefault((step, seen[step]), {}).update(row)
            seen[step] += 1
    return [(step, row) for (step, _), row in sorted(found.items(), key=lambda item: item[0])]
