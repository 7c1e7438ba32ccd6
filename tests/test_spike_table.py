"""The table of spikes on Weights & Biases while a run goes on, and what a run leaves in each logger at its end."""

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
from lightning_autoclip.monitoring.loggers import SpikesInTime
from lightning_autoclip.monitoring.summary import Point
from lightning_autoclip.monitoring.trace import Trace

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
def test_a_spike_is_in_the_table_with_the_row_that_sums_it_up(tmp_path: Path, factor: float) -> None:
    autoclip = fit(tmp_path, {33: factor}, 60)
    found = tables(tmp_path)
    assert [*found][:1] == [4], "the first row has the first largest norm"
    at = [step for step, table in found.items() if any(row["step"] == 33 for row in table)]
    assert at[0] == 34
    assert found[34][0]["step"] == 33
    assert [row["step"] for row in found[max(found)]] == [spike["step"] for spike in autoclip.spikes()]


def test_a_late_spike_that_is_smaller_than_the_first_norms_is_shown_too(tmp_path: Path) -> None:
    factors = {step: 10_000.0 * 0.5**step if step < 20 else 1.0 for step in range(100)} | {72: 100.0}
    fit(tmp_path, factors, 100)
    found = tables(tmp_path)
    assert 74 in found
    spike = next(row for row in found[74] if row["step"] == 72)
    assert spike["times"] > 30
    assert spike["norm"] < found[74][0]["norm"]


def test_norms_that_keep_growing_make_few_tables_at_growing_distances(tmp_path: Path) -> None:
    model = Noting({step: 1.5**step for step in range(90)}, lambda parameters: SGD(parameters, lr=0.0))
    fit(tmp_path, {}, 90, model=model)
    rows = [(step + 1) // 5 for step in tables(tmp_path) if step < 90]
    assert rows == [1, 2, 4, 8, 16]


def test_what_comes_in_between_is_shown_when_the_distance_is_reached(tmp_path: Path) -> None:
    factors = {0: 2.0, 6: 100.0, 12: 1000.0}  # in the first three rows: the third one is too early
    fit(tmp_path, factors, 60)
    found = tables(tmp_path)
    assert [*found][:3] == [4, 9, 19]
    assert found[19][0]["step"] == 12


def test_a_quiet_stretch_makes_no_table_and_costs_no_patience_afterwards(tmp_path: Path) -> None:
    fit(tmp_path, {0: 50.0, 150: 5000.0, 158: 50_000.0}, 200)
    assert [step for step in tables(tmp_path) if step < 200] == [4, 154, 164]  # the third two rows after the second


def test_of_a_table_that_has_not_changed_there_is_no_second_one_at_the_end(tmp_path: Path) -> None:
    fit(tmp_path, {}, 5)
    assert [*tables(tmp_path)] == [4]


def test_however_long_a_run_is_the_table_has_twenty_versions_beside_the_last() -> None:
    """Of a million rows that each bring a spike."""
    logger, shown, trace = WandbLogger(project="test", id="run"), list[int](), Trace()
    point = Point(7, 0, 7, 7, 1.0, 1.0, 1.0, 1.0, 0.0)
    trace.extend([point], None)
    table, row = SpikesInTime(), -1

    def spikes() -> list[dict[str, Any]]:
        shown.append(row)
        return [{"step": 7}]

    for row in range(2**20 + 10):  # noqa: B007
        table.after_row([logger], [(trace, [point])], spikes)
    assert shown == [2**n - 1 for n in range(20)]


class Full(Callback):
    """The disk is full from a step on."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 30:
            (files,) = {Path(trainer.logger.experiment.dir)}
            media = files / "media" / "table" / "autoclip"
            for each in media.iterdir():
                each.unlink()
            media.rmdir()
            media.write_text("a file where the client would make a folder")


def test_a_table_that_cannot_be_written_does_not_stop_the_training(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="The spike table could not be logged to `WandbLogger`"):
        autoclip = fit(tmp_path, {33: 1000.0}, 60, Full())
    assert autoclip.clippers[0].steps == 60


@pytest.mark.parametrize("prefix", ["", "trial"])
def test_one_table_holds_the_spikes_of_all_optimizers(tmp_path: Path, prefix: str) -> None:
    model = OptimizerPerLayer(slowly, slowly)
    autoclip = fit(tmp_path, {}, 20, model=model, prefix=prefix)
    found = tables(tmp_path, f"{prefix}-{KEY}".lstrip("-"))
    assert {row["optimizer"] for row in found[4]} == {"autoclip/SGD", "autoclip/SGD-1"}
    assert [row["norm"] for row in found[max(found)]] == pytest.approx([spike["norm"] for spike in autoclip.spikes()])


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
