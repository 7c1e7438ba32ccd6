"""An optimizer's parameters, what it wraps, what a loss scaler keeps of it, and which ones cannot be clipped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler, OptState
from torch.optim import LBFGS

from lightning_autoclip.shards import Shard

_STEP_WHAT_THEY_WRAP = ("LightningOptimizer", "_FabricOptimizer", "AcceleratedOptimizer")


def wrapped_in(target: Any) -> list[Any]:
    """An optimizer and those that it wraps, outermost first, whatever their attribute is called.

    A wrapped optimizer has the same parameters; one that is only referred to has others.
    """
    chain_ = [target]
    while True:
        held = (each for each in getattr(chain_[-1], "__dict__", {}).values() if hasattr(each, "param_groups"))
        others = (each for each in held if all(each is not known for known in chain_))
        inner = next((each for each in others if _ids(each) == _ids(target)), None)
        if inner is None:
            return chain_
        chain_.append(inner)


def _ids(optimizer: Any) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def unwrapped(target: Any) -> Any:
    """The optimizer inside Lightning's, Fabric's and Accelerate's wrappers: the one whose ``step`` they call."""
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
    is_one = isinstance(target, (Tensor, nn.Module)) or not isinstance(target, Iterable)  # some modules can be iterated
    parameters = _each_once([target] if is_one else target)
    for parameter in parameters:
        if not isinstance(parameter, Tensor):
            raise TypeError(
                f"Expected `target` to be an optimizer or parameters, but got a `{type(parameter).__name__}`. Pass the"
                " optimizer, or `model.parameters()`."
            )
    return parameters


def _each_once(parameters: Iterable[Tensor]) -> list[Tensor]:
    return list({id(parameter): parameter for parameter in parameters}.values())


def unscale_(grad_scaler: GradScaler, target: Any) -> dict[str, Any]:
    """Unscale the gradients unless that was done before, as ``grad_scaler.step`` would.

    A wrapper and the optimizer in it have the same gradients, and only the user knows which of both the scaler will
    step: what is unscaled counts as unscaled for both.

    Returns:
        The scaler's state of the optimizer: ``found_inf_per_device`` and ``stage``.
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
    return state


def check_optimizer(optimizer: Any, parameters: Sequence[Any], shards: Mapping[Tensor, Shard] | None) -> None:
    """Refuse an optimizer whose gradients would be clipped wrongly."""
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


def refuse_capture(device: torch.device) -> None:
    """Raise while a CUDA graph is captured: replays would count no step, and measure no weights again."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "Expected `clip_` to be called outside of a graph, but it was called while a CUDA graph is captured, whose"
            " replays would leave the norm history behind. Capture forward and backward pass, and clip and step after"
            " the replay."
        )
