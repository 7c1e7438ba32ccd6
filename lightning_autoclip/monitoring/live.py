"""Figures in ``trainer.callback_metrics`` that are of the step at which somebody looks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
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

    def __new__(cls, metrics: Any = (), figures: Any = None) -> Any:
        """Without figures, an ordinary dict: that is what Lightning makes of it when the fit is over."""
        return dict(metrics) if figures is None else super().__new__(cls)

    def __init__(self, metrics: Any, figures: Callable[[], Mapping[str, float]]) -> None:
        super().__init__(metrics)
        self._figures = figures
        self._refresh()

    def _refresh(self) -> None:
        super().update({key: torch.tensor(value, dtype=torch.float32) for key, value in self._figures().items()})

    def __iter__(self) -> Iterator[str]:  # of its own, or `dict(metrics)` and `{**metrics}` would copy without asking
        return super().__iter__()

    def __reduce_ex__(self, protocol: Any) -> Any:  # of `copy.deepcopy` and pickle; torch loads this class safely
        return OrderedDict, (list(self.items()),)


def _read(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def refreshed(self: LiveMetrics, *args: Any) -> Any:
        self._refresh()
        return method(self, *args)

    return refreshed


for _name in ("__getitem__", "__eq__", "__or__", "__ror__", "__repr__", "get", "items", "values", "copy", "pop"):
    setattr(LiveMetrics, _name, _read(getattr(dict, _name)))


def show(trainer: Any, figures: Callable[[], Mapping[str, float]]) -> None:
    """Have ``trainer.callback_metrics`` show these figures for the rest of the fit."""
    connector = trainer._logger_connector
    connector._callback_metrics = LiveMetrics(connector._callback_metrics, figures)
