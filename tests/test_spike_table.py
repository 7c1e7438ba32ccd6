"""The table of large steps on Weights & Biases: logged once, at the end of fit or where an exception ends it."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import wandb
from helpers import by_percentile, loader, trainer
from lightning.pytorch import Callback
from lightning.pytorch.loggers import WandbLogger
from models import Noting, OptimizerPerLayer
from torch.optim import SGD
from wandb_reader import read_runs

from lightning_autoclip import AutoClip

pytestmark = pytest.mark.usefixtures("wandb_offline")
slowly = partial(SGD, lr=0.001)


def fit(directory: Path, model: Any, *callbacks: Callback, prefix: str = "") -> AutoClip:
    autoclip = by_percentile(50, verbose=False)
    logger = WandbLogger(save_dir=directory, project="test", id="run", prefix=prefix)
    trainer(autoclip, *callbacks, logger=logger, log_every_n_steps=5).fit(model, loader(n=240))
    return autoclip


def table_of(directory: Path, key: str = "autoclip/spikes") -> tuple[int, list[dict[str, Any]]]:
    """The only table that the client has written, and the step that it was logged at."""
    wandb.finish()
    (run,) = read_runs(directory)
    (row,) = (row for row in run.history if f"{key}.path" in row)
    (file,) = directory.glob(f"wandb/offline-run-*/files/{row[f'{key}.path']}")
    table = json.loads(file.read_text())
    assert len(table["data"]) == row[f"{key}.nrows"]
    return int(row["trainer/global_step"]), [dict(zip(table["columns"], cells, strict=True)) for cells in table["data"]]


def test_the_table_is_logged_once_at_the_end_of_fit(tmp_path: Path) -> None:
    autoclip = fit(tmp_path, Noting({33: 1000.0, 41: math.nan}, slowly))
    step, table = table_of(tmp_path)
    assert step == 60
    assert [row["step"] for row in table[:2]] == [41, 33]
    assert [row["step"] for row in table] == [spike["step"] for spike in autoclip.spikes()]


class Crash(Callback):
    """Ends the fit at a step."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 42:
            raise ZeroDivisionError


def test_the_table_is_logged_where_an_exception_ends_the_fit(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, Noting({33: 1000.0}, slowly), Crash())
    step, table = table_of(tmp_path)
    assert (step, table[0]["step"]) == (42, 33)


class Full(Callback):
    """The disk is full from a step on."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 30:
            media = Path(trainer.logger.experiment.dir, "media", "table", "autoclip")
            media.parent.mkdir(parents=True)
            media.write_text("a file where the client would make a folder")


def test_a_table_that_cannot_be_written_does_not_stop_the_training(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="The table of large steps could not be logged to `WandbLogger`"):
        autoclip = fit(tmp_path, Noting({33: 1000.0}, slowly), Full())
    assert autoclip.clippers[0].steps == 60


class Bad(OptimizerPerLayer):
    """The second layer has a NaN in its gradient at one batch."""

    def on_after_backward(self) -> None:
        if self.trainer.fit_loop.epoch_loop.batch_idx == 6 and self.net[2].weight.grad is not None:
            self.net[2].weight.grad[0, 0] = math.nan


def test_one_table_has_the_large_steps_of_all_optimizers_the_nonfinite_ones_first(tmp_path: Path) -> None:
    autoclip = fit(tmp_path, Bad(slowly, slowly), prefix="trial")
    _, table = table_of(tmp_path, "trial-autoclip/spikes")
    assert (table[0]["optimizer"], table[0]["step"], table[0]["skipped"]) == ("autoclip/SGD-1", 6, "non-finite")
    assert {row["optimizer"] for row in table[1:]} == {"autoclip/SGD", "autoclip/SGD-1"}
    norms = [spike["norm"] for spike in autoclip.spikes()]
    assert [row["norm"] for row in table[1:]] == pytest.approx(norms[1:])
    assert all(map(math.isfinite, norms[1:]))
