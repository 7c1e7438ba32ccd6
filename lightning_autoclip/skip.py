"""Skipping a step: the wrapper around an optimizer's ``step``, ``found_inf``, the loss scaler, and when to read."""

from __future__ import annotations

import functools
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from lightning_autoclip.optimizers import wrapped_in
from lightning_autoclip.settings import Clipping

_WRAPPER, _WRAPPED = "_autoclip_wrapper", "_autoclip_wrapped"  # attributes of an optimizer


class NonFiniteGradientError(RuntimeError):
    """A gradient held a NaN or an Inf and ``nonfinite="raise"`` was asked for.

    Attributes:
        parameters: The parameters whose gradients were not finite.
    """

    def __init__(self, message: str, parameters: list[Tensor]) -> None:
        super().__init__(message)
        self.parameters = parameters


class _SkipStep(BaseException):
    """Ends a closure, and with it a step that has changed nothing yet."""


class StepWrapper:
    """Wraps ``step`` of an optimizer, and of the innermost one that it wraps, to skip a step on request.

    A skipped step is not made, as with `GradScaler`: without a closure the wrapper returns at once. With a closure,
    which every optimizer calls before it changes anything, the closure ends in an exception that the wrapper catches.

    Attributes:
        steps: How many steps were made or skipped.
        unannounced: How many of them nobody announced by :meth:`announce`.
        replaced: At how many of them the gradients were not those that were announced.
        evaluations: How often the step that is being made has called its closure.
    """

    def __init__(self) -> None:
        self.steps = self.unannounced = self.replaced = self.evaluations = 0
        self._is_announced = self._skips = self._is_running = self._is_evaluating = self._is_replaced = False
        self._found_inf: Tensor | None = None
        self._gradients: list[tuple[Tensor, Tensor, int]] = []  # parameter, gradient, version
        self._versions: list[tuple[Tensor, int]] = []  # of parameters, at a step that is to be skipped

    @classmethod
    def of(cls, optimizer: Any) -> StepWrapper:
        """Return the wrapper of an optimizer, attached to it."""
        wrapper: StepWrapper | None = optimizer.__dict__.get(_WRAPPER)
        if wrapper is None:
            wrapper = cls()
            for each in _ends(optimizer):
                _wrap(each, wrapper)
        return wrapper

    @classmethod
    def detach(cls, optimizer: Any) -> None:
        """Put the optimizer's own ``step`` back."""
        for each in _ends(optimizer):
            _unwrap(each)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a copy of an optimizer has a wrapper of its own once `clip_` is called with it

    def is_too_late(self, optimizer: Any) -> bool:
        """Whether a step is being made that will not ask any more whether to skip it, or that began without us."""
        return not self._is_evaluating and (self._is_running or _is_stepping(optimizer))

    def announce(self, optimizer: Any) -> None:
        """Start a new step: what was asked for a step that was never made no longer holds."""
        if self._skips and any(each._version != version for each, version in self._versions):
            warnings.warn(
                f"`{type(optimizer).__name__}` made a step that was to be skipped: its `step` was taken before"
                " `clip_` was called first, as by `torch.compile(optimizer.step)`. Take it afterwards.",
                stacklevel=4,
            )
        self.cancel(optimizer)
        self._is_announced = True
        if not self._is_running:
            self.evaluations = 0

    def cancel(self, optimizer: Any) -> None:
        """Take back what was announced and asked for."""
        self._is_announced, self._skips, self._gradients = False, False, []
        self._forget_found_inf(optimizer)

    def skip(self, parameters: Sequence[Tensor]) -> None:
        """Skip the coming step."""
        self._skips, self._versions = True, [(each, each._version) for each in (parameters[0], parameters[-1])]

    def skip_if(self, found_inf: Tensor, optimizer: Any) -> None:
        """Have the coming step of a fused optimizer change nothing if this number, on its device, is 1."""
        optimizer.found_inf = self._found_inf = found_inf

    def expect(self, parameters: Sequence[Tensor]) -> None:
        """Remember the gradients that the coming step is to use: those of the first and the last parameter."""
        ends = [(each, each.grad) for each in (parameters[0], parameters[-1])]
        self._gradients = [(each, gradient, gradient._version) for each, gradient in ends if gradient is not None]

    def _step(self, original: Callable[..., Any], optimizer: Any, args: Any, kwargs: Any) -> Any:
        if self._is_running:  # a wrapped optimizer, or a step that calls that of its parent class
            self._compare()
            return original(*args, **kwargs)
        closure = kwargs.get("closure", args[0] if args else None)
        self._is_running, self.evaluations, self._is_replaced = True, 0, False
        loss = None
        try:
            if callable(closure):
                ending = self._ending(closure)
                args, kwargs = ((ending, *args[1:]), kwargs) if args else (args, {**kwargs, "closure": ending})
                loss = original(*args, **kwargs)
            elif not self._skips:
                self._compare()
                self._join_found_inf(optimizer)
                loss = original(*args, **kwargs)
            else:
                optimizer._opt_called = True  # or a scheduler warns that no step was made before its own
        except _SkipStep as skipped:
            (loss,) = skipped.args
        finally:
            self._is_running = False
            self._forget_found_inf(optimizer)
        self.steps, self.unannounced = self.steps + 1, self.unannounced + (not self._is_announced)
        self.replaced += self._is_replaced
        self._is_announced, self._skips, self._gradients = False, False, []
        return loss

    def _ending(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure, which ends the step if the step is to be skipped."""

        def ending() -> Any:
            self.evaluations, self._is_evaluating = self.evaluations + 1, True
            try:
                loss = closure()
            finally:
                self._is_evaluating = False
            if self._skips:
                raise _SkipStep(loss)
            self._compare()
            return loss

        return ending

    def _compare(self) -> None:
        """Note whether the gradients that a step is about to use are not those that were announced."""
        self._is_replaced |= any(each.grad is not old or old._version != n for each, old, n in self._gradients)

    def _join_found_inf(self, optimizer: Any) -> None:
        """A scaler, which knows nothing of outliers, has put its own number in the place of ours."""
        theirs = getattr(optimizer, "found_inf", None)
        if self._found_inf is not None and theirs is not None and theirs is not self._found_inf:
            optimizer.found_inf = torch.maximum(theirs, self._found_inf.to(theirs))

    def _forget_found_inf(self, optimizer: Any) -> None:
        """Torch would believe it at every later step. A scaler deletes its own itself."""
        if self._found_inf is not None and getattr(optimizer, "found_inf", None) is self._found_inf:
            del optimizer.found_inf
        self._found_inf = None


def _ends(optimizer: Any) -> list[Any]:
    """The optimizer and the innermost one that it wraps."""
    outermost, *inner = wrapped_in(optimizer)
    return [outermost, *inner[-1:]]


def _wrap(optimizer: Any, wrapper: StepWrapper) -> None:
    own, original = optimizer.__dict__.get("step"), optimizer.step
    function = original.__func__ if getattr(original, "__self__", None) is optimizer else None

    @functools.wraps(original)
    def step(optimizer: Any, /, *args: Any, **kwargs: Any) -> Any:
        bound = original if function is None else MethodType(function, optimizer)  # which may be a copy
        found: StepWrapper | None = optimizer.__dict__.get(_WRAPPER)
        return bound(*args, **kwargs) if found is None else found._step(bound, optimizer, args, kwargs)

    optimizer.step = wrapped = MethodType(step, optimizer)  # schedulers look for `__func__`
    optimizer.__dict__.update({_WRAPPER: wrapper, _WRAPPED: (wrapped, own)})


def _unwrap(optimizer: Any) -> None:
    optimizer.__dict__.pop(_WRAPPER, None)
    wrapped, own = optimizer.__dict__.pop(_WRAPPED, (None, None))
    if wrapped is None or optimizer.__dict__.get("step") is not wrapped:
        return  # wrapped by something else since
    if own is None:
        del optimizer.step
    else:
        optimizer.step = own


def steps_with_found_inf(optimizer: Any) -> bool:
    """Whether the optimizer's step reads ``found_inf``: all of its groups are fused."""
    name = "_step_supports_amp_scaling"
    # Its own attribute: a wrapper that passes on what it is asked for would have it, and its inner step would not.
    if not (getattr(optimizer, "__dict__", {}).get(name) or getattr(type(optimizer), name, False)):
        return False
    return all(group.get("fused") for group in optimizer.param_groups)


def allocates_momentum(optimizer: Any, is_sharded: bool = False) -> bool:
    """Whether a fused step that skips by ``found_inf`` would leave uninitialised memory as momentum behind.

    Fused SGD allocates momentum buffers when it first meets their parameters, without filling them, and a skipped
    kernel leaves them so (torch 2.13, also under a `GradScaler`). Such a step must not be made at all.

    Args:
        optimizer: The optimizer.
        is_sharded: Whether other processes may meet a parameter at another step than this one, though all of them must
            decide alike.
    """
    return steps_with_found_inf(optimizer) and any(
        is_sharded or (parameter.grad is not None and optimizer.state.get(parameter, {}).get("momentum_buffer") is None)
        for group in optimizer.param_groups
        if group.get("momentum")
        for parameter in group["params"]
    )


def needs_read(settings: Clipping, optimizer: Any, has_scaler: bool, is_sharded: bool) -> bool:
    """Whether the host must know the norm before the step: where nothing on the device can skip the step.

    A scaler skips non-finite steps. A finite outlier it would skip too, and lower its scale.
    """
    skips_outliers = settings.skip_above is not None
    if settings.nonfinite == "raise" or (settings.nonfinite == "ignore" and not skips_outliers):
        return settings.nonfinite == "raise"
    can_skip = steps_with_found_inf(optimizer) or (has_scaler and not skips_outliers)
    return not can_skip or allocates_momentum(optimizer, is_sharded)


def raise_if_nonfinite(
    norm: float, norms: Sequence[float], parameters: Sequence[Tensor], grad_scaler: GradScaler | None
) -> None:
    """Raise at a non-finite norm, unless a `GradScaler` may cure it by lowering its scale."""
    if norm < math.inf or (grad_scaler is not None and grad_scaler.get_scale() > 1):
        return
    bad = [parameter for parameter, own in zip(parameters, norms, strict=True) if not math.isfinite(own)]
    having = sum(parameter.grad is not None for parameter in parameters)
    what = "a NaN or an Inf" if math.isnan(norm) else "a NaN, an Inf or a norm beyond float32 (above 1.8e19)"
    where = f"{what} in the gradient of {len(bad)} of {having} parameters" if bad else "above 1.8e19, beyond float32"
    raise NonFiniteGradientError(f"The norm of the gradient is {norm}: {where}.", bad)


def report_to_scaler(scaler_state: dict[str, Any], is_bad: Tensor | None) -> None:
    """Have a scaler see a non-finite norm where it looks before the step.

    A norm beyond float32 is an Inf too, though no element may be. The scaler adds up what stands here, and fused
    kernels skip at exactly 1.

    Args:
        scaler_state: Of the optimizer.
        is_bad: Shape ``()``, bool: whether the norm is not finite; ``None``: it is not.
    """
    first, *others = scaler_state["found_inf_per_device"].values()
    if is_bad is None:
        first.fill_(1.0)
    else:
        first.masked_fill_(is_bad.to(first.device), 1.0)
    for other in others:
        other.zero_()


def skip_if_bad(
    settings: Clipping,
    is_finite: bool,
    is_outlier: bool,
    parameters: Sequence[Tensor],
    optimizer: Any,
    wrapper: StepWrapper | None,
    scaler_state: dict[str, Any] | None,
) -> None:
    """Have the coming step change nothing, neither weights nor momentum, if it is not finite or an outlier."""
    is_bad = settings.nonfinite != "ignore" and not is_finite
    if is_bad and scaler_state is not None:
        report_to_scaler(scaler_state, None)
        is_bad = allocates_momentum(optimizer)
    if not (is_bad or is_outlier):
        return
    if wrapper is not None and not wrapper.is_too_late(optimizer):
        wrapper.skip(parameters)
        return
    for parameter in parameters:
        parameter.grad = None


def _is_stepping(optimizer: Any) -> bool:
    """Whether the optimizer's ``step`` is among the callers, or torch's wrapper around it, which calls its hooks."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name in ("step", "wrapper") and frame.f_locals.get("self") is optimizer:
            return True
        frame = frame.f_back
    return False


def skip_if_bad_unread(
    settings: Clipping,
    is_finite: Tensor,
    is_outlier: Any,
    optimizer: Any,
    wrapper: StepWrapper | None,
    scaler_state: dict[str, Any] | None,
) -> None:
    """Do the same where the host does not know the norm."""
    bad = is_outlier
    if settings.nonfinite != "ignore":
        is_bad = is_finite.logical_not()
        if scaler_state is not None:
            report_to_scaler(scaler_state, is_bad)
        else:
            bad = is_bad if is_outlier is False else is_bad | is_outlier
    if wrapper is not None and bad is not False:
        wrapper.skip_if(bad.to(torch.float32), optimizer)
