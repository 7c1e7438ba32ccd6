"""The step of an optimizer taken back on its device, where the host is not to know whether it was to be left out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD

from lightning_autoclip.clipping import _numbers


def can_be_undone(optimizer: Any) -> bool:
    """Whether all that the coming step changes stands on a device that compiles graphs, where a copy of it is free.

    That can be told of torch's own optimizers, whose state is in ``optimizer.state``: of SGD, and of Adam and others
    with ``capturable=True``, since they count their steps on the host otherwise. What an optimizer makes at its first
    step was never there to be copied.
    """
    if not getattr(type(optimizer).step, "__module__", "").startswith("torch.optim."):
        return False
    for group in optimizer.param_groups:
        has_none = isinstance(optimizer, SGD) and not group["momentum"]
        for parameter in (each for each in group["params"] if each.grad is not None):
            kept = optimizer.state.get(parameter, {}).values()
            if not _numbers.compiles_graphs(parameter.device) or not (kept or has_none):
                return False
            if not all(isinstance(each, Tensor) and each.device == parameter.device for each in kept):
                return False
    return True


class Undo:
    """Everything that the coming step of an optimizer may change, as it is before: called, it puts that back.

    Args:
        optimizer: One that :func:`can_be_undone`.
        goes: Shape ``()``, bool, on the device: whether the step is to stay as it was made.
    """

    def __init__(self, optimizer: Any, goes: Tensor) -> None:
        parameters = [each for group in optimizer.param_groups for each in group["params"] if each.grad is not None]
        self._goes = goes
        self._weights = [(parameter, parameter.detach().clone()) for parameter in parameters]
        self._states = [
            (optimizer.state[parameter], {key: value.clone() for key, value in optimizer.state[parameter].items()})
            for parameter in parameters
            if parameter in optimizer.state
        ]

    @torch.no_grad()
    def __call__(self) -> None:
        """After the step: it stays, or nothing has changed."""
        for weight, before in self._weights:
            weight.copy_(torch.where(self._goes, weight, before))
        for state, kept in self._states:
            for key, before in kept.items():
                state[key].copy_(torch.where(self._goes, state[key], before))
