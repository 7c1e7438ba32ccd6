"""One step: from what was measured to a threshold, to clipped gradients and the record of the step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from lightning_autoclip.clip import clamp_, clamp_unread_, multiply_, multiply_unread_
from lightning_autoclip.gradients import LARGEST_NORM, Arrival, Numbers
from lightning_autoclip.history import History, Number, constant
from lightning_autoclip.policies import threshold_of
from lightning_autoclip.settings import Clipping

LEAST_STEPS = 20  # of a history whose median tells what is usual
MOST_IN_A_ROW = 5  # outliers in a row that are skipped: more are none, the norms have risen for good


class StepRecord(NamedTuple):
    """What one step's clipping saw and did.

    Every field is a float or a bool where the host knows it: on the CPU, and where a step had to be read. Else it is a
    tensor of shape ``()``, float32 or bool, on the gradients' device, which comes to the host one step later.

    Attributes:
        norm: L2 norm of all gradients viewed as one vector, before clipping.
        clipped_norm: The same after clipping; by value NaN at the steps at which it is not measured. On a device it is
            NaN until the step is committed.
        statistic: What the threshold is compared with: the norm, or by value the gradient RMS, norm / √numel.
        threshold: In units of ``statistic``; ``inf`` where nothing could be clipped.
        update_ratio: By what part of its norm the gradient, unless clipped, would move the weight matrix that it moves
            most; NaN without ``max_update_ratio``.
        is_finite: Whether the gradient of the whole step is, of which this may be the part of one group.
        is_skipped: Whether the step is skipped as an outlier (``skip_above``); it is not clipped then.
        parameter_norms: L2 norm of each parameter's gradient before clipping, in the optimizer's order, 0 where there
            is none: floats, or shape ``(n,)``. ``None`` where an engine measures the whole alone.
        weight_norms: With ``max_update_ratio``, L2 norm of each weight matrix, likewise, at the steps at which it is
            measured; else ``None``.
    """

    norm: Number
    clipped_norm: Number
    statistic: Number
    threshold: Number
    update_ratio: Number = math.nan
    is_finite: bool | Tensor = True
    is_skipped: bool | Tensor = False
    parameter_norms: Numbers | None = None
    weight_norms: Numbers | None = None


class Part:
    """The gradients that share a history and a threshold, at one step: of an optimizer, or of a group of it.

    Args:
        settings: How they are clipped.
        history: Of the steps before.
        steps: How many steps there were before.
        tensors: The gradients, or what this process holds of them.
        norms: L2 norm of each.
        norm: Of all.
        statistic: What the threshold is compared with.
        is_whole: Whether they are all gradients of the step.
        update_ratio: As in `StepRecord`.
        weight_norms: Likewise.
    """

    def __init__(
        self,
        settings: Clipping,
        history: History,
        steps: int,
        tensors: list[Tensor],
        norms: Any,
        norm: Any,
        statistic: Any,
        is_whole: bool = True,
        update_ratio: Any = math.nan,
        weight_norms: Numbers | None = None,
    ) -> None:
        self.settings, self.history, self.steps, self.tensors = settings, history, steps, tensors
        self.norms, self.norm, self.statistic, self.is_whole = norms, norm, statistic, is_whole
        self.update_ratio, self.weight_norms = update_ratio, weight_norms

    def is_outlier(self, is_finite: Any) -> Any:
        """Whether the statistic is far above the median of the history: a bool, or a tensor of shape ``()``."""
        times = self.settings.skip_above
        if times is None or self.steps < max(LEAST_STEPS, self.settings.warmup_steps):
            return False
        return is_finite & (self.statistic > times * self.history.percentile(50))

    @property
    def threshold(self) -> float:
        """The threshold of the policy and ``max_threshold``, which alone is there during the warm-up."""
        most = self.settings.max_threshold or math.inf
        if self.steps < self.settings.warmup_steps:
            return most
        return min(float(self._asked()), most)

    @property
    def unread_threshold(self) -> Tensor:
        """The same on the device of the norm: shape ``()``."""
        most = self.settings.max_threshold or math.inf
        if self.steps < self.settings.warmup_steps:
            return constant(most, self.norm.device, self.norm.dtype)
        threshold: Tensor = self._asked()
        return (
            threshold if most == math.inf else torch.fmin(threshold, constant(most, threshold.device, threshold.dtype))
        )

    def _asked(self) -> Any:
        return threshold_of(self.settings.policy, self.history.with_current(self.statistic))

    def clip_(self, is_finite: bool, is_skipped: bool) -> StepRecord:
        """Clip the gradients in place at a threshold that the host knows."""
        settings, norm, ratio = self.settings, self.norm, self.settings.max_update_ratio
        clips = is_finite if self.is_whole or settings.nonfinite != "ignore" else norm < math.inf
        threshold = self.threshold if clips else math.inf
        limited = norm * ratio / self.update_ratio if ratio and self.update_ratio > 0 else math.inf
        clips = clips and not is_skipped
        clipped_norm = norm
        if settings.by_value:
            clipped_norm = math.nan  # which is measured afterwards
            if clips and threshold < math.inf:
                clamp_(self.tensors, threshold)
            if clips and limited < norm:
                multiply_(self.tensors, limited / norm)  # what is left is no longer, and is shortened as much
        else:
            threshold = min(threshold, limited)
            if clips and threshold < norm:
                multiply_(self.tensors, threshold / norm)
                clipped_norm = threshold
        return self._record(clipped_norm, threshold, is_finite, is_skipped)

    def clip_unread_(self, is_finite: Tensor, is_skipped: Any) -> StepRecord:
        """Clip the gradients in place, where all that depends on the norm stays on its device."""
        settings, norm, ratio = self.settings, self.norm, self.settings.max_update_ratio
        clips = is_finite if self.is_whole or settings.nonfinite != "ignore" else norm < math.inf
        clips = clips if is_skipped is False else clips & ~is_skipped
        unchanged, threshold = constant(1.0, norm.device, norm.dtype), self.unread_threshold
        limited = norm * ratio / self.update_ratio if ratio else None
        if settings.by_value:
            clamp_unread_(self.tensors, torch.where(clips, threshold, constant(math.inf, norm.device, norm.dtype)))
            coef = None if limited is None else limited / norm
        else:
            threshold = threshold if limited is None else torch.fmin(threshold, limited)
            coef = threshold / norm
        if coef is not None:
            multiply_unread_(self.tensors, torch.fmin(torch.where(clips, coef, unchanged), unchanged))
        return self._record(math.nan, threshold, is_finite, is_skipped)

    def _record(self, clipped_norm: Any, threshold: Any, is_finite: Any, is_skipped: Any) -> StepRecord:
        of_step = self.norm, clipped_norm, self.statistic, threshold, self.update_ratio, is_finite, is_skipped
        return StepRecord(*of_step, self.norms, self.weight_norms)


def find_outlier(parts: Sequence[Part | None], is_finite: Any) -> Any:
    """Whether a part of the step is far above what is usual: a bool, or shape ``()``."""
    found: Any = False
    for part in parts:
        if part is not None and (judged := part.is_outlier(is_finite)) is not False:
            found = judged | found
    return found


class Unread:
    """The records of a step whose numbers are on their way to the host.

    Args:
        records: One per group; ``None`` where a group has no gradient.
        is_outlier: Shape ``()``, bool, on the device; or a bool.
        by_value: Whether elements were clamped.
    """

    _FIELDS = ("norm", "clipped_norm", "statistic", "threshold", "update_ratio", "parameter_norms", "weight_norms")

    def __init__(self, records: Sequence[StepRecord | None], is_outlier: Any, by_value: bool) -> None:
        self._records, self._is_outlier, self._is_here = list(records), is_outlier, False
        self._by_value = by_value
        numbers = [number for _, _, number in self._tensors()]
        if isinstance(is_outlier, Tensor):
            numbers.append(is_outlier.to(torch.float32))
        self._arrival = Arrival(torch.cat([number.reshape(-1) for number in numbers]))

    def _tensors(self) -> list[tuple[int, str, Tensor]]:
        fields = ((i, name) for i, record in enumerate(self._records) if record is not None for name in self._FIELDS)
        numbers = ((i, name, getattr(self._records[i], name)) for i, name in fields)
        return [(i, name, number) for i, name, number in numbers if isinstance(number, Tensor)]

    def read(self) -> tuple[list[StepRecord | None], bool]:
        """Wait for the numbers; return the records with floats, and whether the step was an outlier."""
        if self._is_here:
            return self._records, bool(self._is_outlier)
        left, records = iter(self._arrival.wait()), list(self._records)
        for i, name, number in self._tensors():
            floats: Any = [next(left) for _ in range(number.numel())]
            records[i] = cast(StepRecord, records[i])._replace(**{name: floats if number.dim() else floats[0]})
        is_outlier = bool(next(left)) if isinstance(self._is_outlier, Tensor) else self._is_outlier
        whole = math.hypot(*(record.norm for record in records if record is not None))
        is_finite = whole <= LARGEST_NORM
        records = [None if each is None else self._finished(each, is_finite, is_outlier) for each in records]
        self._records, self._is_outlier, self._is_here = records, is_outlier, True
        return records, is_outlier

    def _finished(self, record: StepRecord, is_finite: bool, is_outlier: bool) -> StepRecord:
        """A record whose numbers have arrived, with what the host makes of them."""
        is_skipped = is_outlier if isinstance(record.is_skipped, Tensor) else record.is_skipped
        record = record._replace(is_finite=is_finite, is_skipped=is_skipped)
        if not is_finite:
            return record._replace(threshold=math.inf, clipped_norm=record.norm)
        if is_skipped:
            return record._replace(clipped_norm=record.norm)
        return record if self._by_value else record._replace(clipped_norm=min(record.norm, record.threshold))
