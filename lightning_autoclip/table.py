"""The table of a run: a row is one step, or several that were merged; each column says how two rows become one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from lightning_autoclip.step import StepRecord

MOST_BINS = 1024
SAME = 1e-3  # norms that differ by no more than this part count as equal


def _first(column: Sequence[float]) -> float:
    return column[0]


def _last(column: Sequence[float]) -> float:
    return column[-1]


def _last_known(column: Sequence[float]) -> float:
    return next((number for number in reversed(column) if number == number), math.nan)


class Step(NamedTuple):
    """A row of the table: one step, or several in a row that were merged.

    "Statistic" is what a `StepRecord` compares with its threshold: the norm, or by value the gradient RMS. Non-finite
    steps count in ``steps`` and ``nonfinite`` alone, and outliers that were skipped in no figure of clipping.

    Attributes:
        first: The loggers' step of the first one.
        last: Of the last one.
        epoch: Of the last one.
        steps: How many they are.
        nonfinite: How many had non-finite gradients.
        skipped: How many were skipped as outliers.
        zero: How many had a gradient of exactly zero.
        norm: Norm of the last finite one; NaN without any.
        statistic: Likewise.
        threshold: The last one that is finite; NaN without any.
        norm_sum: Sum of the norms.
        norm_max: The largest norm; 0 without any.
        norm_max_step: The loggers' step of the largest norm; NaN without any.
        at_max: How many norms are that number, to within the part `SAME`.
        statistic_min: Smallest statistic above 0; ``inf`` without any.
        statistic_max: Largest statistic.
        log_sum: Sum of the natural logarithms of the statistics above 0.
        measured: At how many steps the norm after clipping is known.
        clipped: At how many of these clipping changed the gradient.
        clipped_norm_sum: Sum of the norms after clipping, at these.
        coef_sum: Sum of the clip coefficients, at these.
        coef_min: The smallest of them; 1 without any.
        with_ratio: At how many steps ``max_update_ratio`` could limit the step.
        limited: How many of these it shortened.
        ratio_log_sum: Sum of the natural logarithms of the update ratios.
        excess_log_sum: Sum of the logarithms of ratio / limit, over the limited steps.
    """

    first: float
    last: float
    epoch: float = -1.0
    steps: float = 1.0
    nonfinite: float = 0.0
    skipped: float = 0.0
    zero: float = 0.0
    norm: float = math.nan
    statistic: float = math.nan
    threshold: float = math.nan
    norm_sum: float = 0.0
    norm_max: float = 0.0
    norm_max_step: float = math.nan
    at_max: float = 0.0
    statistic_min: float = math.inf
    statistic_max: float = 0.0
    log_sum: float = 0.0
    measured: float = 0.0
    clipped: float = 0.0
    clipped_norm_sum: float = 0.0
    coef_sum: float = 0.0
    coef_min: float = 1.0
    with_ratio: float = 0.0
    limited: float = 0.0
    ratio_log_sum: float = 0.0
    excess_log_sum: float = 0.0

    @property
    def finite(self) -> float:
        """How many steps had finite gradients."""
        return self.steps - self.nonfinite

    @property
    def norms(self) -> float:
        """How many steps had a finite norm above 0."""
        return self.steps - self.nonfinite - self.zero

    @property
    def geometric_mean(self) -> float:
        """Geometric mean of the statistics above 0; NaN without any."""
        return math.exp(self.log_sum / self.norms) if self.norms else math.nan

    @property
    def clipped_fraction(self) -> float:
        """Share of the steps that clipping changed; NaN where that is not known."""
        return self.clipped / self.measured if self.measured else math.nan

    @property
    def clip_coef_mean(self) -> float:
        """Mean clip coefficient; NaN where it is not known."""
        return self.coef_sum / self.measured if self.measured else math.nan

    @property
    def limited_fraction(self) -> float:
        """Share of the finite steps that ``max_update_ratio`` shortened; NaN where it could limit none."""
        return self.limited / self.finite if self.with_ratio else math.nan

    @property
    def update_ratio(self) -> float:
        """Geometric mean of the update ratios; NaN where ``max_update_ratio`` could limit none."""
        return math.exp(self.ratio_log_sum / self.with_ratio) if self.with_ratio else math.nan

    @property
    def limit_excess(self) -> float:
        """Geometric mean of how many times the limit the limited steps exceeded; NaN without any."""
        return math.exp(self.excess_log_sum / self.limited) if self.limited else math.nan


_MERGES: dict[str, Callable[[Sequence[float]], float]] = {
    "first": _first,
    "last": _last,
    "epoch": _last,
    "norm": _last_known,
    "statistic": _last_known,
    "threshold": _last_known,
    "norm_max": max,
    "norm_max_step": _last,  # set below, as the next one
    "at_max": _last,
    "statistic_min": min,
    "statistic_max": max,
    "coef_min": min,
}
_MERGE_COLUMNS = [_MERGES.get(field, sum) for field in Step._fields]


def merged(rows: Sequence[Step]) -> Step:
    """Merge rows, which follow each other, into one."""
    if len(rows) == 1:
        return rows[0]
    whole = Step(*[merge(column) for merge, column in zip(_MERGE_COLUMNS, zip(*rows, strict=True), strict=True)])
    largest = [row for row in rows if row.norm_max >= whole.norm_max * (1 - SAME)]
    step = next((row.norm_max_step for row in largest if row.finite and row.norm_max == whole.norm_max), math.nan)
    return whole._replace(norm_max_step=step, at_max=sum(row.at_max for row in largest))


def step_of(record: StepRecord, step: int, epoch: int, max_update_ratio: float | None, by_value: bool) -> Step:
    """The row of one step.

    Args:
        record: What clipping saw and did; with floats.
        step: The loggers' step.
        epoch: The epoch.
        max_update_ratio: The limit that the step had.
        by_value: Whether elements were clamped.
    """
    norm, statistic, threshold = float(record.norm), float(record.statistic), float(record.threshold)
    row: dict[str, float] = {"threshold": threshold if threshold < math.inf else math.nan}
    if not record.is_finite:
        return Step(step, step, epoch, nonfinite=1.0, **row)
    row |= {"norm": norm, "statistic": statistic, "norm_sum": norm, "norm_max": norm, "norm_max_step": float(step)}
    if statistic > 0:
        row |= {"statistic_min": statistic, "statistic_max": statistic, "log_sum": math.log(statistic), "at_max": 1.0}
    else:
        row["zero"] = 1.0
    if record.is_skipped:
        return Step(step, step, epoch, skipped=1.0, **row)
    if (clipped_norm := float(record.clipped_norm)) == clipped_norm:
        clipped_norm = min(clipped_norm, norm)
        coef = clipped_norm / norm if clipped_norm < norm else 1.0
        row |= {"measured": 1.0, "clipped": float(coef < 1), "clipped_norm_sum": clipped_norm}
        row |= {"coef_sum": coef, "coef_min": coef}
    if max_update_ratio is not None and 0 < (ratio := float(record.update_ratio)) < math.inf:
        row |= {"with_ratio": 1.0, "ratio_log_sum": math.log(ratio)}
        excess = ratio / max_update_ratio
        if excess > 1 and (by_value or threshold >= norm / excess * (1 - 1e-5)):
            row |= {"limited": 1.0, "excess_log_sum": math.log(excess)}
    return Step(step, step, epoch, **row)


class Place(NamedTuple):
    """Where a step is in a run.

    Attributes:
        step: The loggers' step.
        epoch: From 0; -1 where it is not known, as the next two.
        first_batch: Index of the first batch of its accumulation window.
        last_batch: Index of the last one.
    """

    step: int
    epoch: int = -1
    first_batch: int = -1
    last_batch: int = -1

    @property
    def batches(self) -> str:
        """The batches of its accumulation window, as ``"7"`` or ``"4-7"``."""
        return f"{self.first_batch}" + (f"-{self.last_batch}" if self.last_batch != self.first_batch else "")

    @property
    def where(self) -> str:
        """Step, epoch and batches in words."""
        batches = f" (epoch {self.epoch}, batch {self.batches.replace('-', ' to ')})" if self.epoch >= 0 else ""
        return f"step {self.step}{batches}"


NOWHERE = Place(-1)


class LargeStep(NamedTuple):
    """A step with one of the largest norms of the run, or with non-finite gradients.

    Attributes:
        place: Where it is.
        norm: As the next two, of the `StepRecord`.
        threshold: See there.
        clip_coef: Norm after clipping / norm; NaN where it is not known.
        is_skipped: Whether it was skipped as an outlier.
        times: Its statistic in units of the geometric mean of the steps before.
        parameters: The parameters with the largest shares of the squared norm, and their shares from 0 to 1; of a
            non-finite gradient, those that were not finite, each with NaN.
    """

    place: Place
    norm: float
    threshold: float
    clip_coef: float
    is_skipped: bool
    times: float
    parameters: tuple[tuple[str, float], ...]


def in_bins(bins: Sequence[Step], rows: Sequence[Step], width: int) -> tuple[tuple[Step, ...], int]:
    """Bins with further steps: of ``width`` steps each, or of twice as many where there would be too many bins."""
    whole, last = (bins[:-1], bins[-1:]) if bins and bins[-1].steps < width else (bins, ())
    together = [*whole, *_grouped([*last, *rows], width)]
    while len(together) > MOST_BINS:
        width *= 2
        together = _grouped(together, width)
    return tuple(together), width


def _grouped(rows: Sequence[Step], width: int) -> list[Step]:
    if width == 1:
        return list(rows)
    found, group, steps = list[Step](), list[Step](), 0.0
    for row in rows:
        group.append(row)
        steps += row.steps
        if steps >= width:
            found.append(merged(group))
            group, steps = [], 0.0
    return [*found, merged(group)] if group else found


def as_numbers(rows: Sequence[Step]) -> list[float]:
    """Rows as a checkpoint holds them: one number after the other."""
    return [float(number) for row in rows for number in row]


def from_numbers(numbers: Sequence[float]) -> list[Step]:
    """The rows of what :func:`as_numbers` returned."""
    columns = len(Step._fields)
    if len(numbers) % columns:
        raise ValueError(f"The state of `StepLog` cannot be loaded: expected rows of {columns} numbers. It is damaged.")
    return [Step(*numbers[at : at + columns]) for at in range(0, len(numbers), columns)]
