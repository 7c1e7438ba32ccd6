"""`Clipping`: every argument that decides a step; checked once, compared at a resume, saved and logged."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lightning_autoclip._checks import check_choice, check_integer, check_number, check_positive
from lightning_autoclip._text import shown
from lightning_autoclip.history import History
from lightning_autoclip.policies import Policy

Algorithm = Literal["norm", "value"]
NonFinite = Literal["skip", "raise", "ignore"]


@dataclass(frozen=True)
class Clipping:
    """How gradients are clipped.

    Args:
        policy: Turns the norm history into a threshold, for example ``Percentile(10)``.
        gradient_clip_algorithm: ``"norm"`` scales the whole gradient so that its L2 norm is at most the threshold;
            ``"value"`` compares the gradient RMS and clamps each element to ``[-threshold, threshold]``.
        window: How many of the last steps the policy sees, at least 1; ``None`` for all of them.
        warmup_steps: The first so many steps are observed; only ``max_threshold`` and ``max_update_ratio`` limit them.
        max_threshold: Upper bound of the threshold, above 0; also used during the warm-up.
        max_update_ratio: No step moves a weight matrix by more than this part of its own L2 norm, above 0, for example
            0.12, momentum counted, weight decay not. For SGD; other optimizers set the size of their steps themselves.
        skip_above: A step whose norm is more than so many times the median of the history, at least 1, is skipped as an
            outlier; a `GradScaler` keeps its scale, and the norm enters the history. From the 21st step on and after
            the warm-up; of such steps in a row the first five.
        nonfinite: What happens to a step with non-finite gradients (NaN or Inf). ``"skip"``: no weight moves (with a
            `GradScaler` it is the scaler that skips, and lowers its scale). ``"raise"``: `NonFiniteGradientError`; with
            a `GradScaler` only once the scale is down to 1, since above it the overflow may be the scale's own.
            ``"ignore"``: the gradient is applied as it is. Such a step never enters the history; nor does one whose
            gradient is exactly zero.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of its range.
    """

    policy: Policy
    gradient_clip_algorithm: Algorithm = "norm"
    window: int | None = 100
    warmup_steps: int = 0
    max_threshold: float | None = None
    max_update_ratio: float | None = None
    skip_above: float | None = None
    nonfinite: NonFinite = "skip"

    def __post_init__(self) -> None:
        if not isinstance(self.policy, Policy):
            raise TypeError(
                f"Expected `policy` to be a `Policy` such as `Percentile(10)`, but got {shown(self.policy)}."
            )
        checked: dict[str, Any] = {
            "gradient_clip_algorithm": check_choice(
                "gradient_clip_algorithm", self.gradient_clip_algorithm, get_args(Algorithm)
            ),
            "nonfinite": check_choice("nonfinite", self.nonfinite, get_args(NonFinite)),
            "window": History(self.window).window,
            "warmup_steps": check_integer("warmup_steps", self.warmup_steps, "an integer of at least 0", 0),
        }
        for name in ("max_threshold", "max_update_ratio"):
            if (value := getattr(self, name)) is not None:
                checked[name] = check_positive(name, value)
        if self.skip_above is not None:
            checked["skip_above"] = check_number("skip_above", self.skip_above, "a number of at least 1", 1)
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @property
    def by_value(self) -> bool:
        """Whether elements are clamped."""
        return self.gradient_clip_algorithm == "value"

    def to_dict(self) -> dict[str, Any]:
        """Return the arguments as plain values, which a checkpoint and every logger can hold."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**values, "policy": self.policy.to_dict()}

    def __repr__(self) -> str:
        values = {name: value for name, value in vars(self).items() if name != "policy"}
        return f"{self.policy!r}, " + ", ".join(f"{name}={value!r}" for name, value in values.items())


def changes_of(written: dict[str, Any], settings: dict[str, Any], state_key: str) -> str:
    """What has changed since a checkpoint was written, in words; empty if nothing has.

    Args:
        written: The settings in the checkpoint.
        settings: Those of this run.
        state_key: Of the callback.

    Raises:
        ValueError: The norm history has another unit, or is one of other groups.
    """
    for name, plural in (("gradient_clip_algorithm", "thresholds have another unit"), ("groups", "groups differ")):
        was, now = written[name], settings[name]
        if (sorted(was) if isinstance(was, dict) else was) != (sorted(now) if isinstance(now, dict) else now):
            raise ValueError(
                f"The checkpoint's norm history was recorded with {name}={shown(was)}, but this run has"
                f" {name}={shown(now)}: {plural}. Resume with the setting of the checkpoint, or delete"
                f" `checkpoint['callbacks'][{state_key!r}]` to start with an empty history."
            )
    was, now = flat_settings(written), flat_settings(settings)
    keys = [key for key in {**was, **now} if was.get(key) != now.get(key)]
    return ", ".join(f"{key} {shown(was.get(key))} → {shown(now.get(key))}" for key in keys)


def settings_of_run(settings: dict[str, Any], several_policies: bool) -> dict[str, Any]:
    """The settings that hold for every step of a run, resumed ones included."""
    return {**settings, "policy": {"class": "several", "arguments": {}}} if several_policies else settings


def flat_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with those of the policy among them, as loggers show them."""
    name, arguments = settings["policy"]["class"], settings["policy"]["arguments"]
    own = {f"policy.{key}" if key in settings else key: value for key, value in arguments.items()}
    return {**settings, "policy": name.removeprefix("lightning_autoclip.policies."), **own}
