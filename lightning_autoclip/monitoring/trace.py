"""What clipping did in a run, small enough for a checkpoint: bins of steps, the largest norms, the layers' shares."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lightning_autoclip._checks import DAMAGE
from lightning_autoclip._text import printable
from lightning_autoclip.monitoring.summary import SAME, Point, Summary

MOST_BINS = 1024
MOST_SPIKES = 20
_AROUND = 50  # bins before a spike, which tell what was usual
_NAMED = 3  # parameters per spike


@dataclass(frozen=True)
class Spike:
    """A step with one of the largest norms of the run, or with a gradient that was not finite.

    Attributes:
        point: The step.
        times: Its norm in units of the typical one of the steps around it, as far as they were known.
        parameters: The parameters with the largest shares of the squared norm, and their shares from 0 to 1; of a
            gradient that is not finite, those that were not, each with NaN.
    """

    point: Point
    times: float
    parameters: tuple[tuple[str, float], ...]

    @property
    def is_sound(self) -> bool:
        """Whether it can be one, rather than damaged."""
        return (
            self.point.is_sound
            and type(self.times) is float
            and not self.times < 0
            and all(type(name) is str and type(share) is float for name, share in self.parameters)
            and all(math.isnan(share) or 0 <= share <= 1 for _, share in self.parameters)
        )

    def to_dict(self) -> dict[str, Any]:
        """The spike as one flat row of a table."""
        point = self.point
        names = ", ".join(f"{name} ({share:.0%})" if share == share else name for name, share in self.parameters)
        return {
            "step": point.step,
            "epoch": point.epoch,
            "batches": point.batches,
            "norm": point.norm,
            "times": self.times,
            "threshold": point.threshold,
            "clip_coef": point.clip_coef,
            "left_out": bool(point.left_out),
            "parameters": printable(names),
        }


class Trace:
    """Everything that the report and the plot need of one optimizer's steps, in bounded memory.

    Steps stand in bins of one step each until there are ``MOST_BINS``; then neighbours are merged, and so on.

    Args:
        names: The name of each parameter, in the optimizer's order.
        numels: The number of entries of each.

    Attributes:
        bins: The steps, oldest first.
        largest: The steps with the largest norms, largest first.
        nonfinite: The first steps that were not finite, oldest first.
        nonfinite_total: How many steps were not finite.
    """

    def __init__(self, names: Sequence[str] = (), numels: Sequence[int] = ()) -> None:
        self.names, self.numels = list(names), list(numels)
        self.bins: list[Summary] = []
        self.largest: list[Spike] = []
        self.nonfinite: list[Spike] = []
        self.nonfinite_total = 0.0
        self._width = 1  # steps per bin
        self._share_sums = torch.zeros(len(self.names), dtype=torch.float64, device="cpu")
        self._share_steps = 0

    def copy(self) -> Trace:
        """The same; what it takes in, the other one does not."""
        other = copy.copy(self)
        other.bins = [*self.bins[:-1], *map(replace, self.bins[-1:])]  # only the last one is written to
        other.largest, other.nonfinite = [*self.largest], [*self.nonfinite]
        other._share_sums = self._share_sums.clone()
        return other

    def extend(self, points: Sequence[Point], squares: Tensor | None) -> Tensor:
        """Take in some steps.

        Args:
            points: The steps in order.
            squares: Shape ``(len(points), len(names))``, float64: the squared norm of each parameter's gradient;
                ``None`` where nobody measures them.

        Returns:
            The shares in the squared norm, as :func:`shares_of` has them.
        """
        for i, point in enumerate(points):
            step = Summary.of(point)
            self.nonfinite_total = point.nonfinite_total
            if self.bins and self.bins[-1].steps < self._width:
                self.bins[-1].merge(step)
            else:
                self.bins.append(step)
            if len(self.bins) > MOST_BINS:
                self._halve()
            self._keep_if_large(point, None if squares is None else squares[i])
        if squares is None:
            return self._share_sums.new_empty(0, len(self.names))
        shares = shares_of(squares[[i for i, point in enumerate(points) if point.finite]])
        for of_step in shares:  # in an order that does not depend on how many steps come at once
            self._share_sums += of_step
        self._share_steps += shares.shape[0]
        return shares

    def _halve(self) -> None:
        pairs = zip(self.bins[::2], [*self.bins[1::2], None], strict=False)
        self.bins = [kept if taken is None else Summary.merged((kept, taken)) for kept, taken in pairs]
        self._width *= 2

    def _keep_if_large(self, point: Point, squares: Tensor | None) -> None:
        finite = point.finite
        kept = self.largest if finite else self.nonfinite
        if len(kept) >= MOST_SPIKES and not (finite and point.norm > kept[-1].point.norm):
            return
        parameters: tuple[tuple[str, float], ...] = ()
        if squares is not None and finite and float(squares.sum()) > 0:
            largest = (squares / squares.sum()).topk(min(_NAMED, len(self.names)))
            parameters = tuple((self.names[i], share) for share, i in zip(*map(Tensor.tolist, largest), strict=True))
        elif squares is not None and not finite:
            bad = squares.isfinite().logical_not().nonzero().flatten().tolist()
            parameters = tuple((self.names[i], math.nan) for i in bad[:_NAMED])
        spike = Spike(point, point.statistic / Summary.merged(self.bins[-_AROUND:]).typical, parameters)
        if finite:
            self.largest = sorted([*self.largest, spike], key=lambda spike: -spike.point.norm)[:MOST_SPIKES]
        else:
            self.nonfinite.append(spike)

    @property
    def left_out(self) -> float:
        """How many steps were left out for their size."""
        return sum(summary.left_out for summary in self.bins)

    @property
    def shares(self) -> dict[str, float]:
        """Mean share of each parameter in the squared norm, from 0 to 1, by name; empty where nobody measured it."""
        if not self._share_steps:
            return {}
        return dict(zip(self.names, (self._share_sums / self._share_steps).tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Tensors, lists and plain numbers; loads with ``torch.load(..., weights_only=True)``."""
        bins = torch.tensor([astuple(summary) for summary in self.bins], dtype=torch.float64, device="cpu")
        return {
            "names": list(self.names),
            "numels": list(self.numels),
            "bins": bins.reshape(-1, len(fields(Summary))),
            "width": self._width,
            "largest": [(tuple(spike.point), spike.times, spike.parameters) for spike in self.largest],
            "nonfinite": [(tuple(spike.point), spike.times, spike.parameters) for spike in self.nonfinite],
            "share_sums": self._share_sums.clone(),
            "share_steps": self._share_steps,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Trace:
        """Restore what :meth:`state_dict` returned.

        Raises:
            ValueError: An entry is missing or damaged.
        """
        try:
            if not all(isinstance(state[key], list) for key in ("names", "numels", "largest", "nonfinite")):
                raise TypeError("a list is none")
            trace = cls(state["names"], state["numels"])
            trace.bins = [Summary(*row) for row in state["bins"].tolist()]
            trace.largest, trace.nonfinite = (
                [Spike(Point._make(point), times, parameters) for point, times, parameters in state[key]]
                for key in ("largest", "nonfinite")
            )
            trace._width, trace._share_steps = state["width"], state["share_steps"]
            trace._share_sums = state["share_sums"].clone()
            trace._check(state["bins"].shape)
            trace.nonfinite_total = Summary.merged(trace.bins).nonfinite
        except DAMAGE as error:
            raise ValueError(f"The trace of a run is damaged or not one: {error!r}.") from error
        return trace

    def _check(self, bins: torch.Size) -> None:
        """Raise unless everything has its type and size."""
        sums, steps = self._share_sums, Summary.merged(self.bins).steps
        sound = (
            bins == (len(self.bins), len(fields(Summary))) and len(self.bins) <= MOST_BINS,
            all(steps.is_sound and steps.steps <= self._width for steps in self.bins),
            all(before.last <= after.first for before, after in pairwise(self.bins)),
            all(type(name) is str for name in self.names) and len(self.numels) == len(self.names),
            all(type(numel) is int and 0 <= numel < 2**63 for numel in self.numels),
            type(self._width) is int and 1 <= self._width < 2**53,
            type(self._share_steps) is int and 0 <= self._share_steps <= steps,
            sums.shape == (len(self.names),) and sums.dtype == torch.float64,
            bool(((sums >= 0) & (sums <= self._share_steps * (1 + SAME))).all()),
            max(len(self.largest), len(self.nonfinite)) <= MOST_SPIKES,
            all(spike.is_sound and spike.point.finite for spike in self.largest),
            all(spike.is_sound and not spike.point.finite for spike in self.nonfinite),
        )
        if not all(sound):
            raise ValueError("an entry has a wrong type, size or range")

    def follow(self, names: Sequence[str], numels: Sequence[int]) -> None:
        """Go on with these parameters: at the start of a fit, or when some have joined the optimizer."""
        if list(names) != self.names:
            sums = dict(zip(self.names, self._share_sums.tolist(), strict=True))
            kept = [sums.get(name, 0.0) for name in names]
            self._share_sums = torch.tensor(kept, dtype=torch.float64, device="cpu")
            self._share_steps = self._share_steps if sums.keys() & set(names) else 0
        self.names, self.numels = list(names), list(numels)


def shares_of(squares: Tensor) -> Tensor:
    """Each parameter's share in the squared norm, of the steps that have a finite norm above 0: shape ``(m, n)``."""
    whole = squares.sum(1)
    counted = (whole > 0) & whole.isfinite()
    return squares[counted] / whole[counted, None]


def module_of(name: str, depth: int) -> str:
    """The module that a parameter belongs to, ``depth`` names deep at most; its own name if it belongs to none."""
    *path, parameter = name.split(".")
    return ".".join(path[:depth]) or parameter


def norms_by_module(squares: Tensor, names: Sequence[str], depth: int) -> dict[str, float]:
    """Sums over the steps of each module's norm.

    Args:
        squares: Shape ``(m, n)``, float64: the squared norm of each parameter's gradient at ``m`` finite steps.
        names: The names of the ``n`` parameters.
        depth: Of modules so many names deep.
    """
    modules = [module_of(name, depth) for name in names]
    places = {module: place for place, module in enumerate(dict.fromkeys(modules))}
    at = torch.tensor([places[module] for module in modules], dtype=torch.int64, device="cpu")
    norms = squares.new_zeros(len(squares), len(places)).index_add_(1, at, squares).sqrt()
    return dict(zip(places, norms.sum(0).tolist(), strict=True))


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
