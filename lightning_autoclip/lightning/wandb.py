"""What only Weights & Biases can do."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any

from lightning_autoclip.diagnoses import late_spikes
from lightning_autoclip.steplog import StepLog
from lightning_autoclip.table import Place

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


def log_histogram(logger: Any, prefix: str, norms: Sequence[float], step: float) -> None:
    """Log the distribution of the norms of a logging interval."""
    import wandb

    if norms:
        logger.log_metrics({f"{prefix}grad_norm_histogram": wandb.Histogram(norms)}, step=int(step))


def log_table(logger: Any, key: str, rows: Sequence[dict[str, Any]], step: int) -> None:
    """Log a table; the numbers that the client adds to it get no panel."""
    import wandb

    for number in _OF_TABLES:
        logger.experiment.define_metric(f"{_escaped(_prefix(logger) + key)}.{number}", hidden=True)
    table = wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
    logger.log_metrics({key: table}, step=step)


def log_health(logger: Any, health: str) -> None:
    """Put the report's summary into the run's."""
    logger.experiment.summary[f"{_prefix(logger)}autoclip/health"] = health


def alert(logger: Any, log: StepLog, span: tuple[float, float], above: float, of_nonfinite: bool) -> None:
    """Send an alert of the first spike of a logging interval, and another one of its first non-finite step."""
    first, last = span
    spikes = sorted(large for large in late_spikes(log, above) if first <= large.place.step <= last)
    for large in spikes[:1]:
        names = ", ".join(f"{name} ({share:.0%})" for name, share in large.parameters)
        what = f"{large.norm:.4g}, {large.times:.1f} times the usual one" + f", mostly in {names}" * bool(names)
        _alert(logger, f"{log.prefix.strip('/')}: spike of the gradient norm", large.place, what)
    # Those whose norm is not finite itself, rather than that of another group.
    bad = [large for large in log.nonfinite if first <= large.place.step <= last and not math.isfinite(large.norm)]
    for large in bad[:1] if of_nonfinite else ():
        what = f"{large.norm:.4g}. `spikes()` of the callback names the parameters"
        _alert(logger, f"{log.prefix.strip('/')}: non-finite gradient", large.place, what)


def _alert(logger: Any, title: str, place: Place, what: str) -> None:
    """W&B limits the rate per title, so that neither kind hides the other."""
    text = f"At {place.where} the norm of the gradient was {what}."
    logger.experiment.alert(title=title, text=text, level="WARN", wait_duration=_WAIT)
