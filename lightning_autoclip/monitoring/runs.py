"""Runs on disk, read back for report, plot and advice: checkpoints, and what loggers have written."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_autoclip._checks import DAMAGE
from lightning_autoclip.clipping.record import History
from lightning_autoclip.monitoring.checkpoints import read_part
from lightning_autoclip.monitoring.logs import Log, is_settings, read_log
from lightning_autoclip.monitoring.plot import plot_of
from lightning_autoclip.monitoring.report import Report, report_of
from lightning_autoclip.monitoring.summary import LARGEST, Point, Summary
from lightning_autoclip.monitoring.trace import MOST_SPIKES, Spike, Trace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STATE_KEY = "GradientClipping"  # of the callback in a checkpoint
_KEYS = ("grad_norm", "grad_norm_mean", "grad_norm_max", "grad_norm_max_step", "clipped_fraction")  # if any is finite
_COUNT = "nonfinite_total"  # in every row
_FRACTIONS = ("clipped_fraction", "bounded_fraction", "clip_coef_mean", "clip_coef_min")
_LEAST = 1e-45  # below every float32 above 0
_COUNTS, _MOST_STEPS = ("step", "_step", "_total"), 2.0**53
_UNKNOWN: dict[str, Any] = {
    "policy": {"name": "unknown"},
    "gradient_clip_algorithm": "norm",
    "max_threshold": None,
    "max_update_ratio": None,
    "warmup_steps": 0,
}
Row = Mapping[str, float]


class RecordedRun:
    """A run that was read back.

    Args:
        source: What was read, in words.
        traces: Per optimizer, by the prefix of its keys, what happened.
        norms: Likewise, the norms of single steps, oldest first, as far as the file has them; by value the
            root-mean-square entries.
        settings: The callback's arguments, as far as the file has them.
        has_scaler: Whether a loss scaler was at work.
    """

    def __init__(
        self,
        source: str,
        traces: dict[str, Trace],
        norms: dict[str, list[float]],
        settings: dict[str, Any],
        has_scaler: bool = False,
    ) -> None:
        self.source, self.traces, self.norms = source, traces, norms
        self.settings, self.has_scaler = settings, has_scaler

    def report(self) -> Report:
        """What clipping did, and what it may hide."""
        return report_of(self.traces, self.settings, self.has_scaler)

    def plot(self) -> Figure:
        """Norms, thresholds, factors: needs matplotlib."""
        return plot_of(self.traces, self.settings)


def read_run(path: Path) -> RecordedRun:
    """Read a Lightning checkpoint, or what a logger has written: `read_log` says which.

    Raises:
        ValueError: It is none of these, is damaged, or holds nothing of this library.
    """
    try:
        if not path.exists():
            raise ValueError(
                "Expected a checkpoint, a `metrics.csv`, the folder of a TensorBoard run or the directory of a W&B"
                f" run, but {path} is missing."
            )
        is_log = path.is_dir() or path.suffix in (".csv", ".wandb") or path.name.startswith("events.out.tfevents.")
        return _of_log(read_log(path)) if is_log else _of_checkpoint(path)
    except OSError as error:
        raise ValueError(f"Expected {path} to be a file or a folder that can be read: {error}.") from error


def _of_checkpoint(path: Path) -> RecordedRun:
    state = read_part(path, _our_state(path))
    try:
        if not all(isinstance(prefix, str) for prefix in state["scopes"]):
            raise TypeError("a record has no name")
        traces = {prefix: Trace.from_state(scope["trace"]) for prefix, scope in state["scopes"].items()}
        norms = {
            prefix: _exact(traces[prefix], scope["clipper"]["history"]) for prefix, scope in state["scopes"].items()
        }
        settings, has_scaler = dict(state["settings"]), bool(state["has_scaler"])
        if not traces or not is_settings(settings):
            raise KeyError("settings")
        if state["several_policies"]:
            settings["policy"] = {"name": "several"}
    except DAMAGE as error:
        raise ValueError(f"The state of {STATE_KEY!r} in {path} is damaged: {error!r}.") from error
    return RecordedRun(f"checkpoint {path.name}", traces, norms, settings, has_scaler)


def _our_state(path: Path) -> Callable[[Any], Any]:
    """Finds the callback's entry among what a checkpoint holds."""

    def choose(checkpoint: Any) -> Any:
        callbacks = checkpoint.get("callbacks") if isinstance(checkpoint, dict) else None
        if not isinstance(callbacks, dict):
            raise ValueError(f"Expected {path} to be a checkpoint of Lightning's Trainer, but it has no `callbacks`.")
        if not (state := callbacks.get(STATE_KEY)):
            raise ValueError(
                f"{path} was written without `AutoClip` or `GradientClipping`: it has no state under {STATE_KEY!r}."
            )
        return state

    return choose


