"""The figures of a run, and the verdicts on them: what clipping may hide, in words that a user can act on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lightning_autoclip.monitoring.summary import Point, Summary
from lightning_autoclip.monitoring.trace import Spike, Trace, by_module

# Each threshold is argued in docs/monitoring.md.
LEAST_STEPS = 50  # fewer tell nothing of a trend
RISEN = 10.0  # times, from the first steps to the largest tenth of the run
RISING = 5.0  # likewise, where clipping is also far more frequent than it should be
FALLEN = 1000.0  # times, from the first tenth of the steps to the last
SPIKE = 30.0  # times the typical norm
DOMINATES = 0.9  # share of the squared norm ...
SMALL_PART = 0.5  # ... in so little of the entries
STARVED = 1e-3  # root-mean-square entry of a weight's gradient, in those of the whole
LOW_COEF = 0.1  # mean factor on the step
AT_TOP = 0.1  # of the finite steps, to within `SAME` at one norm that is the largest ...
LEAST_AT_TOP = 5  # ... and so many of them
OVERFLOWS = 0.01  # of the steps, with a loss scaler
LEFT_OUT = 0.01  # of the steps, by `skip_above`
LEANS = 1 / 3  # of the steps, on `max_update_ratio`
_START = 5  # bins (of one step each in a short run): the first steps
_LAYERS = 99  # names deep: each layer by itself


@dataclass(frozen=True)
class Verdict:
    """Something that clipping may hide.

    Attributes:
        name: What it is, in a few words.
        evidence: The figures that show it.
        advice: What to look at or to change.
    """

    name: str
    evidence: str
    advice: str

    def __str__(self) -> str:
        return f"{self.name}: {self.evidence} {self.advice}"


@dataclass(frozen=True)
class Figures:
    """What clipping did to one optimizer's steps.

    Attributes:
        steps: Number of optimizer steps.
        nonfinite: How many had a NaN or an infinity in their gradient.
        left_out: How many `skip_above` left out for their size.
        clipped_fraction: Share of the steps that clipping changed, of those at which that is known; NaN if none.
        expected_fraction: What the percentile alone would lead to expect, of the steps after the warm-up, as a share of
            all; NaN for other policies.
        percentile: That percentile, likewise.
        clip_coef_mean: Mean factor on the step, from 0 to 1.
        clip_coef_min: The smallest.
        norm_first: Typical (geometric mean) norm of the first tenth of the steps; by value, of the root-mean-square
            entry, as all norms here.
        norm_typical: Of all steps.
        norm_last: Of the last tenth.
        norm_max: The largest.
        threshold: The last one.
        bounded_fraction: Share of the steps that `max_update_ratio` shortened; NaN where it was not at work.
        update_ratio: By what part of its norm the gradients, unless clipped, would typically (geometric mean) have
            moved the weight matrix that they move most; NaN likewise.
        bound_excess: How many times that bound the steps typically exceeded that it shortened; NaN if none.
        modules: Mean share of each module in the squared norm, two names deep, largest first.
    """

    steps: int
    nonfinite: int
    left_out: int
    clipped_fraction: float
    expected_fraction: float
    percentile: float
    clip_coef_mean: float
    clip_coef_min: float
    norm_first: float
    norm_typical: float
    norm_last: float
    norm_max: float
    threshold: float
    bounded_fraction: float
    update_ratio: float
    bound_excess: float
    modules: dict[str, float]


def figures_of(trace: Trace, settings: Mapping[str, Any]) -> Figures:
    """The figures of one optimizer's steps, with the callback's arguments as it saves them."""
    run = Summary.merged(trace.bins)
    modules, percentile = by_module(trace.shares, depth=2), _percentile(settings)
    after_warm_up = max(1 - settings["warmup_steps"] / run.steps, 0.0)
    expected = math.nan if run.bounded else (1 - percentile / 100) * after_warm_up  # another bound clips too
    return Figures(
        steps=int(run.steps),
        nonfinite=int(run.nonfinite),
        left_out=int(run.left_out),
        clipped_fraction=run.clipped_fraction,
        expected_fraction=expected,
        percentile=percentile,
        clip_coef_mean=run.clip_coef_mean,
        clip_coef_min=run.coef_min,
        norm_first=_part(trace, 0.0, 0.1).typical,
        norm_typical=run.typical,
        norm_last=_part(trace, 0.9, 1.0).typical,
        norm_max=run.largest,
        threshold=math.inf if math.isnan(run.threshold) else run.threshold,
        bounded_fraction=run.bounded_fraction,
        update_ratio=run.update_ratio,
        bound_excess=run.bound_excess,
        modules=dict(sorted(modules.items(), key=lambda item: -item[1])),
    )


def _percentile(settings: Mapping[str, Any]) -> float:
    """The percentile, if it tells how many steps are to be expected above the threshold; else NaN."""
    policy, percentile = settings["policy"], settings["policy"].get("percentile")
    plain = policy.get("name") == "Percentile" and policy.get("multiplier") == 1 and settings["max_threshold"] is None
    known = plain and settings["gradient_clip_algorithm"] == "norm" and isinstance(percentile, (int, float))
    return float(percentile) if known else math.nan


def _part(trace: Trace, start: float, end: float) -> Summary:
    """The bins between two fractions of the run, at least one."""
    bins = trace.bins
    first = min(int(start * len(bins)), len(bins) - 1)
    return Summary.merged(bins[first : max(first + 1, math.ceil(end * len(bins)))])


def verdicts_of(trace: Trace, figures: Figures, has_scaler: bool) -> Iterator[Verdict]:
    """What the figures may mean; with a loss scaler, some overflows mean nothing."""
    yield from _of_nonfinite(trace, figures, has_scaler)
    yield from _of_left_out(trace, figures)
    yield from _of_clipping_before(Summary.merged(trace.bins))
    if figures.steps < LEAST_STEPS:
        return
    verdict_of_bound = list(_of_bound(figures))
    yield from verdict_of_bound
    yield from _of_growth(trace, figures)
    yield from _of_decline(trace, figures)
    yield from _of_spikes(trace)
    if not verdict_of_bound:  # which says more
        yield from _of_clipping(figures)
    yield from _of_layers(trace)


def _of_nonfinite(trace: Trace, figures: Figures, has_scaler: bool) -> Iterator[Verdict]:
    if figures.nonfinite > (max(20, OVERFLOWS * figures.steps) if has_scaler else 0):
        first = trace.nonfinite[0]
        named = ", ".join(name for name, _ in first.parameters)
        named = "other groups" if math.isfinite(first.point.norm) else named
        beyond = ", or a norm above 1.8e19" if first.point.norm == math.inf else ""
        yield Verdict(
            "non-finite gradients",
            f"{figures.nonfinite} of {figures.steps} steps had a NaN or an infinity in their gradient{beyond}, first at"
            f" {where(first.point)}" + (f" in {named}." if named else "."),
            "Look at that batch, at what divides, takes a root or a logarithm there, and, if norms grew before it, at"
            " the learning rate.",
        )


def _of_left_out(trace: Trace, figures: Figures) -> Iterator[Verdict]:
    if figures.left_out > max(1, LEFT_OUT * figures.steps):
        those = [spike.point for spike in trace.largest if spike.point.left_out]
        first = f", one of them at {where(min(those))}" if those else ""
        yield Verdict(
            "many steps left out",
            f"{figures.left_out} of {figures.steps} steps were left out for norms above `skip_above`{first}.",
            "What is left out is not learned: look at these batches (`spikes()` lists the largest), lower the learning"
            " rate, or raise `skip_above`.",
        )


def _of_clipping_before(run: Summary) -> Iterator[Verdict]:
    if run.at_top >= max(LEAST_AT_TOP, AT_TOP * run.norms):
        yield Verdict(
            "already clipped",
            f"{run.at_top:.0f} of {run.norms:.0f} norms were the same number, {run.top:.5g}, and none was larger.",
            "Something clips or normalises the gradient before this callback does (the module, a package, another"
            " callback), or the gradient is constant: the threshold then follows that number. Clip in one place only.",
        )


def _of_bound(figures: Figures) -> Iterator[Verdict]:
    if figures.bounded_fraction > LEANS:
        times = figures.bound_excess
        yield Verdict(
            "learning rate too high",
            f"at {figures.bounded_fraction:.0%} of the steps the gradient would have moved a weight matrix by more than"
            f" `max_update_ratio` lets it, typically by {times:.1f} times as much.",
            f"Divide the learning rate by {times:.1f} or more, or use a learning-rate warm-up if only the first steps"
            " are concerned.",
        )


def _of_growth(trace: Trace, figures: Figures) -> Iterator[Verdict]:
    start = Summary.merged([steps for steps in trace.bins if steps.norms][:_START]).typical
    tenths = [_part(trace, i / 10, (i + 1) / 10).typical for i in range(10)]
    peak = max((typical for typical in tenths if typical > 0), default=math.nan)
    rise = peak / start
    if rise > RISEN:  # a learning rate that is too high shows within a few steps, and clipping may tame it later
        yield Verdict(
            "growing norms",
            f"the typical norm rose from {start:.3g} in the first steps to {peak:.3g} ({rise:.3g} times).",
            "Where the loss does not fall as well, clipping holds a training together that is coming apart: lower the"
            " learning rate or warm it up, and look at the initialisation, at missing normalisation and at a loss"
            " without a floor.",
        )
    # One third of the way from what is to be expected to every step that can be clipped.
    expected = figures.expected_fraction
    most = expected / (1 - figures.percentile / 100) if figures.percentile < 100 else 1.0
    if rise > RISING and figures.clipped_fraction > (most + 2 * expected) / 3:
        yield Verdict(
            "clipped far more often than the percentile implies",
            f"{figures.clipped_fraction:.1%} of the steps were clipped, where {expected:.0%} are to be expected.",
            "Norms keep growing past their own record: look at the learning rate and the initialisation.",
        )


def _of_decline(trace: Trace, figures: Figures) -> Iterator[Verdict]:
    last = _part(trace, 0.9, 1.0)
    only_zeros = last.zero > 0 and not last.norms
    if only_zeros or figures.norm_last < figures.norm_first / FALLEN:
        yield Verdict(
            "vanishing norms",
            "in the last tenth of the run every gradient was exactly zero."
            if only_zeros
            else f"the typical norm went from {figures.norm_first:.3g} in the first tenth of the run to"
            f" {figures.norm_last:.3g} in the last.",
            "Nothing is being learned any more: look for saturated activations, dead units or a loss that is solved.",
        )


def _of_spikes(trace: Trace) -> Iterator[Verdict]:
    if late := late_spikes(trace, SPIKE):
        worst = max(late, key=lambda spike: spike.times)
        names = ", ".join(f"{name} ({share:.0%})" for name, share in worst.parameters if share >= 0.05)
        yield Verdict(
            "spikes",
            f"{len(late)} of the {len(trace.largest)} largest norms exceeded {SPIKE:.0f} times the typical one of their"
            f" time, the worst {worst.times:.0f} times at {where(worst.point)}"
            + (", which was left out" if worst.point.left_out else "")
            + (f", mostly in {names}." if names else "."),
            "Look at these batches: the spike table (`spikes()`, or `autoclip/spikes` of the logger) lists them. Bad"
            " data, a rare input or a learning rate that is too high may be behind them.",
        )


def _of_clipping(figures: Figures) -> Iterator[Verdict]:
    if figures.clip_coef_mean < LOW_COEF:
        yield Verdict(
            "steps cut to a fraction",
            f"clipping multiplied the gradient by {figures.clip_coef_mean:.2g} on average.",
            "With SGD that is the learning rate that you train with: raise the threshold (a higher percentile), or"
            " lower the learning rate and see whether it was too high.",
        )


def _of_layers(trace: Trace) -> Iterator[Verdict]:
    shares = {name: share for name, share in trace.shares.items() if share > 0}  # others are frozen or not used
    if not shares or not all(trace.numels):  # FSDP1 does not tell sizes
        return
    numels = {name: float(numel) for name, numel in zip(trace.names, trace.numels, strict=True) if name in shares}
    entries, total = by_module(numels, depth=_LAYERS), sum(numels.values())
    for layer, share in by_module(shares, depth=_LAYERS).items():
        if share > DOMINATES and entries[layer] < SMALL_PART * total:
            yield Verdict(
                "one layer holds the norm",
                f"{layer} holds {share:.1%} of the squared norm in {entries[layer] / total:.1%} of the entries.",
                "The threshold follows that layer alone: look at the scale of its inputs, at its initialisation and"
                " learning rate, and at whether anything gets through to the layers before it.",
            )
    starved = [
        name
        for name, share in shares.items()
        if "weight" in name.rpartition(".")[2] and share / numels[name] < STARVED**2 / total
    ]
    if starved:
        yield Verdict(
            "vanishing gradients",
            f"{len(starved)} of {len(shares)} parameters have gradients less than {STARVED:g} times as large as the"
            f" whole, among them {', '.join(starved[:3])}.",
            "They hardly learn: look for saturated activations, missing normalisation or residual connections, or an"
            " initialisation that is too small.",
        )


def late_spikes(trace: Trace, above: float) -> list[Spike]:
    """Of the largest norms those so many times the typical one of their time, after the first tenth of the run."""
    start = _part(trace, 0.0, 0.1)  # the first steps of a training are large
    # A training that is nearly solved has a typical norm of almost nothing: one hard sample exceeds it by far.
    large = [steps for steps in trace.bins if steps.first > start.last and steps.largest > start.typical]
    return [
        spike
        for spike in trace.largest
        if spike.times > above and any(steps.first <= spike.point.step <= steps.last for steps in large)
    ]


def where(point: Point) -> str:
    """Return step, epoch and batches in words."""
    return f"step {point.step} (epoch {point.epoch}, batch {point.batches.replace('-', ' to ')})"
