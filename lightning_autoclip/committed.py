"""The steps of one optimizer that were made, and the one that is pending: a step counts once it was made."""

from __future__ import annotations

import copy
import math
from typing import Any, NamedTuple

from torch import Tensor
from torch.amp.grad_scaler import OptState

from lightning_autoclip._checks import check_state
from lightning_autoclip.history import History
from lightning_autoclip.policies import Policy
from lightning_autoclip.settings import Clipping
from lightning_autoclip.skip import StepWrapper
from lightning_autoclip.step import Part, StepRecord, Unread
from lightning_autoclip.steplog import StepLog
from lightning_autoclip.table import NOWHERE, Place
from lightning_autoclip.update_ratio import WeightNorms

_STATE: dict[str, Any] = {
    "version": 1,
    "gradient_clip_algorithm": str,  # the unit of the history
    "history": {"values": [float], "count": int},
    "steps": int,
    "nonfinite_steps": int,
    "outliers_in_a_row": int,
    "weights_step": int,
    "weight_norms": [float],
}


class Pending(NamedTuple):
    """A step that was clipped and is not known to be made."""

    record: StepRecord
    is_outlier: bool | Tensor = False
    unread: Unread | None = None  # of all groups
    group: int = 0
    wrapper: StepWrapper | None = None
    steps_before: int = 0  # of the wrapper
    scaler_state: dict[str, Any] | None = None  # of a `GradScaler`, which may skip the step
    place: Place = NOWHERE

    @property
    def was_made(self) -> bool:
        """Whether the step is known to be made; of bare parameters that is not known."""
        if self.scaler_state is not None and self.scaler_state["stage"] is OptState.STEPPED:
            return True
        return self.unread is not None if self.wrapper is None else self.wrapper.steps > self.steps_before


class _State(NamedTuple):
    """All that a commit changes, in one assignment."""

    history: History
    steps: int = 0
    nonfinite_steps: int = 0
    outliers_in_a_row: int = 0
    weights: WeightNorms = WeightNorms()
    pending: Pending | None = None


class CommittedSteps:
    """The history and the counts of the steps that were made: all of `GradientClipper` that touches no gradient.

    Clipping leaves a pending record. It is committed when the step is known to be made: with the next step at the
    latest. What is saved is what is committed.

    Args:
        policy: As in `GradientClipper`.
        **settings: Likewise.

    Attributes:
        settings: How gradients are clipped.
        log: Takes the steps that were made; ``None``: they are not logged.
    """

    def __init__(self, policy: Policy, **settings: Any) -> None:
        self.settings = Clipping(policy, **settings)
        self.log: StepLog | None = None
        self._state = _State(History(self.settings.window))

    @property
    def has_pending(self) -> bool:
        """Whether a step was clipped that is not committed."""
        return self._state.pending is not None

    @property
    def pending(self) -> StepRecord | None:
        """The record of the step that was clipped and not committed yet, with floats. Waits for its numbers."""
        pending = self._state.pending
        if pending is None or pending.unread is None:
            return None if pending is None else pending.record
        return pending.unread.read()[0][pending.group]

    def commit(self, wait: bool = True) -> StepRecord | None:
        """Say that the pending step was made: its norm enters the history.

        Args:
            wait: Wait for a norm that is still on its way to the host; else it stays pending.

        Returns:
            The record of the step with floats; ``None`` if none is pending.
        """
        state = self._state
        if state.pending is None or not (wait or state.pending.unread is None):
            return None
        record = self.pending
        if record is None:
            return None
        pending, history, weights = state.pending, state.history, state.weights
        is_outlier = pending.is_outlier if pending.unread is None else pending.unread.read()[1]
        if record.is_finite and record.statistic > 0:
            # A gradient of exactly zero moves nothing and tells no scale. Enough of them (hinge losses, masked batches)
            # would pull a percentile to zero, and stop the training for good.
            history = copy.copy(history)
            history.append(float(record.statistic))
        if record.weight_norms is not None:
            weights = WeightNorms(state.steps + 1, record.weight_norms)
        if self.log is not None:
            self.log.add(record, state.steps + 1, pending.place)
        self._state = _State(
            history,
            state.steps + 1,
            state.nonfinite_steps + (not record.is_finite),
            state.outliers_in_a_row + 1 if is_outlier else 0,
            weights,
        )
        return record

    def _leave(self, pending: Pending) -> None:
        """Leave a step pending. Of bare parameters it is taken to be made, once its norm is there."""
        self._state = self._state._replace(pending=pending)
        if pending.wrapper is None:
            self.commit(wait=False)

    def _committed(self) -> _State:
        """The state, the pending step included if it is known to have been made."""
        pending = self._state.pending
        if pending is not None and pending.was_made:
            self.commit()
        return self._state

    @property
    def history(self) -> History:
        """The norms (by value: the gradient RMS) of the steps that were made. A copy."""
        return copy.copy(self._committed().history)

    @property
    def steps(self) -> int:
        """How many steps were made."""
        return self._committed().steps

    @property
    def nonfinite_steps(self) -> int:
        """How many of them had non-finite gradients."""
        return self._committed().nonfinite_steps

    def start_from(self, history: History) -> None:
        """Start a new run with a history."""
        self._state = _State(history)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the committed steps; loads with ``torch.load(..., weights_only=True)``."""
        state = self._committed()
        return {
            "version": _STATE["version"],
            "gradient_clip_algorithm": self.settings.gradient_clip_algorithm,
            "history": state.history.state_dict(),
            "steps": state.steps,
            "nonfinite_steps": state.nonfinite_steps,
            "outliers_in_a_row": state.outliers_in_a_row,
            "weights_step": state.weights.step,
            "weight_norms": list(state.weights.norms),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        A smaller ``window`` keeps the newest norms; a larger one starts with what there is.

        Raises:
            ValueError: An entry is missing or has the wrong type, the state is of another version, or its history is of
                the other ``gradient_clip_algorithm``, which has another unit.
        """
        check_state("GradientClipper", state_dict, _STATE)
        algorithm = state_dict["gradient_clip_algorithm"]
        if algorithm != self.settings.gradient_clip_algorithm:
            raise ValueError(
                f"The norm history was recorded with gradient_clip_algorithm={algorithm!r}, whose thresholds have"
                f" another unit than those of {self.settings.gradient_clip_algorithm!r}. Resume with that one, or start"
                " with an empty history."
            )
        history = History(self.settings.window)
        history.load_state_dict(state_dict["history"])
        weights = WeightNorms(state_dict["weights_step"], list(state_dict["weight_norms"]))
        steps, nonfinite_steps, outliers = (state_dict[f] for f in ("steps", "nonfinite_steps", "outliers_in_a_row"))
        self._state = _State(history, steps, nonfinite_steps, outliers, weights)

    def observe(self, norm: float, place: Place = NOWHERE) -> StepRecord:
        """Compute the threshold of a step whose norm an engine measures, and which it clips itself. It is pending then.

        Args:
            norm: L2 norm of the whole gradient, equal on every process.
            place: Where the step is, for the log.
        """
        self.commit()
        state = self._state
        part = Part(self.settings, state.history, state.steps, [], None, norm, norm)
        threshold = part.threshold if norm < math.inf else math.inf
        record = StepRecord(norm, min(norm, threshold), norm, threshold, is_finite=norm < math.inf)
        self._state = state._replace(pending=Pending(record, place=place))
        return record

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.settings!r})"
