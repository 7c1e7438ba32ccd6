"""One optimizer of a fit: the groups of its parameters, and what is known of its steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_autoclip._text import as_key
from lightning_autoclip.clipper import GradientClipper
from lightning_autoclip.optimizers import parameters_of
from lightning_autoclip.param_groups import Groups, group_by_id, positions_by_group
from lightning_autoclip.skip import StepWrapper
from lightning_autoclip.steplog import StepLog
from lightning_autoclip.table import Place
from lightning_autoclip.update_ratio import is_sgd_like

Named = Sequence[tuple[int, str]]
"""The ids of the parameters with their names."""


class Group(NamedTuple):
    """The parameters that share a history: of an optimizer, or of a group of it.

    Attributes:
        clipper: Their history and threshold.
        positions: Where they stand among all parameters of the optimizer; ``None``: they are all.
    """

    clipper: GradientClipper
    positions: list[int] | None


class ClippedOptimizer:
    """One optimizer of a fit.

    Args:
        optimizer: It.
        prefix: What its keys start with.
        has_engine: Whether an engine makes its steps.

    Attributes:
        groups: The groups of its parameters.
        place: Where its last step is.
        first_batch: Of the accumulation window that is going on; ``None`` before its first backward pass.
        announced: How many steps Lightning has announced.
        measured: At how many of them there was a gradient.
        unannounced: How many steps were made within batches that Lightning has not announced.
    """

    def __init__(self, optimizer: Any, prefix: str, has_engine: bool = False) -> None:
        self.prefix, self.groups = prefix, list[Group]()
        self.place: Place | None = None
        self.first_batch: int | None = None
        self.announced = self.measured = self.unannounced = 0
        self.is_reported = False  # that its steps are not clipped
        self._has_engine, self._global_step = has_engine, -1
        self.replace(optimizer)

    def replace(self, optimizer: Any) -> None:
        """Continue with an optimizer that has taken the place of the one before."""
        for clipper, _ in self.groups:
            clipper.release()
        self.optimizer, self._seen = optimizer, list[int]()
        self.wrapper = None if self._has_engine else StepWrapper.of(optimizer)
        self.begin_batch()

    def set_groups(self, groups: Groups | None, named: Named, clipper_of: Callable[[str], GradientClipper]) -> None:
        """Say which parameters are in which group, and what they are called: of several names of one the first.

        Args:
            groups: As in `GradientClipping`.
            named: The names of the model's parameters.
            clipper_of: Returns the clipper of a prefix.
        """
        parameters, names = parameters_of(self.optimizer), dict(reversed(named))
        self.groups, is_limited = [], not self._has_engine and is_sgd_like(self.optimizer)
        for prefix, positions in self.positions(groups, named).items():
            clipper, places = clipper_of(prefix), range(len(parameters)) if positions is None else positions
            self.groups.append(Group(clipper, positions))
            _log_of(clipper).max_update_ratio = clipper.settings.max_update_ratio if is_limited else None
            own = [names.get(id(parameters[place]), f"parameter {place}") for place in places]
            _log_of(clipper).set_parameters(own, [_numel(parameters[place]) for place in places])
        self._seen = [] if any(map(is_lazy, parameters)) else self._ids()  # lazy ones have a size at the next step

    def positions(self, groups: Groups | None, named: Named) -> Mapping[str, list[int] | None]:
        """By prefix, where the parameters of each group stand; all of them under its own prefix without groups."""
        if groups is None:
            return {self.prefix: None}
        group_of = None if isinstance(groups, str) else group_by_id(groups, named)
        by_group = positions_by_group(self.optimizer, group_of)
        return {f"{self.prefix}{as_key(group)}/": positions for group, positions in by_group.items()}

    @property
    def logs(self) -> Iterator[StepLog]:
        """What happened to each group."""
        return (_log_of(clipper) for clipper, _ in self.groups)

    @property
    def has_changed(self) -> bool:
        """Whether other parameters stand at other places than when they were named last."""
        return self._ids() != self._seen

    def _ids(self) -> list[int]:
        return [id(each) for each in chain.from_iterable(group["params"] for group in self.optimizer.param_groups)]

    # --- steps --------------------------------------------------------------------------------------------------------

    def announce(self, has_loss: bool, global_step: int) -> None:
        """Start a new step; commit the previous one.

        Args:
            has_loss: Whether gradients are to be expected.
            global_step: How many steps the Trainer has counted.
        """
        self.announced += has_loss
        self.commit()
        self._global_step = global_step
        if self.wrapper is not None:
            self.wrapper.announce(self.optimizer)

    @property
    def computes_again(self) -> bool:
        """Whether the step that is being made has computed its gradients before."""
        return self.wrapper is not None and self.wrapper.evaluations > 1

    def place_of(self, step: int, epoch: int, batch: int) -> Place:
        """Where the coming step is; its accumulation window ends."""
        place = Place(step, epoch, batch if self.first_batch is None else self.first_batch, batch)
        self.place, self.first_batch = place, None
        return place

    def commit(self) -> None:
        """Commit the pending step."""
        for clipper, _ in self.groups:
            clipper.commit()

    def commit_if_counted(self, global_step: int) -> None:
        """Commit the pending step if the Trainer has counted it: a loss scaler may have skipped it."""
        if global_step > self._global_step:
            self.commit()

    def begin_batch(self) -> None:
        """Ignore steps between batches, such as the trial steps of the learning rate finder."""
        if self.wrapper is not None:
            self.wrapper.cancel(self.optimizer)
        self._unannounced_before = 0 if self.wrapper is None else self.wrapper.unannounced

    @property
    def has_pending(self) -> bool:
        """Whether a step is pending."""
        return any(clipper.has_pending for clipper, _ in self.groups)

    def end_batch(self) -> None:
        """Commit the pending step, which was made, unless its norm is still on its way to the host."""
        if self.wrapper is not None:
            self.unannounced += self.wrapper.unannounced - self._unannounced_before
            self.begin_batch()
        self._global_step = -1
        for clipper, _ in self.groups:
            clipper.commit(wait=False)

    def why_not_clipped(self, has_ended: bool) -> str:
        """What to report of steps that were not clipped; nothing if all is well.

        Args:
            has_ended: Whether to report an optimizer that has made no step at all.
        """
        name = self.prefix.strip("/").removeprefix("autoclip").strip("/") or type(self.optimizer).__name__
        steps = self.announced + self.unannounced
        if self.unannounced:
            others = "the others were" if self.announced else "none was"
            return (
                f"saw {self.announced or 'none'} of the {steps} steps of `{name}` so far: {others} not clipped. In"
                " manual optimization, step what `self.optimizers()` returns: `optimizer.step()`, not"
                " `optimizer.optimizer.step()`."
            )
        if self.wrapper is not None and 0 < self.measured <= 2 * self.wrapper.replaced:
            return (
                f"clips gradients that `{name}` does not use: at {self.wrapper.replaced} of {steps} steps so far they"
                " were changed or replaced after clipping. Something else clips or computes them: the module's own"
                " `on_before_optimizer_step`, a later callback, or the optimizer itself, as Opacus' does. Remove it, or"
                " clip there with `GradientClipper`."
            )
        if self.announced and not self.measured and parameters_of(self.optimizer):
            return (
                f"saw {steps} steps of `{name}` so far, and none of its parameters had a gradient, so none was"
                " clipped. If the model trains all the same, something else makes its steps: other optimizers, perhaps"
                " within the backward pass, or copies of the weights that get their gradients inside of the step. Their"
                " gradients cannot be clipped."
            )
        if has_ended and not steps and not self.measured:
            return (
                f"saw no step of `{name}` so far, so none was clipped. In manual optimization, step what"
                " `self.optimizers()` returns. Optimizers that `trainer.optimizers` does not hold are not clipped."
            )
        return ""


def _log_of(clipper: GradientClipper) -> StepLog:
    assert clipper.log is not None
    return clipper.log


def _numel(parameter: Tensor) -> int:
    """The number of elements; 0 where it is not known: of lazy parameters, and of FSDP1's, which ranks share."""
    is_part = getattr(parameter, "_fsdp_flattened", False)
    return 0 if is_lazy(parameter) or is_part else parameter.numel()
