"""What several percentiles and windows would have clipped in a recorded run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_autoclip.clipping.record import History

PERCENTILES = (1.0, 10.0, 25.0, 50.0, 75.0, 90.0, 99.0)
WINDOWS = (100, 1000, None)
LEAST_FACTOR = 0.6  # mean factor on the step below which the learning rate is no longer what was set


@dataclass(frozen=True)
class Candidate:
    """What one setting would have done to norms as they were: a run that is clipped has other ones later.

    Attributes:
        percentile: Of the last ``window`` norms.
        window: ``None`` for all of them.
        clipped_fraction: Share of the steps above the threshold.
        clip_coef_mean: Mean factor on the step.
        clip_coef_min: The smallest.
    """

    percentile: float
    window: int | None
    clipped_fraction: float
    clip_coef_mean: float
    clip_coef_min: float


def candidates(
    norms: Sequence[float], percentiles: Sequence[float] = PERCENTILES, windows: Sequence[int | None] = WINDOWS
) -> list[Candidate]:
    """Clip recorded norms by several settings.

    Args:
        norms: Of the steps in order, before clipping; those that are not finite are left out.
        percentiles: Each between 0 and 100.
        windows: Each at least 1, or ``None``.

    Raises:
        ValueError: There are fewer than two norms.
    """
    finite = [norm for norm in norms if 0 < norm < math.inf]
    if len(finite) < 2:
        raise ValueError(f"Expected at least 2 recorded norms to suggest a percentile from, but got {len(finite)}.")
    found = []
    for window in windows:
        history, coefs = History(window), [list[float]() for _ in percentiles]
        for norm in finite:
            history.record(norm)
            for percentile, of_percentile in zip(percentiles, coefs, strict=True):
                of_percentile.append(min(1.0, float(history.percentile(percentile)) / norm))
        for percentile, of_percentile in zip(percentiles, coefs, strict=True):
            clipped = sum(coef < 1 for coef in of_percentile) / len(finite)
            mean = math.fsum(of_percentile) / len(finite)
            found.append(Candidate(percentile, window, clipped, mean, min(of_percentile)))
    return found


def recommended(found: Sequence[Candidate]) -> Candidate:
    """The lowest percentile of at least 10 over 100 steps that leaves the steps most of their length."""
    eligible = [one for one in found if one.window == 100 and one.percentile >= 10] or list(found)
    return next((one for one in eligible if one.clip_coef_mean >= LEAST_FACTOR), eligible[-1])


def table(found: Sequence[Candidate]) -> str:
    """The candidates as a table for the terminal, and the recommendation."""
    lines = ["percentile  window  steps clipped  mean factor  smallest"]
    for one in found:
        window = "all" if one.window is None else str(one.window)
        lines.append(
            f"{one.percentile:10g}  {window:>6s}  {one.clipped_fraction:13.1%}  {one.clip_coef_mean:11.2f}"
            f"  {one.clip_coef_min:8.2g}"
        )
    best = recommended(found)
    lines += [
        "",
        f"Start with AutoClip(percentile={best.percentile:g}, window={best.window}): its mean factor on the step is"
        f" {best.clip_coef_mean:.2f}.",
        "By that factor it lowers the learning rate of SGD; Adam hardly minds. A lower percentile guards more.",
    ]
    return "\n".join(lines)
