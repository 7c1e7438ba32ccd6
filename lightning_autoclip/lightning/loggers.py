"""What is logged to every logger: keys and settings, rows, the table of large steps, the report's summary."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.utilities import rank_zero_warn

from lightning_autoclip._text import as_ascii_key, csv_of, finite_row, markdown_of
from lightning_autoclip.lightning import wandb
from lightning_autoclip.steplog import Row, StepLog

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

CONFIG_KEY = "lightning_autoclip"  # of the settings among the hyperparameters
_WITH_SERVERS = ("WandbLogger", "MLFlowLogger", "CometLogger")
_TABLE, _HEALTH = "autoclip_spikes", "autoclip/health"


def describe(loggers: Iterable[Logger], settings: dict[str, Any], hparams: Any, step: int) -> None:
    """Log at the start of a fit how gradients are clipped.

    Args:
        loggers: Those of the Trainer.
        settings: The callback's settings.
        hparams: The hyperparameters of the module; what stands there under our key stays.
        step: The step that the fit begins with.
    """
    for logger in loggers:  # MLflow refuses another value in a run that is resumed
        _attempt("callback's settings", logger, partial(_log_settings, logger, settings, hparams, step))


def _log_settings(logger: Any, settings: dict[str, Any], hparams: Any, step: int) -> None:
    """As hyperparameters under one key where a server keeps them, as text to TensorBoard, else as a file.

    `hparams.yaml` is left to the user's own: Lightning hands all of it to a module that is loaded with it.
    """
    if _is(logger, "TensorBoardLogger"):
        rows = [{"setting": key, "value": str(value)} for key, value in settings.items()]
        logger.experiment.add_text("autoclip/settings", markdown_of(rows), step)
    elif not any(_is(logger, name) for name in _WITH_SERVERS):
        _write(logger, "autoclip_settings.json", json.dumps(settings, indent=1))
    else:
        config = dict(logger.experiment.config) if _is(logger, "WandbLogger") else {}
        held = config.get(CONFIG_KEY, hparams.get(CONFIG_KEY) if isinstance(hparams, Mapping) else None)
        if held is not None and not (isinstance(held, Mapping) and settings.keys() <= held.keys()):
            raise ValueError(f"the hyperparameters have a key `{CONFIG_KEY}` of your own, which stays: rename it")
        # Of keys, MLflow takes few: those of groups are names of the user's.
        groups = str(settings["groups"]) if _is(logger, "MLFlowLogger") else settings["groups"]
        logger.log_hyperparams({CONFIG_KEY: {**settings, "groups": groups}})


def define(loggers: Iterable[Logger], keys: Sequence[str]) -> None:
    """Define the keys that rows will have."""
    for logger in loggers:
        if _is(logger, "WandbLogger"):
            _attempt("names of the metrics", logger, partial(wandb.define_metrics, logger, keys))


def send(loggers: Iterable[Logger], rows: Sequence[Row]) -> list[Exception]:
    """Log the finite numbers of rows, each with its step, and save them; nothing is done if there is no row.

    A NaN or an Inf stays in the summaries of W&B for good, a database makes a largest number or an error of it, and
    Comet refuses it. A CSV file has an empty cell, so that its columns are the same from the first row on.

    Args:
        loggers: Those of the Trainer.
        rows: What is to be logged.

    Returns:
        The errors of the loggers that failed; the others have the rows all the same.
    """
    failed: list[Exception] = []
    for logger in loggers if rows else ():
        try:
            _send(logger, rows)
            logger.save()
        except Exception as error:
            failed.append(error)
    return failed


def _send(logger: Logger, rows: Sequence[Row]) -> None:
    keeps_columns, takes_ascii = _is(logger, "CSVLogger"), _is(logger, "MLFlowLogger")
    for step, row in rows:
        row = {as_ascii_key(key): value for key, value in row.items()} if takes_ascii else row
        finite: Any = {key: value for key, value in row.items() if math.isfinite(value)}
        if keeps_columns or finite:
            logger.log_metrics(dict.fromkeys(row) | finite if keeps_columns else finite, step=step)


def illustrate(
    loggers: Iterable[Logger],
    log: StepLog,
    span: tuple[float, float],
    norms: Sequence[float],
    alert_above: float | None,
    alert_nonfinite: bool,
) -> None:
    """Log what only Weights & Biases takes, of the logging interval of one optimizer or group.

    Args:
        loggers: Those of the Trainer.
        log: What happened.
        span: The first and the last step of the interval.
        norms: Of which a histogram is logged; none if there are none.
        alert_above: Of norms how many times the usual one alerts are sent; ``None`` for no alerts.
        alert_nonfinite: Whether non-finite steps send an alert too; with a loss scaler they are usual.
    """
    for logger in loggers:
        if _is(logger, "WandbLogger"):
            _attempt("histogram of the norms", logger, partial(wandb.log_histogram, logger, log.prefix, norms, span[1]))
            if alert_above is not None:
                _attempt("alert", logger, partial(wandb.alert, logger, log, span, alert_above, alert_nonfinite))


def conclude(loggers: Iterable[Logger], spikes: Sequence[dict[str, Any]], summary: str | None, step: int) -> None:
    """Log the table of large steps and the report's summary; a logger that fails is warned of.

    Args:
        loggers: Those of the Trainer.
        spikes: What ``spikes()`` of the callback returns; nothing is logged of an empty table.
        summary: Of the report; ``None`` where there is no report.
        step: The step that it is logged at.
    """
    rows = [finite_row(spike) for spike in spikes]
    for logger in loggers:
        if rows:
            _attempt("table of large steps", logger, partial(_log_spikes, logger, rows, step))
        if summary is not None:
            _attempt("report's summary", logger, partial(_log_health, logger, summary, step))


def _attempt(what: str, logger: Logger, log: Callable[[], None]) -> None:
    try:
        log()
    except Exception as error:  # a server or a disk that fails must not fail a run for what is only reported
        rank_zero_warn(f"The {what} could not be logged to `{type(logger).__name__}`: {error}")


def _log_spikes(logger: Any, rows: Sequence[dict[str, Any]], step: int) -> None:
    """To W&B and Comet as a table, to TensorBoard as text, to MLflow as an artifact, else as a CSV file.

    The file stands beside the logger's own, or, if it has no directory per run, where Lightning puts a run's
    checkpoints: in ``save_dir/name/version``.
    """
    if _is(logger, "WandbLogger"):
        wandb.log_table(logger, "autoclip/spikes", rows, step)
    elif _is(logger, "TensorBoardLogger"):
        logger.experiment.add_text("autoclip/spikes", markdown_of(rows), step)
    elif _is(logger, "MLFlowLogger"):  # its server may have another disk
        logger.experiment.log_text(logger.run_id, csv_of(rows), f"{_TABLE}.csv")
    elif _is(logger, "CometLogger"):  # a file beside what it keeps offline would be seen by nobody
        table = [["" if value is None else value for value in row.values()] for row in rows]
        logger.experiment.log_table(f"{_TABLE}.csv", tabular_data=table, headers=list(rows[0]))
    else:
        _write(logger, f"{_TABLE}.csv", csv_of(rows))


def _log_health(logger: Any, health: str, step: int) -> None:
    """To W&B's summary, TensorBoard's texts, MLflow's tags, Comet's other values, else into a file beside the table.

    Of a run that is resumed the last one counts: it is of the whole run.
    """
    if _is(logger, "WandbLogger"):
        wandb.log_health(logger, health)
    elif _is(logger, "TensorBoardLogger"):
        logger.experiment.add_text(_HEALTH, health, step)
    elif _is(logger, "MLFlowLogger"):
        logger.experiment.set_tag(logger.run_id, _HEALTH, health)
    elif _is(logger, "CometLogger"):
        logger.experiment.log_other(_HEALTH, health)
    else:
        _write(logger, f"{_HEALTH.replace('/', '_')}.txt", f"{health}\n")


def _write(logger: Any, name: str, text: str) -> None:
    if directory := getattr(logger, "log_dir", None) or _directory_of_run(logger):
        files = get_filesystem(directory)  # which need not be the local one
        files.makedirs(directory, exist_ok=True)
        with files.open(f"{directory}/{name}", "w", encoding="utf-8") as file:
            file.write(text)


def _is(logger: Logger, name: str) -> bool:
    """Whether this is a logger of that name, of either Lightning package; needs nothing to be installed."""
    return any(base.__name__ == name for base in type(logger).__mro__)


def _directory_of_run(logger: Any) -> str:
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return os.path.join(logger.save_dir, str(logger.name), version) if logger.save_dir else ""
