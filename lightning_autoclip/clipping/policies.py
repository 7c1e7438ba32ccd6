"""Policies: from the recorded norms to a threshold. Stateless, pure tensor functions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_autoclip._checks import check_positive
from lightning_autoclip.clipping.record import check_percentile, percentile_of, percentile_on_host


class Policy(ABC):
    """A rule that turns recorded norms into a threshold. Subclass it for a rule of your own.

    Example:
        >>> import torch
        >>> from lightning_autoclip import Policy
        >>> class TwiceTheMean(Policy):
        ...     def __call__(self, norms, count):
        ...         recorded = torch.arange(norms.numel(), device=norms.device) < count
        ...         return 2 * torch.where(recorded, norms, 0.0).sum() / count
        >>> TwiceTheMean()(torch.tensor([1.0, 2.0, float("inf")]), torch.tensor(2))
        tensor(3.)
    """

    @abstractmethod
    def __call__(self, norms: Tensor, count: Tensor) -> Tensor:
        """Return the threshold.

        Must not read a tensor back to the host (no ``.item()``, ``float()``, ``if tensor``).

        Args:
            norms: Shape ``(n,)``, float32, ascending, the current norm included, then padded with ``+inf``.
            count: Shape ``()``, int64: how many of them are norms. The result is not used while it is 0.

        Returns:
            Shape ``()``, float32, on the device of ``norms``.
        """

    def on_host(self, norms: memoryview, count: int) -> float:
        """Return the threshold where reads are free. Override it where small tensor operations cost too much.

        Args:
            norms: The same as plain floats, which must not be written to.
            count: At least 1.
        """
        return threshold_of(
            self, torch.frombuffer(norms, dtype=torch.float32), torch.tensor(count, device="cpu")
        ).item()


def threshold_of(policy: Policy, norms: Tensor, count: Tensor) -> Tensor:
    """What a policy asks for: shape ``()``, float32. Anything but one number is a `TypeError`."""
    threshold = policy(norms, count)
    if not isinstance(threshold, Tensor) or threshold.numel() != 1:
        raise TypeError(f"Expected `policy` to return a tensor of shape (), but {policy!r} gave {threshold!r}.")
    return threshold.to(torch.float32).reshape(())


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

    percentile: float = 10.0
    multiplier: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "percentile", check_percentile(self.percentile))
        _check_positive(self, "multiplier")

    def __call__(self, norms: Tensor, count: Tensor) -> Tensor:
        """Return ``multiplier`` times the percentile."""
        threshold = percentile_of(norms, count, self.percentile)
        return threshold if self.multiplier == 1 else threshold * self.multiplier

    def on_host(self, norms: memoryview, count: int) -> float:
        """Return the same with plain numbers."""
        if type(self).__call__ is not Percentile.__call__:  # a subclass that knows nothing of this form
            return super().on_host(norms, count)
        return percentile_on_host(norms, count, self.percentile) * self.multiplier


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

    def __call__(self, norms: Tensor, count: Tensor) -> Tensor:
        """Return mean + z * standard deviation."""
        recorded = torch.arange(norms.numel(), device=norms.device) < count
        mean = torch.where(recorded, norms, 0.0).sum() / count
        variance = torch.where(recorded, norms - mean, 0.0).square().sum() / count
        return mean + self.z * variance.sqrt()


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

    def __call__(self, norms: Tensor, count: Tensor) -> Tensor:
        """Return the threshold."""
        return norms.new_full((), self.threshold)


def _check_positive(policy: Policy, name: str) -> None:
    object.__setattr__(policy, name, check_positive(name, getattr(policy, name)))
