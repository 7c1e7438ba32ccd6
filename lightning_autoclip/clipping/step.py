"""What one step's clipping saw and did."""

from __future__ import annotations

import math
from typing import NamedTuple

from lightning_autoclip.clipping._numbers import Number, Numbers


class StepRecord(NamedTuple):
    """What one step's clipping saw and did.

    Every field is a float where the host knows it: of gradients on the CPU, and where a step had to be read. Else it is
    a tensor of shape ``()``, float32, on their device, for which the host waits only when somebody reads it, as
    ``float(record.norm)`` does.

    Attributes:
        norm: L2 norm of all gradients viewed as one vector, before clipping.
        clipped_norm: The same after clipping; by value NaN at the steps at which it is not measured.
        statistic: What was recorded and compared: the norm, or by value the root-mean-square entry, norm / √numel.
        threshold: The threshold of this step, in units of ``statistic``; ``inf`` while nothing is clipped.
        nonfinite_total: How many steps so far, this one included, had a NaN or an infinity in their gradient.
        max_norm: The norm after clipping that ``max_update_ratio`` allows; NaN where there is no such bound.
        left_out: 1 if ``skip_above`` leaves the step out, which is not clipped then either; else 0.
        parameter_norms: L2 norm of each parameter's gradient before clipping, in the optimizer's order, 0 where there
            is none: floats, or a tensor of shape ``(n,)``. ``None`` where nobody measured it.
    """

    norm: Number
    clipped_norm: Number
    statistic: Number
    threshold: Number
    nonfinite_total: Number
    max_norm: Number = math.nan
    left_out: Number = 0.0
    parameter_norms: Numbers | None = None
