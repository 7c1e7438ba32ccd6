"""The arguments that decide what a step does: checked once, compared at a resume, shown to loggers and report."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

from lightning_autoclip._text import shown
from lightning_autoclip.clipping.bound import is_proportional
from lightning_autoclip.clipping.clipper import GradientClipper
from lightning_autoclip.clipping.policies import Policy
from lightning_autoclip.groups import check_groups

STATE_KEY = "GradientClipping"
"""The callback's key in a checkpoint."""


class Settings:
    """How every optimizer and every group of a run is clipped.

    Args:
        policy: As in `GradientClipping`, as the following.
        groups: Groups of parameters with a record of their own.
        arguments: The keyword arguments of `GradientClipper`.

    Attributes:
        several_policies: Whether the run has had others before.
        has_scaler: Whether a loss scaler is at work, which finds its scale by overflows.
        has_engine: Whether an engine steps in the optimizer's place.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of its range.
    """

    def __init__(self, policy: Policy, groups: Any, **arguments: Any) -> None:
        self.policy, self.groups = policy, check_groups(groups)
        self.several_policies = self.has_scaler = self.has_engine = False
        self.arguments = GradientClipper(policy, **arguments).arguments

    @property
    def by_value(self) -> bool:
        """Whether entries are clamped."""
        return bool(self.arguments["gradient_clip_algorithm"] == "value")

    @property
    def skips_outliers(self) -> bool:
        """Whether steps can be left out for their size."""
        return self.arguments["skip_above"] is not None

    def bound_of(self, optimizer: Any) -> float | None:
        """The `max_update_ratio` that the steps of an optimizer can be held to; ``None`` if there is none."""
        ratio: float | None = self.arguments["max_update_ratio"]
        return None if self.has_engine or ratio is None or not is_proportional(optimizer) else ratio

    def new_clipper(self) -> GradientClipper:
        """A clipper with an empty record."""
        return GradientClipper(self.policy, **self.arguments)

    def to_dict(self) -> dict[str, Any]:
        """The arguments as plain values."""
        policy: Any = self.policy
        known = dataclasses.is_dataclass(policy)
        fields = {field.name: getattr(policy, field.name) for field in dataclasses.fields(policy)} if known else {}
        name = type(policy).__qualname__
        return {"policy": {"name": name, **_plain(fields)}, **self.arguments, "groups": self.groups}

    def of_run(self) -> dict[str, Any]:
        """Those that hold for every step of the run, resumed ones included."""
        return self.to_dict() | ({"policy": {"name": "several"}} if self.several_policies else {})

    def to_log(self) -> dict[str, Any]:
        """The arguments as loggers have them: of a run that has had others before, they say so."""
        return self.to_dict() | ({"several_policies": True} if self.several_policies else {})

    def has_policy(self, written: dict[str, Any]) -> bool:
        """Whether a record was made with this policy."""
        return _are_equal(written["policy"], self.to_dict()["policy"])

    def compare(self, written: dict[str, Any]) -> str:
        """Whether a run can go on with a record that was made with other settings.

        Args:
            written: What :meth:`to_dict` gave then.

        Returns:
            What has changed, in words; empty if nothing has.

        Raises:
            KeyError: A setting is missing.
            TypeError: These are no settings.
            ValueError: The record has another unit, or is one of other groups.
        """
        if not is_settings(written):
            raise TypeError(f"these settings: {shown(written)}")
        changed = {key: value for key, value in self.to_dict().items() if not _are_equal(written[key], value)}
        if "gradient_clip_algorithm" in changed:
            raise ValueError(
                f"The checkpoint's record was made with gradient_clip_algorithm={written['gradient_clip_algorithm']!r},"
                " whose thresholds have another unit. Resume with that algorithm, or delete"
                f" `checkpoint['callbacks']['{STATE_KEY}']` to start with an empty record."
            )
        was, now = (
            sorted(groups) if isinstance(groups, dict) else groups for groups in (written["groups"], self.groups)
        )
        if was != now:
            raise ValueError(
                f"The checkpoint's records were made with groups={shown(written['groups'])}, but this run has"
                f" groups={self.groups!r}. Resume with those groups, or delete"
                f" `checkpoint['callbacks']['{STATE_KEY}']` to start with empty records."
            )
        if not changed:
            return ""
        before = ", ".join(f"{key}={shown(written[key])}" for key in changed)
        after = ", ".join(f"{key}={value!r}" for key, value in changed.items())
        return f"The checkpoint was written with {before}; this run goes on with {after} on the same record."

    def __repr__(self) -> str:
        given = self.arguments if self.groups is None else {**self.arguments, "groups": self.groups}
        return f"{self.policy!r}, " + ", ".join(f"{key}={value!r}" for key, value in given.items())


def is_settings(value: Any) -> bool:
    """Whether this is what :meth:`Settings.to_dict` returns, rather than something of the user's."""
    return (
        isinstance(value, dict)
        and value.get("gradient_clip_algorithm") in ("norm", "value")
        and "max_threshold" in value
        and type(warmup := value.get("warmup_steps")) is int
        and 0 <= warmup < 2**63
        and isinstance(policy := value.get("policy"), dict)
        and (policy.get("name") != "Percentile" or _is_percentile(policy))
    )


def _is_percentile(policy: Mapping[str, Any]) -> bool:
    percentile: Any = policy.get("percentile")
    multiplier: Any = policy.get("multiplier", 1)
    return {type(percentile), type(multiplier)} <= {int, float} and 0 <= percentile <= 100 and multiplier > 0


def _are_equal(one: Any, other: Any) -> bool:
    """Whether they are, as far as they can be compared."""
    try:
        return bool(one == other)
    except (ValueError, RuntimeError, TypeError):  # of an array, which is damage
        return False


def _plain(value: Any) -> Any:
    """The value as YAML and JSON have it; in words, if they have none."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, str):
        return str.__str__(value)  # numpy's and those of an enum would not load from a checkpoint
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Real):  # numpy's numbers too
        return int(value) if isinstance(value, Integral) else float(value)
    return repr(value)
