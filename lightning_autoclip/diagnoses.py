"""The figures of a run, and what they may mean: what clipping may hide, in words that a user can act on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lightning_autoclip.layers import by_module
from lightning_autoclip.steplog import StepLog
from lightning_autoclip.table import LargeStep, Step, merged

# Each threshold is argued in docs/monitoring.md.
LEAST_STEPS = 50  # fewer show no trend
RISEN = 10.0  # times, from the first steps to the largest tenth of the run
RISING = 5.0  # likewise, where clipping is also far more frequent than it should be
FALLEN = 1000.0  # times, from the first tenth of the steps to the last
SPIKE = 30.0  # times the geometric mean norm
DOMINATES = 0.9  # share of the squared norm ...
SMALL_PART = 0.5  # ... in so small a part of the elements
VANISHING = 1e-3  # RMS of a weight's gradient, in that of the whole
LOW_COEF = 0.1  # mean clip coefficient
AT_MAX = 0.1  # of the finite steps, to within `SAME` at the largest norm ...
LEAST_AT_MAX = 5  # ... and so many of them
OVERFLOWS = 0.01  # of the steps, with a loss scaler
SKIPPED = 0.01  # of the steps, by `skip_above`
LIMITED = 1 / 3  # of the steps, by `max_update_ratio`
_START = 5  # bins (of one step each in a short run): the first steps
_LAYERS = 99  # names deep: each layer by itself


@dataclass(frozen=True)
class Diagnosis:
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
        nonfinite: How many had non-finite gradients.
        skipped: How many `skip_above` skipped as outliers.
        clipped_fraction: Share of the steps that clipping changed, of those at which that is known; NaN if none.
        expected_fraction: The share that the percentile alone is expected to clip, of the steps after the warm-up; NaN
            for other policies.
        percentile: That percentile, likewise.
        clip_coef_mean: Mean clip coefficient, from 0 to 1.
        clip_coef_min: The smallest.
        norm_first: Geometric mean norm of the first tenth of the steps; by value, of the gradient RMS, as all norms
            here.
        norm_mean: Of all steps.
        norm_last: Of the last tenth.
        norm_max: The largest.
        threshold: The last one.
        limited_fraction: Share of the steps that `max_update_ratio` shortened; NaN where it was not at work.
        update_ratio: By what part of its norm the gradients, unless clipped, would have moved the weight matrix that
            they move most (geometric mean); NaN likewise.
        limit_excess: How many times that limit the limited steps exceeded (geometric mean); NaN if none.
        modules: Mean share of each module in the squared norm, two names deep, largest first.
    """

    steps: int
    nonfinite: int
    skipped: int
    clipped_fraction: float
    expected_fraction: float
    percentile: float
    clip_coef_mean: float
    clip_coef_min: float
    norm_first: float
    norm_mean: float
    norm_last: float
    norm_max: float
    threshold: float
    limited_fraction: float
    update_ratio: float
    limit_excess: float
    modules: dict[str, float]


def figures_of(log: StepLog, settings: Mapping[str, Any]) -> Figures:
    """The figures of one optimizer's steps, with the callback's settings as it saves them."""
    run = merged(log.bins)
    modules, percentile = by_module(log.shares, depth=2), _percentile(settings)
    after_warm_up = max(1 - settings["warmup_steps"] / run.steps, 0.0)
    expected = math.nan if run.limited else (1 - percentile / 100) * after_warm_up  # that limit clips too
    return Figures(
        steps=int(run.steps),
        nonfinite=int(run.nonfinite),
        skipped=int(run.skipped),
        clipped_fraction=run.clipped_fraction,
        expected_fraction=expected,
        percentile=percentile,
        clip_coef_mean=run.clip_coef_mean,
        clip_coef_min=run.coef_min,
        norm_first=_part(log, 0.0, 0.1).geometric_mean,
        norm_mean=run.geometric_mean,
        norm_last=_part(log, 0.9, 1.0).geometric_mean,
        norm_max=run.statistic_max,
        threshold=math.inf if math.isnan(run.threshold) else run.threshold,
        limited_fraction=run.limited_fraction,
        update_ratio=run.update_ratio,
        limit_excess=run.limit_excess,
        modules=dict(sorted(modules.items(), key=lambda item: -item[1])),
    )


