"""`GradientClipper`: measure, threshold, clip, and commit once the step was made. For any PyTorch loop."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from lightning_autoclip import gradients as measuring
from lightning_autoclip import skip
from lightning_autoclip.committed import CommittedSteps, Pending
from lightning_autoclip.gradients import Gradients, Measured, at, norm_of, rms_of
from lightning_autoclip.optimizers import (
    check_optimizer,
    parameters_of,
    refuse_capture,
    unscale_,
    unwrapped,
    wrapped_in,
)
from lightning_autoclip.policies import Policy
from lightning_autoclip.shards import Shard, are_shared
from lightning_autoclip.skip import StepWrapper
from lightning_autoclip.step import MOST_IN_A_ROW, Part, StepRecord, Unread, find_outlier
from lightning_autoclip.table import NOWHERE, Place
from lightning_autoclip.update_ratio import Rates, UpdateRatioLimit, WeightNorms, is_sgd_like


class GradientClipper(CommittedSteps):
    """Clips the gradients of one optimizer at a threshold that follows the history of their norms.

    Call :meth:`clip_` between ``backward()`` and ``optimizer.step()``. Each call measures the gradients, has the policy
    set the threshold from the norm history and the current norm, and clips in place. The norm enters the history once
    the step was made: with the next call at the latest.

    On an accelerator the host waits for nothing, except for one number per step where ``nonfinite="skip"`` meets an
    optimizer that can neither skip by itself (``fused=True``) nor be skipped by a `GradScaler`, where ``skip_above``
    meets one that is not fused, where ``nonfinite="raise"``, and on MPS and XLA.

    Args:
        policy: Turns the norm history into a threshold, for example ``Percentile(10)``.
        **settings: The other arguments of `Clipping`: ``gradient_clip_algorithm``, ``window``, ``warmup_steps``,
            ``max_threshold``, ``max_update_ratio``, ``skip_above``, ``nonfinite``.

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

    def __init__(self, policy: Policy, **settings: Any) -> None:
        super().__init__(policy, **settings)
        self.clipped_norm_every = 1  # steps, by value; the callback is content with a few per logging interval
        self._limit = UpdateRatioLimit(self.settings.max_update_ratio) if self.settings.max_update_ratio else None
        self._optimizer: weakref.ref[Any] | None = None
        self._was_released = False
        self._stepping: weakref.ref[Any] | None = None  # it or one in it, if its steps can be limited

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
            NonFiniteGradientError: With ``nonfinite="raise"``, at a NaN or an Inf.
            TypeError: ``target`` is neither an optimizer nor parameters, or the policy returned no single number.
            ValueError: The clipper has served another optimizer before, or FSDP1 shares its gradients and ``shards``
                are not given.
            RuntimeError: A CUDA graph is being captured.
        """
        return clip_together_([(self, None)], target, grad_scaler, shards)[0]

    def release(self) -> None:
        """Put the optimizer's own ``step`` back and forget the optimizer, so that :meth:`clip_` may be given another.

        The history stays.
        """
        optimizer = None if self._optimizer is None else self._optimizer()
        if optimizer is not None:
            StepWrapper.detach(optimizer)
        self._state = self._committed()._replace(pending=None)
        self._optimizer, self._stepping, self._was_released = None, None, True

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned: see `CommittedSteps`."""
        super().load_state_dict(state_dict)
        self._was_released = False
        if self._limit is not None:
            self._limit.reset()

    def _serves(self, optimizer: Any) -> bool:
        return self._optimizer is not None and self._optimizer() is optimizer

    def _bind(self, optimizer: Any) -> None:
        served = None if self._optimizer is None else self._optimizer()
        if served is not None and wrapped_in(served)[-1] is not wrapped_in(optimizer)[-1]:
            raise ValueError(
                "Expected `clip_` to be called with the optimizer it was called with first, but got another one, whose"
                " norms would mix with the first one's. Use one `GradientClipper` per optimizer, or call `release()`"
                " if this optimizer takes the other's place."
            )
        if served is not None:  # of the two, one wraps the other
            StepWrapper.detach(served)
        self._optimizer = weakref.ref(optimizer)
        if self._was_released and self._limit is not None:  # the weights of the next optimizer are others
            self._state, self._was_released = self._state._replace(weights=WeightNorms()), False
            self._limit.reset()
        is_limited = self._limit is not None and is_sgd_like(optimizer)
        self._stepping = weakref.ref(wrapped_in(optimizer)[-1]) if is_limited else None

    def _weighs(self, gradients: Gradients, positions: Sequence[int] | None) -> bool:
        """Whether the weights are to be measured at the coming step."""
        count = len(gradients.tensors if positions is None else positions)
        weights, shapes = self._state.weights, lambda: at(gradients.shapes, positions)
        return UpdateRatioLimit.is_due(self._state.steps + 1, weights, count, shapes)

    def _part(
        self,
        positions: Sequence[int] | None,
        gradients: Gradients,
        measured: Measured,
        norm: Any,
        rates: Rates | None,
        is_read: bool,
    ) -> Part:
        """What was measured of the parameters at these positions."""
        state, settings, norms = self._state, self.settings, at(measured.norms, positions)
        tensors = gradients.tensors if positions is None else [gradients.tensors[position] for position in positions]
        norm = norm if positions is None else norm_of(norms)
        statistic = rms_of(norm, at(measured.numels, positions)) if settings.by_value else norm
        part = Part(settings, state.history, state.steps, tensors, norms, norm, statistic, positions is None)
        if rates is not None and self._limit is not None:
            weights: Any = state.weights
            if len(measured.weights):
                weights = at(measured.weights, positions)
                weights = self._limit.measured(state.steps + 1, weights, at(gradients.shapes, positions), is_read)
                part.weight_norms = weights.norms
            ratio_of = self._limit.update_ratio if is_read else self._limit.update_ratio_unread
            part.update_ratio = ratio_of(norms, weights, rates, positions)
        return part

    def __getstate__(self) -> dict[str, Any]:
        state = self._committed()._replace(pending=None)
        return {**self.__dict__, "_optimizer": None, "_stepping": None, "_state": state}


