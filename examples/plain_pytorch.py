"""A loop without Lightning: float16 with a `GradScaler`, and the clipper saved and loaded beside the model.

    python examples/plain_pytorch.py

`clip_` is told of the scaler and takes the loss scale into account, so that it does not matter whether `unscale_` was
called before. Steps that overflow are left to the scaler and do not enter the record.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_autoclip import GradientClipper, Percentile

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def train(start: int, stop: int, checkpoint: dict[str, Any] | None = None) -> dict[str, Any]:
    """Take the steps from ``start`` to ``stop`` and return everything that is needed to go on."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 1)).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    parts = {
        "model": model,
        "optimizer": optimizer,
        "scaler": torch.amp.GradScaler(DEVICE),  # the loss is float16, and its scale starts too high
        "clipper": GradientClipper(Percentile(10)),
    }
    for name, state in (checkpoint or {}).items():
        parts[name].load_state_dict(state)
    scaler, clipper = parts["scaler"], parts["clipper"]

    for step in range(start, stop):
        x = torch.randn(32, 8, generator=torch.Generator().manual_seed(step)).to(DEVICE)
        with torch.autocast(DEVICE, torch.float16):
            loss = nn.functional.mse_loss(model(x), 3 * x.sum(1, keepdim=True).sin())
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        clipper.clip_(optimizer, scaler)
        scaler.step(optimizer)
        scaler.update()
    return {name: part.state_dict() for name, part in parts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", type=Path, default=Path("runs/plain_pytorch"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)

    torch.save(train(0, args.steps // 2), args.out / "half.pt")
    end = train(args.steps // 2, args.steps, torch.load(args.out / "half.pt", weights_only=True))
    record, whole = end["clipper"], train(0, args.steps)
    print(f"{record['steps']} steps, {record['nonfinite_steps']} of them overflowed")
    print("weights equal:", all(torch.equal(value, end["model"][name]) for name, value in whole["model"].items()))


if __name__ == "__main__":
    main()