def _percentile(settings: Mapping[str, Any]) -> float:
    """The percentile, if the share of steps above the threshold can be expected from it; else NaN."""
    arguments = settings["policy"]["arguments"]
    is_ours = settings["policy"]["class"] == "lightning_autoclip.policies.Percentile"
    is_plain = is_ours and arguments["multiplier"] == 1 and settings["max_threshold"] is None
    return float(arguments["percentile"]) if is_plain and settings["gradient_clip_algorithm"] == "norm" else math.nan


def _part(log: StepLog, start: float, end: float) -> Step:
    """The bins between two fractions of the run, at least one."""
    bins = log.bins
    first = min(int(start * len(bins)), len(bins) - 1)
    return merged(bins[first : max(first + 1, math.ceil(end * len(bins)))])


def diagnoses_of(log: StepLog, figures: Figures, has_scaler: bool) -> Iterator[Diagnosis]:
    """What the figures may mean; with a loss scaler, some overflows mean nothing."""
    yield from _of_nonfinite(log, figures, has_scaler)
    yield from _of_skipped(log, figures)
    yield from _of_clipping_before(merged(log.bins))
    if figures.steps < LEAST_STEPS:
        return
    of_limit = list(_of_limit(figures))
    yield from of_limit
    yield from _of_growth(log, figures)
    yield from _of_decline(log, figures)
    yield from _of_spikes(log)
    if not of_limit:  # which says more
        yield from _of_over_clipping(figures)
    yield from _of_layers(log)


def _of_nonfinite(log: StepLog, figures: Figures, has_scaler: bool) -> Iterator[Diagnosis]:
    if figures.nonfinite > (max(20, OVERFLOWS * figures.steps) if has_scaler else 0):
        first = log.nonfinite[0]
        names = ", ".join(name for name, _ in first.parameters)
        names = "other groups" if math.isfinite(first.norm) else names
        beyond = ", or a norm above 1.8e19" if first.norm == math.inf else ""
        yield Diagnosis(
            "non-finite gradients",
            f"{figures.nonfinite} of {figures.steps} steps had a NaN or an Inf in their gradients{beyond}, first at"
            f" {first.place.where}" + (f" in {names}." if names else "."),
            "Look at that batch, at what divides, takes a root or a logarithm there, and, if norms grew before it, at"
            " the learning rate.",
        )


def _of_skipped(log: StepLog, figures: Figures) -> Iterator[Diagnosis]:
    if figures.skipped > max(1, SKIPPED * figures.steps):
        places = [large.place for large in log.largest if large.is_skipped]
        first = f", one of them at {min(places).where}" if places else ""
        yield Diagnosis(
            "many steps skipped",
            f"{figures.skipped} of {figures.steps} steps were skipped as outliers, with norms above"
            f" `skip_above` times the median{first}.",
            "The model does not learn from skipped steps: look at these batches (`spikes()` lists the largest), lower"
            " the learning rate, or raise `skip_above`.",
        )


def _of_clipping_before(run: Step) -> Iterator[Diagnosis]:
    if run.at_max >= max(LEAST_AT_MAX, AT_MAX * run.norms):
        yield Diagnosis(
            "already clipped",
            f"{run.at_max:.0f} of {run.norms:.0f} norms were the same number, {run.norm_max:.5g}, and none was larger.",
            "Something clips or normalises the gradients before this callback does (the module, a package, another"
            " callback), or they are constant: the threshold then follows that number. Clip in one place only.",
        )


def _of_limit(figures: Figures) -> Iterator[Diagnosis]:
    if figures.limited_fraction > LIMITED:
        times = figures.limit_excess
        yield Diagnosis(
            "learning rate too high",
            f"`max_update_ratio` limited {figures.limited_fraction:.0%} of the steps: they would have moved a weight"
            f" matrix by {times:.1f} times the limit (geometric mean).",
            f"Divide the learning rate by {times:.1f} or more, or use a learning-rate warm-up if only the first steps"
            " are limited.",
        )


def _of_growth(log: StepLog, figures: Figures) -> Iterator[Diagnosis]:
    start = merged([row for row in log.bins if row.norms][:_START] or log.bins[:1]).geometric_mean
    tenths = [_part(log, i / 10, (i + 1) / 10).geometric_mean for i in range(10)]
    peak = max((mean for mean in tenths if mean > 0), default=math.nan)
    rise = peak / start
    if rise > RISEN:  # a learning rate that is too high shows within a few steps, and clipping may tame it later
        yield Diagnosis(
            "growing norms",
            f"the geometric mean norm rose from {start:.3g} in the first steps to {peak:.3g} ({rise:.3g} times).",
            "Unless the loss falls as well, clipping hides a divergence: lower the learning rate or use a learning-rate"
            " warm-up, and look at the initialisation, at missing normalisation and at an unbounded loss.",
        )
    # One third of the way from what is expected to every step that can be clipped.
    expected = figures.expected_fraction
    most = expected / (1 - figures.percentile / 100) if figures.percentile < 100 else 1.0
    if rise > RISING and figures.clipped_fraction > (most + 2 * expected) / 3:
        yield Diagnosis(
            "clipped far more often than the percentile implies",
            f"{figures.clipped_fraction:.1%} of the steps were clipped, where {expected:.0%} are expected.",
            "Norms keep growing past their own history: look at the learning rate and the initialisation.",
        )


