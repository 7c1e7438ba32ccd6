"""The spike table, in the form that each logger has for tables."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from typing import Any

from lightning.fabric.utilities.cloud_io import get_filesystem

from lightning_autoclip.monitoring.wandb import is_logger, is_wandb, log_table

NAME = "autoclip_spikes"


def log_spikes(logger: Any, rows: Sequence[dict[str, Any]], step: int) -> None:
    """Log the table: to W&B as a Table, to TensorBoard as text, to MLflow as an artifact, else as a CSV file.

    That file stands beside the logger's own, or, if it has no directory per run, where Lightning puts a run's
    checkpoints: in ``save_dir/name/version``.

    Args:
        logger: A logger of Lightning.
        rows: What ``spikes()`` of the callback returns; nothing is logged of an empty table.
        step: The step that it is logged at.
    """
    if not rows:
        return
    if is_wandb(logger):
        log_table(logger, "autoclip/spikes", rows, step)
    elif is_logger(logger, "TensorBoardLogger"):
        logger.experiment.add_text("autoclip/spikes", as_markdown(rows), step)
    elif is_logger(logger, "MLFlowLogger"):  # its server may have another disk
        logger.experiment.log_text(logger.run_id, as_csv(rows), f"{NAME}.csv")
    elif directory := getattr(logger, "log_dir", None) or _directory_of_run(logger):
        files = get_filesystem(directory)  # which need not be the local one
        files.makedirs(directory, exist_ok=True)
        with files.open(f"{directory}/{NAME}.csv", "w") as file:
            file.write(as_csv(rows))


def _directory_of_run(logger: Any) -> str:
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return os.path.join(logger.save_dir, str(logger.name), version) if logger.save_dir else ""


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """The table as the text of a CSV file."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")  # where files are text, the system adds its own
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def as_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table in markdown."""
    cells = [list(rows[0]), ["---"] * len(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
