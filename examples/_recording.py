"""Helper of char_lm.py: one training, logged to a CSV file that is read back and, if wandb is installed, to W&B."""

import csv
import sys
from importlib.util import find_spec
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from torch.utils.data import DataLoader

Log = dict[str, tuple[list[int], list[float]]]  # key -> steps, values


def fit_and_read_log(
    name: str, model: LightningModule, loaders: list[DataLoader], callback: Callback, out: Path
) -> Log:
    print(f"\n{name}", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    loggers = [CSVLogger(out, name=name.replace(" ", "_"))]
    if find_spec("wandb"):
        import wandb

        wandb.setup(wandb.Settings(mode="offline", silent=True))  # as arguments of WandbLogger they would come too late
        loggers.append(WandbLogger(name=name, project="char_lm", save_dir=out, offline=True))
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=loggers,
        callbacks=[callback],
        log_every_n_steps=10,
        val_check_interval=1 / 16,
        enable_checkpointing=False,
    )
    trainer.fit(model, *loaders)
    for logger in loggers[1:]:
        logger.experiment.finish()  # else the next run would be logged into this one
    return read_log(Path(loggers[0].log_dir, "metrics.csv"))


def read_log(path: Path) -> Log:
    log: Log = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            for key, value in row.items():
                if value:
                    steps, values = log.setdefault(key, ([], []))
                    steps.append(int(row["step"]))
                    values.append(float(value))
    return log


def print_where(out: Path) -> None:
    print(f"\nfigure                   {out / 'char_lm.png'}")
    if (out / "wandb").exists():
        wandb = Path(sys.executable).with_name("wandb")
        wandb = wandb.relative_to(Path.cwd()) if wandb.is_relative_to(Path.cwd()) else wandb
        print(f"browse in the terminal   {wandb} leet {out / 'wandb'}")
        print(f"send to W&B              {wandb} sync {out / 'wandb'}/offline-run-*")
