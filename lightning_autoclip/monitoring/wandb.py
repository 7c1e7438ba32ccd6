"""What only Weights & Biases can do."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from lightning_autoclip.monitoring.summary import Point

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

_WAIT = timedelta(minutes=10)  # between two alerts


def is_logger(logger: Logger, name: str) -> bool:
    """Whether this is a logger of that name, of either Lightning package; needs nothing to be installed."""
    return any(base.__name__ == name for base in type(logger).__mro__)


def is_wandb(logger: Logger) -> bool:
    """Whether this is a `WandbLogger`."""
    return is_logger(logger, "WandbLogger")


def describe_run(logger: Any, keys: Iterable[str], settings: dict[str, Any]) -> None:
    """Define each metric and put the callback's settings into the run's config.

    Each key is named, never a glob: Lightning has defined ``*`` and the client picks among matching globs at random.

    Args:
        logger: A `WandbLogger`.
        keys: The keys that the callback will log.
        settings: The callback's arguments, stored in the config under ``autoclip``.
    """
    for key in keys:
        name = (_prefix(logger) + key).replace(".", r"\.")  # else a dot means a key within a dict
        logger.experiment.define_metric(
            name, step_metric="trainer/global_step", step_sync=True, summary="min,max,mean,last"
        )
    logger.log_hyperparams({"autoclip": settings})


def _prefix(logger: Any) -> str:
    """What the logger puts before every key."""
    return f"{logger._prefix}{logger.LOGGER_JOIN_CHAR}" if logger._prefix else ""


def finite_part(row: dict[str, float]) -> dict[str, float]:
    """The row without NaN and infinities, any of which would stay in the run's summaries for good."""
    return {key: value for key, value in row.items() if math.isfinite(value)}


def log_histogram(logger: Any, key: str, points: Sequence[Point]) -> None:
    """Log the distribution of the finite norms of some steps."""
    import wandb

    if norms := [point.norm for point in points if math.isfinite(point.norm)]:
        logger.log_metrics({key: wandb.Histogram(norms)}, step=points[-1].step)


def log_table(logger: Any, key: str, rows: Sequence[dict[str, Any]], step: int) -> None:
    """Log a table."""
    import wandb

    data = [[None if value != value else value for value in row.values()] for row in rows]  # NaN is no JSON
    table = wandb.Table(columns=list(rows[0]), data=data)
    logger.log_metrics({key: table}, step=step)


def summarise_run(logger: Any, verdicts: str) -> None:
    """Put the report's verdicts into the run's summary."""
    logger.experiment.summary[f"{_prefix(logger)}autoclip/health"] = verdicts


def alert(logger: Any, prefix: str, points: Sequence[Point], above: float, nonfinite: bool) -> None:
    """Send an alert of the first step so many times over its threshold, or not finite, if there is one.

    Args:
        logger: A `WandbLogger`.
        prefix: Of the optimizer's keys.
        points: The steps since the last row.
        above: How many times the threshold.
        nonfinite: Whether steps that are not finite count; with a loss scaler they are usual.
    """
    for point in points:
        spike = math.isfinite(point.norm) and point.statistic > above * point.threshold
        if spike or (nonfinite and not math.isfinite(point.norm)):
            same = point.first_batch == point.last_batch
            batches = f"{point.last_batch}" if same else f"{point.first_batch} to {point.last_batch}"
            times = point.statistic / point.threshold if spike and point.threshold else math.inf
            why = f"{times:.1f} times the threshold" if spike else "not finite"
            logger.experiment.alert(
                title=f"{prefix.strip('/')}: spike or non-finite gradient",  # W&B limits the rate per title
                text=(
                    f"At step {point.step} (epoch {point.epoch}, batch {batches}) the"
                    f" norm of the gradient was {point.norm:.4g}, {why}. `spikes()` of the callback names its layers."
                ),
                level="WARN",
                wait_duration=_WAIT,
            )
            return
