"""Measure, record, decide, clip: adaptive gradient clipping for any PyTorch loop."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import LBFGS, Optimizer

from lightning_autoclip.clipping import _numbers
from lightning_autoclip.clipping._numbers import Number, as_there, minimum, negation, unknown
from lightning_autoclip.clipping.bound import Rates, is_proportional
from lightning_autoclip.clipping.gate import StepGate
from lightning_autoclip.clipping.gradients import Gradients, norm_of
from lightning_autoclip.clipping.optimizers import (
    NonFiniteGradientError,
    leave_out_unless,
    must_be_read,
    parameters_of,
    raise_if_nonfinite,
    refuse_capture,
    skip_if_nonfinite,
    unscale_,
    unwrapped,
    wrapped_in,
)
from lightning_autoclip.clipping.parts import any_outlier, are_weighed, have_gradients, parts_of, with_clipped_norms
from lightning_autoclip.clipping.shards import Shard, are_shared
from lightning_autoclip.clipping.step import StepRecord
from lightning_autoclip.clipping.threshold import Threshold


class GradientClipper(Threshold):
    """Clips the gradients of one optimizer at a threshold that follows their own record.

    Call :meth:`clip_` between ``backward()`` and ``optimizer.step()``. Each call measures the gradients, records the
    measurement, lets the policy set the threshold from the record (the current step included) and clips in place.
    On an accelerator nothing is read back to the host, except one scalar per step where ``nonfinite="skip"`` meets
    an optimizer that can neither skip by itself (``fused=True``) nor be skipped by a `GradScaler`, where ``skip_above``
    meets one that is not fused, and where ``nonfinite="raise"``.

    Args:
        policy: From recorded norms to a threshold, for example ``Percentile(10)``.
        gradient_clip_algorithm: ``"norm"`` scales the whole gradient so that its L2 norm is at most the threshold;
            ``"value"`` records the root-mean-square entry and clamps each entry to ``[-threshold, threshold]``.
        window: How many of the last steps the policy sees, at least 1; ``None`` for all of them.
        warmup_steps: The first so many steps are recorded, and clipped at most by the two bounds that follow.
        max_threshold: Upper bound of the threshold, above 0; also used during the warm-up.
        max_update_ratio: No step moves a weight matrix by more than this part of its own L2 norm, above 0, for example
            0.12, momentum counted, weight decay not. For SGD; others set their steps' size themselves and have none.
        skip_above: A step whose norm is more than so many times the typical one (the median of the record before it),
            at least 1, is left out like one that is not finite, a `GradScaler` does not back off, and its norm enters
            the record. From the 21st step on and after the warm-up; of such steps in a row the first five.
        nonfinite: What happens to a step whose gradient holds a NaN or an infinity. ``"skip"``: no weight moves (with
            a `GradScaler` it is the scaler that skips, and backs off). ``"raise"``: `NonFiniteGradientError`; with a
            `GradScaler` only once the scale is down to 1, since above it the overflow may be the scale's own.
            ``"ignore"``: nothing, the gradient is applied as it is. Such a step never enters the record; nor does one
            whose gradient is exactly zero.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of its range.

    Example:
        >>> import torch
        >>> from lightning_autoclip import Constant, GradientClipper
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = torch.optim.SGD([weight], lr=1.0)
        >>> clipper = GradientClipper(Constant(1.0))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> clipper.clip_(optimizer).norm
        5.0
        >>> weight.grad
        tensor([0.6000, 0.8000])
    """

    _optimizer: weakref.ref[Any] | None = None
    _stepping: weakref.ref[Any] | None = None  # what makes the step, it or one in it, if `max_update_ratio` can be had

    def clip_(
        self,
        target: Optimizer | Tensor | Iterable[Tensor],
        grad_scaler: GradScaler | None = None,
        shards: Mapping[Tensor, Shard] | None = None,
    ) -> StepRecord | None:
        """Clip the gradients of an optimizer, or of some parameters, in place.

        Args:
            target: The optimizer that is about to step, or its parameters. One clipper serves one optimizer.
            grad_scaler: The scaler of mixed-precision training, if there is one. Gradients that are still scaled are
                unscaled by its ``unscale_``, so that a call of your own must come before this one.
            shards: For gradients that several processes share without being DTensors (FSDP1): what this one holds of
                each. All processes must then call this alike.

        Returns:
            The record of the step, or ``None`` where no parameter has a gradient (where processes share gradients, a
            record of norm 0: only a read of the host would tell).

        Raises:
            NonFiniteGradientError: With ``nonfinite="raise"``, at a NaN or an infinity.
            TypeError: ``target`` is neither an optimizer nor parameters, or the policy gave no single number.
            ValueError: The clipper has served another optimizer before, or FSDP1 shares its gradients and ``shards``
                are not given.
            RuntimeError: A CUDA graph is being captured.
        """
        return clip_together_([(self, None)], target, grad_scaler, shards)[0]

    @torch.no_grad()
    def record_(self, norm: Tensor, loss_scale: float = 1.0) -> StepRecord:
        """Record a norm that somebody else has measured, who is to clip at the threshold that is returned.

        Args:
            norm: Shape ``()``: the L2 norm of the whole gradient, at its true scale, equal on every process.
            loss_scale: What the loss was multiplied by. Above 1 a norm that is not finite is nothing to raise.

        Raises:
            NonFiniteGradientError: With ``nonfinite="raise"``, if the norm is not finite.
        """
        norm = norm.to(torch.float32)
        is_read = self.nonfinite == "raise" or _numbers.reads_are_free(norm.device)
        number: Number = norm.item() if is_read else norm
        threshold = self.decide(number < math.inf, number)
        clipped, so_far = minimum(number, threshold), self.nonfinite_so_far
        record = StepRecord(number, clipped, number, threshold, so_far, unknown(number), as_there(0.0, number))
        if self.nonfinite == "raise" and loss_scale <= 1 and not math.isfinite(number):
            raise NonFiniteGradientError(f"The norm of the gradient is {float(number)}.", [], [record])
        return record

    def _bind(self, optimizer: Any) -> None:
        served = None if self._optimizer is None else self._optimizer()
        if served is optimizer:
            return
        if served is not None and wrapped_in(served)[-1] is not wrapped_in(optimizer)[-1]:
            raise ValueError(
                "Expected `clip_` to be called with the optimizer it was called with first, but got another one, whose"
                " norms would mix with the first one's. Use one `GradientClipper` per optimizer, or call `release()`"
                " if this optimizer takes the other's place."
            )
        self._optimizer, is_bounded = weakref.ref(optimizer), self.bound.is_on and is_proportional(optimizer)
        self._stepping = weakref.ref(wrapped_in(optimizer)[-1]) if is_bounded else None

    def _rates(self, parameters: Sequence[Tensor]) -> Rates | None:
        stepping = None if self._stepping is None else self._stepping()
        return None if stepping is None else Rates(stepping, parameters)

    def release(self) -> None:
        """Forget the optimizer (not its record), so that the next :meth:`clip_` may be given another one."""
        if self._optimizer is not None:  # the weights of others; a state that was loaded has those of this one
            self.bound.forget()
        self._optimizer = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_optimizer": None, "_stepping": None}  # a weak reference does not pickle


@torch.no_grad()
def clip_together_(
    clippers: Sequence[tuple[GradientClipper, Sequence[int] | None]],
    target: Optimizer | Tensor | Iterable[Tensor],
    grad_scaler: GradScaler | None = None,
    shards: Mapping[Tensor, Shard] | None = None,
) -> list[StepRecord | None]:
    """Clip groups of an optimizer's parameters, each at a threshold of its own: one pass, and one collective for all.

    A NaN or an infinity in one group is one of the step: it enters no record, and with ``nonfinite="skip"`` no weight
    of any group moves.

    Args:
        clippers: One per group, alike in everything but their records, each with the positions of its parameters
            among those of ``target``. Together they hold each parameter once. ``None``: the one clipper has all.
        target: As in :meth:`GradientClipper.clip_`.
        grad_scaler: As in :meth:`GradientClipper.clip_`.
        shards: As in :meth:`GradientClipper.clip_`.

    Returns:
        A record per clipper; ``None`` where no parameter of its group has a gradient.
    """
    (first, _), parameters = clippers[0], parameters_of(target)
    optimizer = _optimizer_of(target, first)
    gate = None if optimizer is None else _gate_of(optimizer, clippers, parameters, shards)
    if not parameters:
        return [None] * len(clippers)
    refuse_capture(parameters[0].device)
    scaler = grad_scaler if grad_scaler is not None and grad_scaler.is_enabled() else None
    if not (have_gradients(parameters, None) or are_shared(parameters, shards)):
        return [None] * len(clippers)
    found_infs = None if scaler is None else unscale_(scaler, target)
    gradients = Gradients(parameters, shards)
    read = not _numbers.reads_are_free(gradients.device) and must_be_read(
        first.nonfinite, optimizer, scaler is not None, gradients.shards is not None, first.outliers.is_on
    )
    rates = first._rates(parameters)
    measured = gradients.measure(
        read,
        numels=first.gradient_clip_algorithm == "value",
        weights=rates is not None and are_weighed(clippers, parameters),
        rates=rates.unread if rates is not None else (),
    )
    if rates is not None and read:
        rates.read(measured.rates)
    norm = norm_of(norms := measured.norms)
    is_finite = norm < math.inf
    parts = parts_of(clippers, parameters, measured, norm, gradients.shards is not None)
    is_outlier = any_outlier(clippers, parts, is_finite) if first.outliers.is_on else False
    records = [
        None if part is None else part.clip_(gradients, measured, rates, is_finite, is_outlier) for part in parts
    ]
    if first.gradient_clip_algorithm == "value":
        records = with_clipped_norms(records, clippers, gradients, is_finite, read)
    if first.nonfinite == "raise":
        raise_if_nonfinite(float(norm), list(norms), parameters, scaler, records)
    goes = negation(is_outlier)
    if first.nonfinite != "ignore":
        goes = skip_if_nonfinite(is_finite, optimizer, found_infs, is_outlier)
    if goes is not True:
        leave_out_unless(goes, parameters, optimizer, gate)
    return records


def _optimizer_of(target: Any, clipper: GradientClipper) -> Any:
    """The optimizer that makes the step; `None` where the target is parameters."""
    if hasattr(target, "param_groups"):
        return unwrapped(target)
    if clipper.bound.is_on:
        raise ValueError(
            "Expected `target` to be the optimizer beside `max_update_ratio`, which depends on its learning rate, but"
            " got parameters. Pass the optimizer."
        )
    return None


def _gate_of(
    optimizer: Any,
    clippers: Sequence[tuple[GradientClipper, Any]],
    parameters: Sequence[Any],
    shards: Mapping[Tensor, Shard] | None,
) -> StepGate:
    """Bind the clippers to the optimizer, and have its gate expect the step."""
    for clipper, _ in clippers:
        clipper._bind(optimizer)
    is_flat = shards is None and any(getattr(parameter, "_fsdp_flattened", False) for parameter in parameters)
    if is_flat and torch.distributed.get_world_size() > 1:
        raise ValueError(
            "Expected `shards` beside an optimizer of `FullyShardedDataParallel` parameters: without them each"
            " process would clip its part at a threshold of its own. Shard with `fully_shard` (FSDP2), whose"
            " gradients tell what is held, or use a Trainer with the callback."
        )
    if isinstance(optimizer, LBFGS):
        raise ValueError(
            "Expected an optimizer that computes its gradients once per step, but `LBFGS` searches along them; clipping"
            " them breaks the search. Use another optimizer."
        )
    gate = StepGate.of(optimizer)
    gate.expect(optimizer)
    return gate