def _of_decline(log: StepLog, figures: Figures) -> Iterator[Diagnosis]:
    last = _part(log, 0.9, 1.0)
    only_zeros = last.zero > 0 and not last.norms
    if only_zeros or figures.norm_last < figures.norm_first / FALLEN:
        yield Diagnosis(
            "vanishing norms",
            "in the last tenth of the run every gradient was exactly zero."
            if only_zeros
            else f"the geometric mean norm fell from {figures.norm_first:.3g} in the first tenth of the run to"
            f" {figures.norm_last:.3g} in the last.",
            "The model has stopped learning: look for saturated activations, dead units or a loss that is solved.",
        )


def _of_spikes(log: StepLog) -> Iterator[Diagnosis]:
    if late := late_spikes(log, SPIKE):
        worst = max(late, key=lambda large: large.times)
        names = ", ".join(f"{name} ({share:.0%})" for name, share in worst.parameters if share >= 0.05)
        yield Diagnosis(
            "spikes",
            f"{len(late)} of the {len(log.largest)} largest norms exceeded {SPIKE:.0f} times the geometric mean of the"
            f" steps before, the worst {worst.times:.0f} times at {worst.place.where}"
            + (", which was skipped" if worst.is_skipped else "")
            + (f", mostly in {names}." if names else "."),
            "Look at these batches: `spikes()`, or `autoclip/spikes` of the logger, lists them. Bad data, a rare input"
            " or a learning rate that is too high may be behind them.",
        )


def _of_over_clipping(figures: Figures) -> Iterator[Diagnosis]:
    if figures.clip_coef_mean < LOW_COEF:
        yield Diagnosis(
            "over-clipping",
            f"the mean clip coefficient was {figures.clip_coef_mean:.2g}.",
            "With SGD that multiplies the learning rate: raise the threshold (a higher percentile), or lower the"
            " learning rate and see whether it was too high.",
        )


def _of_layers(log: StepLog) -> Iterator[Diagnosis]:
    shares = {name: share for name, share in log.shares.items() if share > 0}  # others are frozen or not used
    if not shares or not all(log.numels):  # of FSDP1, sizes are not known
        return
    numels = {name: float(numel) for name, numel in zip(log.names, log.numels, strict=True) if name in shares}
    elements, total = by_module(numels, depth=_LAYERS), sum(numels.values())
    for layer, share in by_module(shares, depth=_LAYERS).items():
        if share > DOMINATES and elements[layer] < SMALL_PART * total:
            yield Diagnosis(
                "one layer dominates the gradient norm",
                f"{layer} has {share:.1%} of the squared norm in {elements[layer] / total:.1%} of the elements.",
                "The threshold follows that layer alone: look at the scale of its inputs, at its initialisation and"
                " learning rate, and at whether gradients reach the layers before it.",
            )
    vanishing = [
        name
        for name, share in shares.items()
        if "weight" in name.rpartition(".")[2] and share / numels[name] < VANISHING**2 / total
    ]
    if vanishing:
        yield Diagnosis(
            "vanishing gradients",
            f"{len(vanishing)} of {len(shares)} parameters have gradients less than {VANISHING:g} times as large as the"
            f" whole, among them {', '.join(vanishing[:3])}.",
            "They hardly learn: look for saturated activations, missing normalisation or residual connections, or an"
            " initialisation that is too small.",
        )


def late_spikes(log: StepLog, above: float) -> list[LargeStep]:
    """Of the largest steps those above so many times the usual norm of their time, after the first tenth of the run."""
    start = _part(log, 0.0, 0.1)  # the first steps of a run are large
    # A run that is nearly solved has norms of almost nothing: one hard sample exceeds them by far.
    large = [row for row in log.bins if row.first > start.last and row.statistic_max > start.geometric_mean]
    return [
        each
        for each in log.largest
        if each.times > above and any(row.first <= each.place.step <= row.last for row in large)
    ]
