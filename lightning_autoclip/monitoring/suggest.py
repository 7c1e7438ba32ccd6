"""What several percentiles and windows would have clipped in a recorded run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from lightning_autoclip.clipping.record import History
from lightning_autoclip.monitoring.summary import Summary

PERCENTILES = (1.0, 10.0, 25.0, 50.0, 75.0, 90.0, 99.0)
WINDOWS = (100, 1000, None)
LEAST_FACTOR = 0.6  # mean factor on the step below which the learning rate is no longer what was set


def candidates(
    norms: Sequence[float], percentiles: Sequence[float] = PERCENTILES, windows: Sequence[int | None] = WINDOWS
) -> dict[tuple[float, int | None], Summary]:
    """Clip recorded norms by several settings.

    Args:
        norms: Of the steps in order, before clipping; those that are not finite are left out.
        percentiles: Each between 0 and 100.
        windows: Each at least 1, or ``None`` for all norms up to then.

    Returns:
        By percentile and window, what each would have done to norms as they were: a run that is clipped has other ones
        later. Only what clipping did is summed up.

    Raises:
        ValueError: There are fewer than two norms.
    """
    finite = [norm for norm in norms if 0 < norm < math.inf]
    if len(finite) < 2:
        raise ValueError(f"Expected at least 2 recorded norms to suggest a percentile from, but got {len(finite)}.")
    found = {}
    for window in windows:
        history, by_percentile = History(window), {percentile: list[float]() for percentile in percentiles}
        for norm in finite:
            history.record(norm)
            for percentile, coefs in by_percentile.items():
                coefs.append(min(1.0, float(history.percentile(percentile)) / norm))
        for percentile, coefs in by_percentile.items():
            clipped = float(sum(coef < 1 for coef in coefs))
            found[percentile, window] = Summary(
                steps=len(coefs), measured=len(coefs), clipped=clipped, coefs=math.fsum(coefs), coef_min=min(coefs)
            )
    return found


def recommended(found: Mapping[tuple[float, int | None], Summary]) -> tuple[float, int | None]:
    """The lowest percentile of at least 50 over 100 steps that leaves the steps most of their length."""
    eligible = [setting for setting in found if setting[1] == 100 and setting[0] >= 50] or list(found)
    return next((setting for setting in eligible if found[setting].clip_coef_mean >= LEAST_FACTOR), eligible[-1])


def table(found: Mapping[tuple[float, int | None], Summary]) -> str:
    """The candidates as a table for the terminal, and the recommendation."""
    lines = ["percentile  window  steps clipped  mean factor  smallest"]
    for (percentile, window), steps in found.items():
        lines.append(
            f"{percentile:10g}  {'all' if window is None else window:>6}  {steps.clipped_fraction:13.1%}"
            f"  {steps.clip_coef_mean:11.2f}  {steps.clip_coef_min:8.2g}"
        )
    percentile, window = recommended(found)
    lines += [
        "",
        f"Start with AutoClip(percentile={percentile:g}, window={window}): its mean factor on the step is"
        f" {found[percentile, window].clip_coef_mean:.2f}.",
        "By that factor it lowers the learning rate of SGD; Adam hardly minds. A lower percentile guards more.",
        "How far the weights bound the steps of SGD (`max_update_ratio`) this table does not tell.",
    ]
    return "\n".join(lines)
