"""From step records on the device to rows for the loggers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_autoclip.clipping.clipper import StepRecord
from lightning_autoclip.monitoring.trace import Point, Trace, by_module, shares_of

_MAX_ON_DEVICE = 1024  # records that may wait on the device, however far apart the rows are


class Where(NamedTuple):
    """Which step a record is of: the arguments of `Point` that the clipper does not know."""

    step: int
    epoch: int
    first_batch: int
    last_batch: int


class Flush(NamedTuple):
    """What is to be logged: rows, each with its step, and the steps that they sum up."""

    rows: list[tuple[int, dict[str, float]]]
    points: list[Point]


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

    Attributes:
        last_row: The latest summary, by key.
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
        self.last_row: dict[str, float] = {}
        self._on_device: list[tuple[Where, StepRecord]] = []  # or on the host, of the CPU
        self._points: list[Point] = []
        self._squares: list[Tensor] = []

    @property
    def keys(self) -> list[str]:
        """Every key that the rows of this recorder can have."""
        none = Point(0, 0, 0, 0, *[math.nan] * 5)
        return list(self._summary([none])) + (list(self._step_row(none)) if self.every_step else [])

    def add(self, record: StepRecord, where: Where) -> None:
        """Hold a record until the next row."""
        self._on_device.append((where, record))
        if len(self._on_device) >= _MAX_ON_DEVICE:
            self._fetch()

    def is_due(self, every_n_steps: int) -> bool:
        """Whether the records that are held reach a multiple of ``every_n_steps``. Needs no host read."""
        if not self._on_device and not self._points:
            return False
        first = self._points[0].step if self._points else self._on_device[0][0].step
        last = self._on_device[-1][0].step if self._on_device else self._points[-1].step
        return (last + 1) // every_n_steps > first // every_n_steps

    def _fetch(self) -> None:
        """Copy to the host what is held on the device."""
        if not self._on_device:
            return
        wheres, records = zip(*self._on_device, strict=True)
        self._on_device = []
        numbers: Any = [record[:5] for record in records]
        norms: Any = [record.parameter_norms for record in records]
        if isinstance(records[0].norm, Tensor):
            numbers = torch.stack([torch.stack(five) for five in numbers]).tolist()
            norms = norms if norms[0] is None else torch.stack(norms).cpu()
        points = [Point(*where, *five) for where, five in zip(wheres, numbers, strict=True)]
        squares = None if norms[0] is None else torch.as_tensor(norms, dtype=torch.float64, device="cpu").square()
        self._points += points
        self._squares += [] if squares is None else [squares]
        self.trace.extend(points, squares)

    def summarise(self) -> dict[str, float]:
        """The summary of everything that is held; of the last flush if nothing is."""
        self._fetch()
        if self._points:
            self.last_row = self._summary(self._points)
        return self.last_row

    def flush(self) -> Flush:
        """Return everything that is held, and hold nothing any more."""
        self.summarise()
        points, self._points, self._squares = self._points, [], []
        if not points:
            return Flush([], [])
        steps = [(point.step, self._step_row(point)) for point in points] if self.every_step else []
        return Flush([*steps, (points[-1].step, self.last_row)], points)

    def _summary(self, points: list[Point]) -> dict[str, float]:
        """One row for a window of steps. Non-finite steps are counted and otherwise left out."""
        finite = [point for point in points if math.isfinite(point.norm)]
        last = finite[-1] if finite else replace(points[-1], norm=math.nan, statistic=math.nan)
        largest = max(finite, key=lambda point: point.norm, default=None)
        coefs = [coef for point in finite if not math.isnan(coef := point.clip_coef)]
        row = {
            "grad_norm": last.norm,
            "grad_norm_mean": _mean([point.norm for point in finite]),
            "grad_norm_max": largest.norm if largest else math.nan,
            "grad_norm_max_step": float(largest.step) if largest else math.nan,
            "threshold": last.threshold,
            "clipped_fraction": _mean([float(coef < 1) for coef in coefs]),
            "clip_coef_mean": _mean(coefs),
            "clip_coef_min": min(coefs, default=math.nan),
            "nonfinite_total": points[-1].nonfinite_total,
        }
        if self.by_value:
            row["grad_rms"] = last.statistic
        return {self.prefix + key: value for key, value in row.items()} | self._layers()

    def _layers(self) -> dict[str, float]:
        """The mean share of each module in the squared norm of the steps that are held."""
        if not self.layer_depth:
            return {}
        shares = torch.full((len(self.trace.names),), math.nan, dtype=torch.float64)
        if self._squares:
            shares = shares_of(torch.cat(self._squares)).mean(0)  # NaN if none is finite
        named = dict(zip(self.trace.names, shares.tolist(), strict=True))
        prefix = self.prefix.replace("autoclip/", "autoclip_layers/", 1)
        return {prefix + module: share for module, share in by_module(named, self.layer_depth).items()}

    def _step_row(self, point: Point) -> dict[str, float]:
        row = {"grad_norm": point.norm, "threshold": point.threshold}
        if self.by_value:
            row["grad_rms"] = point.statistic
        return {f"{self.prefix}step/{key}": value for key, value in row.items()}


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
