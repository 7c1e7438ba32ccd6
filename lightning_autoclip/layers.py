"""Which parameters and modules the squared norm of the gradient belongs to, summed up over steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_autoclip._checks import check_state

_TYPES: dict[str, Any] = {"steps": int, "shares": [float], "norms": [float], "norm_steps": [float]}


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

    @classmethod
    def empty(cls, parameters: int, modules: int = 0) -> LayerSums:
        """The sums of no step."""
        return cls(0, *(_vector([0.0] * size) for size in (parameters, modules, modules)))

    def with_steps(self, squares: Tensor, modules: Sequence[str] = ()) -> LayerSums:
        """The sums with further steps, added one by one: they do not depend on how many come at once.

        Args:
            squares: Squared norm of each parameter's gradient at each step: shape ``(k, n)``, float64.
            modules: Of each parameter its module; none if their norms are not asked for.
        """
        steps, shares, norms, _ = self
        whole = squares.sum(1, keepdim=True)
        for of_step in (squares / whole)[(whole > 0).flatten()]:
            steps, shares = steps + 1, shares + of_step
        for of_step in module_sums(squares, modules).sqrt() if modules else ():
            norms = norms + of_step
        return LayerSums(steps, shares, norms, self.norm_steps + len(squares))

    def renamed(self, names: Sequence[Sequence[str]], modules: Sequence[Sequence[str]]) -> LayerSums:
        """The sums where names stand at other places; 0 of new ones.

        Args:
            names: Of the parameters, before and after.
            modules: Likewise.
        """
        shares, norms, norm_steps = (
            _vector([dict(zip(before, sums.tolist(), strict=True)).get(name, 0.0) for name in after])
            for sums, (before, after) in zip(self[1:], (names, modules, modules), strict=True)
        )
        return LayerSums(self.steps, shares, norms, norm_steps)

    def to_dict(self) -> dict[str, Any]:
        """The sums as a checkpoint holds them."""
        return {"steps": self.steps, **{key: getattr(self, key).tolist() for key in self._fields[1:]}}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> LayerSums:
        """The sums of what :meth:`to_dict` returned."""
        check_state("StepLog.layers", state, _TYPES)
        return cls(state["steps"], *(_vector(state[key]) for key in cls._fields[1:]))


def _vector(numbers: Sequence[float]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64, device="cpu")


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
