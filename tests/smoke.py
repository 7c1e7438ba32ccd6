"""What a release must do in an environment that holds nothing else: import, train, look back. No test of pytest's."""

import subprocess
import sys
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

import lightning_autoclip
from lightning_autoclip import AutoClip


class Regression(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.mse_loss(self.layer(batch[0]).squeeze(1), batch[0].sum(1))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


if __name__ == "__main__":
    assert Path(lightning_autoclip.__file__).is_relative_to(sys.prefix), "not the installed package"
    data = DataLoader(TensorDataset(torch.randn(256, 4)), batch_size=4)
    trainer = Trainer(max_epochs=1, callbacks=[AutoClip()], accelerator="cpu", enable_progress_bar=False)
    trainer.fit(Regression(), data)
    assert "autoclip/threshold" in trainer.callback_metrics
    checkpoint = trainer.checkpoint_callback.best_model_path
    done = subprocess.run(
        [sys.executable, "-m", "lightning_autoclip", "report", checkpoint], capture_output=True, text=True
    )
    print(done.stdout, done.stderr)
    assert "64 steps" in done.stdout