def _exact(trace: Trace, state: dict[str, Any]) -> list[float]:
    """The norms of single steps: of all of them while each has its bin, else those that the record still holds."""
    history = History(None)
    history.load_state_dict(state)
    if all(steps.steps == 1 for steps in trace.bins):
        return [steps.largest for steps in trace.bins if steps.norms]
    if not bool((history.recorded > 0).all()):
        raise ValueError("its norms are not all above 0")
    norms: list[float] = history.recorded.tolist()
    return norms


def _of_log(log: Log) -> RecordedRun:
    """From logged rows: a bin per row, and the series of steps if ``log_every_step`` logged it."""
    rows, settings = log.rows, _UNKNOWN | (log.settings or {})
    _check(rows, log.source)
    keys = {key for row in rows for key in row if "autoclip/" in key and key.endswith(f"/{_COUNT}")}
    prefixes = sorted((key.removesuffix(_COUNT) for key in keys), key=lambda prefix: prefix.split("/"))
    traces, norms = {}, {}
    for prefix in prefixes:
        unknown = {prefix + key: math.nan for key in _KEYS}  # rows without a finite step have none of them
        found = [unknown | dict(row) for row in rows if prefix + _COUNT in row]
        traces[prefix] = trace = _trace_of(found, prefix, log.source)
        if any(f"{prefix}grad_rms" in row for row in found):
            settings["gradient_clip_algorithm"] = "value"
        exact = [row[f"{prefix}step/grad_norm"] for row in rows if f"{prefix}step/grad_norm" in row]
        exact = [norm for norm in exact if _LEAST < norm < math.inf]
        entries = [row[f"{prefix}step/grad_rms"] for row in rows if f"{prefix}step/grad_rms" in row]
        norms[prefix] = [entry for entry in entries if _LEAST < entry < math.inf] or exact
        for norm in exact:
            trace.bins[-1].note_top(norm)
        for row, steps_of_row in zip(found, trace.bins, strict=True) if not norms[prefix] else ():
            steps_of_row.note_top(row[prefix + "grad_norm_max"])  # of how many steps, a row does not tell
    if not traces:
        raise ValueError(_why_nothing(log))
    return RecordedRun(log.source, traces, norms, settings)


def _trace_of(rows: Sequence[Row], prefix: str, source: str) -> Trace:
    """A bin per row of one scope, and the largest of their largest norms."""
    trace, steps = Trace(), [row["step"] for row in rows]
    longest = max((later - earlier for earlier, later in pairwise(steps)), default=steps[0] + 1)
    last, nonfinite, skipped = -1.0, 0.0, 0.0
    if steps[0] + 1 > 2 * longest:  # a run that was resumed elsewhere: the counts go on from what is not here
        last = max(-1.0, steps[0] - longest)
        nonfinite, skipped = (rows[0].get(prefix + key, 0.0) for key in (_COUNT, "skipped_total"))
    large, unit = [], _unit(rows, prefix)
    for row in rows:
        unit = _unit([row], prefix, unit)
        if math.isnan(row[key := f"{prefix}grad_norm_mean"]) and row[prefix + _COUNT] <= nonfinite and trace.bins:
            raise ValueError(f"{source} is damaged: at step {row['step']:g} it has no `{key}`.")
        trace.bins.append(_bin(row, prefix, unit, max(last, -1.0), row["step"], nonfinite))
        trace.bins[-1].left_out = max(row.get(f"{prefix}skipped_total", 0.0) - skipped, 0.0)
        if math.isfinite(row[prefix + "grad_norm_max_step"]) and (norm := row[prefix + "grad_norm_max"]) > 0:
            large.append((-norm, len(trace.bins), row, unit))
        last, nonfinite = row["step"], row[prefix + "nonfinite_total"]
        skipped = row.get(f"{prefix}skipped_total", skipped)
    for _, count, row, unit in sorted(large, key=lambda each: each[0])[:MOST_SPIKES]:
        trace.largest.append(_largest(row, prefix, unit, trace.bins[:count]))
    return trace


