"""What optimizers and gradient scalers do with a step: which parameters, which loss scale, how a step is left out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler, OptState

from lightning_autoclip.clipping._numbers import flag, negation
from lightning_autoclip.clipping.gate import StepGate

_STEP_WHAT_THEY_WRAP = ("LightningOptimizer", "_FabricOptimizer", "AcceleratedOptimizer")


class NonFiniteGradientError(RuntimeError):
    """A gradient held a NaN or an infinity and ``nonfinite="raise"`` was asked for.

    Attributes:
        parameters: The parameters whose gradients were not finite.
        records: What :func:`clip_together_` would have returned: a `StepRecord` per clipper, or ``None``.
    """

    def __init__(self, message: str, parameters: list[Tensor], records: Sequence[Any]) -> None:
        super().__init__(message)
        self.parameters, self.records = parameters, records


def wrapped_in(target: Any) -> list[Any]:
    """An optimizer and those that it wraps, outermost first, whatever their attribute is called.

    What it wraps has the same parameters; another optimizer that it only knows of has others.
    """
    found = [target]
    while True:
        held = (each for each in getattr(found[-1], "__dict__", {}).values() if hasattr(each, "param_groups"))
        others = (each for each in held if all(each is not known for known in found))
        inner = next((each for each in others if _ids(each) == _ids(target)), None)
        if inner is None:
            return found
        found.append(inner)


def _ids(optimizer: Any) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def unwrapped(target: Any) -> Any:
    """The optimizer inside Lightning's, Fabric's and Accelerate's wrappers: the one whose step is made."""
    if not _steps_what_it_wraps(target):
        return target
    return next((inner for inner in wrapped_in(target) if not _steps_what_it_wraps(inner)), target)


def _steps_what_it_wraps(optimizer: Any) -> bool:
    return any(base.__name__ in _STEP_WHAT_THEY_WRAP for base in type(optimizer).__mro__)


def parameters_of(target: Any) -> list[Tensor]:
    """The parameters of an optimizer, or those that were given, each once; anything else is a `TypeError`."""
    if hasattr(target, "param_groups"):
        given = list(chain.from_iterable(group["params"] for group in target.param_groups))
        return given if len(set(map(id, given))) == len(given) else _each_once(given)
    parameters = _each_once(target if isinstance(target, Iterable) and not isinstance(target, Tensor) else [target])
    for parameter in parameters:
        if not isinstance(parameter, Tensor):
            raise TypeError(
                f"Expected `target` to be an optimizer or parameters, but got a `{type(parameter).__name__}`. Pass the"
                " optimizer, or `model.parameters()`."
            )
    return parameters


def _each_once(parameters: Iterable[Tensor]) -> list[Tensor]:
    return list({id(parameter): parameter for parameter in parameters}.values())


def refuse_capture(device: torch.device) -> None:
    """Raise while a CUDA graph is captured: replays would count no step, and measure no weights again."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "Expected `clip_` to be called outside of a graph, but it was called while a CUDA graph is captured, whose"
            " replays would leave its record behind. Capture forward and backward pass, and clip and step after the"
            " replay."
        )


def unscale_(grad_scaler: GradScaler, target: Any) -> list[Tensor]:
    """Unscale the gradients unless that was done before, as ``grad_scaler.step`` would.

    A wrapper and the optimizer in it have the same gradients, and nobody but the user knows which of both the scaler
    will step: what is unscaled counts as unscaled for both.

    Returns:
        On each device shape ``()``, float32: where the scaler keeps whether it has found an infinity.
    """
    if not hasattr(target, "param_groups"):
        raise ValueError(
            "Expected the optimizer beside `grad_scaler`: which gradients are unscaled is kept per optimizer."
        )
    states, optimizers = grad_scaler._per_optimizer_states, wrapped_in(target)
    known = [states[id(optimizer)] for optimizer in optimizers if id(optimizer) in states]
    state = next((state for state in known if state["stage"] is not OptState.READY), None)
    if state is None:
        grad_scaler.unscale_(unwrapped(target))
        state = states[id(unwrapped(target))]
    for optimizer in optimizers:
        states[id(optimizer)] = state
    return list(state["found_inf_per_device"].values())


def steps_with_found_inf(optimizer: Any) -> bool:
    """Whether the optimizer's step reads ``found_inf``: all of its groups are fused."""
    name = "_step_supports_amp_scaling"
    # Its own: a wrapper that passes on what it is asked for would be told, and the step that it calls would not.
    if not (getattr(optimizer, "__dict__", {}).get(name) or getattr(type(optimizer), name, False)):
        return False
    return StepGate.of(optimizer).has_hooks and all(group.get("fused") for group in optimizer.param_groups)


