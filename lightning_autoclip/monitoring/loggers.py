"""What loggers are told of a run, whichever they are: its keys and settings, rows, and at the end the spike table."""

from __future__ import annotations

import csv
import io
import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.utilities import rank_zero_warn

from lightning_autoclip.monitoring import wandb
from lightning_autoclip.monitoring.summary import Point
from lightning_autoclip.monitoring.trace import Trace
from lightning_autoclip.monitoring.verdicts import late_spikes

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

Row = tuple[int, dict[str, float]]
"""What is logged at a step."""

_TABLE = "autoclip_spikes"


def describe(loggers: Iterable[Logger], settings: dict[str, Any]) -> None:
    """Tell at the start of a fit how it is clipped.

    Args:
        loggers: Those of the Trainer.
        settings: The callback's arguments, as plain values.
    """
    for logger in loggers:
        if _is(logger, "WandbLogger"):
            wandb.log_settings(logger, settings)


def define(loggers: Iterable[Logger], keys: Sequence[str]) -> None:
    """Tell of keys that rows will have."""
    for logger in loggers:
        if _is(logger, "WandbLogger"):
            wandb.define_metrics(logger, keys)


def send(loggers: Iterable[Logger], rows: Sequence[Row]) -> None:
    """Log the finite numbers of rows, each with its step, and save them; nothing is done if there is no row.

    A NaN or an infinity stays in the summaries of W&B for good, a database makes a largest number or an error of it,
    and Comet refuses it. A CSV file has an empty cell, so that its columns are the same from the first row on.
    """
    for logger in loggers if rows else ():
        keeps_columns = _is(logger, "CSVLogger")
        for step, row in rows:
            finite: Any = {key: value for key, value in row.items() if math.isfinite(value)}
            if keeps_columns or finite:
                logger.log_metrics(dict.fromkeys(row) | finite if keeps_columns else finite, step=step)
        logger.save()


def joined(parts: Iterable[Sequence[Row]]) -> list[Row]:
    """The rows of several scopes as one row per step; of a scope with several at one step, the first with the first."""
    found: dict[tuple[int, int], dict[str, float]] = {}
    for part in parts:
        seen: Counter[int] = Counter()
        for step, row in part:
            found.setdefault((step, seen[step]), {}).update(row)
            seen[step] += 1
    return [(step, row) for (step, _), row in sorted(found.items(), key=lambda item: item[0])]


def illustrate(
    loggers: Iterable[Logger],
    prefix: str,
    points: Sequence[Point],
    trace: Trace,
    *,
    histogram: bool = False,
    alert_above: float | None = None,
    alert_nonfinite: bool = True,
) -> None:
    """Send what only Weights & Biases takes, of the steps of one scope that a row sums up.

    Args:
        loggers: Those of the Trainer.
        prefix: Of the scope's keys.
        points: The steps.
        trace: What happened in the run so far.
        histogram: Whether a histogram of the norms is logged.
        alert_above: Whether alerts are sent, and of norms how many times the typical one, as the report measures it.
        alert_nonfinite: Whether steps that are not finite are alerted of too; with a loss scaler they are usual.
    """
    for logger in loggers:
        if not _is(logger, "WandbLogger") or not points:
            continue
        if histogram:
            wandb.log_histogram(logger, f"{prefix}grad_norm_histogram", points)
        if alert_above is not None:
            held, large = set(points), late_spikes(trace, alert_above)
            spikes = sorted((each for each in large if each.point in held), key=lambda spike: spike.point.step)
            wandb.alert_spike(logger, prefix, spikes)
        if alert_above is not None and alert_nonfinite:
            wandb.alert_nonfinite(logger, prefix, [point for point in points if not point.finite])


def conclude(loggers: Iterable[Logger], spikes: Sequence[dict[str, Any]], health: str | None, step: int) -> None:
    """Log the spike table, and to W&B the report's verdicts; a logger that fails is warned of.

    Args:
        loggers: Those of the Trainer.
        spikes: What ``spikes()`` of the callback returns; nothing is logged of an empty table.
        health: The report's verdicts in a few words; ``None`` where there is no report.
        step: The step that it is logged at.
    """
    for logger in loggers:
        try:
            if spikes:
                _log_spikes(logger, [_finite(spike) for spike in spikes], step)
            if health is not None and _is(logger, "WandbLogger"):
                wandb.log_health(logger, health)
        except Exception as error:  # a server that fails now must not fail a training that is done
            rank_zero_warn(f"The spike table could not be logged to `{type(logger).__name__}`: {error}")


def _log_spikes(logger: Any, rows: Sequence[dict[str, Any]], step: int) -> None:
    """To W&B as a Table, to TensorBoard as text, to MLflow as an artifact, else as a CSV file.

    That file stands beside the logger's own, or, if it has no directory per run, where Lightning puts a run's
    checkpoints: in ``save_dir/name/version``.
    """
    if _is(logger, "WandbLogger"):
        wandb.log_table(logger, "autoclip/spikes", rows, step)
    elif _is(logger, "TensorBoardLogger"):
        logger.experiment.add_text("autoclip/spikes", _as_markdown(rows), step)
    elif _is(logger, "MLFlowLogger"):  # its server may have another disk
        logger.experiment.log_text(logger.run_id, _as_csv(rows), f"{_TABLE}.csv")
    elif directory := getattr(logger, "log_dir", None) or _directory_of_run(logger):
        files = get_filesystem(directory)  # which need not be the local one
        files.makedirs(directory, exist_ok=True)
        with files.open(f"{directory}/{_TABLE}.csv", "w") as file:
            file.write(_as_csv(rows))


def _is(logger: Logger, name: str) -> bool:
    """Whether this is a logger of that name, of either Lightning package; needs nothing to be installed."""
    return any(base.__name__ == name for base in type(logger).__mro__)


def _directory_of_run(logger: Any) -> str:
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return os.path.join(logger.save_dir, str(logger.name), version) if logger.save_dir else ""


def _as_csv(rows: Sequence[dict[str, Any]]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")  # where files are text, the system adds its own
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """The row with nothing where a number is not finite: neither JSON nor a database has it."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}


def _as_markdown(rows: Sequence[dict[str, Any]]) -> str:
    cells = [list(rows[0]), ["---"] * len(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
