"""Reality for the tests: parameters whose gradients are known, small models, data, Trainers."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_autoclip import AutoClip, gradients, skip

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]
FORMS = ("cpu form", "accelerator form")


@contextmanager
def in_form(form: str) -> Iterator[None]:
    """Take one of the two forms of a step: an accelerator's, whose norm is read a step later, runs on the CPU too.

    There, an ordinary optimizer's step is read at once. Bare parameters, as in most tests of arithmetic, are not.
    """
    if form == "cpu form":
        yield
        return
    needs_read = skip.needs_read

    def unless_bare(settings: Any, optimizer: Any, *others: bool) -> bool:
        return needs_read(settings, optimizer, *others) and (optimizer is not None or settings.nonfinite == "raise")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradients, "can_read_later", lambda device: True)
        patch.setattr(skip, "needs_read", unless_bare)
        yield


def with_gradient(gradient: Any, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    """A parameter of zeros that has the given gradient."""
    gradient = torch.as_tensor(gradient, dtype=dtype)
    parameter = nn.Parameter(torch.zeros_like(gradient))
    parameter.grad = gradient.clone()
    return parameter


def norm_of(parameters: Iterable[nn.Parameter]) -> float:
    """The L2 norm of all gradients, computed in float64 independently of the library."""
    return float(sum(p.grad.double().square().sum() for p in parameters if p.grad is not None) ** 0.5)


def dataset(n: int = 64, features: int = 4, scales: Iterable[float] | None = None, seed: int = 0) -> TensorDataset:
    """Inputs, targets and a factor for the loss of each row (1, or ``scales`` in turn)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, features, generator=generator)
    y = x.sum(1, keepdim=True).sin()
    factors = list(scales) if scales is not None else [1.0]
    scale = torch.tensor([factors[i % len(factors)] for i in range(n)])
    return TensorDataset(x, y, scale)


def loader(batch_size: int = 4, **kwargs: Any) -> DataLoader:
    """The dataset in a fixed order."""
    return DataLoader(dataset(**kwargs), batch_size=batch_size)


class Net(LightningModule):
    """A two-layer network on :func:`dataset`, whose loss is multiplied by each row's factor."""

    def __init__(self, optimizer: OptimizerFactory | None = None, features: int = 4) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(features, 8), nn.Tanh(), nn.Linear(8, 1))
        self.optimizer = optimizer or (lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9))

    def loss(self, batch: list[Tensor]) -> Tensor:
        x, y, scale = batch
        return ((self.net(x) - y).square().squeeze(1) * scale).mean()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters())


def assert_bit_equal(first: dict[str, Any], second: dict[str, Any]) -> None:
    """The figures of every step and the norm history of two runs, or of two ranks of one, are the same to the bit."""
    assert torch.equal(first["steps"].nan_to_num(-1), second["steps"].nan_to_num(-1))
    assert first["history"] == second["history"]


FACTORS = [20.0 if 48 <= row < 56 else 1.0 + row // 16 for row in range(80)]  # for ten batches of `Batches`
ONE_NAN = [math.nan if row == 25 else factor for row, factor in enumerate(FACTORS)]  # a row of the second of two ranks


class Batches(LightningDataModule):
    """Global batches of eight rows of :func:`dataset` in a fixed order; each data-parallel rank gets its share.

    Rows go to the ranks in turn, so that the mean over the ranks is that of one process.
    """

    def __init__(self, factors: list[float]) -> None:
        super().__init__()
        self.rows = dataset(80, scales=factors)

    def train_dataloader(self) -> DataLoader:
        ranks = getattr(self.trainer.strategy, "distributed_sampler_kwargs", {"num_replicas": 1, "rank": 0})
        sampler = DistributedSampler(self.rows, shuffle=False, **ranks)
        return DataLoader(self.rows, 8 // ranks["num_replicas"], sampler=sampler)


def trainer(*callbacks: Any, **kwargs: Any) -> Trainer:
    """A quiet Trainer on one CPU process."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(callbacks=list(callbacks), **{**defaults, **kwargs})


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, such as a logger has written."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_rows(path: Path) -> list[dict[str, float]]:
    """The numbers of this library in the rows of a CSV file that have any, and their step."""
    rows = [
        {key: float(value) for key, value in row.items() if value and (key == "step" or key.startswith("autoclip"))}
        for row in read_csv(path)
    ]
    return [row for row in rows if len(row) > 1]


def by_percentile(*args: Any, **kwargs: Any) -> AutoClip:
    """`AutoClip` without the update-ratio limit: its thresholds are those of the percentile alone."""
    return AutoClip(*args, **{"max_update_ratio": None, **kwargs})


def weights(module: nn.Module) -> Tensor:
    """All parameters as one vector."""
    return torch.cat([p.detach().flatten() for p in module.parameters()])
