"""What is measured, clipped, logged and reported as one, and what is known of the steps of one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_autoclip._text import printable
from lightning_autoclip.clipping.clipper import GradientClipper
from lightning_autoclip.clipping.gate import StepGate
from lightning_autoclip.clipping.optimizers import parameters_of
from lightning_autoclip.clipping.step import StepRecord
from lightning_autoclip.monitoring.held import NOTHING, Held
from lightning_autoclip.monitoring.recorder import Recorder
from lightning_autoclip.monitoring.summary import Point, Summary
from lightning_autoclip.monitoring.trace import Trace

Named = Sequence[tuple[int, str]]
"""The ids of the parameters with their names."""

Positions = Mapping[str, list[int] | None]
"""By the name of a group, where its parameters stand among all of the optimizer; ``None``: they are all."""


class Scope:
    """The parameters of an optimizer, or a group of them.

    Attributes:
        clipper: Their record and threshold.
        recorder: Their rows.
        positions: Where they stand among all parameters of the optimizer; ``None``: they are all.
    """

    def __init__(self, clipper: GradientClipper, recorder: Recorder) -> None:
        self.clipper, self.recorder = clipper, recorder
        self.positions: list[int] | None = None

    @property
    def trace(self) -> Trace:
        """What happened to them, for report and plot."""
        return self.recorder.trace

    def begin_step(self) -> None:
        """Say that a step begins, and that the one before it stays."""
        self.clipper.begin_step()
        self.recorder.begin_step()

    def state_dict(self, before_step: bool = False) -> dict[str, Any]:
        """What happened so far, on the host.

        Args:
            before_step: Leave out what has happened since :meth:`begin_step`.
        """
        return {"clipper": self.clipper.state_dict(before_step), **self.recorder.state_dict(before_step)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; what is damaged is a `ValueError`."""
        trace, held = Trace.from_state(state["trace"]), Held.from_state(state["held"])
        self.clipper.load_state_dict(state["clipper"])
        seen, (steps, bad) = Summary.merged(trace.bins), (self.clipper.steps, self.clipper.nonfinite_total)
        waiting = held.points[-1].step if held.points else -1
        if (seen.steps, seen.nonfinite) != (steps, bad) or len(held.points) > steps or waiting > seen.last:
            raise ValueError(
                f"The state of a scope is damaged: its record is of {steps} steps, {bad} of them not finite, its trace"
                f" of {seen.steps:.0f}, {seen.nonfinite:.0f} of them not finite."
            )
        self.recorder.restore(trace, held)

    def start_anew(self, clipper: GradientClipper) -> None:
        """Keep nothing but the norm history, which goes to another clipper."""
        clipper.history = self.clipper.history
        clipper.begin_step()
        self.clipper = clipper
        self.recorder.restore(Trace(), Held())

    def go_on_from(self, other: Scope) -> None:
        """Take over what happened to another one."""
        self.clipper = other.clipper
        self.recorder.restore(other.trace, other.recorder.held)


