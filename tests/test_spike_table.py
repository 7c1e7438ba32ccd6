"""The table of spikes on Weights & Biases: logged once, at the end of fit or where an exception ends it."""

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
KEY = "autoclip/spikes"


def slowly(parameters: Any) -> SGD:
    return SGD(parameters, lr=0.001)


def fit(tmp_path: Path, factors: dict[int, float], steps: int, *callbacks: Callback, **options: Any) -> AutoClip:
    """Train with a row per five steps; the loss of some batches is multiplied by a factor."""
    autoclip = by_percentile(50, verbose=False, **{key: options.pop(key) for key in ("groups",) if key in options})
    logger = WandbLogger(save_dir=tmp_path, project="test", id="run", prefix=options.pop("prefix", ""))
    model = options.pop("model", None) or Noting(factors, slowly)
    run = trainer(autoclip, *callbacks, logger=logger, **{"log_every_n_steps": 5, **options})
    run.fit(model, loader(n=4 * steps))
    return autoclip


def tables(tmp_path: Path, key: str = KEY) -> dict[int, list[dict[str, Any]]]:
    """The versions of the table that the client has written, each by the step that it was logged at."""
    wandb.finish()
    (run,), found = read_runs(tmp_path), {}
    for row in run.history:
        if f"{key}.path" in row:
            (file,) = tmp_path.glob(f"wandb/offline-run-*/files/{row[f'{key}.path']}")
            table = json.loads(file.read_text())
            assert len(table["data"]) == row[f"{key}.nrows"]
            step = int(row["trainer/global_step"])
            assert step not in found, "once per row"
            found[step] = [dict(zip(table["columns"], cells, strict=True)) for cells in table["data"]]
    return found


@pytest.mark.parametrize("factor", [1000.0, math.nan], ids=["a spike", "a NaN"])
def test_the_table_is_logged_once_at_the_end_of_fit(tmp_path: Path, factor: float) -> None:
    autoclip = fit(tmp_path, {33: factor}, 60)
    ((step, table),) = tables(tmp_path).items()
    assert step == 60
    assert table[0]["step"] == 33
    assert [row["step"] for row in table] == [spike["step"] for spike in autoclip.spikes()]


class Crash(Callback):
    """Ends the fit at a step."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 42:
            raise ZeroDivisionError


def test_the_table_is_logged_where_an_exception_ends_the_fit(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, {33: 1000.0}, 60, Crash())
    ((step, table),) = tables(tmp_path).items()
    assert (step, table[0]["step"]) == (42, 33)


class Full(Callback):
    """The disk is full from a step on."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 30:
            media = Path(trainer.logger.experiment.dir, "media", "table", "autoclip")
            media.parent.mkdir(parents=True)
            media.write_text("a file where the client would make a folder")


def test_a_table_that_cannot_be_written_does_not_stop_the_training(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="The spike table could not be logged to `WandbLogger`"):
        autoclip = fit(tmp_path, {33: 1000.0}, 60, Full())
    assert autoclip.clippers[0].steps == 60


@pytest.mark.parametrize("prefix", ["", "trial"])
def test_one_table_holds_the_spikes_of_all_optimizers(tmp_path: Path, prefix: str) -> None:
    model = OptimizerPerLayer(slowly, slowly)
    autoclip = fit(tmp_path, {}, 20, model=model, prefix=prefix)
    (table,) = tables(tmp_path, f"{prefix}-{KEY}".lstrip("-")).values()
    assert {row["optimizer"] for row in table} == {"autoclip/SGD", "autoclip/SGD-1"}
    assert [row["norm"] for row in table] == pytest.approx([spike["norm"] for spike in autoclip.spikes()])


def test_what_was_not_finite_comes_first_with_several_optimizers():
    class Bad(OptimizerPerLayer):
        def on_after_backward(self):
            if self.trainer.fit_loop.epoch_loop.batch_idx == 6 and self.net[2].weight.grad is not None:
                self.net[2].weight.grad[0, 0] = math.nan

    autoclip, sgd = AutoClip(50, verbose=False), partial(SGD, lr=0.01)
    with pytest.warns(match="had a NaN or an infinity"):
        trainer(autoclip).fit(Bad(sgd, sgd), loader())
    first, second = autoclip.spikes()[:2]
    assert (first["optimizer"], first["step"]) == ("autoclip/SGD-1", 6)
    assert math.isfinite(second["norm"])
