"""Steps that are far too large: whether one is to be left out."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_autoclip._checks import check_integer, check_number, is_infinite
from lightning_autoclip.clipping._numbers import Number, constant
from lightning_autoclip.clipping.record import History

LEAST_STEPS = 20  # before these nobody knows what is typical
MOST_IN_A_ROW = 5  # more are no outliers: the norms have risen, and a training that is left out does not go on


class Outliers:
    """Tells steps whose norm is many times the typical one, the median of the record before them.

    Of steps in a row that are so large, the first `MOST_IN_A_ROW` are left out. The ones that follow are made until one
    has been smaller again, so that a training whose norms have risen for good goes on. All of them enter the record.

    Args:
        times: How many times, at least 1; ``inf``: no step is left out.

    Attributes:
        in_a_row: How many of the last steps, without one between them, were so large.

    Raises:
        TypeError: ``times`` is no number.
        ValueError: ``times`` is below 1.
    """

    def __init__(self, times: float) -> None:
        self.times = times if is_infinite(times) else check_number("skip_above", times, "a number of at least 1", 1)
        self.in_a_row: Number = 0.0

    @property
    def is_on(self) -> bool:
        """Whether any step can be one."""
        return self.times < math.inf

    def is_above(
        self, statistic: Number, is_finite: bool | Tensor, history: History, steps: int, warmup_steps: int = 0
    ) -> bool | Tensor:
        """Whether a step, or a part of it, is so large; to be asked before it is recorded.

        Args:
            statistic: Of the step, in the record's unit.
            is_finite: Whether the gradient is; what is not finite is none of these.
            history: The record of the steps before.
            steps: How many steps there were before.
            warmup_steps: How many of these there must have been at least, if that is more than `LEAST_STEPS`.

        Returns:
            A bool of floats, a tensor of shape ``()`` of tensors; ``False`` of both while the record is young.
        """
        if not self.is_on or steps < max(LEAST_STEPS, warmup_steps):
            return False
        typical = history.percentile(50)
        if isinstance(statistic, Tensor):
            device = statistic.device
            return (statistic > torch.as_tensor(typical, device=device) * self.times) & is_finite
        return bool(is_finite) and statistic > self.times * float(typical)

    def count(self, is_above: bool | Tensor) -> bool | Tensor:
        """Whether a step is to be left out; to be called once per step.

        Args:
            is_above: Whether the step, or one of its parts, is so large.
        """
        if isinstance(is_above, Tensor):
            device = is_above.device
            before = self.in_a_row if isinstance(self.in_a_row, Tensor) else constant(self.in_a_row, device)
            self.in_a_row = torch.where(is_above, before + 1, constant(0.0, device))
            return is_above & (self.in_a_row <= MOST_IN_A_ROW)
        self.in_a_row = float(self.in_a_row) + 1 if is_above else 0.0
        return is_above and self.in_a_row <= MOST_IN_A_ROW

    def load_state_dict(self, in_a_row: Any) -> None:
        """Restore :attr:`in_a_row`; what is damaged is a `ValueError` or a `TypeError`."""
        self.in_a_row = float(check_integer("outliers_in_a_row", in_a_row, "a count", 0))
