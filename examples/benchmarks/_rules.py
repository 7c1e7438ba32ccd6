"""Helper of overhead.py: the ways to clip that are compared, as arguments of a Trainer."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from lightning_autoclip import AutoClip

Arguments = dict[str, Any]  # of a Trainer


class HandWritten(Callback):
    """AutoClip as projects write it by hand: every norm read back, the whole history sorted at every step."""

    def __init__(self, percentile: float, history: list[float] | None = None) -> None:
        self.percentile, self.history = percentile, history or []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        squares = [p.grad.norm(2).item() ** 2 for p in pl_module.parameters() if p.grad is not None]
        self.history.append(sum(squares) ** 0.5)
        torch.nn.utils.clip_grad_norm_(pl_module.parameters(), np.percentile(self.history, self.percentile))


class PyPIAutoclip(Callback):
    """The package `autoclip` in the one place of a Lightning callback that it fits in."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        from autoclip.torch import QuantileClip

        self.clipper = QuantileClip(pl_module.parameters(), quantile=0.5, history_length=100, global_threshold=True)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self.clipper.step()


class PyPISmartclip(Callback):
    """The package `smartclip`, called as its own callback calls it, which also needs the package transformers."""

    def __init__(self) -> None:
        from smartclip import AutoClip

        setting = {"mode": "percentile", "percentile": 50, "history": "window", "window_size": 100}
        self.clipper = AutoClip(**setting, warmup_steps=0, min_history=1)  # by itself it observes 100 steps

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        import smartclip

        smartclip.apply(pl_module, self.clipper)


def rules() -> dict[str, Callable[[], Arguments]]:
    """By name, in the order of the table; peers only where they are installed."""
    found: dict[str, Callable[[], Arguments]] = {
        "no clipping": lambda: {},
        "Lightning, norm": lambda: {"gradient_clip_val": 1.0},
        "Lightning, value": lambda: {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        "hand-written AutoClip, p50": lambda: {"callbacks": [HandWritten(50)]},
    }
    if find_spec("autoclip"):
        found["PyPI autoclip, p50"] = lambda: {"callbacks": [PyPIAutoclip()]}
    if find_spec("smartclip"):
        found["PyPI smartclip, p50"] = lambda: {"callbacks": [PyPISmartclip()]}
    for algorithm in ("norm", "value"):
        for percentile in (10, 50, 90):
            found[f"ours, {algorithm}, p{percentile}"] = lambda p=percentile, a=algorithm: {
                "callbacks": [AutoClip(p, gradient_clip_algorithm=a, max_update_ratio=None, verbose=False)]
            }
    found["ours, norm, p50, max_update_ratio"] = lambda: {"callbacks": [AutoClip(verbose=False)]}
    return found
