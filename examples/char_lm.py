"""Three trainings of a character-level LSTM that differ in nothing but how their gradients are clipped.

    python examples/char_lm.py

prints a table and draws runs/char_lm/char_lm.png, in about two minutes on two CPU cores. The text is the source of
Python's standard library. The learning rate is too high on purpose: without clipping, the large gradients of the first
steps throw the model far off. AutoClip runs with its defaults; a fixed threshold that a search has found for this very
model ends about where it does (`--fixed 0.25`).
"""

import argparse
import sysconfig
from pathlib import Path

import torch
from _common import prepare
from _plot import draw, print_table
from _recording import fit_and_read_log, print_where
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_autoclip import AutoClip, Constant, GradientClipping


class CharLM(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(128, 64)
        self.lstm = nn.LSTM(64, 128, num_layers=2, batch_first=True)
        self.head = nn.Linear(128, 128)

    def training_step(self, windows: Tensor, batch_idx: int, name: str = "train_loss") -> Tensor:
        hidden, _ = self.lstm(self.embedding(windows[:, :-1]))
        loss = nn.functional.cross_entropy(self.head(hidden).mT, windows[:, 1:])
        self.log(name, loss, prog_bar=True)
        return loss

    def validation_step(self, windows: Tensor, batch_idx: int) -> None:
        self.training_step(windows, batch_idx, "val_loss")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=6.0, momentum=0.9)


def stdlib_windows(steps: int) -> list[DataLoader]:
    """Windows of 65 characters: random ones of the first 900,000 characters to train on, later ones to validate."""
    modules = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = "".join(module.read_text(encoding="utf-8", errors="replace") for module in modules)[:1_000_000]
    windows = torch.tensor(list(text.encode("ascii", "replace"))).unfold(0, 65, 1)
    drawn = windows[torch.randint(900_000 - 65, (32 * steps,))]
    return [DataLoader(drawn, batch_size=32), DataLoader(windows[900_000::400], batch_size=256)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=lambda n: max(16, int(n)), default=800, help="of each run, at least 16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fixed", type=float, default=1.0, help="threshold of the run with fixed clipping")
    parser.add_argument("--out", type=Path, default=Path("runs/char_lm"))
    args = parser.parse_args()
    prepare()
    runs = {
        "no clipping": AutoClip(percentile=100, nonfinite="ignore", log_every_step=True),  # only observes
        f"fixed {args.fixed:g}": GradientClipping(Constant(args.fixed), log_every_step=True),  # as gradient_clip_val
        "AutoClip": AutoClip(log_every_step=True),
    }
    logs = {}
    for name, clipping in runs.items():
        torch.manual_seed(args.seed)  # the same weights and the same windows in each run
        logs[name] = fit_and_read_log(name, CharLM(), stdlib_windows(args.steps), clipping, args.out)
    print_table(logs)
    draw(logs, args.out / "char_lm.png")
    runs["AutoClip"].plot().savefig(args.out / "autoclip.png", dpi=110)
    print_where(args.out)


if __name__ == "__main__":
    main()
