"""A sweep over percentiles on Weights & Biases: under its agent, or as a loop on this machine alone.

    python examples/sweep/main.py --loop 10 50 90     # offline, one run after the other

    cd examples/sweep && wandb sweep sweep.yaml       # prints the command of the agent,
    wandb agent <entity>/<project>/<sweep>            # which calls this program once per run

The model is a small network, one in 300 of whose targets is far off.
"""

import argparse
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import wandb
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_autoclip import AutoClip


class Network(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", nn.functional.mse_loss(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def loaders(steps: int) -> Iterator[DataLoader]:
    """Batches of 32 for training, one target in 300 of which is far off, and clean ones for validation."""
    for n, spoilt, batch_size in ((32 * steps, 1 / 300, 32), (2000, 0.0, 500)):
        x = torch.randn(n, 8)
        y = x[:, :4].sum(1, keepdim=True).sin()
        y = torch.where(torch.rand(n, 1) < spoilt, 30.0, y)
        yield DataLoader(TensorDataset(x, y), batch_size=batch_size)


def train(percentile: float, max_update_ratio: float | None, steps: int, logger: WandbLogger) -> float:
    """Train once, and return the loss on the validation data."""
    seed_everything(0, verbose=False)
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=logger,
        log_every_n_steps=20,
        callbacks=[AutoClip(percentile, max_update_ratio=max_update_ratio, verbose=False)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    train_loader, val_loader = loaders(steps)
    trainer.fit(Network(), train_loader, val_loader)
    return float(trainer.callback_metrics["val_loss"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--percentile", type=float, default=50.0)
    parser.add_argument("--max_update_ratio", type=float, help="of the weights, per step; without it no such bound")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--loop", type=float, nargs="+", metavar="PERCENTILE", help="train each of them, offline")
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"), help="folder of the runs")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the model is small
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module=r"lightning\.pytorch")  # on the workers of the data loader
    args.out.mkdir(parents=True, exist_ok=True)
    if args.loop is None:  # by the agent, who has set what W&B needs to know
        train(args.percentile, args.max_update_ratio, args.steps, WandbLogger(save_dir=args.out))
        return
    wandb.setup(wandb.Settings(mode="offline", silent=True))
    losses = {}
    for percentile in args.loop:
        name = f"percentile {percentile:g}"
        logger = WandbLogger(name, save_dir=args.out, project="autoclip-sweep", group="percentile", offline=True)
        losses[percentile] = train(percentile, args.max_update_ratio, args.steps, logger)
        logger.experiment.finish()
    print("percentile  val_loss")
    for percentile, loss in sorted(losses.items(), key=lambda pair: pair[1]):
        print(f"{percentile:10g}  {loss:.4f}")
    print(f"\nsend to W&B: wandb sync {args.out / 'wandb' / 'offline-run-*'}")


if __name__ == "__main__":
    main()
