"""What a process holds of parameters and of their gradients: plain, sparse and complex ones, DTensors, flat shards."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parameter import is_lazy


class Shard(NamedTuple):
    """What this process holds of a gradient.

    Attributes:
        share: The number of distinct shards of the gradient divided by the number of processes, so that a sum of
            ``share * square`` over all processes counts every entry once.
        numel: Number of entries that are held here, where padding makes it differ from the gradient's own.
        shape: That of the whole, where what is held has another.
    """

    share: float
    numel: float | None = None
    shape: torch.Size | None = None


def dtensor_class() -> type | None:
    """The class DTensor if anybody has imported it, for `isinstance`; importing it takes a second."""
    module = sys.modules.get("torch.distributed.tensor")
    return None if module is None else module.DTensor


def are_shared(parameters: Iterable[Tensor], shards: Mapping[Tensor, Shard] | None) -> bool:
    """Whether processes share the gradients of some parameters: whether each has to take part in a sum."""
    dtensor = dtensor_class()
    return shards is not None or (dtensor is not None and any(isinstance(each, dtensor) for each in parameters))


def refuse_xla_shards(parameters: Iterable[Tensor]) -> None:
    """Refuse parameters of `XlaFullyShardedDataParallel`: a process holds a part, and nothing says how large.

    Raises:
        ValueError: There are some.
    """
    if any(getattr(parameter, "_is_sharded", False) for parameter in parameters):
        raise ValueError(
            "Expected whole gradients on XLA, but got those of `XlaFullyShardedDataParallel`, of which each process"
            " holds a part and would clip it at a threshold of its own. Use `XLAStrategy` instead of `XLAFSDPStrategy`."
        )


def shard_of_gradient(parameter: Any, shards: Mapping[Tensor, Shard]) -> Shard:
    """How much of a gradient this process holds: known of a DTensor by itself, else given."""
    gradient = parameter.grad
    if gradient is None:
        return Shard(0.0, 0.0)
    if not hasattr(gradient, "placements"):
        return shards.get(parameter, Shard(1 / dist.get_world_size()))
    return Shard(_share_of_dtensor(gradient), gradient.to_local().numel())


def share_of_weights(parameter: Any, shards: Mapping[Tensor, Shard]) -> float:
    """The share that a parameter itself has in a sum over all processes."""
    if hasattr(parameter, "placements"):
        return _share_of_dtensor(parameter)
    return shards[parameter].share if parameter in shards else 1 / dist.get_world_size()


def is_trained(parameter: Any) -> bool:
    """Whether a step may move it: also where it was frozen when its gradient was there."""
    return bool(parameter.requires_grad or parameter.grad is not None)


def shape_of(parameter: Tensor, shards: Mapping[Tensor, Shard]) -> torch.Size | None:
    """The shape of the whole parameter; `None` of one that is not trained, not there yet, or empty."""
    if not is_trained(parameter) or is_lazy(parameter):
        return None
    given = shards[parameter].shape if parameter in shards else None
    shape = parameter.shape if given is None else given
    return shape if shape.numel() else None


def _share_of_dtensor(tensor: Any) -> float:
    sizes = (tensor.device_mesh.size(i) for i, placement in enumerate(tensor.placements) if placement.is_shard())
    return float(math.prod(sizes)) / int(dist.get_world_size())


@lru_cache(maxsize=64)
def nothing(dtype: torch.dtype, device: torch.device) -> Tensor:
    """What stands for a gradient that is not there; of the parameters' dtype, for calls that want one for all."""
    return torch.empty(0, dtype=dtype if dtype.is_floating_point else torch.float32, device=device)


def weights_of(parameter: Any) -> Tensor:
    """What this process holds of a parameter as a real tensor; nothing of one that is not trained or not there yet."""
    if not is_trained(parameter) or is_lazy(parameter):
        return nothing(parameter.dtype, parameter.device)
    held: Tensor = (parameter.to_local() if hasattr(parameter, "placements") else parameter).detach()
    return torch.view_as_real(held.resolve_conj()) if held.is_complex() else held


def gradient_of(parameter: Any) -> Tensor:
    """What this process holds of a gradient as a real, dense tensor that shares its memory; nothing if it is `None`."""
    gradient = parameter.grad
    if gradient is None:
        return nothing(parameter.dtype, parameter.device)
    if type(gradient) is not Tensor and hasattr(gradient, "placements"):  # looking for what is not there is slow
        return _local(parameter)
    if gradient.layout is torch.strided and not gradient.is_complex() and not gradient.is_neg():
        return gradient if gradient.is_contiguous() or 0 not in gradient.stride() else _plain(parameter)
    return _plain(parameter)


def _local(parameter: Any) -> Tensor:
    """What this process holds of a DTensor's gradient.

    Gradients that are still to be summed (sequence parallelism leaves such for replicated parameters) are summed here.
    """
    gradient = parameter.grad
    if any(placement.is_partial() for placement in gradient.placements):
        gradient = parameter.grad = gradient.redistribute(placements=parameter.placements)
    local: Tensor = gradient.to_local()
    if local.is_conj() or local.is_neg() or local.layout is not torch.strided:
        raise TypeError("Expected gradients of DTensors to be dense and not lazily conjugated or negated.")
    return torch.view_as_real(local) if local.is_complex() else local


def _plain(parameter: Any) -> Tensor:
    """A sparse, complex, expanded or lazily negated gradient as a real, dense tensor that shares its memory."""
    gradient: Any = parameter.grad
    if gradient.layout is torch.sparse_coo:
        gradient = gradient.coalesce()
        if not gradient._values().is_contiguous():  # of a single row, it may be expanded still
            values = gradient._values().contiguous()
            gradient = torch.sparse_coo_tensor(gradient._indices(), values, gradient.shape, is_coalesced=True)
        parameter.grad = gradient
        gradient = gradient._values()
    elif gradient.layout is not torch.strided:
        raise TypeError(f"Expected dense or sparse COO gradients, but got one of layout {gradient.layout}.")
    elif gradient.is_neg() or gradient.is_conj():
        gradient = parameter.grad = gradient.resolve_conj().resolve_neg()
    elif 0 in gradient.stride():  # expanded: one number for several entries
        gradient = parameter.grad = gradient.contiguous()
    return torch.view_as_real(gradient) if gradient.is_complex() else gradient
