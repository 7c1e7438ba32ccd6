"""What several percentiles and windows would have clipped in a recorded run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from lightning_autoclip.history import History
from lightning_autoclip.table import Step

PERCENTILES = (1.0, 10.0, 25.0, 50.0, 75.0, 90.0, 99.0)
WINDOWS = (100, 1000, None)
BY_VALUE = 3.0  # the multiplier that `AutoClip` has by value unless it is given another
LEAST_COEF = 0.6  # mean clip coefficient below which the learning rate is no longer what was set


def candidates(
    norms: Sequence[float], percentiles: Sequence[float] = PERCENTILES, windows: Sequence[int | None] = WINDOWS
) -> dict[tuple[float, int | None], Step]:
    """Clip recorded norms by several settings.

    Args:
        norms: Of the steps in order, before clipping; those that are not finite are skipped.
        percentiles: Each between 0 and 100.
        windows: Each at least 1, or ``None`` for all norms up to then.

    Returns:
        By percentile and window, what each would have done to the norms as they were: a run that is clipped has other
        ones later. Only the columns of clipping are filled.

    Raises:
        ValueError: There are fewer than two norms.
    """
    finite = _finite(norms)
    found = {}
    for window in windows:
        for percentile, thresholds in thresholds_of(finite, percentiles, window).items():
            found[percentile, window] = _clipped(finite, thresholds)
    return found


def _finite(norms: Sequence[float]) -> list[float]:
    finite = [norm for norm in norms if 0 < norm < math.inf]
    if len(finite) < 2:
        raise ValueError(f"Expected at least 2 norms to suggest a percentile from, but got {len(finite)}.")
    return finite


def thresholds_of(norms: Sequence[float], percentiles: Sequence[float], window: int | None) -> dict[float, list[float]]:
    """By percentile, the threshold of each step over a history of norms above 0."""
    history, thresholds = History(window), {percentile: list[float]() for percentile in percentiles}
    for norm in norms:
        history.append(norm)
        for percentile, of_steps in thresholds.items():
            of_steps.append(history.percentile(percentile))
    return thresholds


def _clipped(norms: Sequence[float], thresholds: Sequence[float]) -> Step:
    """What clipping by these thresholds would have done."""
    coefs = [min(1.0, threshold / norm) for norm, threshold in zip(norms, thresholds, strict=True)]
    clipped, steps = float(sum(coef < 1 for coef in coefs)), len(coefs)
    return Step(
        0, steps - 1, steps=steps, measured=steps, clipped=clipped, coef_sum=math.fsum(coefs), coef_min=min(coefs)
    )


def nearest_fixed(norms: Sequence[float], thresholds: Sequence[float]) -> float:
    """The fixed threshold that would have done most nearly the same, by norm.

    That is the one with the least mean squared difference between the logarithms of its clip coefficients and of
    theirs. Where nothing was clipped it is the largest norm, the least value that clips nothing.

    Args:
        norms: Of the steps, each above 0.
        thresholds: Of the same steps.
    """
    logs = sorted(
        (math.log(norm), min(0.0, math.log(threshold / norm)))
        for norm, threshold in zip(norms, thresholds, strict=True)
    )
    # Between two norms that follow each other the same steps are clipped, and the difference is a parabola.
    best, least = logs[-1][0], math.fsum(log_coef**2 for _, log_coef in logs)
    unclipped, above, squares, count = least, 0.0, 0.0, 0
    for at in range(len(logs) - 1, -1, -1):
        log_norm, log_coef = logs[at]
        wanted = log_norm + log_coef  # of the fixed threshold, to have the same coefficient here
        unclipped, above, squares, count = unclipped - log_coef**2, above + wanted, squares + wanted**2, count + 1
        lowest = logs[at - 1][0] if at else -math.inf
        log_fixed = min(max(above / count, lowest), log_norm)
        difference = unclipped + squares - 2 * log_fixed * above + count * log_fixed**2
        if difference < least - 1e-12 * len(logs):
            best, least = log_fixed, difference
    return math.exp(best)


def nearest_fixed_value(thresholds: Sequence[float]) -> float:
    """The same by value: the geometric mean of the thresholds.

    An element that both clamp has a coefficient of threshold / element; of the others nothing is recorded.
    """
    return math.exp(math.fsum(map(math.log, thresholds)) / len(thresholds))


def recommended(found: Mapping[tuple[float, int | None], Step]) -> tuple[float, int | None]:
    """The lowest percentile of at least 50 over 100 steps that keeps most of the steps' length."""
    eligible = [setting for setting in found if setting[1] == 100 and setting[0] >= 50] or list(found)
    return next((setting for setting in eligible if found[setting].clip_coef_mean >= LEAST_COEF), eligible[-1])


