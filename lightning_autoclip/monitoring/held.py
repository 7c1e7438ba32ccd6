"""The steps that wait for their row."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch

from lightning_autoclip._checks import DAMAGE
from lightning_autoclip.monitoring.summary import LARGEST, Point, Summary

NOTHING = Point(-1, -1, -1, -1, *[math.nan] * 5)


class Held:
    """Steps on the host that wait for their row. They are part of a checkpoint: a resumed run completes the row.

    Attributes:
        points: The steps in order.
        told: How many of them have been logged one by one.
        summary: Of these steps, as the following.
        latest: The last finite one; without any, the last one.
        largest: The one with the largest norm.
        clipped_total: Sum of the norms after clipping, of the finite steps at which that is known.
        clipped_steps: How many these are.
        share_sums: Sums of the parameters' shares in the squared norm, by name.
        share_steps: Of how many steps.
        norm_sums: Sums of the modules' norms over the finite steps, by name.
        norm_steps: Of how many steps each: a module may join in mid-row.
    """

    def __init__(self) -> None:
        self.points: list[Point] = []
        self.told = 0
        self.summary = Summary()
        self.latest = self.largest = NOTHING
        self.clipped_total, self.clipped_steps = 0.0, 0
        self.share_sums: dict[str, float] = {}
        self.share_steps = 0
        self.norm_sums: dict[str, float] = {}
        self.norm_steps: dict[str, int] = {}

    def copy(self) -> Held:
        """The same; what it takes in, the other one does not."""
        other = copy.copy(self)
        other.points, other.summary = [*self.points], replace(self.summary)
        other.share_sums, other.norm_sums = {**self.share_sums}, {**self.norm_sums}
        other.norm_steps = {**self.norm_steps}
        return other

    def add(self, point: Point) -> None:
        """Take in a step."""
        self.points.append(point)
        self.summary.merge(Summary.of(point))
        if point.finite or not self.latest.finite:
            self.latest = point
        if point.finite and not point.norm <= self.largest.norm:  # which is NaN at first
            self.largest = point
        if point.finite and not point.left_out and not math.isnan(point.clipped_norm):
            self.clipped_total += min(point.clipped_norm, point.norm)
            self.clipped_steps += 1

    @property
    def clipped_mean(self) -> float:
        """Mean norm after clipping, of the steps at which that is known; NaN if it is of none."""
        return self.clipped_total / self.clipped_steps if self.clipped_steps else math.nan

    def add_shares(self, names: Sequence[str], sums: Sequence[float], steps: int) -> None:
        """Take in the shares of parameters, summed up over some steps."""
        for name, share in zip(names, sums, strict=True):
            self.share_sums[name] = self.share_sums.get(name, 0.0) + share
        self.share_steps += steps

    def shares(self, names: Sequence[str]) -> dict[str, float]:
        """The mean share of each of these parameters; NaN if no step has any."""
        return {
            name: self.share_sums.get(name, 0.0) / self.share_steps if self.share_steps else math.nan for name in names
        }

    def add_norms(self, sums: Mapping[str, float], steps: int) -> None:
        """Take in the norms of modules, summed up over some finite steps."""
        for module, norms in sums.items():
            self.norm_sums[module] = self.norm_sums.get(module, 0.0) + norms
            self.norm_steps[module] = self.norm_steps.get(module, 0) + steps

    def norms(self, modules: Iterable[str]) -> dict[str, float]:
        """The mean norm of each of these modules, over the steps at which it was there; NaN if there is none."""
        return {
            module: self.norm_sums[module] / steps if (steps := self.norm_steps.get(module, 0)) else math.nan
            for module in modules
        }

    def state_dict(self, told: int) -> dict[str, Any]:
        """Tensors, dicts and plain numbers; loads with ``torch.load(..., weights_only=True)``.

        Args:
            told: How many of the steps have been logged one by one.
        """
        points = torch.tensor(self.points, dtype=torch.float64, device="cpu").reshape(-1, len(Point._fields))
        return {
            "points": points,
            "told": told,
            "share_sums": dict(self.share_sums),
            "share_steps": self.share_steps,
            "norm_sums": dict(self.norm_sums),
            "norm_steps": dict(self.norm_steps),
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Held:
        """Restore what :meth:`state_dict` returned.

        Raises:
            ValueError: An entry is missing or damaged.
        """
        held = cls()
        try:
            points = [Point(*map(int, row[:4]), *row[4:]) for row in state["points"].tolist()]
            in_order = all(before.step <= after.step for before, after in pairwise(points))
            if not (in_order and all(point.is_sound for point in points)):
                raise ValueError("a step is none")
            for point in points:
                held.add(point)
            if not all(isinstance(state[key], dict) for key in ("share_sums", "norm_sums", "norm_steps")):
                raise TypeError("a dict is none")
            held.told, held.share_steps = state["told"], state["share_steps"]
            held.share_sums = dict(state["share_sums"])
            held.norm_sums, held.norm_steps = dict(state["norm_sums"]), dict(state["norm_steps"])
            shares, steps = held.share_sums.items(), len(held.points)
            sound = (
                state["points"].shape == (steps, len(Point._fields)) and state["points"].dtype == torch.float64,
                all(type(count) is int and 0 <= count <= steps for count in (held.told, held.share_steps)),
                all(type(key) is str and type(value) is float and 0 <= value <= steps + 1 for key, value in shares),
                all(type(key) is str and type(value) is float for key, value in held.norm_sums.items()),
                all(0 <= value <= LARGEST * max(steps, 1) for value in held.norm_sums.values()),
                held.norm_steps.keys() == held.norm_sums.keys(),
                all(type(count) is int and 0 <= count <= steps for count in held.norm_steps.values()),
            )
            if not all(sound):
                raise ValueError("an entry has a wrong type, size or range")
        except DAMAGE as error:
            raise ValueError(f"The steps that wait for their row are damaged: {error!r}.") from error
        return held
