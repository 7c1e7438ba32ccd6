"""What came from elsewhere as it can be shown: values in messages, names in tables, terminals and keys."""

from __future__ import annotations

import re
import reprlib
import zlib
from collections.abc import Iterable
from itertools import islice
from typing import Any

_MOST_SHOWN = 120  # characters of a value
_MOST_OF_A_KEY = 80


class _Short(reprlib.Repr):
    """Of what a few entries hold, a few levels deep: what is shared in many places can have more text than memory."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, _MOST_SHOWN, _MOST_SHOWN

    def repr_dict(self, x: dict[Any, Any], level: int) -> str:
        if level <= 0:
            return "{...}"
        own = [f"{self.repr1(key, level - 1)}: {self.repr1(x[key], level - 1)}" for key in islice(x, self.maxdict)]
        return f"{{{', '.join(own)}{', ...' * (len(x) > self.maxdict)}}}"


def shown(value: Any) -> str:
    """A value in a message: short, whatever its ``repr`` does."""
    try:
        text = _Short().repr(value) if isinstance(value, (dict, list, tuple)) else repr(value)
    except Exception:  # Python refuses to write an integer of more than 4,300 digits, for one
        return "what cannot be shown"
    return text if len(text) <= _MOST_SHOWN else f"{text[: _MOST_SHOWN - 3]}..."


def printable(text: str) -> str:
    r"""Return the text, or, if it has control characters or line ends, what ``repr`` makes of it.

    Example:
        >>> printable("net.\x1b[31mred")
        'net.\\x1b[31mred'
    """
    return text if text.isprintable() else repr(text)[1:-1]


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
    return re.sub(r"([\\|`*<\[])", r"\\\1", printable(text))
