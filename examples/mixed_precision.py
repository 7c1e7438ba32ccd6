"""Float16 training: overflows are counted and kept out of the record, and a fused optimizer is clipped like any other.

    python examples/mixed_precision.py

With `precision="16-mixed"` the loss is multiplied by a scale that starts too high, and steps whose gradients overflow
are skipped while the scale comes down. A fused optimizer takes the scale out of the gradients itself, inside its step;
Lightning's own `gradient_clip_val` raises an error there, because it would clip gradients that are still scaled.
"""

import argparse

import torch
from _common import prepare
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_autoclip import AutoClip


class Regression(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x), y)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01, fused=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    args = parser.parse_args()
    prepare()
    torch.manual_seed(0)
    x = torch.randn(32 * args.steps, 8)
    loader = DataLoader(TensorDataset(x, 100 * x.sum(1, keepdim=True).sin()), batch_size=32)

    settings = {"max_epochs": 1, "devices": 1, "logger": False, "enable_checkpointing": False}
    if torch.cuda.is_available():
        settings |= {"accelerator": "cuda", "precision": "16-mixed"}
    else:  # on a CPU Lightning takes "16-mixed" for bfloat16, which needs no loss scale: ask for the real thing
        settings |= {"accelerator": "cpu", "plugins": MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))}
    autoclip = AutoClip()
    trainer = Trainer(callbacks=[autoclip], **settings)
    trainer.fit(Regression(), loader)

    print(f"steps                  {args.steps}")
    print(f"of these overflowed    {int(trainer.callback_metrics['autoclip/nonfinite_total'])}")
    print(f"norms in the record    {int(autoclip.clippers[0].history.count)}")
    print(f"threshold              {trainer.callback_metrics['autoclip/threshold']:.4g}")
    print(f"loss scale at the end  {trainer.precision_plugin.scaler.get_scale():g}")


if __name__ == "__main__":
    main()
