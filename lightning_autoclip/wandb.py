"""What only Weights & Biases can do."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger


def is_wandb(logger: Logger) -> bool:
    """Whether this is a `WandbLogger` (of either Lightning package); needs no wandb to be installed."""
    return any(base.__name__ == "WandbLogger" for base in type(logger).__mro__)


def describe_run(logger: Any, keys: Iterable[str], settings: dict[str, Any]) -> None:
    """Define each metric and put the callback's settings into the run's config.

    Each key is named, never a glob: Lightning has defined ``*`` and the client picks among matching globs at random.

    Args:
        logger: A `WandbLogger`.
        keys: The keys that the callback will log.
        settings: The callback's arguments, stored in the config under ``autoclip``.
    """
    prefix = f"{logger._prefix}{logger.LOGGER_JOIN_CHAR}" if logger._prefix else ""
    for key in keys:
        logger.experiment.define_metric(
            prefix + key, step_metric="trainer/global_step", step_sync=True, summary="min,max,mean,last"
        )
    logger.log_hyperparams({"autoclip": settings})


def finite_part(row: dict[str, float]) -> dict[str, float]:
    """The row without NaN and infinities, any of which would stay in the run's summaries for good."""
    return {key: value for key, value in row.items() if math.isfinite(value)}
