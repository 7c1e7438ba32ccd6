"""Values in messages, names in keys of loggers, tables as texts."""

from __future__ import annotations

import csv
import io
import math
import re
import reprlib
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

_MOST_SHOWN = 120  # characters of a value
_MOST_OF_A_KEY = 80


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, _MOST_SHOWN, _MOST_SHOWN


def shown(value: Any) -> str:
    """A value in a message: short, whatever its ``repr`` does, and however often it holds the same list."""
    try:
        text = _SHORT.repr(value)
    except Exception:  # Python refuses to write an integer of more than 4,300 digits, for one
        return "what cannot be shown"
    return text if len(text) <= _MOST_SHOWN else f"{text[: _MOST_SHOWN - 3]}..."


def as_key(name: str) -> str:
    """A name as a part of a key: other characters than letters, digits, ``_``, ``-``, ``.`` and spaces as their number.

    What is longer than loggers take is cut short, and ends in a number that is its own.

    Example:
        >>> as_key("blocks.0.attn"), as_key("a*b/c")
        ('blocks.0.attn', 'a_2a_b_2f_c')
    """
    key = _numbered(r"[^\w\-. ]", name)
    if len(key) <= _MOST_OF_A_KEY:
        return key
    return f"{key[:_MOST_OF_A_KEY]}-{_checksum(key)}"


def as_ascii_key(key: str) -> str:
    """A key for a logger that strips all other letters, so that two keys could become one."""
    return _numbered(r"[^\x00-\x7f]", key)


def _checksum(text: str) -> str:
    return f"{zlib.crc32(text.encode('utf-8', 'replace')):08x}"


def _numbered(others: str, text: str) -> str:
    """The text with each character that a pattern finds as its number."""
    return re.sub(others, lambda found: f"_{ord(found[0]):x}_", text)


def as_keys(names: Iterable[str]) -> dict[str, str]:
    """Each name's key. Of names whose keys would be one to some logger, the later ones end in a number that is theirs.

    Example:
        >>> as_keys(["a*b", "a_2a_b"])
        {'a*b': 'a_2a_b', 'a_2a_b': 'a_2a_b-4581f594'}
    """
    keys: dict[str, str] = {}
    taken = set[str]()
    for name in names:
        key = as_key(name)
        while as_ascii_key(key) in taken:
            key = f"{key}-{_checksum(name)}"
        taken.add(as_ascii_key(key))
        keys[name] = key
    return keys


def as_markdown(text: str) -> str:
    """A text within a line of markdown, a table's cell too."""
    return re.sub(r"([\\|`*<\[])", r"\\\1", text)


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
