"""Tables as texts, and texts in files that are replaced whole or not at all."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from lightning_autoclip._text import as_markdown


def replace_text(files: Any, path: str, text: str) -> None:
    """Write a file anew, whole or not at all: a full disk or a kill leaves the one that was there.

    Args:
        files: The file system, as `fsspec` has them.
        path: The file.
        text: What it is to hold.
    """
    part = f"{path}.part"
    try:
        with files.open(part, "w", encoding="utf-8") as file:
            file.write(text)
        files.mv(part, path)
    except BaseException:
        with suppress(Exception):
            files.rm(part)
        raise


def csv_of(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of a table, of which there is at least one, as a CSV file."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")  # where files are text, the system adds its own
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def finite_row(row: dict[str, Any]) -> dict[str, Any]:
    """The row with nothing where a number is not finite: neither JSON nor a database has it."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}


def markdown_of(rows: Sequence[dict[str, Any]]) -> str:
    """The same as a table of markdown."""
    cells = [list(rows[0]), ["---"] * len(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else as_markdown(str(value))
