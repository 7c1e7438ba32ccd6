"""From step records on the device to rows for the loggers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_autoclip.clipping.clipper import StepRecord
from lightning_autoclip.monitoring.summary import Point, Summary
from lightning_autoclip.monitoring.trace import Trace, by_module, shares_of

_MAX_ON_DEVICE = 1024  # records that may wait on the device, however far apart the rows are
_NOTHING = Point(-1, -1, -1, -1, *[math.nan] * 5)


class Recorder:
    """Holds the step records of one optimizer and sums them up in rows.

    Records of an accelerator stay there until a row is due: one copy to the host per row, none per step.

    Args:
        prefix: What the keys of the rows start with, for example ``"autoclip/"``.
        by_value: Whether the gradients are clipped by value: the rows then carry ``grad_rms`` too, which is what the
            threshold is compared with.
        every_step: Whether each step gets a row of its own beside the summary.
        layer_depth: The rows also carry the mean share of each module in the squared norm, of modules so many names
            deep; 0 for none.
        trace: Takes in every step, for report and plot.
    """

    def __init__(
        self,
        prefix: str,
        by_value: bool = False,
        every_step: bool = False,
        layer_depth: int = 0,
        trace: Trace | None = None,
    ) -> None:
        self.prefix, self.by_value, self.every_step, self.layer_depth = prefix, by_value, every_step, layer_depth
        self.trace = Trace() if trace is None else trace
        self._on_device: list[tuple[tuple[int, int, int, int], StepRecord]] = []  # or on the host, of the CPU
        self._begin()
        self._last_row: dict[str, float] | None = None
        self._last_finite: dict[str, float] = {}  # by key

    def _begin(self) -> None:
        """Hold nothing."""
        self._points: list[Point] = []
        self._summary = Summary()  # of these, as the following
        self._latest = _NOTHING  # the last finite one; without any, the last one
        self._largest = _NOTHING
        self._share_sums: Tensor | None = None
        self._share_steps = 0

    @property
    def keys(self) -> list[str]:
        """Every key that the rows of this recorder can have."""
        return [*self._row(), *(self._step_row(_NOTHING) if self.every_step else ())]

    def add(self, record: StepRecord, *, step: int, epoch: int, first_batch: int, last_batch: int) -> None:
        """Hold a record until the next row: with what the clipper does not know of it, as `Point` says."""
        if self._on_device and isinstance(record.norm, Tensor) != isinstance(self._on_device[-1][1].norm, Tensor):
            self._fetch()  # the host has read the one step, but not the other
        self._on_device.append(((step, epoch, first_batch, last_batch), record))
        if len(self._on_device) >= _MAX_ON_DEVICE:
            self._fetch()

    def is_due(self, every_n_steps: int) -> bool:
        """Whether the records that are held reach a multiple of ``every_n_steps``. Needs no host read."""
        if not self._on_device and not self._points:
            return False
        first = self._points[0].step if self._points else self._on_device[0][0][0]
        last = self._on_device[-1][0][0] if self._on_device else self._points[-1].step
        return (last + 1) // every_n_steps > first // every_n_steps

    def _fetch(self) -> None:
        """Copy to the host what is held on the device, and sum it up."""
        if not self._on_device:
            return
        places, records = zip(*self._on_device, strict=True)
        self._on_device = []
        numbers: Any = [record[:5] for record in records]
        norms: Any = [record.parameter_norms for record in records]
        if isinstance(records[0].norm, Tensor):
            numbers = torch.stack([torch.stack(five) for five in numbers]).tolist()
            norms = norms if norms[0] is None else torch.stack(norms).cpu()
        points = [Point(*place, *five) for place, five in zip(places, numbers, strict=True)]
        squares = None if norms[0] is None else torch.as_tensor(norms, dtype=torch.float64, device="cpu").square()
        self.trace.extend(points, squares)
        for point in points:
            self._hold(point)
        if squares is not None and self.layer_depth:
            shares = shares_of(squares)
            self._share_sums = shares.sum(0) + (0 if self._share_sums is None else self._share_sums)
            self._share_steps += len(shares)

    def _hold(self, point: Point) -> None:
        self._points.append(point)
        self._summary.merge(Summary.of(point))
        if point.finite or not self._latest.finite:
            self._latest = point
        if point.finite and not point.norm <= self._largest.norm:  # which is NaN at first
            self._largest = point

    def summarise(self) -> dict[str, float]:
        """The summary of everything that is held; of the last flush if nothing is; NaN before any step."""
        self._fetch()
        return self._row() if self._points or self._last_row is None else self._last_row

    def figures(self) -> dict[str, float]:
        """The summary as :meth:`summarise` gives it; where it has no number, the last one that a row had.

        Who stops a run at a NaN is not to stop it for a step that was left out.
        """
        row = self.summarise()
        return {key: value if math.isfinite(value) else self._last_finite.get(key, value) for key, value in row.items()}

    def flush(self) -> tuple[list[tuple[int, dict[str, float]]], list[Point]]:
        """Hold nothing any more.

        Returns:
            What is to be logged of the steps that were held: rows, each with its step; and these steps.
        """
        row, points = self.summarise(), self._points
        if not points:
            return [], []
        rows = [(point.step, self._step_row(point)) for point in points] if self.every_step else []
        self._last_row = row
        self._last_finite |= {key: value for key, value in row.items() if math.isfinite(value)}
        self._begin()
        return [*rows, (points[-1].step, row)], points

    def _row(self) -> dict[str, float]:
        """One row for the steps that are held. Non-finite steps are counted and otherwise left out."""
        held, latest = self._summary, self._latest
        if not latest.finite:
            latest = latest._replace(norm=math.nan, statistic=math.nan)
        row = {
            "grad_norm": latest.norm,
            "grad_norm_mean": held.mean,
            "grad_norm_max": self._largest.norm,
            "grad_norm_max_step": float(self._largest.step) if self._largest.finite else math.nan,
            "threshold": latest.threshold,
            "clipped_fraction": held.clipped_fraction,
            "clip_coef_mean": held.clip_coef_mean,
            "clip_coef_min": held.clip_coef_min,
            "nonfinite_total": self._points[-1].nonfinite_total if self._points else math.nan,
        }
        if self.by_value:
            row["grad_rms"] = latest.statistic
        return {self.prefix + key: value for key, value in row.items()} | self._layers()

    def _layers(self) -> dict[str, float]:
        """The mean share of each module in the squared norm of the steps that are held; NaN if none is finite."""
        if not self.layer_depth:
            return {}
        names, sums = self.trace.names, self._share_sums
        if sums is None:
            sums = torch.zeros(len(names), dtype=torch.float64, device="cpu")
        means = dict(zip(names, (sums / self._share_steps).tolist(), strict=True))
        prefix = self.prefix.replace("autoclip/", "autoclip_layers/", 1)
        shares = by_module(means, self.layer_depth)
        return {prefix + module: share for module, share in shares.items()}

    def _step_row(self, point: Point) -> dict[str, float]:
        row = {"grad_norm": point.norm, "threshold": point.threshold}
        if self.by_value:
            row["grad_rms"] = point.statistic
        return {f"{self.prefix}step/{key}": value for key, value in row.items()}
