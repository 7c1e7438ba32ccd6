"""From step records on the device to rows for the loggers."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from lightning_autoclip.clipper import StepRecord

_MAX_ON_DEVICE = 1024  # records that may wait on the device, however far apart the rows are


@dataclass(frozen=True)
class Point:
    """A `StepRecord` on the host, with the step that it is logged at (the loggers' own ``trainer/global_step``)."""

    step: int
    norm: float
    clipped_norm: float
    statistic: float
    threshold: float
    nonfinite_total: float

    @property
    def clip_coef(self) -> float:
        """The factor by which clipping shrank the norm of the gradient, and with it the step: 1 where it did not.

        NaN where the norm after clipping was not measured.
        """
        return 1.0 if self.clipped_norm >= self.norm else self.clipped_norm / self.norm


class Recorder:
    """Holds the step records of one optimizer and sums them up in rows.

    Records of an accelerator stay there until a row is due: one copy to the host per row, none per step.

    Args:
        prefix: What the keys of the rows start with, for example ``"autoclip/"``.
        by_value: Whether the gradients are clipped by value: the rows then carry ``grad_rms`` too, which is what the
            threshold is compared with.
        every_step: Whether each step gets a row of its own beside the summary.

    Attributes:
        last_row: The latest summary, by key.
    """

    def __init__(self, prefix: str, by_value: bool = False, every_step: bool = False) -> None:
        self.prefix, self.by_value, self.every_step = prefix, by_value, every_step
        self.last_row: dict[str, float] = {}
        self._on_device: list[tuple[int, StepRecord]] = []  # or on the host, of the CPU
        self._points: list[Point] = []

    @property
    def keys(self) -> list[str]:
        """Every key that the rows of this recorder can have."""
        none = Point(0, *[math.nan] * 5)
        return list(self._summary([none])) + (list(self._step_row(none)) if self.every_step else [])

    def add(self, record: StepRecord, step: int) -> None:
        """Hold a record until the next row."""
        self._on_device.append((step, record))
        if len(self._on_device) >= _MAX_ON_DEVICE:
            self._fetch()

    def is_due(self, every_n_steps: int) -> bool:
        """Whether the records that are held reach a multiple of ``every_n_steps``. Needs no host read."""
        if not self._on_device and not self._points:
            return False
        first = self._points[0].step if self._points else self._on_device[0][0]
        last = self._on_device[-1][0] if self._on_device else self._points[-1].step
        return (last + 1) // every_n_steps > first // every_n_steps

    def _fetch(self) -> None:
        """Copy to the host what is held on the device."""
        if self._on_device:
            records: Any = [record for _, record in self._on_device]
            if isinstance(records[0].norm, torch.Tensor):
                records = torch.stack([torch.stack(record) for record in records]).tolist()
            self._points += [Point(step, *record) for (step, _), record in zip(self._on_device, records, strict=True)]
            self._on_device = []

    def summarise(self) -> dict[str, float]:
        """The summary of everything that is held; of the last flush if nothing is."""
        self._fetch()
        if self._points:
            self.last_row = self._summary(self._points)
        return self.last_row

    def flush(self) -> list[tuple[int, dict[str, float]]]:
        """Return the rows of everything that is held, each with its step, and hold nothing any more."""
        self.summarise()
        points, self._points = self._points, []
        if not points:
            return []
        steps = [(point.step, self._step_row(point)) for point in points] if self.every_step else []
        return [*steps, (points[-1].step, self.last_row)]

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
        return {self.prefix + key: value for key, value in row.items()}

    def _step_row(self, point: Point) -> dict[str, float]:
        row = {"grad_norm": point.norm, "threshold": point.threshold}
        if self.by_value:
            row["grad_rms"] = point.statistic
        return {f"{self.prefix}step/{key}": value for key, value in row.items()}


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
