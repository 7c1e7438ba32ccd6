"""A long run with everything switched on: `python examples/benchmarks/soak.py`.

What must not grow: memory, time per step, the callback's state in a checkpoint. What must stay right: at every step a
row, and at some of them, drawn at random, the threshold that `numpy.percentile` gives. Gradients have norms of two
regimes, with single ones far too large, zeros and NaNs.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_autoclip import AutoClip, History
from lightning_autoclip.checkpoint import STATE_KEY

PARTS = 20  # of a run, at the end of each of which is measured
PERCENTILE = 50.0


class Gradients(IterableDataset[Tensor]):
    """One gradient per step, of shape ``(16,)``."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(0)
        for step in range(self.steps):
            gradient = torch.randn(16, generator=generator) * (1 + 2 * (step // 5000 % 2))
            kind = int(torch.randint(2000, (), generator=generator))
            yield gradient * {0: 300.0, 1: 0.0, 2: math.nan}.get(kind, 1.0)


class Given(LightningModule):
    """A module whose gradient is the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(4))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        weights = torch.cat((self.body.flatten(), self.head))
        return (weights * batch[0]).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-6, momentum=0.9)


class Measures(Callback):
    """Memory and time at the end of each part."""

    def __init__(self, every: int) -> None:
        self.every, self.found = every, list[dict[str, float]]()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.since = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step % self.every == 0:
            now = time.perf_counter()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.found.append(
                {
                    "steps": trainer.global_step,
                    "memory_mb": pages * 4096 / 1e6,
                    "device_mb": torch.cuda.memory_allocated() / 1e6 if torch.cuda.is_initialized() else 0.0,
                    "step_us": (now - self.since) / self.every * 1e6,
                }
            )
            self.since = now


def is_of_a_step(row: dict[str, str]) -> bool:
    """Whether a row of the CSV file has the figures of a single step."""
    return bool(row["autoclip/step/threshold"] or row["autoclip/step/grad_norm"])


def larger(worst: float, difference: float) -> float:
    """The larger one; a NaN stays."""
    return worst if difference <= worst else difference


def thresholds_agree(path: Path, window: int | None, checks: int) -> tuple[int, float]:
    """How many steps have a row, and by what part their thresholds differ from numpy's at most, of some of them.

    Steps whose norm enters no history (NaN, Inf, zero) are not compared.
    """
    with path.open(newline="") as file:
        found = [row for row in csv.DictReader(file) if is_of_a_step(row)]
    norms = np.array([float(row["autoclip/step/grad_norm"] or "nan") for row in found])
    thresholds = [float(row["autoclip/step/threshold"] or "nan") for row in found]
    places, worst = np.flatnonzero((norms > 0) & (norms < math.inf)), 0.0
    for count in np.random.default_rng(1).choice(len(places), min(checks, len(places)), replace=False) + 1:
        expected = np.percentile(norms[places[max(0, count - (window or count)) : count]], PERCENTILE)
        worst = larger(worst, abs(thresholds[places[count - 1]] / expected - 1))
    return len(found), worst


def soak(steps: int, window: int | None, accelerator: str, folder: Path) -> dict[str, Any]:
    """One run."""
    autoclip = AutoClip(
        PERCENTILE, window=window, log_every_step=True, log_layers=True, log_histogram=True, alert_above=50.0,
        skip_above=100.0, verbose=False,
    )  # fmt: skip
    measures = Measures(steps // PARTS)
    loggers: list[Any] = [CSVLogger(folder, name="", version="run", flush_logs_every_n_steps=1000)]
    if find_spec("wandb"):
        loggers.append(WandbLogger(save_dir=folder, project="soak", offline=True))
    saves = ModelCheckpoint(folder, every_n_train_steps=steps // PARTS, save_top_k=1, monitor=None)
    trainer = Trainer(
        accelerator=accelerator, devices=1, max_steps=steps, callbacks=[autoclip, measures, saves], logger=loggers,
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=50,
    )  # fmt: skip
    trainer.fit(Given(), DataLoader(Gradients(steps), batch_size=1))
    rows, worst = thresholds_agree(folder / "run" / "metrics.csv", window, min(2000, steps))
    (checkpoint,) = folder.glob("*.ckpt")
    entry = torch.load(checkpoint, weights_only=True)["callbacks"][STATE_KEY]
    torch.save(entry, folder / "entry.pt")
    (section,) = autoclip.report().sections
    return {
        "steps": steps,
        "window": window,
        "rows": rows,
        "nonfinite": section.figures.nonfinite,
        "skipped": section.figures.skipped,
        "worst_threshold": worst,
        "entry_kb": (folder / "entry.pt").stat().st_size / 1e3,
        "parts": measures.found,
    }


def full_history(values: int, device: str | None) -> dict[str, Any]:
    """So many norms in a full history: how far its percentiles are from numpy's, and what the last ones take.

    Args:
        values: How many.
        device: Where the norm of the current step is; ``None``: it is a float.
    """
    norms = np.random.default_rng(0).lognormal(0.0, 1.0, values).astype(np.float32)
    floats = norms.tolist()
    current = floats if device is None else torch.from_numpy(norms).to(device)
    history, worst, since = History(None), 0.0, 0.0
    timed_from = values - 1000
    checked = {*np.random.default_rng(1).integers(0, timed_from, 50).tolist(), values - 1}
    for i in range(values):
        if i == timed_from:
            since = time.perf_counter()
        threshold = history.with_current(current[i]).percentile(PERCENTILE)
        history.append(floats[i])  # one step later, on an accelerator
        if i in checked:
            worst = larger(worst, abs(float(threshold) / np.percentile(norms[: i + 1], PERCENTILE) - 1))
    took = (time.perf_counter() - since) / 1000 * 1e6
    return {"values": values, "on_accelerator": device is not None, "worst_threshold": worst, "step_us": took}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200_000)
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--out", type=Path, help="a JSON file to add the figures to")
    given = parser.parse_args()
    runs = []
    for window in (100, None):
        with TemporaryDirectory() as folder:
            runs.append(run := soak(given.steps, window, given.accelerator, Path(folder)))
        first, last = run["parts"][1], run["parts"][-1]
        print(
            f"window {window}: {run['rows']:,} of {run['steps']:,} steps have a row, thresholds within"
            f" {run['worst_threshold']:.1e} of numpy's; memory {first['memory_mb']:.0f} to {last['memory_mb']:.0f} MB,"
            f" {first['step_us']:.0f} to {last['step_us']:.0f} µs per step, {run['entry_kb']:.0f} kB in a checkpoint"
        )
    on = "cuda" if given.accelerator == "gpu" else "cpu"
    histories = [full_history(max(5 * given.steps, 2000), None), full_history(max(given.steps, 2000), on)]
    for each in histories:
        print(
            f"{each['values']:,} values in the full history, {'tensors' if each['on_accelerator'] else 'floats'}:"
            f" within {each['worst_threshold']:.1e} of numpy's, the last ones {each['step_us']:.0f} µs each"
        )
    if given.out:
        device = torch.cuda.get_device_name() if given.accelerator == "gpu" else "CPU"
        found = {"device": device, "torch": torch.__version__, "runs": runs, "histories": histories}
        given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
