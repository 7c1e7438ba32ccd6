"""Policies: pure rules that turn the norm history and the current norm into a threshold."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from numbers import Real
from typing import Any

from torch import Tensor

from lightning_autoclip._checks import check_positive
from lightning_autoclip._text import shown
from lightning_autoclip.history import Number, WithCurrent, check_percentile, constant


class Policy(ABC):
    """A rule that turns the norm history into a threshold. Subclass it for a rule of your own.

    A frozen dataclass has its fields saved in checkpoints, compared at a resume and logged.

    Example:
        >>> from lightning_autoclip import History, Policy
        >>> class TwiceTheMean(Policy):
        ...     def __call__(self, history):
        ...         return 2 * history.mean()
        >>> history = History()
        >>> history.append(1.0)
        >>> TwiceTheMean()(history.with_current(2.0))
        3.0
    """

    @abstractmethod
    def __call__(self, history: WithCurrent) -> Number:
        """Return the threshold.

        Args:
            history: The norms of the window, the current one included: ``percentile``, ``mean`` and ``std``. On an
                accelerator they return tensors of shape ``()``: calculate with them, but do not read them (no
                ``.item()``, ``float()``, ``if tensor``), or the host would wait for the device in each step.

        Returns:
            At least 0: a float, or a tensor of shape ``()``.
        """

    def to_dict(self) -> dict[str, Any]:
        """Return the class and its dataclass fields as plain values."""
        fields: Any = dataclasses.fields(self) if dataclasses.is_dataclass(self) else ()
        return {
            "class": f"{type(self).__module__}.{type(self).__qualname__}",
            "arguments": {field.name: _plain(getattr(self, field.name)) for field in fields},
        }


def threshold_of(policy: Policy, history: WithCurrent) -> Number:
    """Return the threshold that a policy asks for: a tensor where the current norm is one.

    Raises:
        TypeError: It is not one real number.
        ValueError: It is below 0 or NaN, where it is a float.
    """
    threshold = policy(history)
    if isinstance(threshold, Tensor):
        if threshold.numel() != 1 or threshold.is_complex():
            raise TypeError(f"Expected `policy` to return one number, but {policy!r} returned {shown(threshold)}.")
        if history.unread is not None:
            threshold = threshold.to(history.unread.dtype).reshape(())
            return threshold if type(policy).__module__ == __name__ else threshold.clamp(min=0.0)
        threshold = threshold.item()
    if not isinstance(threshold, Real):  # numpy's numbers are real ones too
        raise TypeError(f"Expected `policy` to return one number, but {policy!r} returned {shown(threshold)}.")
    try:
        number = float(threshold)
    except OverflowError:  # an int may be more than a float can hold
        number = math.inf if threshold > 0 else -math.inf
    if not number >= 0:
        raise ValueError(f"Expected `policy` to return a threshold of at least 0, but {policy!r} returned {number}.")
    unread = history.unread
    return number if unread is None else constant(number, unread.device, unread.dtype)


@dataclass(frozen=True)
class Percentile(Policy):
    """``multiplier`` times a percentile of the norms (AutoClip).

    Args:
        percentile: Between 0 and 100, linear interpolation. By norm, 100 with ``multiplier=1`` never clips.
        multiplier: Above 0. By value, the percentile is that of the gradient RMS, and 3 is a good multiplier.

    Raises:
        TypeError: An argument is no number.
        ValueError: ``percentile`` is outside [0, 100] or NaN, or ``multiplier`` is not above 0.

    References:
        Seetharaman et al., `AutoClip: Adaptive Gradient Clipping for Source Separation Networks
        <https://arxiv.org/abs/2007.14469>`_, 2020.
    """

    percentile: float = 10.0
    multiplier: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "percentile", check_percentile(self.percentile))
        _check_positive(self, "multiplier")

    def __call__(self, history: WithCurrent) -> Number:
        """Return ``multiplier`` times the percentile."""
        threshold = history.percentile(self.percentile)
        return threshold if self.multiplier == 1 else threshold * self.multiplier


@dataclass(frozen=True)
class ZScore(Policy):
    """Mean of the norms plus ``z`` of their (population) standard deviations.

    Args:
        z: Above 0.

    Raises:
        TypeError: ``z`` is no number.
        ValueError: ``z`` is not above 0, or NaN.
    """

    z: float = 2.5

    def __post_init__(self) -> None:
        _check_positive(self, "z")

    def __call__(self, history: WithCurrent) -> Number:
        """Return mean + z * standard deviation."""
        return history.mean() + self.z * history.std()


@dataclass(frozen=True)
class Constant(Policy):
    """The same threshold at every step: fixed clipping, with the history and the logs of the adaptive kind.

    Args:
        threshold: Above 0, in units of the gradient norm (by value: of one element).

    Raises:
        TypeError: ``threshold`` is no number.
        ValueError: ``threshold`` is not above 0, or NaN.
    """

    threshold: float

    def __post_init__(self) -> None:
        _check_positive(self, "threshold")

    def __call__(self, history: WithCurrent) -> Number:
        """Return the threshold."""
        return self.threshold


def _check_positive(policy: Policy, name: str) -> None:
    object.__setattr__(policy, name, check_positive(name, getattr(policy, name)))


def _plain(value: Any) -> Any:
    """A value as YAML, JSON and a checkpoint hold it; its ``repr`` if they cannot."""
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)  # a subclass, such as numpy's, would not load from a checkpoint
    if isinstance(value, Real):
        return int(value) if float(value).is_integer() and isinstance(value, int) else float(value)
    return repr(value)