def must_not_skip_itself(optimizer: Any, is_sharded: bool = False) -> bool:
    """Whether a fused step that is told to skip would leave uninitialised memory as momentum behind.

    Fused SGD allocates momentum buffers when it first meets their parameters, without filling them, and a skipped
    kernel leaves them so (torch 2.13, also under a `GradScaler`). That step must be skipped by having no gradients.

    Args:
        optimizer: The optimizer.
        is_sharded: Whether other processes may meet a parameter at another step than this one, though all of them must
            go the same way.
    """
    return steps_with_found_inf(optimizer) and any(
        is_sharded or (parameter.grad is not None and optimizer.state.get(parameter, {}).get("momentum_buffer") is None)
        for group in optimizer.param_groups
        if group.get("momentum")
        for parameter in group["params"]
    )


def must_be_read(
    nonfinite: str, optimizer: Any, has_scaler: bool, is_sharded: bool, skips_outliers: bool = False
) -> bool:
    """Whether the host must know the norm before the step: where nothing on the accelerator can leave it out.

    A scaler leaves out what is not finite. What is finite and far too large it would leave out too, and back off.
    """
    if nonfinite == "raise" or (nonfinite == "ignore" and not skips_outliers):
        return nonfinite == "raise"
    can_be_skipped = steps_with_found_inf(optimizer) or (has_scaler and not skips_outliers)
    return not can_be_skipped or must_not_skip_itself(optimizer, is_sharded)


def raise_if_nonfinite(
    norm: float,
    norms: Sequence[float],
    parameters: Sequence[Tensor],
    grad_scaler: GradScaler | None,
    records: Sequence[Any],
) -> None:
    """Raise at a non-finite norm, unless a `GradScaler` may cure it by lowering its scale.

    Args:
        norm: Of the whole gradient.
        norms: Of the gradient of each parameter.
        parameters: The parameters.
        grad_scaler: The scaler of the loss.
        records: For the error.
    """
    if norm < math.inf or (grad_scaler is not None and grad_scaler.get_scale() > 1):
        return
    bad = [parameter for parameter, own in zip(parameters, norms, strict=True) if not math.isfinite(own)]
    having = sum(parameter.grad is not None for parameter in parameters)
    what = "a NaN or an infinity" if math.isnan(norm) else "a NaN, an infinity or a norm beyond float32 (above 1.8e19)"
    where = f"{what} in the gradient of {len(bad)} of {having} parameters" if bad else "above 1.8e19, beyond float32"
    raise NonFiniteGradientError(f"The norm of the gradient is {norm}: {where}.", bad, records)


def skip_if_nonfinite(
    is_finite: bool | Tensor, optimizer: Any, found_infs: list[Tensor] | None, is_outlier: bool | Tensor
) -> bool | Tensor:
    """Have a scaler leave the coming step out if the norm is not finite.

    Args:
        is_finite: Whether the norm is; a tensor where nobody may read it.
        optimizer: What steps; ``None`` if it is not known.
        found_infs: Where the scaler keeps whether it has found an infinity, if there is one.
        is_outlier: Whether the step is to be left out for its size, which is nothing that a scaler should know.

    Returns:
        Whether the step goes ahead as far as the scaler is concerned; if not, somebody else must leave it out.
    """
    if is_finite is True:
        return negation(is_outlier)
    if found_infs:
        # Where it looks before the step. A norm beyond float32 is an infinity too, though no entry may be. The scaler
        # adds up what stands here, and fused kernels skip at exactly 1.
        first, *others = found_infs
        bad = flag(is_finite, 0.0, 1.0).to(first) if isinstance(is_finite, Tensor) else torch.ones_like(first)
        torch.maximum(first, bad, out=first)
        for other in others:
            other.zero_()
    if isinstance(is_finite, Tensor):
        small = negation(is_outlier)
        if found_infs is not None:
            return small
        return is_finite if small is True else is_finite & small
    return not (found_infs is None or must_not_skip_itself(optimizer))


def leave_out_unless(goes: bool | Tensor, parameters: Sequence[Tensor], optimizer: Any, gate: StepGate | None) -> None:
    """See to it that the coming step moves no weight unless it goes ahead: neither momentum nor weight decay.

    Args:
        goes: Whether it does; a tensor where nobody may read it.
        parameters: Those that step.
        optimizer: Their optimizer; ``None`` if it is not known.
        gate: Of the optimizer; ``None`` if that is not known.
    """
    if isinstance(goes, Tensor):
        if gate is not None and gate.has_hooks:
            gate.leave_out_if(flag(goes, 0.0, 1.0), optimizer)
    elif not goes and gate is not None:
        gate.leave_out(optimizer)
    elif not goes:
        for parameter in parameters:
            parameter.grad = None
