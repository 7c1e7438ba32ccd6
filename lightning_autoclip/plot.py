"""The picture of a run: norms, thresholds, what was clipped, the largest norms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_autoclip.steplog import StepLog
from lightning_autoclip.table import LargeStep

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SPIKE = 10  # times the geometric mean of the steps before: these are marked ...
_LABELLED = 3  # ... and the largest of them labelled
_NORM, _THRESHOLD, _CLIPPED, _BAD = "#4878a8", "#c44e52", "#dd8452", "#7f3fbf"


def plot_of(logs: Mapping[str, StepLog], settings: Mapping[str, Any]) -> Figure:
    """Draw a run: for each optimizer the norms with their threshold, and below what clipping did.

    Args:
        logs: What happened, per optimizer, by the prefix of its keys.
        settings: The callback's settings as it saves them.

    Raises:
        ValueError: There is no step to draw.
    """
    from matplotlib.figure import Figure

    drawn = {prefix: log for prefix, log in logs.items() if log.steps}
    if not drawn:
        raise ValueError("Expected a run with at least one optimizer step to plot, but none was recorded here.")
    by_value = settings["gradient_clip_algorithm"] == "value"
    figure = Figure(figsize=(8, 4.2 * len(drawn)), layout="constrained")
    grid = figure.subplots(2 * len(drawn), 1, sharex=True, squeeze=False, height_ratios=[3, 1] * len(drawn))
    for (prefix, log), (upper,), (lower,) in zip(drawn.items(), grid[::2], grid[1::2], strict=True):
        _draw_norms(upper, log, by_value)
        _draw_clipping(lower, log)
        if len(drawn) > 1:
            upper.set_title(prefix.strip("/"), loc="left", fontsize=10, parse_math=False)
    grid[-1][0].set_xlabel("step")
    return figure


def _draw_norms(axes: Axes, log: StepLog, by_value: bool) -> None:
    rows = [row for row in log.bins if row.norms]
    middles, means = [(row.first + row.last) / 2 for row in rows], [row.geometric_mean for row in rows]
    label = "gradient RMS" if by_value else "gradient norm"
    if any(row.norms > 1 for row in rows):
        smallest, largest = [row.statistic_min for row in rows], [row.statistic_max for row in rows]
        axes.fill_between(middles, smallest, largest, color=_NORM, alpha=0.25, lw=0, label="smallest to largest")
        label = f"geometric mean {label}"
    axes.plot(middles, means, color=_NORM, lw=0.8, label=label)
    axes.plot(middles, [row.threshold for row in rows], color=_THRESHOLD, lw=1.4, label="threshold")
    spikes = [] if by_value else [large for large in log.largest if large.times > _SPIKE]
    if spikes:
        steps, norms = [large.place.step for large in spikes], [large.norm for large in spikes]
        axes.plot(steps, norms, "o", ms=4, mfc="none", color="black", label=f"over {_SPIKE} times the usual norm")
    for large in _apart(spikes, log.bins[-1].last - log.bins[0].first):
        batch = f"step {large.place.step}" + (f"\nbatch {large.place.last_batch}" if large.place.epoch >= 0 else "")
        place = large.place.step, large.norm
        axes.annotate(batch, place, (5, -3), textcoords="offset points", va="top", fontsize=7)
    if rows:
        axes.set_yscale("log")
    axes.set_ylabel(label.removeprefix("geometric mean "))
    axes.grid(alpha=0.2)
    axes.legend(fontsize=8, loc="best", frameon=False)


def _draw_clipping(axes: Axes, log: StepLog) -> None:
    rows = [row for row in log.bins if row.measured]
    middles, coefs = [(row.first + row.last) / 2 for row in rows], [row.clip_coef_mean for row in rows]
    axes.plot(middles, coefs, ".", ms=3, color=_CLIPPED, clip_on=False, zorder=3)
    bad = [row for row in log.bins if row.nonfinite]
    if bad:
        label = f"non-finite ({sum(row.nonfinite for row in bad):.0f})"  # a bin may have several
        middles = [(row.first + row.last) / 2 for row in bad]
        axes.plot(middles, [0.0] * len(bad), "x", ms=6, color=_BAD, label=label, clip_on=False)
        axes.legend(fontsize=8, loc="lower right", framealpha=0.9)
    axes.set(ylim=(0, 1.05), ylabel="clip\ncoefficient")
    axes.grid(alpha=0.2)


def _apart(spikes: Sequence[LargeStep], run: float) -> list[LargeStep]:
    """The largest ones whose labels do not cover each other."""
    chosen: list[LargeStep] = []
    for large in spikes:
        is_free = all(abs(large.place.step - other.place.step) > 0.12 * run for other in chosen)
        if len(chosen) < _LABELLED and is_free:
            chosen.append(large)
    return chosen
