"""The preset that most users want: a percentile of the norms, with flat arguments."""

from __future__ import annotations

from typing import Literal

from lightning_autoclip.callback import GradientClipping
from lightning_autoclip.clipping.policies import Percentile
from lightning_autoclip.clipping.threshold import Algorithm, NonFinite
from lightning_autoclip.groups import Groups

MAX_UPDATE_RATIO = 0.25
"""Chosen in docs/study.md: the smallest that costs nothing at learning rates that are tuned."""


class AutoClip(GradientClipping):
    """Picks the clipping threshold by itself: a running percentile of the gradient norms of past steps.

    A preset of `GradientClipping` with the policy `Percentile`.

    Args:
        percentile: Between 0 and 100, of the recorded norms including the current one. A low one normalises most
            steps, 90 one step in ten, 100 by norm never clips (observes).
        multiplier: Above 0: the threshold is so many times the percentile. By default 1 by norm, and 3 by value, where
            the percentile is one of the root-mean-square entry.
        gradient_clip_algorithm: ``"norm"`` or ``"value"``, as the Trainer's own argument.
        window: How many of the last optimizer steps count, at least 1; ``None`` for all of them, as in the paper.
        warmup_steps: The first so many steps are recorded, and clipped at most by the two bounds that follow.
        max_threshold: Upper bound of the threshold, above 0; also used during the warm-up.
        max_update_ratio: No step of SGD moves a weight matrix by more than this part of its norm, above 0; see
            `GradientClipper`. ``"auto"``: 0.25, or none with ``percentile=100``, which only observes. ``None``: no such
            bound. With Adam and its kin there is none either.
        skip_above: A step whose norm is so many times the typical one, at least 1, is left out; see `GradientClipper`.
        nonfinite: ``"skip"``, ``"raise"`` or ``"ignore"``; see `GradientClipper`.
        groups: Groups of parameters that each have a record and a threshold of their own: ``"param_groups"`` for those
            of the optimizer, or patterns of parameter names by the group's name, such as ``{"encoder": "encoder.*"}``.
        log_every_step: Also log the exact series ``autoclip/step/grad_norm`` and ``autoclip/step/threshold``.
        log_layers: Also log each module's mean share in the squared norm, of modules two (or so many) names deep.
        log_histogram: Also log a histogram of the norms per row, to Weights & Biases.
        alert_above: Send a W&B alert when a norm is so many times the typical one of the steps before, at least 1, and
            one of its own when it is not finite.
        verbose: Print a short report at the end of fit.

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
        window: int | None = 100,
        warmup_steps: int = 0,
        max_threshold: float | None = None,
        max_update_ratio: float | Literal["auto"] | None = "auto",
        skip_above: float | None = None,
        nonfinite: NonFinite = "skip",
        groups: Groups | None = None,
        log_every_step: bool = False,
        log_layers: bool | int = False,
        log_histogram: bool = False,
        alert_above: float | None = None,
        verbose: bool = True,
    ) -> None:
        if isinstance(max_update_ratio, str) and max_update_ratio == "auto":
            observes = isinstance(percentile, (int, float)) and percentile == 100
            max_update_ratio = None if observes else MAX_UPDATE_RATIO
        if multiplier is None:
            by_value = isinstance(gradient_clip_algorithm, str) and gradient_clip_algorithm == "value"
            multiplier = 3.0 if by_value else 1.0
        super().__init__(
            Percentile(percentile, multiplier),
            gradient_clip_algorithm=gradient_clip_algorithm,
            window=window,
            warmup_steps=warmup_steps,
            max_threshold=max_threshold,
            max_update_ratio=max_update_ratio,
            skip_above=skip_above,
            nonfinite=nonfinite,
            groups=groups,
            log_every_step=log_every_step,
            log_layers=log_layers,
            log_histogram=log_histogram,
            alert_above=alert_above,
            verbose=verbose,
        )
