"""A small GAN trained by manual optimization: AutoClip keeps a record and a threshold for each of its two optimizers.

    python examples/two_optimizers.py

The gradients of the generator and of the discriminator differ in scale and change while the two compete: a threshold
that suits one of them need not suit the other. The data are eight Gaussians on a ring.
"""

import argparse
import math

import torch
from _common import prepare
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.utils.data import DataLoader

from lightning_autoclip import AutoClip

CORNERS = torch.tensor([[math.cos(k * math.pi / 4), math.sin(k * math.pi / 4)] for k in range(8)]) * 2


def mlp(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, outputs))


class GAN(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.discriminator = mlp(8, 2), mlp(2, 1)

    def sample(self, n: int) -> Tensor:
        return self.generator(torch.randn(n, 8, device=self.device))

    def training_step(self, real: Tensor, batch_idx: int) -> None:
        # What `self.optimizers()` returns runs the hooks of the Trainer, and so the callback, when it steps.
        generator, discriminator = self.optimizers()
        fake = self.sample(len(real))

        loss = softplus(-self.discriminator(real)).mean() + softplus(self.discriminator(fake.detach())).mean()
        discriminator.zero_grad()
        self.manual_backward(loss)
        discriminator.step()

        # This reaches the discriminator's gradients too; only those of the optimizer that steps are measured.
        generator.zero_grad()
        self.manual_backward(softplus(-self.discriminator(fake)).mean())
        generator.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        networks = (self.generator, self.discriminator)
        return [torch.optim.Adam(network.parameters(), lr=1e-3, betas=(0.5, 0.99)) for network in networks]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    args = parser.parse_args()
    prepare()
    torch.manual_seed(0)
    ring = CORNERS[torch.randint(8, (args.steps * 256,))] + 0.1 * torch.randn(args.steps * 256, 2)
    trainer = Trainer(max_epochs=1, accelerator="cpu", callbacks=[AutoClip()], logger=False, enable_checkpointing=False)
    gan = GAN()
    trainer.fit(gan, DataLoader(ring, batch_size=256))

    # Two optimizers of one class are numbered in the order of `configure_optimizers`.
    for network, prefix in (("generator", "autoclip/Adam"), ("discriminator", "autoclip/Adam-1")):
        norm, threshold = (trainer.callback_metrics[f"{prefix}/{key}"] for key in ("grad_norm", "threshold"))
        print(f"{network:<14} last norm {norm:.4f}   threshold {threshold:.4f}")
    samples = gan.sample(1000).detach()
    distance, corner = torch.cdist(samples, CORNERS).min(dim=1)
    print(f"{int((distance < 0.5).sum())} of 1000 samples lie on the ring, on {len(corner.unique())} of its 8 corners")


if __name__ == "__main__":
    main()
