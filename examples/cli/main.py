"""Training from a config file: the clipping callback and its settings are entries of the Trainer's callbacks.

    cd examples/cli
    python main.py fit --config config.yaml                                     # AutoClip
    python main.py fit --config config.yaml --trainer.callbacks.percentile=25   # with another percentile
    python main.py fit --config config.yaml --config zscore.yaml                # GradientClipping with a policy
    python main.py fit --config config.yaml --print_config                      # what would run, as a config file
    python main.py fit --trainer.max_epochs=2 --trainer.callbacks+=AutoClip --trainer.callbacks.window=50

LightningCLI needs `pip install "jsonargparse[signatures]"`. A dotted setting goes to the last callback of the list.
"""

import argparse
from pathlib import Path

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_autoclip import AutoClip  # noqa: F401  # so that its name will do for `lightning_autoclip.AutoClip`


class NextCharacter(LightningModule):
    """Guesses the next character of Python's own `argparse.py`.

    Args:
        context: How many characters it sees.
        lr: Learning rate.
        steps: Batches per epoch, of 32 places in the text each.
    """

    def __init__(self, context: int = 8, lr: float = 0.5, steps: int = 100) -> None:
        super().__init__()
        self.context, self.lr, self.steps = context, lr, steps
        self.net = nn.Sequential(nn.Embedding(128, 16), nn.Flatten(), nn.Linear(16 * context, 128))

    def train_dataloader(self) -> DataLoader:
        text = Path(argparse.__file__).read_text(encoding="utf-8").encode("ascii", "ignore")
        windows = torch.tensor(list(text)).unfold(0, self.context + 1, 1)[: 32 * self.steps]
        return DataLoader(TensorDataset(windows), batch_size=32, shuffle=True)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        (window,) = batch
        loss = nn.functional.cross_entropy(self.net(window[:, :-1]), window[:, -1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


if __name__ == "__main__":
    LightningCLI(NextCharacter, seed_everything_default=0, save_config_kwargs={"overwrite": True})
