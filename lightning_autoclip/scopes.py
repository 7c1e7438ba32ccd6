"""Scopes: what is measured, clipped, logged and reported as one, and what is known of each optimizer's steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_autoclip._checks import check_bool, check_integer
from lightning_autoclip.clipping.clipper import GradientClipper, StepRecord
from lightning_autoclip.clipping.optimizers import StepGate, parameters_of, wrapped_in
from lightning_autoclip.groups import group_by_id, positions_by_group
from lightning_autoclip.monitoring.recorder import Recorder
from lightning_autoclip.monitoring.trace import Trace
from lightning_autoclip.settings import Settings

_LAYER_DEPTH = 2  # of `log_layers=True`
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

    def state_dict(self) -> dict[str, Any]:
        """What happened so far, on the host."""
        self.recorder.summarise()  # takes in what still is on the device
        return {"clipper": self.clipper.state_dict(), "trace": self.trace.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; what is damaged is a `ValueError`."""
        trace = Trace.from_state(state["trace"])
        self.clipper.load_state_dict(state["clipper"])
        self.recorder.trace = trace


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
        self.follow(optimizer)

    def follow(self, optimizer: Any) -> None:
        """Go on with an optimizer that has taken the place of the one before."""
        self.optimizer, self.gate, self._seen = optimizer, StepGate.of(optimizer), list[int]()
        self._passed_before = self.gate.passed_by
        for scope in self.scopes.values():
            scope.clipper.release()

    def announce(self, has_loss: bool) -> None:
        """A step is coming; without a loss, nobody expects gradients."""
        self.announced += has_loss
        self.gate.expect(self.optimizer)

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
        """A batch is through."""
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
        name, steps = type(self.optimizer).__name__, self.announced + self.passed_by
        if self.passed_by:
            return (
                f"saw {self.announced or 'none'} of the {steps} steps of `{name}` so far: the others were not clipped."
                " In manual optimization, step what `self.optimizers()` returns: `optimizer.step()`, not"
                " `optimizer.optimizer.step()`."
            )
        if self.announced and not self.measured:
            return (
                f"saw {steps} steps of `{name}` so far, and none of its parameters had a gradient, so none was"
                " clipped. If the model trains all the same, something else makes its steps: other optimizers, perhaps"
                " within the backward pass, or copies of the weights that get their gradients inside of the step. It"
                " cannot clip those."
            )
        if has_ended and not steps:
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
        parameters, names = parameters_of(self.optimizer), dict(reversed(named))  # of several names the first
        for group, scope in self.scopes.items():
            scope.positions = positions[group]
            at = range(len(parameters)) if scope.positions is None else scope.positions
            chosen = [names.get(id(parameters[i]), f"parameter {i}") for i in at]
            scope.trace.follow(chosen, [_numel(parameters[i]) for i in at])
        self._seen = [] if any(map(is_lazy, parameters)) else self._ids()  # lazy ones have a size at the next step

    def keep(self, records: Sequence[StepRecord | None], step: int, epoch: int, batch: int) -> None:
        """Hand the records of a step, one per scope, to the recorders."""
        first = batch if self.first_batch is None else self.first_batch
        self.first_batch = None
        self.measured += any(record is not None for record in records)
        for scope, record in zip(self.scopes.values(), records, strict=True):
            if record is not None:
                scope.recorder.add(record, step=step, epoch=epoch, first_batch=first, last_batch=batch)


