"""The picture of a run: norms, thresholds, what was clipped, the largest norms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_autoclip._text import printable
from lightning_autoclip.monitoring.trace import Spike, Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SPIKE = 10  # times the typical norm: these are marked ...
_LABELLED = 3  # ... and the largest of them labelled
_NORM, _THRESHOLD, _CLIPPED, _BAD = "#4878a8", "#c44e52", "#dd8452", "#7f3fbf"


def plot_of(traces: Mapping[str, Trace], settings: Mapping[str, Any]) -> Figure:
    """Draw a run: for each optimizer the norms with their threshold, and below what clipping did.

    Args:
        traces: Per optimizer, what happened, by the prefix of its keys.
        settings: The callback's arguments as it saves them.

    Raises:
        ValueError: There is no step to draw.
    """
    from matplotlib.figure import Figure

    drawn = {prefix: trace for prefix, trace in traces.items() if trace.bins}
    if not drawn:
        raise ValueError("Expected a run with at least one optimizer step to plot, but none was recorded here.")
    by_value = settings["gradient_clip_algorithm"] == "value"
    figure = Figure(figsize=(8, 4.2 * len(drawn)), layout="constrained")
    grid = figure.subplots(2 * len(drawn), 1, sharex=True, squeeze=False, height_ratios=[3, 1] * len(drawn))
    for (prefix, trace), (upper,), (lower,) in zip(drawn.items(), grid[::2], grid[1::2], strict=True):
        _draw_norms(upper, trace, by_value)
        _draw_clipping(lower, trace)
        if len(drawn) > 1:
            upper.set_title(printable(prefix.strip("/")), loc="left", fontsize=10, parse_math=False)
    grid[-1][0].set_xlabel("step")
    return figure


def _draw_norms(axes: Axes, trace: Trace, by_value: bool) -> None:
    bins = [steps for steps in trace.bins if steps.norms]
    middles = [(steps.first + steps.last) / 2 for steps in bins]
    norm, typical = "root-mean-square entry" if by_value else "gradient norm", [steps.typical for steps in bins]
    kind = ""
    if any(steps.norms > 1 for steps in bins):
        kind, low, high = "typical ", [steps.smallest for steps in bins], [steps.largest for steps in bins]
        axes.fill_between(middles, low, high, color=_NORM, alpha=0.25, lw=0, label="smallest to largest")
    axes.plot(middles, typical, color=_NORM, lw=0.8, label=kind + norm)
    axes.plot(middles, [steps.threshold for steps in bins], color=_THRESHOLD, lw=1.4, label="threshold")
    spikes = [] if by_value else [spike for spike in trace.largest if spike.times > _SPIKE]
    if spikes:
        at, norms = [spike.point.step for spike in spikes], [spike.point.norm for spike in spikes]
        axes.plot(at, norms, "o", ms=4, mfc="none", color="black", label=f"over {_SPIKE} times the typical norm")
    for spike in _apart(spikes, trace.bins[-1].last - trace.bins[0].first):
        point = spike.point
        batch = f"step {point.step}\nbatch {point.last_batch}"
        axes.annotate(batch, (point.step, point.norm), (5, -3), textcoords="offset points", va="top", fontsize=7)
    if bins:
        axes.set_yscale("log")
    axes.set_ylabel(norm)
    axes.grid(alpha=0.2)
    axes.legend(fontsize=8, loc="best", frameon=False)


def _draw_clipping(axes: Axes, trace: Trace) -> None:
    bins = [steps for steps in trace.bins if steps.measured]
    middles = [(steps.first + steps.last) / 2 for steps in bins]
    axes.plot(middles, [steps.clip_coef_mean for steps in bins], ".", ms=3, color=_CLIPPED, clip_on=False, zorder=3)
    bad = [steps for steps in trace.bins if steps.nonfinite]
    if bad:
        label = f"not finite ({sum(steps.nonfinite for steps in bad):.0f})"  # a bin may have several
        at = [(steps.first + steps.last) / 2 for steps in bad]
        axes.plot(at, [0.0] * len(bad), "x", ms=6, color=_BAD, label=label, clip_on=False)
        axes.legend(fontsize=8, loc="lower right", framealpha=0.9)
    axes.set(ylim=(0, 1.05), ylabel="factor on\nthe step")
    axes.grid(alpha=0.2)


def _apart(spikes: Sequence[Spike], run: float) -> list[Spike]:
    """The largest ones whose labels do not cover each other."""
    chosen: list[Spike] = []
    for spike in spikes:
        if len(chosen) < _LABELLED and all(abs(spike.point.step - other.point.step) > 0.12 * run for other in chosen):
            chosen.append(spike)
    return chosen
