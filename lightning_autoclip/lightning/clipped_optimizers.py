"""The norm histories of a run, and the optimizers of a fit by their place in ``trainer.optimizers``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn

from lightning_autoclip._checks import check_state
from lightning_autoclip._text import as_key
from lightning_autoclip.clipped_optimizer import ClippedOptimizer, Named
from lightning_autoclip.clipper import GradientClipper
from lightning_autoclip.lightning.trainer import parameter_names
from lightning_autoclip.optimizers import wrapped_in
from lightning_autoclip.settings import Clipping
from lightning_autoclip.steplog import StepLog


class ClippedOptimizers:
    """The norm histories and logs of a run, by prefix, and the optimizers of the fit that is going on.

    Args:
        clipping: How gradients are clipped.
        groups: As in `GradientClipping`.
        log_every_step: See there.
        layer_depth: As in `StepLog`.

    Attributes:
        clippers: One per optimizer, or per group of its parameters, by the prefix of its keys.
    """

    def __init__(self, clipping: Clipping, groups: Any, log_every_step: bool, layer_depth: int) -> None:
        self._clipping, self._groups = clipping, groups
        self._every_step, self._layer_depth = log_every_step, layer_depth
        self.clippers: dict[str, GradientClipper] = {}
        self._all: list[ClippedOptimizer] = []
        self._has_engine = False

    def __iter__(self) -> Iterator[ClippedOptimizer]:
        return iter(self._all)

    @property
    def logs(self) -> dict[str, StepLog]:
        """What happened, by prefix."""
        return {prefix: clipper.log for prefix, clipper in self.clippers.items() if clipper.log is not None}

    def reset(self, keeps_histories: bool = False) -> None:
        """Start a new run.

        Args:
            keeps_histories: With the norm histories that are there, rather than with empty ones.
        """
        before, self.clippers = self.clippers, {}
        for prefix, clipper in before.items() if keeps_histories else ():
            self._clipper_of(prefix).start_from(clipper.history)

    def _clipper_of(self, prefix: str) -> GradientClipper:
        """The clipper of a prefix: restored, or new."""
        if prefix not in self.clippers:
            self.clippers[prefix] = self._new(prefix)
        return self.clippers[prefix]

    def _new(self, prefix: str) -> GradientClipper:
        clipping = self._clipping
        clipper = GradientClipper(**vars(clipping))
        clipper.log = StepLog(prefix, clipping.by_value, clipping.skip_above is not None, self._layer_depth)
        clipper.log.step_rows = [] if self._every_step else None
        return clipper

    # --- a fit --------------------------------------------------------------------------------------------------------

    def attach(self, optimizers: Sequence[Any], named: Named, has_engine: bool, clipped_norm_every: int) -> None:
        """Begin a fit: give each optimizer its clippers, those that were restored or new ones.

        Args:
            optimizers: Those of the Trainer.
            named: The names of the model's parameters.
            has_engine: Whether an engine makes the steps.
            clipped_norm_every: By value, every how many steps the norm after clipping is measured.

        Raises:
            MisconfigurationException: The restored histories are not those of these optimizers and groups.
        """
        self._has_engine = has_engine
        self._all = [
            ClippedOptimizer(optimizer, prefix, has_engine)
            for optimizer, prefix in zip(optimizers, _prefixes(optimizers), strict=True)
        ]
        needed = [prefix for clipped in self._all for prefix in clipped.positions(self._groups, named)]
        held, names = self.clippers.keys(), {prefix: set(log.names) for prefix, log in self.logs.items()}
        # A group or an optimizer may have joined after the last step of the checkpoint, as it will again.
        if held and not (held >= set(needed) or (self._groups is not None and held <= set(needed))):
            raise MisconfigurationException(
                f"The checkpoint holds the norm histories {', '.join(map(repr, held))}, but this run needs"
                f" {', '.join(map(repr, needed))}. Resume with the optimizers and the groups that the run was started"
                " with."
            )
        for clipped in self._all:
            clipped.set_groups(self._groups, named, self._clipper_of)
        self.clippers = {prefix: self.clippers[prefix] for prefix in dict.fromkeys([*needed, *self.clippers])}
        for prefix, clipper in self.clippers.items():
            clipper.clipped_norm_every = clipped_norm_every
            _warn_of_other_names(prefix, names.get(prefix, set()), set(self.logs[prefix].names))

    def release(self) -> None:
        """End a fit: put the optimizers' own steps back."""
        for clipper, _ in chain.from_iterable(clipped.groups for clipped in self._all):
            clipper.release()
        self._all = []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_all": []}  # of this process

    def of(self, optimizer: Any, optimizers: Sequence[Any], pl_module: LightningModule) -> ClippedOptimizer:
        """What belongs to an optimizer that is about to step, also if it is new at its place.

        Args:
            optimizer: What Lightning hands to its hooks.
            optimizers: Those of the Trainer now.
            pl_module: The model, whose parameters may have joined the optimizer.

        Raises:
            MisconfigurationException: It neither is one of them nor wraps or is wrapped in one.
        """
        clipped = next((each for each in self._all if each.optimizer is optimizer), None)
        if clipped is None:
            clipped = self._at(_place_of(optimizer, optimizers), optimizer)
        if clipped.has_changed:
            clipped.set_groups(self._groups, parameter_names(pl_module), self._clipper_of)
        return clipped

    def _at(self, place: int, optimizer: Any) -> ClippedOptimizer:
        if place < len(self._all):
            self._all[place].replace(optimizer)
            return self._all[place]
        taken = [each.prefix for each in self._all]
        self._all.append(ClippedOptimizer(optimizer, _free_prefix(optimizer, taken), self._has_engine))
        return self._all[-1]

    def begin_window(self, optimizer: Any = None) -> None:
        """Begin a new accumulation window: of one optimizer, or of all."""
        for clipped in self._all:
            if optimizer is None or clipped.optimizer is optimizer:
                clipped.first_batch = None

    def note_batch(self, batch_idx: int) -> None:
        """Note the batch of a backward pass."""
        for clipped in self._all:
            clipped.first_batch = batch_idx if clipped.first_batch is None else clipped.first_batch

    def commit(self) -> None:
        """Commit all pending steps; wait for their norms."""
        for clipped in self._all:
            clipped.commit()

    def commit_if_counted(self, global_step: int) -> None:
        """Commit the pending steps that the Trainer has counted."""
        for clipped in self._all:
            clipped.commit_if_counted(global_step)

    # --- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The histories and logs of the steps that were made, by prefix."""
        states = ((prefix, clipper.state_dict(), self.logs[prefix]) for prefix, clipper in self.clippers.items())
        return {prefix: {"clipper": clipper, "log": log.state_dict()} for prefix, clipper, log in states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned, all of it or, at an error, nothing.

        In the middle of a fit, where the learning rate finder takes trial steps back, the optimizers continue with it.

        Raises:
            ValueError: It cannot be loaded.
        """
        restored = {str(prefix): self._new(str(prefix)) for prefix in state_dict}
        for prefix, clipper in restored.items():
            _load(clipper, state_dict[prefix])
        for prefix in [log.prefix for clipped in self._all for log in clipped.logs]:
            fresh, restored[prefix] = restored.get(prefix) or self._new(prefix), self.clippers[prefix]
            _load(restored[prefix], {"clipper": fresh.state_dict(), "log": fresh.log and fresh.log.state_dict()})
        self.clippers = restored


def _load(clipper: GradientClipper, state: Any) -> None:
    check_state("AutoClip.groups", state, {"clipper": dict, "log": dict})
    assert clipper.log is not None
    clipper.load_state_dict(state["clipper"])
    clipper.log.load_state_dict(state["log"])


def _warn_of_other_names(prefix: str, before: set[str], now: set[str]) -> None:
    if before - now and now - before:
        rank_zero_warn(
            f"The norm history `{prefix}` was recorded for other parameters (such as {min(before - now)!r}, where this"
            f" run has {min(now - before)!r}). It continues with these."
        )


def _place_of(optimizer: Any, optimizers: Sequence[Any]) -> int:
    """The place of an optimizer, or of one that wraps it or that it wraps."""
    own = set(map(id, wrapped_in(optimizer)))
    for place, other in enumerate(optimizers):
        if not own.isdisjoint(map(id, wrapped_in(other))):
            return place
    raise MisconfigurationException(
        f"`{type(optimizer).__name__}` steps, but it neither is one of `trainer.optimizers` nor wraps one, so it has no"
        " norm history. Return it from `configure_optimizers`, or put it into `trainer.optimizers`."
    )


def _prefixes(optimizers: Sequence[Any]) -> list[str]:
    """``autoclip/`` for one optimizer; for several their class names too, numbered as `LearningRateMonitor` does."""
    if len(optimizers) == 1:
        return ["autoclip/"]
    prefixes: list[str] = []
    for optimizer in optimizers:
        prefixes.append(_free_prefix(optimizer, prefixes))
    return prefixes


def _free_prefix(optimizer: Any, taken: Sequence[str]) -> str:
    """The first that no other optimizer has: of its class's name, or of that with a number."""
    name = as_key(type(optimizer).__name__)
    numbered = chain([name], (f"{name}-{i}" for i in range(1, len(taken) + 1)))
    return next(prefix for each in numbered if (prefix := f"autoclip/{each}/") not in taken)