@torch.no_grad()
def clip_together_(
    groups: Sequence[tuple[GradientClipper, Sequence[int] | None]],
    target: Optimizer | Tensor | Iterable[Tensor],
    grad_scaler: GradScaler | None = None,
    shards: Mapping[Tensor, Shard] | None = None,
    place: Place = NOWHERE,
) -> list[StepRecord | None]:
    """Clip groups of an optimizer's parameters, each at a threshold of its own: one pass, and one collective for all.

    A NaN or an Inf in one group is one of the step: it enters no history, and with ``nonfinite="skip"`` no weight of
    any group moves.

    Args:
        groups: Clippers with equal settings, each with the positions of its parameters among those of ``target``.
            Together they hold each parameter once. ``None``: the one clipper has all.
        target: As in :meth:`GradientClipper.clip_`.
        grad_scaler: As in :meth:`GradientClipper.clip_`.
        shards: As in :meth:`GradientClipper.clip_`.
        place: Where the step is, for the logs.

    Returns:
        A record per clipper; ``None`` where no parameter of its group has a gradient.
    """
    optimizer, parameters, wrapper = _begun(groups, target, shards)
    if not (any(parameter.grad is not None for parameter in parameters) or are_shared(parameters, shards)):
        return [None] * len(groups)
    scaler = grad_scaler if grad_scaler is not None and grad_scaler.is_enabled() else None
    scaler_state = None if scaler is None else unscale_(scaler, target)
    gradients, settings = Gradients(parameters, shards), groups[0][0].settings
    is_read = not measuring.can_read_later(gradients.device) or skip.needs_read(
        settings, optimizer, scaler is not None, gradients.shards is not None
    )
    parts, norm, norms = _measured(groups, parameters, gradients, is_read)
    if settings.nonfinite == "raise":
        skip.raise_if_nonfinite(norm, norms, parameters, scaler)
    is_finite = norm < math.inf
    is_outlier = find_outlier(parts, is_finite)
    counts = [clipper._state.outliers_in_a_row for (clipper, _), part in zip(groups, parts, strict=True) if part]
    is_skipped = is_outlier if max(counts, default=0) < MOST_IN_A_ROW else False
    records = [
        None if part is None else (part.clip_ if is_read else part.clip_unread_)(is_finite, is_skipped)
        for part in parts
    ]
    if settings.by_value:
        records = _with_clipped_norms(records, groups, gradients, is_read)
    if is_read:
        skip.skip_if_bad(settings, is_finite, is_skipped, parameters, optimizer, wrapper, scaler_state)
    else:
        skip.skip_if_bad_unread(settings, is_finite, is_skipped, optimizer, wrapper, scaler_state)
    if wrapper is not None:
        wrapper.expect(parameters)
    unread = None if is_read else Unread(records, is_outlier, settings.by_value)
    steps = 0 if wrapper is None else wrapper.steps
    if wrapper is not None and not steps and wrapper.is_too_late(optimizer):
        steps = -1  # it returns to nobody who would count it
    for group, ((clipper, _), record) in enumerate(zip(groups, records, strict=True)):
        if record is not None:
            clipper._leave(Pending(record, is_outlier, unread, group, wrapper, steps, scaler_state, place))
    return records


