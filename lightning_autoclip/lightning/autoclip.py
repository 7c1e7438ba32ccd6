"""The preset that most users want: a percentile of the gradient norms."""

from __future__ import annotations

from typing import Any, Literal

from lightning_autoclip.lightning.callback import GradientClipping
from lightning_autoclip.policies import Percentile
from lightning_autoclip.settings import Algorithm

MAX_UPDATE_RATIO = 0.25  # chosen in docs/study.md: the smallest that costs nothing at learning rates that are tuned


class AutoClip(GradientClipping):
    """Picks the clipping threshold by itself: a running percentile of the gradient norms of past steps.

    A preset of `GradientClipping` with the policy `Percentile`.

    Args:
        percentile: Between 0 and 100, of the norm history including the current norm. A low one normalises most steps,
            90 one step in ten, 100 by norm never clips (observes).
        multiplier: Above 0: the threshold is so many times the percentile. By default 1 by norm, and 3 by value, where
            the percentile is one of the gradient RMS.
        gradient_clip_algorithm: ``"norm"`` or ``"value"``, as the Trainer's own argument.
        max_update_ratio: No step of SGD moves a weight matrix by more than this part of its norm, above 0; see
            `Clipping`. ``"auto"``: 0.25, or none where a percentile of 100 only observes. ``None``: no such limit.
            Adam-type optimizers have none either.
        **settings: The other arguments of `GradientClipping`.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of its range.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_autoclip import AutoClip
        >>> trainer = Trainer(callbacks=[AutoClip(percentile=10)], logger=False, enable_checkpointing=False)

    References:
        Seetharaman et al., `AutoClip: Adaptive Gradient Clipping for Source Separation Networks
        <https://arxiv.org/abs/2007.14469>`_, 2020.
    """

    def __init__(
        self,
        percentile: float = 50.0,
        *,
        multiplier: float | None = None,
        gradient_clip_algorithm: Algorithm = "norm",
        max_update_ratio: float | Literal["auto"] | None = "auto",
        **settings: Any,
    ) -> None:
        by_value = isinstance(gradient_clip_algorithm, str) and gradient_clip_algorithm == "value"
        policy = Percentile(percentile, (3.0 if by_value else 1.0) if multiplier is None else multiplier)
        if isinstance(max_update_ratio, str) and max_update_ratio == "auto":
            observes = policy.percentile == 100 and policy.multiplier >= 1 and not by_value
            max_update_ratio = None if observes else MAX_UPDATE_RATIO
        super().__init__(
            policy, gradient_clip_algorithm=gradient_clip_algorithm, max_update_ratio=max_update_ratio, **settings
        )
