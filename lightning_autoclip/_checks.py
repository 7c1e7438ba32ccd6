"""Checks of arguments: one error grammar for the whole library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from lightning_autoclip._text import shown


def check_number(name: str, value: Any, rule: str, low: float, high: float = math.inf, open_low: bool = False) -> float:
    """Return ``value`` as a float, or raise if it is not a real number in the range.

    Args:
        name: The argument's name, for the message.
        value: What the user gave.
        rule: What is expected, for the message, for example ``"a number above 0"``.
        low: Smallest value allowed (with ``open_low``: the value must lie above it).
        high: Largest value allowed.
        open_low: Whether ``low`` itself is refused.

    Raises:
        TypeError: ``value`` is no real number (a bool is not one).
        ValueError: ``value`` is NaN or outside the range.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"Expected `{name}` to be {rule}, but got {shown(value)} of type `{type(value).__name__}`.")
    try:
        number = float(value)
    except OverflowError as error:  # an integer or a fraction may be larger
        raise ValueError(f"Expected `{name}` to be {rule}, in the range of a float, but got {shown(value)}.") from error
    if not (low < number if open_low else low <= number) or number > high:
        raise ValueError(f"Expected `{name}` to be {rule}, but got {shown(value)}.")
    return number


def check_positive(name: str, value: Any) -> float:
    """Return ``value`` as a float, or raise if it is not a number above 0 that float32 can hold."""
    number = check_number(name, value, "a number above 0", 0, open_low=True)
    if not 1e-37 < number < 3e38:
        raise ValueError(f"Expected `{name}` to lie in the range of float32, but got {shown(value)}.")
    return number


def check_integer(name: str, value: Any, rule: str, low: int) -> int:
    """Return ``value`` as an int, or raise if it is not a whole number of at least ``low``.

    Raises:
        TypeError: ``value`` is no integer (a bool and ``10.0`` are none).
        ValueError: ``value`` is below ``low``, or no int64.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"Expected `{name}` to be {rule}, but got {shown(value)} of type `{type(value).__name__}`.")
    if not low <= int(value) < 2**63:
        raise ValueError(f"Expected `{name}` to be {rule}, but got {shown(value)}.")
    return int(value)


def check_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """Return the one of ``choices`` that ``value`` equals (as a plain str), or raise ``ValueError``."""
    for choice in choices:
        if isinstance(value, str) and value == choice:
            return choice
    raise ValueError(f"Expected `{name}` to be one of {', '.join(map(repr, choices))}, but got {shown(value)}.")


def check_bool(name: str, value: Any) -> bool:
    """Return ``value`` if it is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"Expected `{name}` to be a bool, but got {shown(value)}.")
    return value


def check_state(name: str, state: Any, expected: Mapping[str, Any]) -> None:
    """Raise unless a saved state has exactly these keys and types.

    Args:
        name: Whose state it is, for the message.
        state: What was loaded.
        expected: By key a type, a mapping for a nested state, the value itself where it must be that one, `object`
            for anything, or ``[float]`` for a list of floats. Integers are counts.

    Raises:
        ValueError: It has others.
    """
    if wrong := _wrong_in(state, expected, name):
        raise ValueError(
            f"The state of `{name}` cannot be loaded: {wrong}. It is damaged or was saved by another version. Resume"
            " from another checkpoint, or remove that entry to start with an empty history."
        )


def _wrong_in(state: Any, expected: Mapping[str, Any], at: str) -> str:
    """What is wrong in a saved state, in words; nothing if it is sound."""
    if not isinstance(state, dict) or state.keys() != expected.keys():
        keys = shown(sorted(map(str, state))) if isinstance(state, dict) else f"a `{type(state).__name__}`"
        return f"expected `{at}` to have the keys {sorted(expected)}, but got {keys}"
    for key, kind in expected.items():
        if isinstance(kind, Mapping):
            wrong = _wrong_in(state[key], kind, f"{at}.{key}")
        else:
            rule = f"of type `{kind.__name__}`" if isinstance(kind, type) else repr(kind)
            wrong = (
                "" if _is_of(kind, state[key]) else f"expected `{at}.{key}` to be {rule}, but got {shown(state[key])}"
            )
        if wrong:
            return wrong
    return ""


def _is_of(kind: Any, value: Any) -> bool:
    """Whether a saved value is of a type, is a list of floats, or is that very value."""
    if kind == [float]:
        return isinstance(value, list) and set(map(type, value)) <= {float}
    if not isinstance(kind, type):
        return type(value) is type(kind) and bool(value == kind)
    if kind is int:
        return type(value) is int and value >= 0
    return isinstance(value, kind)
