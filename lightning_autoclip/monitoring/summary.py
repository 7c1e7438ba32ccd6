"""One optimizer step on the host, and some steps in a row summed up: what rows, traces and reports are made of."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

SAME = 1e-3  # norms that differ by no more than this part are one number
LARGEST = 3.41e38  # above every float32
_LOGS = -104.0, 89.0  # of every float32 above 0
_MOST = 2.0**53  # what counts


class Point(NamedTuple):
    """One optimizer step on the host.

    Attributes:
        step: The step that it is logged at (the loggers' own ``trainer/global_step``).
        epoch: From 0; -1 where nobody knows it, as of logged rows.
        first_batch: Index of the first batch of its accumulation window.
        last_batch: Index of the last one.
        norm: As the following fields, what `StepRecord` says.
        update_ratio: By what part of its norm the gradient, unless clipped, moves the weight matrix that it moves most;
            NaN where that is not known or has no bound.
        bad: 1 if the gradient of the whole step was not finite, of which this may be the part of one group; else 0.
    """

    step: int
    epoch: int
    first_batch: int
    last_batch: int
    norm: float
    clipped_norm: float
    statistic: float
    threshold: float
    nonfinite_total: float
    max_norm: float = math.nan
    left_out: float = 0.0
    update_ratio: float = math.nan
    bad: float = 0.0

    @property
    def is_bounded(self) -> bool:
        """Whether ``max_update_ratio`` shortened the step, rather than the threshold that the policy set."""
        by_value = self.statistic != self.norm  # thresholds are of entries then
        return self.norm > self.max_norm and (by_value or self.threshold >= self.max_norm)

    @property
    def finite(self) -> bool:
        """Whether the gradient of the whole step held neither a NaN nor an infinity."""
        return math.isfinite(self.norm) and not self.bad

    @property
    def clip_coef(self) -> float:
        """The factor by which clipping shrank the norm of the gradient, and with it the step: 1 where it did not.

        NaN where the norm after clipping was not measured, the gradient not finite, or the step left out.
        """
        if math.isnan(self.clipped_norm) or not self.finite or self.left_out:
            return math.nan
        return 1.0 if self.clipped_norm >= self.norm else self.clipped_norm / self.norm

    @property
    def is_sound(self) -> bool:
        """Whether it can be the record of a step, rather than one that is damaged."""
        numbers = self.norm, self.clipped_norm, self.statistic, self.threshold
        return (
            all(type(place) is int and -1 <= place < _MOST for place in self[1:4])
            and type(self.step) is int
            and -_MOST < self.step < _MOST  # below 0 are those of a training before this one
            and all(type(number) is float for number in self[4:])
            and all(math.isnan(number) or 0 <= number < LARGEST or number == math.inf for number in numbers)
            and 0 <= self.nonfinite_total < _MOST
            and all(math.isnan(number) or number >= 0 for number in (self.max_norm, self.update_ratio))
            and (math.isnan(self.update_ratio) or self.max_norm > 0)
            and {self.left_out, self.bad} <= {0.0, 1.0}
        )

    @property
    def batches(self) -> str:
        """The batches of its accumulation window, as ``"7"`` or ``"4-7"``."""
        return f"{self.first_batch}" + (f"-{self.last_batch}" if self.last_batch != self.first_batch else "")


@dataclass
class Summary:
    """Some steps in a row, summed up: by default none.

    "Statistics" are what a `StepRecord` compares with its threshold: norms, or by value root-mean-square entries.

    Attributes:
        first: The step that the first one is logged at.
        last: The step that the last one is logged at.
        steps: How many they are.
        nonfinite: How many had a NaN or an infinity; these count nowhere below.
        zero: How many had a gradient of exactly zero.
        total: Sum of the norms.
        smallest: Smallest statistic above 0; ``inf`` if there is none.
        largest: Largest statistic; 0 if there is none.
        logs: Sum of the natural logarithms of the statistics above 0.
        threshold: The last finite one, also of a step that was not; NaN if nothing was clipped yet.
        measured: At how many steps it is known what clipping did.
        clipped: At how many of these it changed the gradient.
        coefs: Sum of the factors on these.
        coef_min: The smallest of the factors; 1 if there is none.
        top: The largest norm, to within the part `SAME` of it; 0 if there is none.
        at_top: How many norms are that number, to within the same.
        weighed: At how many steps ``max_update_ratio`` was at work.
        bounded: At how many of these it shortened the step.
        updates: Sum of the natural logarithms of their update ratios, as `Point` has them.
        excess: Sum, over the steps that it shortened, of the logarithms of how many times the bound they exceeded.
        left_out: How many steps ``skip_above`` left out; their norms count, what clipping would have done does not.
    """

    first: float = math.nan
    last: float = math.nan
    steps: float = 0.0
    nonfinite: float = 0.0
    zero: float = 0.0
    total: float = 0.0
    smallest: float = math.inf
    largest: float = 0.0
    logs: float = 0.0
    threshold: float = math.nan
    measured: float = 0.0
    clipped: float = 0.0
    coefs: float = 0.0
    coef_min: float = 1.0
    top: float = 0.0
    at_top: float = 0.0
    weighed: float = 0.0
    bounded: float = 0.0
    updates: float = 0.0
    excess: float = 0.0
    left_out: float = 0.0

    @classmethod
    def of(cls, point: Point) -> Summary:
        """One step."""
        summary = cls(point.step, point.step, 1.0)
        if math.isfinite(point.threshold):
            summary.threshold = point.threshold
        if not point.finite:
            summary.nonfinite = 1.0
            return summary
        summary.total = point.norm
        if point.statistic > 0:
            summary.smallest = summary.largest = point.statistic
            summary.logs = math.log(point.statistic)
            summary.top, summary.at_top = point.norm, 1.0
        else:
            summary.zero = 1.0
        if not math.isnan(coef := point.clip_coef):
            summary.measured, summary.clipped, summary.coefs, summary.coef_min = 1.0, float(coef < 1), coef, coef
        summary.left_out = point.left_out
        if 0 < point.update_ratio < math.inf and not point.left_out:
            summary.weighed, summary.bounded = 1.0, float(point.is_bounded)
            summary.updates = math.log(point.update_ratio)
            summary.excess = math.log(point.norm / point.max_norm) if point.is_bounded else 0.0
        return summary

    @property
    def is_sound(self) -> bool:
        """Whether it can be what some steps of a fit were summed up to, rather than damaged."""
        steps, norms = self.steps, self.norms
        counts = (self.nonfinite, self.zero, self.measured, self.clipped, self.at_top, self.weighed, self.bounded)
        up_to = {
            (self.first, self.last),
            (self.nonfinite + self.zero, steps),
            (self.clipped, self.measured),
            (self.bounded, self.weighed),
            (self.coefs, self.measured * (1 + SAME)),
            (self.total, LARGEST * steps),
            (self.coef_min, 1.0),
            (_LOGS[0] * norms, self.logs),
            (self.logs, _LOGS[1] * norms),
            (abs(self.updates), 709.0 * self.weighed),  # what `exp` takes
            (self.excess, 709.0 * self.bounded),
        }
        return (
            1 <= steps < _MOST
            and all(-_MOST < place < _MOST and place.is_integer() for place in (self.first, self.last, steps))
            and all(0 <= count <= steps and count.is_integer() for count in (*counts, self.left_out))
            and all(0 <= number < LARGEST for number in (self.largest, self.top))
            and (math.isnan(self.threshold) or 0 <= self.threshold < LARGEST)
            and (0 < self.smallest < LARGEST or self.smallest == math.inf)
            and min(self.total, self.coefs, self.coef_min, self.excess) >= 0
            and all(low <= high for low, high in up_to)
        )

    @classmethod
    def merged(cls, parts: Iterable[Summary]) -> Summary:
        """All steps of some summaries, given in order."""
        whole = cls()
        for part in parts:
            whole.merge(part)
        return whole

    def merge(self, later: Summary) -> None:
        """Take in later steps."""
        if not self.steps:
            self.first = later.first
        self.last = later.last
        self.steps += later.steps
        self.nonfinite += later.nonfinite
        self.zero += later.zero
        self.total += later.total
        if later.smallest < self.smallest:  # cheaper than `min`, once per step
            self.smallest = later.smallest
        if later.largest > self.largest:
            self.largest = later.largest
        self.logs += later.logs
        if later.threshold == later.threshold:
            self.threshold = later.threshold
        self.measured += later.measured
        self.clipped += later.clipped
        self.coefs += later.coefs
        if later.coef_min < self.coef_min:
            self.coef_min = later.coef_min
        self.note_top(later.top, later.at_top)
        self.weighed += later.weighed
        self.bounded += later.bounded
        self.updates += later.updates
        self.excess += later.excess
        self.left_out += later.left_out

    def note_top(self, norm: float, count: float = 1.0) -> None:
        """Compare so many norms of one number, which is nothing if it is 0, with the largest one so far."""
        # The number stays where it was first seen: one that moved with each norm would creep along with slow growth.
        if norm > self.top * (1 + SAME):
            self.top, self.at_top = norm, count
        elif norm > 0 and norm >= self.top * (1 - SAME):
            self.at_top += count

    @property
    def finite(self) -> float:
        """How many steps had a finite norm."""
        return self.steps - self.nonfinite

    @property
    def norms(self) -> float:
        """How many steps had a finite norm above 0."""
        return self.steps - self.nonfinite - self.zero

    @property
    def mean(self) -> float:
        """Mean norm; NaN if there is none."""
        return self.total / self.finite if self.finite else math.nan

    @property
    def typical(self) -> float:
        """Geometric mean of the statistics above 0; NaN if there is none."""
        return math.exp(self.logs / self.norms) if self.norms else math.nan

    @property
    def clipped_fraction(self) -> float:
        """Share of the steps that clipping changed, of those at which that is known; NaN if it is of none."""
        return self.clipped / self.measured if self.measured else math.nan

    @property
    def bounded_fraction(self) -> float:
        """Share of the finite steps that ``max_update_ratio`` shortened; NaN where it was at work in none."""
        return self.bounded / self.finite if self.weighed else math.nan

    @property
    def bound_excess(self) -> float:
        """Geometric mean of how many times ``max_update_ratio`` the steps exceeded that it shortened; NaN if none."""
        return math.exp(self.excess / self.bounded) if self.bounded else math.nan

    @property
    def update_ratio(self) -> float:
        """Geometric mean of the steps' own, as `Point` has them; NaN likewise."""
        return math.exp(self.updates / self.weighed) if self.weighed else math.nan

    @property
    def clip_coef_mean(self) -> float:
        """Mean factor on the step; NaN if it is not known of any."""
        return self.coefs / self.measured if self.measured else math.nan

    @property
    def clip_coef_min(self) -> float:
        """The smallest factor on the step; NaN if it is not known of any."""
        return self.coef_min if self.measured else math.nan
