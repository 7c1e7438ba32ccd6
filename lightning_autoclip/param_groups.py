"""Groups of parameters that have a norm history and a threshold each: which parameter is in which."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

from lightning_autoclip._text import as_ascii_key, as_key, shown

PARAM_GROUPS = "param_groups"
REST = "rest"
Groups = Literal["param_groups"] | Mapping[str, str | Sequence[str]]
_RESERVED = {REST: "is reserved for what no pattern matches", "step": "is reserved: it is part of other keys"}


def check_groups(groups: Any) -> str | dict[str, list[str]] | None:
    """Return ``groups`` as plain values: ``None``, ``"param_groups"``, or patterns by the name of their group.

    Raises:
        TypeError: It is neither, or a pattern is no string.
        ValueError: It is empty, a name cannot be part of a key, or two would be the same.
    """
    if groups is None:
        return None
    if isinstance(groups, str) and groups == PARAM_GROUPS:
        return PARAM_GROUPS
    if not isinstance(groups, Mapping):
        raise TypeError(
            "Expected `groups` to be 'param_groups', or a mapping of names to patterns of parameter names such as"
            f" {{'encoder': 'encoder.*'}}, but got {shown(groups)}."
        )
    checked = {}
    for name, patterns in groups.items():
        if not isinstance(name, str) or name in _RESERVED or not _fits_a_key(name):
            why = f"{shown(name)} {_RESERVED.get(name, 'is none')}" if isinstance(name, str) else f"got {shown(name)}"
            raise ValueError(
                f"Expected the names in `groups` to be words without a slash, a star or a control character, but {why}."
            )
        several = [patterns] if isinstance(patterns, str) else patterns
        if not isinstance(several, Sequence) or not several or not all(isinstance(pattern, str) for pattern in several):
            raise TypeError(
                f"Expected `groups[{shown(name)}]` to be a pattern or a list of them, but got {shown(patterns)}."
            )
        checked[str.__str__(name)] = [
            str.__str__(pattern) for pattern in several
        ]  # numpy's would not load from a checkpoint
    if not checked:
        raise ValueError("Expected `groups` to name at least one group, but got an empty mapping.")
    _refuse_equal_keys(checked, "the names in `groups`")
    return checked


def _refuse_equal_keys(names: Iterable[str], what: str) -> None:
    """Refuse names that differ in nothing that is left of them in a key: one's record would be the other's."""
    of_key: dict[str, str] = {}
    for name in names:
        key = as_ascii_key(as_key(name))
        if (first := of_key.setdefault(key, name)) is not name:
            raise ValueError(
                f"Expected {what} to differ as keys of loggers, but {shown(first)} and {shown(name)} would both be"
                f" {shown(key)}."
            )


def _fits_a_key(name: str) -> bool:
    """Whether every logger takes the name as a part of a key."""
    return bool(name.strip(". ")) and name.isprintable() and not set(name) & set('/*"\\')


def group_by_id(groups: Mapping[str, Sequence[str]], named: Sequence[tuple[int, str]]) -> dict[int, str]:
    """By a parameter's id the group of which a pattern matches its name (`fnmatch`, case matters), or one of its names.

    Raises:
        ValueError: A pattern matches nothing, or a parameter is in two groups.
    """
    found: dict[int, str] = {}
    for group, patterns in groups.items():
        for pattern in patterns:
            matched = [(key, name) for key, name in named if fnmatchcase(name, pattern)]
            if not matched:
                some = ", ".join(name for _, name in named[:4])
                raise ValueError(
                    f"Expected each pattern in `groups` to match a parameter, but {pattern!r} of {group!r} matches"
                    f" none. The model's are named {some}{', ...' if len(named) > 4 else ''}; `*` stands for anything."
                )
            for key, name in matched:
                if found.setdefault(key, group) != group:
                    raise ValueError(
                        f"Expected the groups not to overlap, but {name!r} is in {found[key]!r} and in {group!r}."
                    )
    return found


def positions_by_group(optimizer: Any, group_of: Mapping[int, str] | None) -> dict[str, list[int]]:
    """Where the parameters of each group stand among all parameters of an optimizer; empty groups are skipped.

    Args:
        optimizer: The optimizer.
        group_of: By a parameter's id its group, ``rest`` of those that are not there; ``None``: the optimizer's own
            groups, by their ``"name"``, else ``pg1``, ``pg2`` as `LearningRateMonitor` calls them.

    Raises:
        ValueError: Two groups of the optimizer have the same name or key, or one a name that cannot be part of a key.
    """
    found: dict[str, list[int]] = {}
    seen: set[int] = set()  # a parameter that is listed twice stands where it stands first
    for number, param_group in enumerate(optimizer.param_groups, 1):
        name = str(param_group.get("name") or f"pg{number}")
        if group_of is None and (name == "step" or not _fits_a_key(name)):
            raise ValueError(
                f"Expected the optimizer's groups to be called by words without a slash, but got {shown(name)}."
            )
        if group_of is None and name in found:
            raise ValueError(
                f"Expected the optimizer's groups to have different names, but two are called {shown(name)}."
            )
        for key in map(id, param_group["params"]):
            if key not in seen:
                found.setdefault(name if group_of is None else group_of.get(key, REST), []).append(len(seen))
                seen.add(key)
    if group_of is None:
        _refuse_equal_keys(found, "the names of the optimizer's groups")
    return found
