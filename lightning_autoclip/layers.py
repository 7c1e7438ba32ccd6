"""Which parameters and modules the squared norm of the gradient belongs to, summed up over steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

LAYERS: dict[str, Any] = {"steps": int, "shares": [float], "norms": [float], "norm_steps": [float]}
"""The types of what `layers_state` returned."""


class LayerSums(NamedTuple):
    """Sums over steps with finite gradients.

    Attributes:
        steps: How many have shares: those whose gradient is not exactly zero.
        shares: Of each parameter's share of the squared norm: shape ``(n,)``, float64.
        norms: Of each module's norm: shape ``(m,)``, float64.
        norm_steps: At how many steps each module was there: likewise.
    """

    steps: int
    shares: Tensor
    norms: Tensor
    norm_steps: Tensor


def no_layers(parameters: int, modules: int = 0) -> LayerSums:
    """The sums of no step."""
    sizes = (parameters, modules, modules)
    return LayerSums(0, *(torch.zeros(size, dtype=torch.float64, device="cpu") for size in sizes))


def added(sums: LayerSums, squares: Tensor, modules: Sequence[str] = ()) -> LayerSums:
    """Sums with further steps, added one by one: they do not depend on how many come at once.

    Args:
        sums: Those so far.
        squares: Squared norm of each parameter's gradient at each step: shape ``(k, n)``, float64.
        modules: Of each parameter its module; none if their norms are not asked for.
    """
    steps, shares, norms = sums.steps, sums.shares, sums.norms
    whole = squares.sum(1, keepdim=True)
    for of_step in (squares / whole)[(whole > 0).flatten()]:
        steps, shares = steps + 1, shares + of_step
    for of_step in module_sums(squares, modules).sqrt() if modules else ():
        norms = norms + of_step
    return LayerSums(steps, shares, norms, sums.norm_steps + len(squares))


def remapped(sums: Tensor, before: Sequence[str], after: Sequence[str]) -> Tensor:
    """Sums of names that stand at other places now; 0 of new ones."""
    known = dict(zip(before, sums.tolist(), strict=True))
    return torch.tensor([known.get(name, 0.0) for name in after], dtype=torch.float64, device="cpu")


def module_of(name: str, depth: int) -> str:
    """The module that a parameter belongs to, ``depth`` names deep at most; its own name if it belongs to none."""
    *path, parameter = name.split(".")
    return ".".join(path[:depth]) or parameter


def module_sums(squares: Tensor, modules: Sequence[str]) -> Tensor:
    """Sums over the parameters of each module, in the order in which they come: of the last dimension."""
    places = {module: place for place, module in enumerate(dict.fromkeys(modules))}
    at = torch.tensor([places[module] for module in modules], dtype=torch.int64, device="cpu")
    return squares.new_zeros(*squares.shape[:-1], len(places)).index_add_(-1, at, squares)


def by_module(shares: dict[str, float], depth: int) -> dict[str, float]:
    """Sums of the shares over the modules that are ``depth`` names deep, in the order of the parameters.

    Example:
        >>> by_module({"net.0.weight": 0.5, "net.0.bias": 0.25, "head.weight": 0.25}, depth=1)
        {'net': 0.75, 'head': 0.25}
    """
    sums: dict[str, float] = {}
    for name, share in shares.items():
        module = module_of(name, depth)
        sums[module] = sums.get(module, 0.0) + share
    return sums


def layers_state(layers: LayerSums) -> dict[str, Any]:
    """Sums as a checkpoint holds them."""
    return {key: value.tolist() if key != "steps" else value for key, value in layers._asdict().items()}


def layers_of(state: dict[str, Any]) -> LayerSums:
    """The sums of what :func:`layers_state` returned."""
    columns = (torch.tensor(state[key], dtype=torch.float64, device="cpu") for key in LayerSums._fields[1:])
    return LayerSums(state["steps"], *columns)
