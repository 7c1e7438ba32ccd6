"""A run that is stopped half way and resumed takes the same steps as one that is never stopped.

    python examples/resume.py

The record of gradient norms is part of every checkpoint, so that there is nothing to do but to give `ckpt_path`. The
data are in a fixed order and the run is stopped between two epochs: Lightning restores no position inside an epoch.
"""

import argparse
from pathlib import Path

import torch
from _common import prepare
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_autoclip import AutoClip


class Classifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)


def fit(epochs: int, ckpt_path: Path | None = None) -> tuple[Trainer, Tensor]:
    """Train to the given epoch with everything new; return the Trainer and the weights as one vector."""
    x = torch.randn(1600, 8, generator=torch.Generator().manual_seed(1))
    loader = DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=32)  # 50 batches, unshuffled
    trainer = Trainer(
        max_epochs=epochs, accelerator="cpu", callbacks=[AutoClip()], logger=False, enable_checkpointing=False
    )
    model = Classifier()
    trainer.fit(model, loader, ckpt_path=ckpt_path)
    return trainer, nn.utils.parameters_to_vector(model.parameters()).detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path("runs/resume"))
    args = parser.parse_args()
    prepare()
    checkpoint = args.out / "half.ckpt"

    uninterrupted, weights = fit(args.epochs)
    half, _ = fit(args.epochs // 2)
    half.save_checkpoint(checkpoint)
    resumed, resumed_weights = fit(args.epochs, ckpt_path=checkpoint)

    key = "autoclip/threshold"
    thresholds = [float(trainer.callback_metrics[key]) for trainer in (half, uninterrupted, resumed)]
    print("threshold half way {:.6f}, at the end {:.6f} uninterrupted and {:.6f} resumed".format(*thresholds))
    print("thresholds equal:", thresholds[1] == thresholds[2])
    print("weights equal:", torch.equal(weights, resumed_weights))


if __name__ == "__main__":
    main()
