"""All scopes of a run, and which of them belong to an optimizer that is about to step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn

from lightning_autoclip._checks import check_bool, check_integer
from lightning_autoclip._text import as_key, printable
from lightning_autoclip.clipping.optimizers import parameters_of, wrapped_in
from lightning_autoclip.groups import group_by_id, positions_by_group
from lightning_autoclip.monitoring.recorder import Recorder
from lightning_autoclip.monitoring.trace import Trace
from lightning_autoclip.settings import Settings
from lightning_autoclip.steps import Named, OptimizerScopes, Positions, Scope

_LAYER_DEPTH = 2  # of `log_layers=True`


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

    def spikes(self) -> list[dict[str, Any]]:
        """The first steps that were not finite, then the largest of each scope: the rows of the spike table."""
        bad = [(prefix, spike) for prefix, trace in self.traces.items() for spike in trace.nonfinite]
        large = [(prefix, spike) for prefix, trace in self.traces.items() for spike in trace.largest]
        bad.sort(key=lambda each: each[1].point.step)
        return [{"optimizer": prefix.strip("/"), **spike.to_dict()} for prefix, spike in [*bad, *large]]

    def forget(self) -> None:
        """Start with empty records."""
        self._by_prefix, self.optimizers = {}, []

    def leave(self, global_step: int) -> None:
        """End a fit: its optimizers are not those of the next one, and a step that it broke off in was not made."""
        for scope in map(self._by_prefix.__getitem__, self._within_a_step(global_step)):
            scope.load_state_dict(scope.state_dict(before_step=True))
        self.optimizers = []

    def _within_a_step(self, global_step: int) -> set[str]:
        """The prefixes of the scopes whose optimizers are within a step."""
        within = [known for known in self.optimizers if known.is_within_a_step(global_step)]
        return {known.prefix + group for known in within for group in known.scopes}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "optimizers": []}  # of this process

    def take_up(self, optimizers: Sequence[Any], named: Named, measure_every: int, step: int) -> None:
        """Begin a fit: give each optimizer its scopes, those that were restored or new ones.

        Args:
            optimizers: Those of the Trainer.
            named: The names of the model's parameters.
            measure_every: By value, every how many steps the norm after clipping is measured.
            step: Of the loggers, that the fit begins with.

        Raises:
            MisconfigurationException: The records that were restored are not those of these optimizers and groups.
        """
        self._measure_every = measure_every
        self.optimizers = [OptimizerScopes(*pair) for pair in zip(optimizers, _prefixes(optimizers), strict=True)]
        found = {known.prefix: self._positions(known.optimizer, named) for known in self.optimizers}
        needed = [prefix + group for prefix, groups in found.items() for group in groups]
        held = self._by_prefix.keys()
        # A group may have joined after the last step of the checkpoint, or an optimizer in mid-fit, as it will again.
        if held and not (held >= set(needed) or (self._settings.groups is not None and held <= set(needed))):
            raise MisconfigurationException(
                f"The checkpoint holds the records {printable(', '.join(held))}, but this run needs"
                f" {', '.join(needed)}. Resume with the optimizers and the groups that the run was started with."
            )
        names = [(known.prefix, known.names(found[known.prefix], named)) for known in self.optimizers]
        if not isinstance(self._settings.groups, dict):  # other patterns have been warned of
            self._refuse_exchanged({prefix + group: own for prefix, groups in names for group, _, own in groups})
        own = {prefix: self._by_prefix.get(prefix) or self._new(prefix) for prefix in needed}
        self._by_prefix = own | {prefix: scope for prefix, scope in self._by_prefix.items() if prefix not in own}
        self._start_anew_at(step)
        for scope in self:
            scope.clipper.release()  # a second fit has new optimizers
            scope.clipper.clipped_norm_every = measure_every
        for known in self.optimizers:
            known.gate.settle()
            self._take_in(known, found[known.prefix], named)

    def _start_anew_at(self, step: int) -> None:
        """Keep nothing but the norm histories of a run that was further than this one."""
        last = max((scope.trace.bins[-1].last for scope in self if scope.trace.bins), default=-1.0)
        if last > step:
            rank_zero_warn(
                f"The state that was loaded goes up to step {last:.0f}, and this fit begins with step {step}: the norm"
                " history is kept. Steps, report, plot and spikes are those of this fit."
            )
            for scope in self:
                scope.start_anew(self._settings.new_clipper())

    def _refuse_exchanged(self, named: dict[str, list[str]]) -> None:
        """Refuse a record that is of the parameters of another optimizer of this run: they stand in another order."""
        for prefix, names in named.items():
            before = set(self._by_prefix[prefix].trace.names) if prefix in self._by_prefix else set[str]()
            others = [other for other, theirs in named.items() if before and before == set(theirs)]
            if others and before.isdisjoint(names):
                raise MisconfigurationException(
                    f"The checkpoint's record `{prefix}` is of the parameters that `{others[0]}` has in this run, among"
                    f" them {printable(min(before))}. Return the optimizers in the order that the run was started with."
                )

    def of(self, optimizer: Any, optimizers: Sequence[Any]) -> OptimizerScopes:
        """The scopes of an optimizer that is about to step, also of one that is new or has taken another's place.

        Args:
            optimizer: What Lightning hands to its hooks.
            optimizers: Those of the Trainer now.

        Raises:
            MisconfigurationException: It neither is one of them nor wraps or is wrapped in one.
        """
        for running in self.optimizers:
            if running.optimizer is optimizer:
                return running
        ours = set(map(id, wrapped_in(optimizer)))
        present = {id(each) for theirs in optimizers for each in wrapped_in(theirs)}
        known: OptimizerScopes | None = next((each for each in self.optimizers if id(each.optimizer) in ours), None)
        if known is None and not ours.isdisjoint(present):
            free = [each for each in self.optimizers if id(each.optimizer) not in present]
            known = self._predecessor(optimizer, optimizers, free)
            if known is None:
                taken = [each.prefix for each in self.optimizers]
                known = OptimizerScopes(optimizer, _free_prefix(optimizer, taken))
                self.optimizers.append(known)
        if known is None:
            raise MisconfigurationException(
                f"`{printable(type(optimizer).__name__)}` steps, but it neither is one of `trainer.optimizers` nor"
                " wraps one, so that it has no record. Return it from `configure_optimizers`, or put it into"
                " `trainer.optimizers`."
            )
        if known.optimizer is not optimizer:
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
        for scope in known.scopes.values():
            scope.clipper.bound.forget()
        self._take_in(known, self._positions(known.optimizer, named), named)

    def _take_in(self, known: OptimizerScopes, positions: Positions, named: Named) -> None:
        known.take_in(positions, self._scope, named)
        for scope in known.scopes.values():
            scope.recorder.max_update_ratio = self._settings.bound_of(known.optimizer)

    def total(self, count: str) -> int:
        """Of all steps of all optimizers; the groups of one have the same steps."""
        of_optimizers = ([getattr(s.clipper, count) for s in known.scopes.values()] for known in self.optimizers)
        return sum(max(counts, default=0) for counts in of_optimizers)

    def figures(self) -> dict[str, float]:
        """The latest row of each scope."""
        return {key: value for scope in self for key, value in scope.recorder.summarise().items()}

    def state_dict(self, global_step: int) -> dict[str, Any]:
        """What happened so far, by prefix, up to the last step that was made: weights are saved as they are after it.

        Args:
            global_step: How many steps the Trainer has counted.
        """
        within = self._within_a_step(global_step)
        return {prefix: scope.state_dict(prefix in within) for prefix, scope in self._by_prefix.items()}

    def update_held(self, state: dict[str, Any], global_step: int) -> None:
        """Bring up to date which steps wait for their row in what :meth:`state_dict` returned."""
        within = self._within_a_step(global_step)
        for prefix, saved in state.items():
            saved["held"] = self._by_prefix[prefix].recorder.held_state(prefix in within)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned, all of it or, at an error, nothing.

        In the middle of a fit, where the learning rate finder takes trial steps back, the optimizers go on with it.
        """
        loaded = {str(prefix): self._new(str(prefix)) for prefix in state}
        for prefix, scope in loaded.items():
            scope.load_state_dict(state[prefix])
        running = {known.prefix + group: scope for known in self.optimizers for group, scope in known.scopes.items()}
        for prefix, scope in running.items():
            scope.go_on_from(loaded.get(prefix) or self._new(prefix))
        self._by_prefix = loaded | running

    def _scope(self, prefix: str) -> Scope:
        if prefix not in self._by_prefix:
            self._by_prefix[prefix] = self._new(prefix)
        return self._by_prefix[prefix]

    def _new(self, prefix: str) -> Scope:
        settings = self._settings
        clipper = settings.new_clipper()
        clipper.clipped_norm_every = self._measure_every
        shown = settings.by_value, self._every_step, self._layer_depth
        return Scope(clipper, Recorder(prefix, *shown, skips=settings.skips_outliers))

    def _positions(self, optimizer: Any, named: Named) -> Positions:
        """The parameters of an optimizer by group, whose names end in a slash; all under no name without groups."""
        groups = self._settings.groups
        if groups is None:
            return {"": None}
        group_of = None if isinstance(groups, str) else group_by_id(groups, named)
        return {f"{as_key(group)}/": at for group, at in positions_by_group(optimizer, group_of).items()}


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
