"""Policies: from the recorded norms to a threshold. Stateless."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from lightning_autoclip._checks import check_positive
from lightning_autoclip.clipping._numbers import Number, constant, single
from lightning_autoclip.clipping.record import History, check_percentile


class Policy(ABC):
    """A rule that turns recorded norms into a threshold. Subclass it for a rule of your own.

    Example:
        >>> from lightning_autoclip import History, Policy
        >>> class TwiceTheMean(Policy):
        ...     def __call__(self, history):
        ...         return 2 * history.mean()
        >>> history = History()
        >>> history.record(1.0)
        >>> history.record(2.0)
        >>> TwiceTheMean()(history)
        3.0
    """

    @abstractmethod
    def __call__(self, history: History) -> Number:
        """Return the threshold.

        Args:
            history: The record, the current norm included, not empty: `History.percentile`, ``mean`` and ``std``. These
                return floats on the CPU and tensors of shape ``()`` on an accelerator, which may be calculated with
                but not read (no ``.item()``, ``float()``, ``if tensor``): the host would wait in each step.

        Returns:
            At least 0: a float, or a tensor of shape ``()``.
        """


def threshold_of(policy: Policy, history: History) -> float:
    """What a policy asks for, as a float32.

    Raises:
        TypeError: It is not one number.
        ValueError: It is below 0.
    """
    return _checked(policy, float(_asked(policy, history)))


def _checked(policy: Policy, threshold: float) -> float:
    if threshold < 0:
        raise ValueError(f"Expected `policy` to return a threshold of at least 0, but {policy!r} gave {threshold}.")
    return single(threshold)


def threshold_on_device(policy: Policy, history: History, device: torch.device) -> Tensor:
    """The same on an accelerator, shape ``()``, float32. It may be below 0, which nobody reads there."""
    threshold = _asked(policy, history)
    if not isinstance(threshold, Tensor):
        return constant(_checked(policy, threshold), device)
    return threshold.to(torch.float32).reshape(())


def _asked(policy: Policy, history: History) -> Number:
    threshold = policy(history)
    if isinstance(threshold, Tensor) and threshold.numel() == 1 and not threshold.is_complex():
        return threshold
    if isinstance(threshold, Tensor) or not isinstance(threshold, Real):  # numpy's numbers are real ones too
        raise TypeError(f"Expected `policy` to return one number, but {policy!r} gave {threshold!r}.")
    if abs(threshold) > 1e300:  # an int may be more than a float can hold
        return math.inf if threshold > 0 else -math.inf
    return float(threshold)


@dataclass(frozen=True)
class Percentile(Policy):
    """``multiplier`` times a percentile of the recorded norms (AutoClip).

    Args:
        percentile: Between 0 and 100, linear interpolation. By norm, 100 with ``multiplier=1`` never clips.
        multiplier: Above 0. ``Percentile(50, multiplier=2)`` is twice the median.

    Raises:
        TypeError: An argument is no number.
        ValueError: ``percentile`` is outside [0, 100], ``multiplier`` is not above 0, or one is NaN.

    References:
        Seetharaman et al., `AutoClip <https://arxiv.org/abs/2007.14469>`_, 2020.
    """

    percentile: float = 50.0
    multiplier: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "percentile", check_percentile(self.percentile))
        _check_positive(self, "multiplier")

    def __call__(self, history: History) -> Number:
        """Return ``multiplier`` times the percentile."""
        threshold = history.percentile(self.percentile)
        return threshold if self.multiplier == 1 else threshold * self.multiplier


@dataclass(frozen=True)
class ZScore(Policy):
    """Mean of the recorded norms plus ``z`` of their (population) standard deviations.

    Args:
        z: Above 0.

    Raises:
        TypeError: ``z`` is no number.
        ValueError: ``z`` is not above 0, or NaN.
    """

    z: float = 2.5

    def __post_init__(self) -> None:
        _check_positive(self, "z")

    def __call__(self, history: History) -> Number:
        """Return mean + z * standard deviation."""
        mean, std = history.moments()
        return mean + self.z * std


@dataclass(frozen=True)
class Constant(Policy):
    """The same threshold at every step: fixed clipping, with the record and the logs of the adaptive kind.

    Args:
        threshold: Above 0, in units of the gradient's norm (or of one entry, when clipping by value).

    Raises:
        TypeError: ``threshold`` is no number.
        ValueError: ``threshold`` is not above 0, or NaN.
    """

    threshold: float

    def __post_init__(self) -> None:
        _check_positive(self, "threshold")

    def __call__(self, history: History) -> Number:
        """Return the threshold."""
        return self.threshold


def _check_positive(policy: Policy, name: str) -> None:
    object.__setattr__(policy, name, check_positive(name, getattr(policy, name)))
