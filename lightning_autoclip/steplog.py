"""The steps of a run as one table: rows for the loggers, bins for report and plot, the state in a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Sequence
from heapq import nlargest
from typing import Any, NamedTuple

import torch

from lightning_autoclip._checks import check_state
from lightning_autoclip._text import as_keys
from lightning_autoclip.layers import LayerSums, module_of, module_sums
from lightning_autoclip.step import StepRecord
from lightning_autoclip.table import LargeStep, Place, Step, as_numbers, from_numbers, in_bins, merged, step_of

LAYER_SECTIONS = ("autoclip_layers", "autoclip_layers_norm")  # of the shares and of the norms
MOST_STEPS = 20  # of the largest steps, and of the first non-finite ones
_MOST_WAITING, _MOST_BYTES = 1024, 2**22  # steps, and what their parameters' norms take
_BYTES = 32  # of a float in a list
_AROUND = 50  # rows before a step, which tell what was usual
_NAMED = 3  # parameters per step

Row = tuple[int, dict[str, float]]
"""What is logged at a step."""


class _State(NamedTuple):
    """All that a new step changes, in one assignment. What is written to the list beyond its length does not count."""

    steps: int
    waiting: list[tuple[Step, Any]]  # steps of the logging interval, each with the norms of the parameters
    length: int
    interval: Step | None  # steps of the logging interval that no longer wait
    norms: tuple[float, ...]  # the finite ones of these, as many as a histogram shows
    bins: tuple[Step, ...]
    width: int  # steps per bin
    largest: tuple[LargeStep, ...]
    nonfinite: tuple[LargeStep, ...]
    run_layers: LayerSums
    interval_layers: LayerSums


class StepLog:
    """What happened to the parameters that share a history: the logging interval so far, and the run in bins.

    Args:
        prefix: What the keys of the rows start with, for example ``"autoclip/"``.
        by_value: Whether elements are clamped: the rows then have ``grad_rms`` too.
        skips_outliers: Whether steps can be skipped as outliers: the rows then have ``skipped_total`` too.
        layer_depth: The rows have the mean share of each module in the squared norm and its mean norm, of modules so
            many names deep; 0 for none.

    Attributes:
        max_update_ratio: The limit that the optimizer's steps have, ``None`` for none. With it the rows also have
            ``limited_fraction`` and ``update_ratio``.
        names: The names of the parameters, in the optimizer's order.
        numels: The number of elements of each; 0 where it is not known.
        step_rows: The rows of single steps, which are taken from here; ``None``: they are not asked for.
    """

    def __init__(
        self, prefix: str = "autoclip/", by_value: bool = False, skips_outliers: bool = False, layer_depth: int = 0
    ) -> None:
        self.prefix, self.by_value, self.skips_outliers = prefix, by_value, skips_outliers
        self.layer_depth = layer_depth
        self.max_update_ratio: float | None = None
        self.names, self.numels = list[str](), list[int]()
        self.step_rows: list[Row] | None = None
        self._state = _State(0, [], 0, None, (), (), 1, (), (), LayerSums.empty(0), LayerSums.empty(0))

    def set_parameters(self, names: Sequence[str], numels: Sequence[int]) -> None:
        """Name the parameters: at the start of a fit, or when some have joined the optimizer."""
        if list(names) != self.names:
            state, before, modules = self._folded(), self.names, self.modules
            self.names = list(names)
            run, interval = LayerSums.empty(len(names)), LayerSums.empty(len(names), len(self.modules))
            if set(before) & set(names):
                run = state.run_layers.renamed((before, names), ((), ()))
                interval = state.interval_layers.renamed((before, names), (modules, self.modules))
            self._state = state._replace(run_layers=run, interval_layers=interval)
        self.numels = list(numels)

    # --- steps --------------------------------------------------------------------------------------------------------

    def add(self, record: StepRecord, number: int, place: Place) -> None:
        """Add a step.

        Args:
            record: What clipping saw and did; with floats.
            number: Which of the run's steps it is, from 1: one that was added already is not added again.
            place: Where it is.
        """
        state = self._state
        if number <= state.steps:
            return
        row = step_of(record, place.step, place.epoch, self.max_update_ratio, self.by_value)
        del state.waiting[state.length :]
        state.waiting.append((row, record.parameter_norms))
        state = state._replace(steps=number, length=state.length + 1)
        ranked, most = (state.nonfinite, math.inf) if row.nonfinite else (state.largest, row.norm)
        if len(ranked) < MOST_STEPS or (not row.nonfinite and most > ranked[-1].norm):
            large = self._large(state, record, row, place)
            if row.nonfinite:
                state = state._replace(nonfinite=(*ranked, large))
            else:
                ordered = sorted((*ranked, large), key=lambda each: -each.norm)
                state = state._replace(largest=tuple(ordered[:MOST_STEPS]))
        if state.length >= _MOST_WAITING or state.length * len(self.names) * _BYTES > _MOST_BYTES:
            state = self._folded(state)
        self._state = state
        if self.step_rows is not None:
            self.step_rows.append((place.step, self._step_row(row)))

    def _step_row(self, row: Step) -> dict[str, float]:
        figures = {"grad_norm": row.norm, "threshold": row.threshold}
        if self.by_value:
            figures["grad_rms"] = row.statistic
        return {f"{self.prefix}step/{key}": value for key, value in figures.items()}

    def _large(self, state: _State, record: StepRecord, row: Step, place: Place) -> LargeStep:
        waiting = [waiting for waiting, _ in state.waiting[max(state.length - _AROUND, 0) : state.length]]
        first = max(len(state.bins) - _AROUND + len(waiting), 0)
        around = merged([*state.bins[first:], *waiting])
        parameters: list[tuple[str, float]] = []
        norms: Any = record.parameter_norms
        if norms is not None and row.nonfinite:
            parameters = [(name, math.nan) for name, norm in zip(self.names, norms, strict=True) if not norm < math.inf]
        elif norms is not None and row.norm > 0:
            top = nlargest(_NAMED, zip(norms, self.names, strict=True), key=lambda pair: pair[0])
            whole = math.fsum(norm * norm for norm in norms)
            parameters = [(name, norm * norm / whole) for norm, name in top] if whole else []
        coef = row.coef_sum if row.measured else math.nan
        numbers = float(record.norm), float(record.threshold), coef, bool(row.skipped)
        return LargeStep(place, *numbers, row.statistic / around.geometric_mean, tuple(parameters[:_NAMED]))

    def _folded(self, state: _State | None = None) -> _State:
        """A state with the same steps, of which none waits."""
        state = self._state if state is None else state
        waiting = state.waiting[: state.length]
        if not waiting:
            return state
        rows = [row for row, _ in waiting]
        bins, width = in_bins(state.bins, rows, state.width)
        interval = merged([*(() if state.interval is None else (state.interval,)), *rows])
        norms = [row.norm for row in rows if not row.nonfinite]
        measured = [of_step for row, of_step in waiting if of_step is not None and not row.nonfinite]
        run, of_interval = state.run_layers, state.interval_layers
        if measured and self.names:
            squares = torch.tensor(measured, dtype=torch.float64, device="cpu").square()
            run = run.with_steps(squares)
            of_interval = of_interval.with_steps(squares, self._module_of_each if self.layer_depth else ())
        return state._replace(
            waiting=[],
            length=0,
            interval=interval,
            norms=(*state.norms, *norms)[-_MOST_WAITING:],
            bins=bins,
            width=width,
            run_layers=run,
            interval_layers=of_interval,
        )

    def _fold(self) -> _State:
        """Have no step wait; a step that a signal handler has committed meanwhile stays."""
        state, folded = self._state, self._folded()
        if self._state is state:
            self._state = folded
        return folded

    # --- rows ---------------------------------------------------------------------------------------------------------

    @property
    def span(self) -> tuple[float, float] | None:
        """The loggers' first and last step of the logging interval; ``None`` if it has none yet."""
        state = self._state
        if not state.length:
            return None if state.interval is None else (state.interval.first, state.interval.last)
        first = state.waiting[0][0] if state.interval is None else state.interval
        return first.first, state.waiting[state.length - 1][0].last

    def norms(self) -> tuple[float, ...]:
        """The finite norms of the logging interval: of the last 1,024 steps, if it is longer."""
        return self._fold().norms

    def row(self) -> dict[str, float]:
        """The figures of the logging interval so far; NaN where there is none. It goes on."""
        state = self._fold()
        step = Step(math.nan, math.nan, steps=0.0) if state.interval is None else state.interval
        row = {
            "grad_norm": step.norm,
            "grad_norm_mean": step.norm_sum / step.finite if step.finite else math.nan,
            "grad_norm_max": step.norm_max if step.finite else math.nan,
            "grad_norm_max_step": step.norm_max_step,
            "grad_norm_clipped": step.clipped_norm_sum / step.measured if step.measured else math.nan,
            "threshold": step.threshold,
            "clipped_fraction": step.clipped_fraction,
            "clip_coef_mean": step.clip_coef_mean,
            "clip_coef_min": step.coef_min if step.measured else math.nan,
            "nonfinite_total": sum(each.nonfinite for each in state.bins),
        }
        if self.skips_outliers:
            row["skipped_total"] = sum(each.skipped for each in state.bins)
        if self.by_value:
            row["grad_rms"] = step.statistic
        if self.max_update_ratio is not None:
            row |= {"limited_fraction": step.limited_fraction, "update_ratio": step.update_ratio}
        return {self.prefix + key: value for key, value in row.items()} | self._layer_row(state.interval_layers)

    @property
    def keys(self) -> list[str]:
        """Every key that the rows can have."""
        of_steps = () if self.step_rows is None else self._step_row(Step(0, 0))
        return [*self.row(), *of_steps]

    def flush(self) -> None:
        """Begin a new logging interval."""
        layers = LayerSums.empty(len(self.names), len(self.modules))
        self._state = self._fold()._replace(interval=None, norms=(), interval_layers=layers)

    def _layer_row(self, layers: LayerSums) -> dict[str, float]:
        """The mean share of each module in the squared norm, then its mean norm: sections of their own.

        The names of modules and groups may be any.
        """
        modules = self.modules
        keys = as_keys(modules)
        shares = module_sums(layers.shares, self._module_of_each) / layers.steps if modules else layers.shares
        figures = (shares, layers.norms / layers.norm_steps)
        return {
            self.prefix.replace("autoclip/", f"{section}/", 1) + keys[module]: figure
            for section, of_modules in zip(LAYER_SECTIONS, figures, strict=True)
            for module, figure in zip(modules, of_modules.tolist(), strict=bool(modules))
        }

    @property
    def _module_of_each(self) -> list[str]:
        """Of each parameter the module that it belongs to, as deep as the rows show."""
        return [module_of(name, self.layer_depth) for name in self.names]

    @property
    def modules(self) -> list[str]:
        """The modules that the rows show."""
        return list(dict.fromkeys(self._module_of_each)) if self.layer_depth else []

    # --- the run ------------------------------------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """How many steps there were."""
        return self._state.steps

    @property
    def bins(self) -> tuple[Step, ...]:
        """All steps of the run, in at most `MOST_BINS` rows of equally many steps, oldest first."""
        return self._fold().bins

    @property
    def largest(self) -> tuple[LargeStep, ...]:
        """The steps with the largest norms of the run, largest first."""
        return self._state.largest

    @property
    def nonfinite(self) -> tuple[LargeStep, ...]:
        """The first steps with non-finite gradients, oldest first."""
        return self._state.nonfinite

    @property
    def shares(self) -> dict[str, float]:
        """Mean share of each parameter in the squared norm, from 0 to 1, by name; empty where it is not known."""
        layers = self._fold().run_layers
        return dict(zip(self.names, (layers.shares / layers.steps).tolist(), strict=True)) if layers.steps else {}

    def state_dict(self) -> dict[str, Any]:
        """Return lists and numbers; loads with ``torch.load(..., weights_only=True)``."""
        state = self._state
        layers = self._folded()
        return {
            "version": _STATE["version"],
            "steps": state.steps,
            "width": state.width,
            "bins": as_numbers(state.bins),
            "interval": as_numbers(() if state.interval is None else (state.interval,)),
            "norms": list(state.norms),
            "waiting": as_numbers([row for row, _ in state.waiting[: state.length]]),
            "largest": [(tuple(large.place), *large[1:]) for large in state.largest],
            "nonfinite": [(tuple(large.place), *large[1:]) for large in state.nonfinite],
            "names": list(self.names),
            "numels": list(self.numels),
            "run_layers": layers.run_layers.to_dict(),
            "interval_layers": layers.interval_layers.to_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            ValueError: An entry is missing or has the wrong type or size, or the state is of another version.
        """
        check_state("StepLog", state_dict, _STATE)
        waiting = [(row, None) for row in from_numbers(state_dict["waiting"])]
        largest, nonfinite = (tuple(map(_large_of, state_dict[key])) for key in ("largest", "nonfinite"))
        run, interval = (LayerSums.from_dict(state_dict[key]) for key in ("run_layers", "interval_layers"))
        self.names, self.numels = list(state_dict["names"]), list(state_dict["numels"])
        if len(interval.norms) != len(self.modules):  # of another depth
            interval = LayerSums.empty(len(self.names), len(self.modules))
        self._state = _State(
            state_dict["steps"],
            waiting,
            len(waiting),
            next(iter(from_numbers(state_dict["interval"])), None),
            tuple(state_dict["norms"]),
            tuple(from_numbers(state_dict["bins"])),
            state_dict["width"],
            largest,
            nonfinite,
            run,
            interval,
        )


_STATE: dict[str, Any] = {
    "version": 1,
    **dict.fromkeys(("steps", "width"), int),
    **{key: [float] for key in ("bins", "interval", "norms", "waiting")},
    **dict.fromkeys(("largest", "nonfinite", "names", "numels"), list),
    **dict.fromkeys(("run_layers", "interval_layers"), dict),
}


def _large_of(saved: tuple[Any, ...]) -> LargeStep:
    place, *numbers, parameters = saved
    return LargeStep._make((Place(*place), *numbers, tuple((name, share) for name, share in parameters)))
