"""Clipping by value on a regression some of whose batches are spoilt by outliers.

    python examples/value_clipping.py

`AutoClip(gradient_clip_algorithm="value")` records the root-mean-square entry of the gradient and clamps every entry to
three times its running percentile: a limit that needs no tuning, since it has the gradient's own unit.
"""

import argparse

import torch
from _common import prepare
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_autoclip import AutoClip


class Regression(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def samples(n: int, outliers: bool) -> tuple[Tensor, Tensor]:
    """A smooth function of eight inputs; with outliers, one target in a thousand is a wild misreading."""
    x = torch.randn(n, 8)
    y = x[:, :4].sum(1, keepdim=True).sin() + 0.5 * x[:, 4:5] * x[:, 5:6]
    return x, torch.where(torch.rand(n, 1) < 0.001, 300.0, y) if outliers else y


def train(steps: int, callbacks: list[Callback]) -> tuple[float, Trainer]:
    """The loss on clean data after so many steps, and the Trainer."""
    torch.manual_seed(0)
    loader = DataLoader(TensorDataset(*samples(32 * steps, outliers=True)), batch_size=32)
    x, y = samples(2000, outliers=False)
    model = Regression()
    trainer = Trainer(max_epochs=1, accelerator="cpu", callbacks=callbacks, logger=False, enable_checkpointing=False)
    trainer.fit(model, loader)
    with torch.no_grad():
        return float(nn.functional.mse_loss(model.net(x), y)), trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    args = parser.parse_args()
    prepare()
    unclipped, _ = train(args.steps, [])
    clipped, trainer = train(args.steps, [AutoClip(gradient_clip_algorithm="value")])
    print(f"loss on clean data: {unclipped:.4f} without clipping, {clipped:.4f} with AutoClip by value")
    metrics = trainer.callback_metrics
    print(
        f"last root-mean-square entry {metrics['autoclip/grad_rms']:.5f}, threshold {metrics['autoclip/threshold']:.5f}"
    )


if __name__ == "__main__":
    main()