class OptimizerScopes:
    """One optimizer: its scopes, and what is known of its steps.

    Attributes:
        optimizer: The one that steps now.
        gate: What stands before its steps.
        prefix: What its keys start with.
        scopes: By the name of the group, which ends in a slash; by no name without groups.
        first_batch: Of the accumulation window that is going on.
        announced: How many steps Lightning has announced.
        measured: At how many of them there was a gradient.
        passed_by: How many steps were made within batches that nobody has announced.
    """

    def __init__(self, optimizer: Any, prefix: str) -> None:
        self.prefix, self.scopes = prefix, dict[str, Scope]()
        self.first_batch: int | None = None
        self.announced = self.measured = self.passed_by = 0
        self.is_told_of = False
        self._begun_at = -1
        self.follow(optimizer)

    def follow(self, optimizer: Any) -> None:
        """Go on with an optimizer that has taken the place of the one before."""
        self.optimizer, self.gate, self._seen = optimizer, StepGate.of(optimizer), list[int]()
        self._passed_before = self.gate.passed_by
        for scope in self.scopes.values():
            scope.clipper.release()

    def announce(self, has_loss: bool, global_step: int) -> None:
        """A step is coming; without a loss, in automatic optimization, nobody expects gradients."""
        self.announced += has_loss
        for scope in self.scopes.values():
            scope.begin_step()
        self._begun_at = global_step
        self.gate.expect(self.optimizer)

    def is_within_a_step(self, global_step: int) -> bool:
        """Whether a step has been announced that was not made yet, or never will be.

        A loss scaler may leave a step out for good, which the optimizer does not tell, but the Trainer counts.

        Args:
            global_step: How many steps the Trainer has counted.
        """
        return self.gate.is_expected and self._begun_at == global_step

    @property
    def computes_again(self) -> bool:
        """Whether the step that is being made has computed its gradients before."""
        return self.gate.computed > 1

    def begin_batch(self, batch_idx: int) -> None:
        """A batch is coming. Steps between batches (the learning rate finder's trial steps) are nobody's concern."""
        self.first_batch = batch_idx if self.first_batch is None else self.first_batch
        self.gate.forget(self.optimizer)
        self._passed_before = self.gate.passed_by

    def end_batch(self) -> None:
        """A batch is through, and so are its steps, also those that no gate knows of and no Trainer counts."""
        self._begun_at = -1
        self.passed_by += self.gate.passed_by - self._passed_before
        self._passed_before = self.gate.passed_by

    @property
    def has_changed(self) -> bool:
        """Whether other parameters stand at other places than when they were named last."""
        return self._ids() != self._seen

    def _ids(self) -> list[int]:
        return [id(each) for each in chain.from_iterable(group["params"] for group in self.optimizer.param_groups)]

    def why_not_clipped(self, has_ended: bool) -> str:
        """What is to be said of steps that were not clipped; nothing if all is well.

        Args:
            has_ended: Whether to speak of an optimizer that has made no step at all.
        """
        name, steps = printable(type(self.optimizer).__name__), self.announced + self.passed_by
        if self.passed_by:
            return (
                f"saw {self.announced or 'none'} of the {steps} steps of `{name}` so far: the others were not clipped."
                " In manual optimization, step what `self.optimizers()` returns: `optimizer.step()`, not"
                " `optimizer.optimizer.step()`."
            )
        if self.announced and not self.measured and parameters_of(self.optimizer):
            return (
                f"saw {steps} steps of `{name}` so far, and none of its parameters had a gradient, so none was"
                " clipped. If the model trains all the same, something else makes its steps: other optimizers, perhaps"
                " within the backward pass, or copies of the weights that get their gradients inside of the step. It"
                " cannot clip those."
            )
        if has_ended and not steps and not self.measured:
            return (
                f"saw no step of `{name}` so far, so none was clipped. In manual optimization, step what"
                " `self.optimizers()` returns. Optimizers that `trainer.optimizers` does not hold are not clipped."
            )
        return ""

    def take_in(
        self, positions: Mapping[str, list[int] | None], scope_of: Callable[[str], Scope], named: Named
    ) -> None:
        """Say which parameters are in which scope, and what they are called."""
        self.scopes = {group: scope_of(self.prefix + group) for group in positions}
        parameters = parameters_of(self.optimizer)
        for group, places, names in self.names(positions, named):
            self.scopes[group].positions = positions[group]
            self.scopes[group].recorder.follow(names, [_numel(parameters[i]) for i in places])
        self._seen = [] if any(map(is_lazy, parameters)) else self._ids()  # lazy ones have a size at the next step

    def names(
        self, positions: Mapping[str, list[int] | None], named: Named
    ) -> Iterator[tuple[str, Sequence[int], list[str]]]:
        """Per group where its parameters stand and what they are called: of several names of one the first."""
        parameters, names = parameters_of(self.optimizer), dict(reversed(named))
        for group, at in positions.items():
            places = range(len(parameters)) if at is None else at
            yield group, places, [names.get(id(parameters[i]), f"parameter {i}") for i in places]

    def keep(self, records: Sequence[StepRecord | None], step: int, epoch: int, batch: int) -> Point:
        """Hand the records of a step, one per scope, to the recorders; where it is, is returned."""
        first = batch if self.first_batch is None else self.first_batch
        self.first_batch = None
        self.measured += any(record is not None for record in records)
        for scope, record in zip(self.scopes.values(), records, strict=True):
            if record is not None:
                scope.recorder.add(record, step=step, epoch=epoch, first_batch=first, last_batch=batch)
        return NOTHING._replace(step=step, epoch=epoch, first_batch=first, last_batch=batch)


def _numel(parameter: Tensor) -> int:
    """The number of entries; 0 where nobody knows it: of lazy parameters, and of FSDP1's, which ranks have parts of."""
    is_part = getattr(parameter, "_fsdp_flattened", False)
    return 0 if is_lazy(parameter) or is_part else parameter.numel()
