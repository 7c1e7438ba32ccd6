"""Figures in ``trainer.callback_metrics`` that are of the step at which somebody looks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch


class LiveMetrics(dict[str, Any]):
    """Metrics of which some are computed when they are read: nothing is computed where nobody reads.

    Checkpoints, early stopping, schedulers and reporters read at steps of their own, some of them before this library's
    callback has its turn. On an accelerator a figure costs the host a wait, which a step must not have for nobody.

    Args:
        metrics: What is known already.
        figures: Gives the latest figures, always with the same keys.
    """

    def __init__(self, metrics: Any = (), figures: Callable[[], Mapping[str, float]] = dict) -> None:
        super().__init__(metrics)
        self._figures = figures
        self._refresh()

    def _refresh(self) -> None:
        figures = {key: torch.tensor(value, dtype=torch.float32) for key, value in self._figures().items()}
        super().update(figures)

    def __getitem__(self, key: str) -> Any:
        self._refresh()
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """As of a dict."""
        self._refresh()
        return super().get(key, default)

    def items(self) -> Any:
        """As of a dict."""
        self._refresh()
        return super().items()

    def values(self) -> Any:
        """As of a dict."""
        self._refresh()
        return super().values()

    def copy(self) -> dict[str, Any]:
        """The metrics of now, in an ordinary dict."""
        return dict(self.items())

    def __iter__(self) -> Iterator[str]:  # also for `dict(metrics)`, which else copies without asking
        return super().__iter__()

    def __repr__(self) -> str:
        return repr(self.copy())

    def __reduce_ex__(self, protocol: Any) -> Any:  # `copy.copy`, `copy.deepcopy`, pickle
        return dict, (self.copy(),)


def show(trainer: Any, figures: Callable[[], Mapping[str, float]]) -> None:
    """Have ``trainer.callback_metrics`` show these figures for the rest of the fit."""
    connector = trainer._logger_connector
    connector._callback_metrics = LiveMetrics(connector._callback_metrics, figures)