def _check(rows: Sequence[Row], source: str) -> None:
    """Refuse what rows of this library cannot be."""
    for row in rows:
        for key, value in row.items():
            most = 1.001 if key.endswith(_FRACTIONS) else _MOST_STEPS if key.endswith(_COUNTS) else LARGEST
            if not 0 <= value <= most:
                raise ValueError(f"{source} is damaged: at step {row['step']:g} it has {value:g} as `{key}`.")
    for before, after in pairwise(rows):
        if after["step"] < before["step"]:
            raise ValueError(
                f"{source} is damaged: its rows are not in order, step {after['step']:g} is behind step"
                f" {before['step']:g}. Sort them, or take apart what is of several runs."
            )


def _why_nothing(log: Log) -> str:
    if not log.is_open and log.settings is None:
        return f"{log.source} has no rows of `AutoClip` or `GradientClipping` (keys `autoclip/...`)."
    wandb = " W&B's client writes 32 KiB at a time." if log.is_open else ""
    return (
        f"{log.source} has no rows of `AutoClip` or `GradientClipping` on disk yet: the run goes on, or was killed"
        f" before the first ones were written.{wandb} Try again later, or take a checkpoint."
    )


def _unit(rows: Iterable[Row], prefix: str, otherwise: float = 1.0) -> float:
    """By value, the root-mean-square entry in units of the norm, of the first row that tells: one of 0 does not."""
    pairs = ((row.get(f"{prefix}grad_rms", math.nan), row[f"{prefix}grad_norm"]) for row in rows)
    return next((entry / norm for entry, norm in pairs if norm > 0 and entry > 0), otherwise)


def _largest(row: Row, prefix: str, unit: float, bins: list[Summary]) -> Spike:
    """The largest norm of a row: of which batch, rows do not tell."""
    norm, coef = row[f"{prefix}grad_norm_max"], row.get(f"{prefix}clip_coef_min", math.nan)
    statistic, threshold = norm * unit, row.get(f"{prefix}threshold", math.nan)
    step, nonfinite = int(row[f"{prefix}grad_norm_max_step"]), row[f"{prefix}nonfinite_total"]
    point = Point(step, -1, -1, -1, norm, norm * coef, statistic, threshold, nonfinite)
    return Spike(point, statistic / Summary.merged(bins[-MOST_SPIKES:]).typical, ())


def _bin(row: Row, prefix: str, unit: float, before: float, step: float, nonfinite: float) -> Summary:
    steps, bad = max(step - before, 1.0), max(row[f"{prefix}nonfinite_total"] - nonfinite, 0.0)
    finite, mean = max(steps - bad, 0.0), row[f"{prefix}grad_norm_mean"]
    threshold = row.get(f"{prefix}threshold", math.nan)
    summary = Summary(
        before + 1, step, steps, min(bad, steps), threshold=threshold if threshold < math.inf else math.nan
    )
    if math.isnan(mean):  # none of its steps was finite
        summary.steps = summary.nonfinite = max(min(bad, steps), 1.0)
        return summary
    if mean > 0:
        summary.total, summary.logs = finite * mean, finite * (math.log(mean) + math.log(unit))
        summary.largest = row[f"{prefix}grad_norm_max"] * unit  # of the smallest, a row does not tell
    else:
        summary.zero = finite
    if (update := row.get(f"{prefix}update_ratio", math.nan)) > 0:
        summary.weighed, summary.updates = finite, finite * math.log(update)
        summary.bounded = finite * row.get(f"{prefix}bounded_fraction", 0.0)
    coef, least = (row.get(f"{prefix}clip_coef_{key}", math.nan) for key in ("mean", "min"))
    if coef == coef:
        summary.measured, summary.clipped = finite, finite * row[f"{prefix}clipped_fraction"]
        summary.coefs, summary.coef_min = finite * coef, least
    return summary
