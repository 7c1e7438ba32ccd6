"""A Fabric loop: the clipper is called between `backward` and `step`, and its record is saved beside the weights.

    python examples/fabric.py

Fabric knows no callbacks of the Trainer, so a `GradientClipper` is called by hand. The run is stopped half way and
resumed: since the record is restored with the rest, it takes the same steps as one that is never stopped.
"""

import argparse
from pathlib import Path

import torch
from _common import prepare
from lightning.fabric import Fabric
from torch import Tensor, nn

from lightning_autoclip import GradientClipper, Percentile


def train(fabric: Fabric, start: int, stop: int, checkpoint: Path, resume: bool = False) -> tuple[Tensor, float]:
    """Take the steps from ``start`` to ``stop``, save, and return the weights as one vector and the last threshold."""
    fabric.seed_everything(0, verbose=False)
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 1))
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9))
    clipper = GradientClipper(Percentile(10))
    state = {"model": model, "optimizer": optimizer}
    if resume:
        rest = fabric.load(checkpoint, state)  # what is no part of `state`
        clipper.load_state_dict(rest["clipper"])

    for step in range(start, stop):
        x = torch.randn(32, 8, generator=torch.Generator().manual_seed(step)).to(fabric.device)
        loss = nn.functional.mse_loss(model(x), 3 * x.sum(1, keepdim=True).sin())
        optimizer.zero_grad()
        fabric.backward(loss)
        # With precision="16-mixed": clip_(optimizer, fabric.strategy.precision.scaler)
        record = clipper.clip_(optimizer)
        optimizer.step()

    fabric.save(checkpoint, {**state, "clipper": clipper.state_dict()})
    return nn.utils.parameters_to_vector(model.parameters()).detach(), float(record.threshold)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", type=Path, default=Path("runs/fabric"))
    args = parser.parse_args()
    prepare()
    fabric = Fabric(accelerator="cpu", devices=1)
    half = args.out / "half.ckpt"

    weights, threshold = train(fabric, 0, args.steps, args.out / "whole.ckpt")
    train(fabric, 0, args.steps // 2, half)
    resumed, resumed_threshold = train(fabric, args.steps // 2, args.steps, half, resume=True)

    print(f"threshold at the end {threshold:.6f} uninterrupted and {resumed_threshold:.6f} resumed")
    print("weights equal:", torch.equal(weights, resumed))


if __name__ == "__main__":
    main()
