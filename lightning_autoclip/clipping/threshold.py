"""The threshold of some gradients: a record of their norms, and what a policy makes of it."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_autoclip._checks import DAMAGE, check_choice, check_integer, check_positive
from lightning_autoclip._text import shown
from lightning_autoclip.clipping._numbers import (
    Number,
    Numbers,
    compiles_graphs,
    constant,
    count_unless,
    single,
    smaller,
)
from lightning_autoclip.clipping.bound import StepBound
from lightning_autoclip.clipping.outliers import Outliers
from lightning_autoclip.clipping.policies import Policy, threshold_of, threshold_on_device
from lightning_autoclip.clipping.record import History

Algorithm = Literal["norm", "value"]
NonFinite = Literal["skip", "raise", "ignore"]


class Threshold:
    """Records a statistic of each step and sets the threshold: all of `GradientClipper` that touches no gradient."""

    def __init__(
        self,
        policy: Policy,
        *,
        gradient_clip_algorithm: Algorithm = "norm",
        window: int | None = 100,
        warmup_steps: int = 0,
        max_threshold: float | None = None,
        max_update_ratio: float | None = None,
        skip_above: float | None = None,
        nonfinite: NonFinite = "skip",
    ) -> None:
        if not isinstance(policy, Policy):
            raise TypeError(f"Expected `policy` to be a `Policy` such as `Percentile(10)`, but got {shown(policy)}.")
        algorithms, reactions = get_args(Algorithm), get_args(NonFinite)
        self.policy = policy
        self.gradient_clip_algorithm = check_choice("gradient_clip_algorithm", gradient_clip_algorithm, algorithms)
        self.nonfinite = check_choice("nonfinite", nonfinite, reactions)
        self.warmup_steps = check_integer("warmup_steps", warmup_steps, "an integer of at least 0", 0)
        self.max_threshold = math.inf if max_threshold is None else check_positive("max_threshold", max_threshold)
        self.bound = StepBound(math.inf if max_update_ratio is None else max_update_ratio)
        self.outliers = Outliers(math.inf if skip_above is None else skip_above)
        self.history = History(window)
        self.steps = 0
        self.clipped_norm_every = 1  # steps, by value; the callback is content with a few per row
        self._until_measured = 0
        self._nonfinite: Number = 0.0
        self.begin_step()

    def begin_step(self) -> None:
        """Note where the record stands, which is where it stays if the step that begins is never made."""
        self._before = self._now()

    def _now(self) -> tuple[int, Number, int, Number, Numbers, int]:
        """All that a step changes, by reference: what stands on an accelerator is replaced, never written to."""
        in_a_row, weights = self.outliers.in_a_row, self.bound.weights
        return self.steps, self._nonfinite, self._until_measured, in_a_row, weights, self.history.calls

    @property
    def arguments(self) -> dict[str, Any]:
        """The constructor's arguments other than the policy, as plain values that a checkpoint can hold."""
        return {
            "gradient_clip_algorithm": self.gradient_clip_algorithm,
            "window": self.history.window,
            "warmup_steps": self.warmup_steps,
            "max_threshold": self.max_threshold if self.max_threshold < math.inf else None,
            "max_update_ratio": self.bound.ratio if self.bound.is_on else None,
            "skip_above": self.outliers.times if self.outliers.is_on else None,
            "nonfinite": self.nonfinite,
        }

    def decide(self, is_finite: bool | Tensor, statistic: Number, most: Number = math.inf) -> Number:
        """Record the step and return its threshold.

        Args:
            is_finite: Whether the whole gradient is, of which this clipper may have a part: whether the step counts.
            statistic: Of this clipper's part: what is recorded.
            most: What the threshold is not to exceed at this step, beside `max_threshold`; NaN is nothing.
        """
        self.steps += 1
        # A gradient of exactly zero moves nothing and tells no scale; enough of them (hinge losses, masked batches)
        # would pull a percentile to zero and stop the training for good.
        if isinstance(is_finite, Tensor) and isinstance(statistic, Tensor):
            device = statistic.device
            self._nonfinite = count_unless(is_finite, self._nonfinite)
            self.history.record(statistic, torch.logical_and(is_finite, statistic))
            limit_there = constant(self.max_threshold, device)
            limit_there = smaller(limit_there, most) if isinstance(most, Tensor) else limit_there
            if self.steps <= self.warmup_steps:
                return limit_there
            asked = threshold_on_device(self.policy, self.history, device)
            return smaller(asked, limit_there).clamp(min=0.0)  # in this order: XLA may make 0 of a NaN
        self._nonfinite = float(self._nonfinite) + (not is_finite)
        if is_finite and statistic > 0:
            self.history.record(statistic)
        limit = single(self.max_threshold)
        limit = float(most) if most < limit else limit
        if self.steps <= self.warmup_steps or not len(self.history):
            return limit
        threshold = threshold_of(self.policy, self.history)
        return threshold if threshold < limit else limit

    def __repr__(self) -> str:
        arguments = ", ".join(f"{key}={value!r}" for key, value in self.arguments.items())
        return f"{type(self).__name__}({self.policy!r}, {arguments})"

    def is_measured(self, is_finite: bool | Tensor) -> bool:
        """By value, whether the norm after clipping is measured at this step: it is one more read of the gradients."""
        if isinstance(is_finite, Tensor) and compiles_graphs(is_finite.device):
            return True  # a step of another kind would be compiled too
        if self._until_measured > 0:
            self._until_measured -= 1
            return False
        if isinstance(is_finite, Tensor) or is_finite:  # else the next one
            self._until_measured = self.clipped_norm_every - 1
        return True

    def measure_next(self) -> None:
        """Measure what clipping by value does at the next step, and from there on every so many steps again."""
        self._until_measured = 0

    @property
    def nonfinite_so_far(self) -> Number:
        """Likewise :attr:`nonfinite_total`, where the numbers of a step are."""
        so_far = self._nonfinite
        return so_far.to(torch.float32) if isinstance(so_far, Tensor) else so_far

    @property
    def nonfinite_total(self) -> int:
        """How many steps so far had a NaN or an infinity in their gradient. Reads the host."""
        return int(self._nonfinite)

    def state_dict(self, before_step: bool = False) -> dict[str, Any]:
        """What happened so far, as tensors and ints; loads with ``torch.load(..., weights_only=True)``.

        Args:
            before_step: Leave out what has happened since :meth:`begin_step`, of one step at most.
        """
        steps, nonfinite, until_measured, in_a_row, weights, calls = self._before if before_step else self._now()
        return {
            "gradient_clip_algorithm": self.gradient_clip_algorithm,  # the unit of what is recorded
            "steps": steps,
            "nonfinite_total": int(nonfinite),
            "until_measured": until_measured,
            "weight_norms": torch.as_tensor(weights).to("cpu").to(torch.float64),
            "outliers_in_a_row": int(in_a_row),
            "window": self.history.window,
            "history": self.history.state_before() if self.history.calls > calls else self.history.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        A smaller ``window`` than the one the state was made with keeps the newest values; a larger one starts with
        what there is.

        Raises:
            ValueError: An entry is missing, damaged, or not one of this class, or the record is one of the other
                ``gradient_clip_algorithm``, which has another unit.
        """
        history, bound = History(self.history.window), StepBound(self.bound.ratio)
        outliers = Outliers(self.outliers.times)
        try:
            algorithm = check_choice(
                "gradient_clip_algorithm", state_dict["gradient_clip_algorithm"], get_args(Algorithm)
            )
            steps = check_integer("steps", state_dict["steps"], "a count", 0)
            nonfinite_total = check_integer("nonfinite_total", state_dict["nonfinite_total"], "a count", 0)
            until_measured = check_integer("until_measured", state_dict["until_measured"], "a count", 0)
            bound.load_state_dict(state_dict["weight_norms"])
            outliers.load_state_dict(state_dict["outliers_in_a_row"])
            history.load_state_dict(state_dict["history"])
            kept, count = (state_dict["history"][key] for key in ("values", "count"))
            window = state_dict["window"]
            least = count if window is None else min(count, check_integer("window", window, "an integer above 0", 1))
            if kept.numel() != least or nonfinite_total > steps:
                raise ValueError(f"{kept.numel()} of {count} norms, {nonfinite_total} of {steps} steps not finite")
        except DAMAGE as error:
            raise ValueError(f"The state of a `GradientClipper` is damaged or not one: {error!r}.") from error
        if bool((history.recorded <= 0).any()):
            raise ValueError("The state of a `GradientClipper` is damaged: its norms are not all above 0.")
        if algorithm != self.gradient_clip_algorithm:
            raise ValueError(
                f"The state's record was made with gradient_clip_algorithm={algorithm!r}, whose thresholds have another"
                f" unit than those of {self.gradient_clip_algorithm!r}. Go on with that one, or with an empty record."
            )
        self.history, self.bound, self.outliers, self.steps = history, bound, outliers, steps
        self._nonfinite, self._until_measured = float(nonfinite_total), until_measured
        self.begin_step()
