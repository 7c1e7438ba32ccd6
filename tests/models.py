"""What several test files train: models that do more than :class:`helpers.Net`, and callbacks that note it."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from typing import Any

import numpy as np
import torch
from helpers import Net, OptimizerFactory, norm_of
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer


class BadBatches(Net):
    """The loss of some batches is multiplied by a factor, such as a NaN."""

    def __init__(self, factors: Mapping[int, float] | None = None, optimizer: OptimizerFactory | None = None) -> None:
        super().__init__(optimizer)
        self.factors = factors or {}

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        return super().training_step(batch, batch_idx) * self.factors.get(batch_idx, 1.0)


class Noting(BadBatches):
    """Notes the norm of the gradient after each backward pass, which is before the callback can have clipped it."""

    def __init__(self, factors: Mapping[int, float] | None = None, optimizer: OptimizerFactory | None = None) -> None:
        super().__init__(factors, optimizer)
        self.norms: list[float] = []

    def on_after_backward(self) -> None:
        self.norms.append(norm_of(self.parameters()))


class WithoutLoss(Net):
    """Returns no loss for some batches."""

    def __init__(self, batches: Container[int], optimizer: OptimizerFactory | None = None) -> None:
        super().__init__(optimizer)
        self.batches = batches

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        return None if batch_idx in self.batches else super().training_step(batch, batch_idx)


class NaNInLastBias(Net):
    """At one batch the gradient of the last bias is a NaN, and no other."""

    def __init__(self, epoch: int, batch: int) -> None:
        super().__init__()
        self.at = epoch, batch

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        loss = super().training_step(batch, batch_idx)
        return loss + (self.net[2].bias * math.nan).sum() if (self.current_epoch, batch_idx) == self.at else loss


# --- manual optimization ----------------------------------------------------------------------------------------------


class Manual(Net):
    """Manual optimization with one optimizer."""

    def __init__(self, optimizer: OptimizerFactory | None = None) -> None:
        super().__init__(optimizer)
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


class OptimizerPerLayer(Manual):
    """Manual optimization: the two layers have an optimizer and a backward pass each; notes the norms of both."""

    def __init__(self, first: OptimizerFactory, second: OptimizerFactory) -> None:
        super().__init__()
        self.classes = first, second
        self.norms: tuple[list[float], list[float]] = ([], [])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        for optimizer, norms in zip(self.optimizers(), self.norms, strict=True):
            self.zero_grad()
            loss = self.loss(batch)
            self.log("train_loss", loss)
            self.manual_backward(loss)
            norms.append(norm_of(optimizer.param_groups[0]["params"]))
            optimizer.step()

    def configure_optimizers(self) -> list[Optimizer]:
        layers = (self.net[0], self.net[2])
        return [cls(layer.parameters()) for cls, layer in zip(self.classes, layers, strict=True)]


class OneBackward(OptimizerPerLayer):
    """One backward pass for both optimizers, of which the second steps at every second batch only."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        first, second = self.optimizers()
        self.zero_grad()
        self.manual_backward(self.loss(batch))
        first.step()
        if batch_idx % 2:
            second.step()


# --- callbacks that note ----------------------------------------------------------------------------------------------


class Gradients(Callback):
    """Notes the true gradient at each optimizer step; one before and one after the clipping callback."""

    def __init__(self) -> None:
        self.gradients: list[np.ndarray] = []

    @property
    def norms(self) -> list[float]:
        return [float(np.linalg.norm(gradient)) for gradient in self.gradients]

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        is_scaled = scaler is not None and id(optimizer) not in scaler._per_optimizer_states
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        flat = [p.grad.double().flatten() / (scaler.get_scale() if is_scaled else 1.0) for p in parameters]
        self.gradients.append(torch.cat(flat).numpy() if flat else np.zeros(0))


class Figures(Callback):
    """Notes what has been logged at each optimizer step; asks for a row at every step."""

    def __init__(self, *keys: str) -> None:
        self.keys, self.steps = keys, dict[int, list[float]]()

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step:
            self.steps[trainer.global_step] = [float(trainer.callback_metrics[key]) for key in self.keys]