def table(norms: Sequence[float]) -> str:
    """What several settings would have done by norm, as a table for the terminal, with a recommendation."""
    finite, windows = _finite(norms), _distinct(norms)
    found = candidates(finite, windows=windows)
    lines = ["percentile  window  steps clipped  mean coefficient  smallest coefficient"]
    for (percentile, window), steps in found.items():
        lines.append(
            f"{percentile:10g}  {_named(window):>6}  {steps.clipped_fraction:13.1%}"
            f"  {steps.clip_coef_mean:16.2f}  {steps.coef_min:20.2g}"
        )
    percentile, window = recommended(found)
    fixed = nearest_fixed(finite, thresholds_of(finite, [percentile], window)[percentile])
    done = _clipped(finite, [fixed] * len(finite))
    lines += [
        *_of_same_windows(len(finite), windows),
        "",
        f"Start with AutoClip(percentile={percentile:g}, window={window}): the lowest percentile ≥ 50"
        f" whose mean clip coefficient ({found[percentile, window].clip_coef_mean:.2f}) is ≥ {LEAST_COEF:g}.",
        "SGD then trains with the learning rate times that coefficient; Adam-type optimizers hardly change.",
        "A lower percentile clips more. `max_update_ratio` is not part of this table.",
        f"If it must be a fixed threshold, gradient_clip_val={fixed:.3g} is the nearest here:"
        f" {done.clipped_fraction:.1%} clipped, mean coefficient {done.clip_coef_mean:.2f}.",
    ]
    return "\n".join(lines)


def table_by_value(rms: Sequence[float], percentile: float = 50.0, multiplier: float = BY_VALUE) -> str:
    """The thresholds of several settings by value, and the fixed ones that come nearest.

    Args:
        rms: The gradient RMS of the steps.
        percentile: Of the last line.
        multiplier: How many times the percentile the thresholds are.
    """
    finite, windows = _finite(rms), _distinct(rms)
    lines, fixed = ["percentile  window  smallest threshold   largest  nearest fixed"], dict[float, float]()
    for window in windows:
        for each, of_history in thresholds_of(finite, sorted({*PERCENTILES, percentile}), window).items():
            thresholds = [multiplier * threshold for threshold in of_history]
            nearest = nearest_fixed_value(thresholds)
            fixed.setdefault(each, nearest)
            lines.append(
                f"{each:10g}  {_named(window):>6}  {min(thresholds):18.3g}  {max(thresholds):8.3g}  {nearest:13.3g}"
            )
    lines += [
        *_of_same_windows(len(finite), windows),
        "",
        f"The thresholds are {multiplier:g} times the percentile (`multiplier`) of the gradient RMS. How many"
        " elements they clamp is not recorded.",
        f"If it must be a fixed threshold, gradient_clip_val={fixed[percentile]:.3g} with"
        f' gradient_clip_algorithm="value" comes nearest to percentile {percentile:g} over {_named(windows[0])} steps.',
    ]
    return "\n".join(lines)


def _distinct(norms: Sequence[float]) -> list[int | None]:
    """The windows that differ over so many norms: all that hold the whole history are one."""
    finite = _finite(norms)
    shorter = [window for window in WINDOWS if window is not None and window < len(finite)]
    return [*shorter, next(window for window in WINDOWS if window is None or window >= len(finite))]


def _of_same_windows(norms: int, windows: Sequence[int | None]) -> list[str]:
    """What to say of the windows that are not shown."""
    same = [_named(window) for window in WINDOWS if window not in windows]
    return [f"With {norms:,} norms a window of {' or '.join(same)} is the same as {windows[-1]}."] if same else []


def _named(window: int | None) -> str:
    return "all" if window is None else str(window)