class Scopes:
    """All scopes of a run, by the prefix of their keys, and the optimizers of the fit that is going on.

    Args:
        settings: How they are clipped.
        log_every_step: As in `GradientClipping`.
        log_layers: Likewise.
    """

    def __init__(self, settings: Settings, log_every_step: bool = False, log_layers: bool | int = False) -> None:
        self._settings, self._every_step = settings, check_bool("log_every_step", log_every_step)
        depth = int(log_layers) * _LAYER_DEPTH if isinstance(log_layers, bool) else log_layers
        self._layer_depth = check_integer("log_layers", depth, "a bool, or a number of names of at least 0", 0)
        self._measure_every = 1
        self._by_prefix: dict[str, Scope] = {}
        self.optimizers: list[OptimizerScopes] = []

    def __iter__(self) -> Iterator[Scope]:
        return iter(self._by_prefix.values())

    def __bool__(self) -> bool:
        return bool(self._by_prefix)

    @property
    def traces(self) -> dict[str, Trace]:
        """What happened, by prefix."""
        return {prefix: scope.trace for prefix, scope in self._by_prefix.items()}

    def forget(self) -> None:
        """Start with empty records."""
        self._by_prefix, self.optimizers = {}, []

    def leave(self) -> None:
        """End a fit: its optimizers are not those of the next one."""
        self.optimizers = []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "optimizers": []}  # of this process

    def take_up(self, optimizers: Sequence[Any], named: Named, measure_every: int) -> None:
        """Begin a fit: give each optimizer its scopes, those that were restored or new ones.

        Args:
            optimizers: Those of the Trainer.
            named: The names of the model's parameters.
            measure_every: By value, every how many steps the norm after clipping is measured.

        Raises:
            MisconfigurationException: The records that were restored are not those of these optimizers and groups.
        """
        self._measure_every = measure_every
        self.optimizers = [OptimizerScopes(*pair) for pair in zip(optimizers, _prefixes(optimizers), strict=True)]
        found = {known.prefix: self._positions(known.optimizer, named) for known in self.optimizers}
        needed = [prefix + group for prefix, groups in found.items() for group in groups]
        held = self._by_prefix.keys()
        # A group may have joined after the last step of the checkpoint.
        # Or an optimizer has joined in mid-fit, and will do so again.
        if held and not (held >= set(needed) or (self._settings.groups is not None and held <= set(needed))):
            raise MisconfigurationException(
                f"The checkpoint holds the records {', '.join(held)}, but this run needs {', '.join(needed)}. Resume"
                " with the optimizers and the groups that the run was started with."
            )
        own = {prefix: self._by_prefix.get(prefix) or self._new(prefix) for prefix in needed}
        self._by_prefix = own | {prefix: scope for prefix, scope in self._by_prefix.items() if prefix not in own}
        for scope in self:
            scope.clipper.release()  # a second fit has new optimizers
            scope.clipper.clipped_norm_every = measure_every
        for known in self.optimizers:
            known.gate.settle()
            known.take_in(found[known.prefix], self._scope, named)

    def of(self, optimizer: Any, optimizers: Sequence[Any]) -> OptimizerScopes | None:
        """The scopes of an optimizer that is about to step, also of one that is new or has taken another's place.

        Args:
            optimizer: What Lightning hands to its hooks.
            optimizers: Those of the Trainer now.

        Returns:
            ``None`` if it neither is one of them nor wraps or is wrapped in one.
        """
        for running in self.optimizers:
            if running.optimizer is optimizer:
                return running
        ours, there = {id(each) for each in wrapped_in(optimizer)}, [wrapped_in(each) for each in optimizers]
        known: OptimizerScopes | None = next((each for each in self.optimizers if id(each.optimizer) in ours), None)
        if known is None and any(id(each) in ours for chain_of in there for each in chain_of):
            present = {id(each) for chain_of in there for each in chain_of}
            free = [each for each in self.optimizers if id(each.optimizer) not in present]
            known = self._predecessor(optimizer, optimizers, free)
            if known is None:
                known = OptimizerScopes(optimizer, self._free_prefix(optimizer))
                self.optimizers.append(known)
        if known is not None and known.optimizer is not optimizer:
            known.follow(optimizer)
        return known

    def _predecessor(
        self, optimizer: Any, optimizers: Sequence[Any], free: Sequence[OptimizerScopes]
    ) -> OptimizerScopes | None:
        """Whose place an optimizer has taken: of those that are gone the one with most of its parameters."""
        ours = set(map(id, parameters_of(optimizer)))
        shared = {id(each): len(ours.intersection(map(id, parameters_of(each.optimizer)))) for each in free}
        best = max(free, key=lambda each: shared[id(each)], default=None)
        if best is None or shared[id(best)]:
            return best
        place = next((i for i, each in enumerate(optimizers) if each is optimizer), len(self.optimizers))
        return next((each for i, each in enumerate(self.optimizers) if i == place and each in free), None)

    def take_in(self, known: OptimizerScopes, named: Named) -> None:
        """Follow an optimizer whose parameters have changed, maybe with new scopes."""
        known.take_in(self._positions(known.optimizer, named), self._scope, named)

    def total(self, count: str) -> int:
        """Of all steps of all optimizers; the groups of one have the same steps."""
        of_optimizers = ([getattr(s.clipper, count) for s in known.scopes.values()] for known in self.optimizers)
        return sum(max(counts, default=0) for counts in of_optimizers)

    def figures(self) -> dict[str, float]:
        """The latest row of each scope."""
        return {key: value for scope in self for key, value in scope.recorder.figures().items()}

    def state_dict(self) -> dict[str, Any]:
        """What happened so far, by prefix."""
        return {prefix: scope.state_dict() for prefix, scope in self._by_prefix.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned, all of it or, at an error, nothing.

        In the middle of a fit, where the learning rate finder takes trial steps back, the optimizers go on with it.
        """
        loaded = {str(prefix): self._new(str(prefix)) for prefix in state}
        for prefix, scope in loaded.items():
            scope.load_state_dict(state[prefix])
        running = {known.prefix + group: scope for known in self.optimizers for group, scope in known.scopes.items()}
        for prefix, scope in running.items():
            restored = loaded.get(prefix) or self._new(prefix)
            scope.clipper, scope.recorder.trace = restored.clipper, restored.trace
        self._by_prefix = loaded | running

    def _scope(self, prefix: str) -> Scope:
        if prefix not in self._by_prefix:
            self._by_prefix[prefix] = self._new(prefix)
        return self._by_prefix[prefix]

    def _new(self, prefix: str) -> Scope:
        clipper = self._settings.new_clipper()
        clipper.clipped_norm_every = self._measure_every
        return Scope(clipper, Recorder(prefix, self._settings.by_value, self._every_step, self._layer_depth, Trace()))

    def _positions(self, optimizer: Any, named: Named) -> Positions:
        """The parameters of an optimizer by group, whose names end in a slash; all under no name without groups."""
        groups = self._settings.groups
        if groups is None:
            return {"": None}
        group_of = None if isinstance(groups, str) else group_by_id(groups, named)
        return {f"{group}/": at for group, at in positions_by_group(optimizer, group_of).items()}

    def _free_prefix(self, optimizer: Any) -> str:
        """Of an optimizer that has joined those that are there."""
        name, taken = type(optimizer).__name__, {known.prefix for known in self.optimizers}
        numbered = chain([name], (f"{name}-{i}" for i in range(1, len(taken) + 1)))
        return next(prefix for each in numbered if (prefix := f"autoclip/{each}/") not in taken)


def _prefixes(optimizers: Sequence[Any]) -> list[str]:
    """``autoclip/`` for one optimizer; for several their class names too, numbered as `LearningRateMonitor` does."""
    if len(optimizers) == 1:
        return ["autoclip/"]
    names: list[str] = []
    for optimizer in optimizers:
        name = type(optimizer).__name__
        same = sum(other == name or other.startswith(f"{name}-") for other in names)
        names.append(f"{name}-{same}" if same else name)
    return [f"autoclip/{name}/" for name in names]


def _numel(parameter: Tensor) -> int:
    """The number of entries; 0 where nobody knows it: of lazy parameters, and of FSDP1's, which ranks have parts of."""
    is_part = getattr(parameter, "_fsdp_flattened", False)
    return 0 if is_lazy(parameter) or is_part else parameter.numel()