_Groups: TypeAlias = Sequence[tuple[GradientClipper, Sequence[int] | None]]


def _optimizer_of(target: Any, clipper: GradientClipper) -> Any:
    """The optimizer that makes the step; ``None`` where the target is parameters."""
    if hasattr(target, "param_groups"):
        return unwrapped(target)
    if clipper.settings.max_update_ratio is not None:
        raise ValueError(
            "Expected `target` to be the optimizer beside `max_update_ratio`, which depends on its learning rate, but"
            " got parameters. Pass the optimizer."
        )
    return None


def _begun(
    groups: _Groups, target: Any, shards: Mapping[Tensor, Shard] | None
) -> tuple[Any, list[Tensor], StepWrapper | None]:
    """Start a new step; commit the previous one. The optimizer, its parameters, and its wrapper, if it is known."""
    optimizer, parameters = _optimizer_of(target, groups[0][0]), parameters_of(target)
    if parameters:
        refuse_capture(parameters[0].device)
    elif optimizer is None:
        warnings.warn("`clip_` got no parameters, so nothing was clipped: an iterator is used up once.", stacklevel=5)
    for clipper, _ in groups:
        clipper.commit()
    return optimizer, parameters, None if optimizer is None else _announced(optimizer, groups, parameters, shards)


def _announced(
    optimizer: Any, groups: _Groups, parameters: Sequence[Any], shards: Mapping[Tensor, Shard] | None
) -> StepWrapper:
    """Bind the clippers to the optimizer, and announce its step."""
    for clipper, _ in groups:
        if not clipper._serves(optimizer):
            check_optimizer(optimizer, parameters, shards)
            clipper._bind(optimizer)
    wrapper = StepWrapper.of(optimizer)
    wrapper.announce(optimizer)
    return wrapper


def _measured(
    groups: _Groups, parameters: Sequence[Tensor], gradients: Gradients, is_read: bool
) -> tuple[list[Part | None], Any, Any]:
    """Measure the gradients of all groups: a part per group, the norm of the whole, and that of each parameter."""
    first, is_shared = groups[0][0], gradients.shards is not None
    stepping = None if first._stepping is None else first._stepping()
    rates, due = (None if stepping is None else Rates(stepping, parameters)), False
    present = [
        clipper if positions is None or _have_gradients(at(parameters, positions), is_shared) else None
        for clipper, positions in groups
    ]
    if rates is not None:
        due = any(
            clipper is not None and clipper._weighs(gradients, positions)
            for clipper, (_, positions) in zip(present, groups, strict=True)
        )
    measured = gradients.measure(is_read, numels=first.settings.by_value, weights=due)
    norm = norm_of(measured.norms)
    parts = [
        None if clipper is None else clipper._part(positions, gradients, measured, norm, rates, is_read)
        for clipper, (_, positions) in zip(present, groups, strict=True)
    ]
    return parts, norm, measured.norms


def _have_gradients(parameters: Sequence[Tensor], is_shared: bool) -> bool:
    """Whether there is a gradient of a group, or, if processes share them, whether one of them may have one."""
    return any(each.requires_grad if is_shared else each.grad is not None for each in parameters)


def _with_clipped_norms(
    records: list[StepRecord | None], groups: _Groups, gradients: Gradients, is_read: bool
) -> list[StepRecord | None]:
    """The records of clipping by value, with the norms after it where they are due: one more read of the gradients."""
    due = [clipper._state.steps % clipper.clipped_norm_every == 0 for clipper, _ in groups]
    if not any(due):
        return records
    after = gradients.measure(is_read).norms
    return [
        record._replace(clipped_norm=norm_of(at(after, positions))) if record is not None and is_due else record
        for record, (_, positions), is_due in zip(records, groups, due, strict=True)
    ]
