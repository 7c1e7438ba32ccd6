"""What optimizers and gradient scalers do with a step: which parameters, which loss scale, how a step is left out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler, OptState

from lightning_autoclip.clipping._numbers import Number
from lightning_autoclip.clipping.gradients import Gradients


class NonFiniteGradientError(RuntimeError):
    """A gradient held a NaN or an infinity and ``nonfinite="raise"`` was asked for.

    Attributes:
        parameters: The parameters whose gradients were not finite.
        records: What :func:`clip_together_` would have returned: a `StepRecord` per clipper, or ``None``.
    """

    def __init__(self, message: str, parameters: list[Tensor], records: Sequence[Any]) -> None:
        super().__init__(message)
        self.parameters, self.records = parameters, records


def unwrapped(target: Any) -> Any:
    """The optimizer inside Lightning's and Fabric's wrappers, which scalers and hooks know by its own identity."""
    while any(base.__name__ in ("LightningOptimizer", "_FabricOptimizer") for base in type(target).__mro__):
        target = target.optimizer
    return target


def parameters_of(target: Any) -> Iterable[Tensor]:
    """The parameters of an optimizer, or those that were given, each once; anything else is a `TypeError`."""
    if hasattr(target, "param_groups"):
        return chain.from_iterable(group["params"] for group in target.param_groups)
    several = isinstance(target, Iterable) and not isinstance(target, Tensor)
    parameters = list({id(parameter): parameter for parameter in (target if several else [target])}.values())
    for parameter in parameters:
        if not isinstance(parameter, Tensor):
            raise TypeError(
                f"Expected `target` to be an optimizer or parameters, but got a `{type(parameter).__name__}`. Pass the"
                " optimizer, or `model.parameters()`."
            )
    return parameters


def pending_scale(grad_scaler: GradScaler | None, optimizer: Any) -> Tensor | None:
    """The scale by which the gradients are still multiplied: shape ``()``, float32; ``None`` if they are not."""
    if grad_scaler is None or not grad_scaler.is_enabled():
        return None
    if optimizer is None:
        raise ValueError(
            "Expected the optimizer beside `grad_scaler`: which gradients are unscaled is kept per optimizer."
        )
    state = grad_scaler._per_optimizer_states.get(id(optimizer))
    unscaled = state is not None and state["stage"] is not OptState.READY
    return None if unscaled else grad_scaler._scale


def raise_if_nonfinite(
    norm: Number,
    norms: list[float] | Tensor,
    gradients: Gradients,
    grad_scaler: GradScaler | None,
    records: Sequence[Any],
) -> None:
    """Raise at a non-finite norm, unless a `GradScaler` may cure it by lowering its scale. Reads the host."""
    if math.isfinite(norm):
        return
    if grad_scaler is not None and grad_scaler.is_enabled() and grad_scaler.get_scale() > 1:
        return
    finite = torch.as_tensor(norms, dtype=torch.float64).isfinite().tolist()
    bad = [parameter for parameter, is_finite in zip(gradients.parameters, finite, strict=True) if not is_finite]
    where = f"a NaN or an infinity in the gradient of {len(bad)} of {len(finite)} parameters"
    if not bad:
        where = "beyond float32" if gradients.shards is None else "not finite in what another process holds"
    raise NonFiniteGradientError(f"The norm of the gradient is {float(norm)}: {where}.", bad, records)


def skip_if_nonfinite(
    norm: Number, gradients: Gradients, optimizer: Any, grad_scaler: GradScaler | None, pending: bool
) -> None:
    """See to it that the coming step moves no weight if the norm is not finite: neither momentum nor weight decay."""
    if isinstance(norm, float) and norm < math.inf:
        return
    nonfinite = torch.as_tensor(norm < math.inf).logical_not()
    if pending:
        # The scaler will look for an infinity itself. A norm beyond float32 is one too, though no entry may be, and so
        # is the infinity of another process.
        for tensor in [tensor for tensor in gradients.tensors if tensor.numel()][:1]:
            tensor[(0,) * tensor.dim()].add_(torch.where(nonfinite, math.inf, 0.0).to(tensor.device))
        return
    scales = grad_scaler is not None and grad_scaler.is_enabled()
    if scales:
        for found_inf in grad_scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values():  # type: ignore[union-attr]
            # Where it looks before the step. Fused kernels skip at exactly 1: 2 would be no infinity to them.
            torch.maximum(found_inf, nonfinite.to(found_inf), out=found_inf)
    if not must_not_skip_itself(optimizer):
        if scales:
            return
        if isinstance(norm, Tensor) and steps_with_found_inf(optimizer):
            # A fused step that finds 1 here leaves weights and state as they are.
            optimizer.found_inf = optimizer._clippers_found_inf = nonfinite.to(torch.float32)
            return
    if nonfinite.item():
        for parameter in gradients.parameters:
            parameter.grad = None


def steps_with_found_inf(optimizer: Any) -> bool:
    """Whether the optimizer's step reads ``found_inf``: all of its groups are fused."""
    supports = getattr(optimizer, "_step_supports_amp_scaling", False)
    return supports and all(group.get("fused") for group in optimizer.param_groups)


def must_not_skip_itself(optimizer: Any) -> bool:
    """Whether a fused step that is told to skip would leave uninitialised memory as momentum behind.

    Fused SGD allocates momentum buffers when it first meets their parameters, without filling them, and a skipped
    kernel leaves them so (torch 2.13, also under a `GradScaler`). That step must be skipped by having no gradients.
    """
    return steps_with_found_inf(optimizer) and any(
        parameter.grad is not None and optimizer.state.get(parameter, {}).get("momentum_buffer") is None
        for group in optimizer.param_groups
        if group.get("momentum")
        for parameter in group["params"]
    )


def forget_found_inf(optimizer: Any, args: Any = None, kwargs: Any = None) -> None:
    """Take back what :func:`skip_if_nonfinite` told a fused optimizer: torch would believe it at every later step."""
    ours = optimizer.__dict__.pop("_clippers_found_inf", None)
    if ours is not None and getattr(optimizer, "found_inf", None) is ours:  # a scaler's own it deletes itself
        del optimizer.found_inf
