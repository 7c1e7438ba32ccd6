"""What only Weights & Biases can do."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

from lightning_autoclip._text import printable
from lightning_autoclip.monitoring.summary import Point
from lightning_autoclip.monitoring.trace import Spike, Trace
from lightning_autoclip.monitoring.verdicts import late_spikes

_WAIT = timedelta(minutes=10)  # between two alerts of one title
_NO_CURVES = ("/grad_norm_max_step",)  # numbers to look up, not to draw
_OF_TABLES = ("ncols", "nrows", "size")  # numbers that the client adds to a table


def define_metrics(logger: Any, keys: Iterable[str]) -> None:
    """Define each metric by its name.

    Never by a glob: Lightning has defined ``*`` and the client picks among matching globs at random.
    """
    for key in keys:
        logger.experiment.define_metric(
            _escaped(_prefix(logger) + key),
            step_metric="trainer/global_step",
            step_sync=True,
            summary="min,max,mean,last",
            hidden=key.endswith(_NO_CURVES) or None,  # from the panels that W&B makes by itself
        )


def _escaped(key: str) -> str:
    """The key as the name of a metric, in which a dot means a key within a dict."""
    return key.replace(".", r"\.")


def _prefix(logger: Any) -> str:
    """What the logger puts before every key."""
    return f"{logger._prefix}{logger.LOGGER_JOIN_CHAR}" if logger._prefix else ""


def extras(
    logger: Any,
    prefix: str,
    points: Sequence[Point],
    trace: Trace,
    histogram: bool,
    alert_above: float | None,
    alert_nonfinite: bool,
) -> Iterator[tuple[str, Callable[[], None]]]:
    """What is to be sent of some steps beside their row: what it is called, and what sends it."""
    if histogram:
        yield "histogram of the norms", partial(log_histogram, logger, f"{prefix}grad_norm_histogram", points)
    if alert_above is None:
        return
    held, large = {point.step for point in points}, late_spikes(trace, alert_above)
    spikes = sorted((each for each in large if each.point.step in held), key=lambda spike: spike.point.step)
    yield "alert", partial(alert_spike, logger, prefix, spikes)
    if alert_nonfinite:
        bad = [point for point in points if not math.isfinite(point.norm)]  # here, rather than in another group
        yield "alert", partial(alert_nonfinite_step, logger, prefix, bad)


def log_histogram(logger: Any, key: str, points: Sequence[Point]) -> None:
    """Log the distribution of the finite norms of some steps."""
    import wandb

    if norms := [point.norm for point in points if point.finite]:
        logger.log_metrics({key: wandb.Histogram(norms)}, step=points[-1].step)


def log_table(logger: Any, key: str, rows: Sequence[dict[str, Any]], step: int) -> None:
    """Log a table; the numbers that the client adds to it get no panel."""
    import wandb

    for number in _OF_TABLES:
        logger.experiment.define_metric(f"{_escaped(_prefix(logger) + key)}.{number}", hidden=True)
    table = wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
    logger.log_metrics({key: table}, step=step)


def log_health(logger: Any, health: str) -> None:
    """Put the report's verdicts into the run's summary."""
    logger.experiment.summary[f"{_prefix(logger)}autoclip/health"] = health


def alert_spike(logger: Any, prefix: str, spikes: Sequence[Spike]) -> None:
    """Send an alert of the first of these spikes, if there is one."""
    for spike in spikes[:1]:
        names = printable(", ".join(f"{name} ({share:.0%})" for name, share in spike.parameters))
        what = f"{spike.point.norm:.4g}, {spike.times:.1f} times the typical one" + (
            f", mostly in {names}" * bool(names)
        )
        _alert(logger, f"{prefix.strip('/')}: spike of the gradient norm", spike.point, what)


def alert_nonfinite_step(logger: Any, prefix: str, points: Sequence[Point]) -> None:
    """Send an alert of the first of these steps, which are not finite, if there is one."""
    for point in points[:1]:
        what = f"{point.norm:.4g}, not finite. `spikes()` of the callback names the parameters"
        _alert(logger, f"{prefix.strip('/')}: non-finite gradient", point, what)


def _alert(logger: Any, title: str, point: Point, what: str) -> None:
    """W&B limits the rate per title, so that neither kind hides the other."""
    batches = point.batches.replace("-", " to ")
    text = f"At step {point.step} (epoch {point.epoch}, batch {batches}) the norm of the gradient was {what}."
    logger.experiment.alert(title=title, text=text, level="WARN", wait_duration=_WAIT)
