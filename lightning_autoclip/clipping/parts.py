"""A step's clipping, one part after the other: the parameters that share a record and a threshold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_autoclip.clipping._numbers import Number, Numbers, as_there, at, flag, minimum, single, unknown
from lightning_autoclip.clipping.bound import Rates
from lightning_autoclip.clipping.clip import clip_norm_, clip_value_
from lightning_autoclip.clipping.gradients import Gradients, Measured, norm_of
from lightning_autoclip.clipping.shards import is_trained
from lightning_autoclip.clipping.step import StepRecord
from lightning_autoclip.clipping.threshold import Threshold

Owners: TypeAlias = Sequence[tuple[Threshold, Sequence[int] | None]]
"""Per part its threshold, and where its parameters stand among all that step; ``None``: it has all."""


class Part:
    """What was measured of the parameters of one threshold.

    Args:
        threshold: It.
        positions: Where the parameters stand among all that step; ``None``: they are all.
        measured: Of all.
        norm: L2 norm of all.
    """

    __slots__ = ("_positions", "_threshold", "norm", "norms", "statistic")

    def __init__(self, threshold: Threshold, positions: Sequence[int] | None, measured: Measured, norm: Number) -> None:
        self._threshold, self._positions = threshold, positions
        self.norms = at(measured.norms, positions)
        self.norm = norm if positions is None else norm_of(self.norms)
        is_by_norm = threshold.gradient_clip_algorithm == "norm"
        self.statistic = self.norm if is_by_norm else _root_mean_square(self.norm, at(measured.numels, positions))

    def is_above(self, is_finite: bool | Tensor) -> bool | Tensor:
        """Whether this part is far too large."""
        own = self._threshold
        return own.outliers.is_above(self.statistic, is_finite, own.history, own.steps, own.warmup_steps)

    def clip_(
        self,
        gradients: Gradients,
        measured: Measured,
        rates: Rates | None,
        is_finite: bool | Tensor,
        is_outlier: bool | Tensor,
    ) -> StepRecord:
        """Record, decide and clip."""
        own, positions, norm = self._threshold, self._positions, self.norm
        tensors = gradients.tensors if positions is None else [gradients.tensors[position] for position in positions]
        max_norm = unknown(norm)
        if rates is not None:
            if len(measured.weights):
                own.bound.weigh(at(measured.weights, positions), at(gradients.shapes, positions))
            max_norm = own.bound.max_norm(norm, self.norms, rates, positions)
        is_by_norm = own.gradient_clip_algorithm == "norm"
        threshold = own.decide(is_finite, self.statistic, max_norm if is_by_norm and rates is not None else math.inf)
        # Nobody else is to see what a step that is left out would have been. What is applied as it is, is clipped by
        # group.
        clips = norm < math.inf if own.nonfinite == "ignore" and positions is not None else is_finite
        if is_outlier is not False:
            clips = clips & ~is_outlier if isinstance(is_outlier, Tensor) else False
        clipped_norm = unknown(norm)
        if is_by_norm:
            clip_norm_(tensors, norm, threshold, clips)
            clipped_norm = minimum(norm, threshold)
            if isinstance(is_outlier, Tensor):  # the gradient stays as it is
                clipped_norm = torch.where(is_outlier, torch.as_tensor(norm), torch.as_tensor(clipped_norm))
            elif is_outlier:
                clipped_norm = norm
        else:
            clip_value_(tensors, threshold, clips)
            if rates is not None:
                clip_norm_(tensors, norm, max_norm, clips)  # what is left is no longer, and is shortened as much
        left_out = flag(is_outlier) if isinstance(is_outlier, Tensor) else as_there(float(is_outlier), norm)
        return StepRecord(
            norm, clipped_norm, self.statistic, threshold, own.nonfinite_so_far, max_norm, left_out, self.norms
        )


def parts_of(
    owners: Owners, parameters: Sequence[Tensor], measured: Measured, norm: Number, are_shared: bool
) -> list[Part | None]:
    """Per threshold its part; ``None`` where none of its parameters has a gradient."""
    return [
        Part(threshold, own, measured, norm) if have_gradients(parameters, own, are_shared) else None
        for threshold, own in owners
    ]


def any_outlier(owners: Owners, parts: Sequence[Part | None], is_finite: bool | Tensor) -> bool | Tensor:
    """Whether the step is to be left out for the size of one part or more: steps in a row are counted for all alike."""
    found: bool | Tensor = False
    for part in parts:
        if part is not None and (judged := part.is_above(is_finite)) is not False:
            found = judged | found
    first, *_ = [threshold.outliers.count(found) for threshold, _ in owners]
    return first


def have_gradients(
    parameters: Sequence[Tensor], positions: Sequence[int] | None, may_be_elsewhere: bool = False
) -> bool:
    """Whether there is a gradient of a group, or, if processes share them, whether one of them may have one."""
    if may_be_elsewhere:
        return positions is None or any(parameters[position].requires_grad for position in positions)
    return any(parameter.grad is not None for parameter in at(parameters, positions))


def are_weighed(owners: Owners, parameters: Sequence[Tensor]) -> bool:
    """Whether the weights of a group or more are to be measured."""
    trained = tuple(map(is_trained, parameters))
    due = [
        threshold.bound.weighs(threshold.steps + 1, len(parameters if own is None else own), trained)
        for threshold, own in owners
    ]
    return any(due)


def with_clipped_norms(
    records: list[StepRecord | None], owners: Owners, gradients: Gradients, is_finite: bool | Tensor, read: bool
) -> list[StepRecord | None]:
    """The records of clipping by value, with the norms after it where they are due: one more read of the gradients."""
    pairs = zip(records, owners, strict=True)
    due = [record is not None and threshold.is_measured(is_finite) for record, (threshold, _) in pairs]
    if not any(due):
        return records
    after = gradients.norms(read)
    return [
        record._replace(clipped_norm=norm_of(at(after, positions))) if record is not None and is_due else record
        for record, (_, positions), is_due in zip(records, owners, due, strict=True)
    ]


def _root_mean_square(norm: Number, numels: Numbers) -> Number:
    """The root-mean-square entry: 0 where there are no entries, as where there are only zeros."""
    if isinstance(norm, Tensor):
        numel = numels.sum().clamp(min=1) if isinstance(numels, Tensor) else float(sum(numels)) or 1.0
        return norm / numel**0.5
    return single(norm / math.sqrt(math.fsum(numels) or 1.0))
