"""What W&B receives from the real client online, against norms that the model noted itself and numpy."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wandb
from helpers import Net, by_percentile, loader, norm_of, trainer
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from models import OptimizerPerLayer
from processes import ROOT, TIME_LIMIT
from test_logging import (
    KEYS,
    WINDOW,
    Noting,
    Row,
    check,
    check_steps,
    check_windows,
    figures,
)
from test_report import TASKS, poisoned, train
from torch.optim import SGD, Adam
from wandb_server import Server, serve

from lightning_autoclip import AutoClip

STEP_KEYS = ["step/grad_norm", "step/threshold"]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with serve() as server:
        settings = {"MODE": "online", "BASE_URL": server.url, "API_KEY": "0" * 40, "DIR": str(tmp_path)}
        for name, value in {**settings, "SILENT": "true", "CONSOLE": "off", "ERROR_REPORTING": "false"}.items():
            monkeypatch.setenv(f"WANDB_{name}", value)
        wandb.teardown()  # the client keeps its settings from run to run
        yield server
        wandb.finish()
        wandb.teardown()


def online(path: Path, **kwargs: Any) -> WandbLogger:
    return WandbLogger(save_dir=path, project="test", id="run", **kwargs)


def fit(model: Net, loggers: Any, *callbacks: Any, bad: dict[int, float] | None = None, **options: Any) -> Trainer:
    """Train on 16 batches; those in ``bad`` have their loss multiplied by its value."""
    kinds = ("log_every_step", "log_layers", "log_histogram", "alert_above")
    clip = {key: options.pop(key) for key in kinds if key in options}
    data = loader(n=64, scales=[(bad or {}).get(i // 4, 1.0) for i in range(64)])
    checkpoint = options.pop("ckpt_path", None)
    run = trainer(
        by_percentile(50, window=WINDOW, **clip), *callbacks, logger=loggers, **{"log_every_n_steps": 5, **options}
    )
    run.fit(model, data, ckpt_path=checkpoint)
    return run


def received(server: Server) -> list[Row]:
    """Every row of the run, in order of arrival, when all have arrived."""
    wandb.finish()
    return [{**row, "step": row["trainer/global_step"]} for row in server.runs["run"].history]


class NotingLayers(Noting):
    """Notes the share of each layer in the squared norm too."""

    def __init__(self) -> None:
        super().__init__()
        self.shares: dict[str, list[float]] = {"net.0": [], "net.2": []}

    def on_after_backward(self) -> None:
        super().on_after_backward()
        for name, shares in self.shares.items():
            shares.append((norm_of(self.get_submodule(name).parameters()) / self.norms[-1]) ** 2)


def test_every_row_arrives_at_its_step_with_its_values(tmp_path: Path, server: Server) -> None:
    model = NotingLayers()
    fit(model, online(tmp_path), bad={3: math.nan, 7: 100.0}, log_every_step=True, log_layers=True)
    rows, ends = received(server), [4, 9, 14, 15]
    check_steps(rows, "autoclip/", model.norms)
    check_windows(rows, "autoclip/", figures(model.norms, ends))
    for name, shares in model.shares.items():
        windows = {end: np.array(shares[start:end]) for start, end in zip([0, 5, 10, 15], [5, 10, 15, 16], strict=True)}
        means = {end - 1: float(np.nanmean(window)) for end, window in windows.items()}
        check(rows, f"autoclip_layers/{name}", means)
    run = server.runs["run"]
    assert (run.project, run.exit_code) == ("test", 0)
    assert run.config["lightning_autoclip"]["value"]["policy"] == {
        "name": "Percentile",
        "percentile": 50,
        "multiplier": 1,
    }


def test_the_summary_holds_the_extremes_of_every_key(tmp_path: Path, server: Server) -> None:
    fit(Noting(), online(tmp_path), bad={3: math.nan, 7: 100.0}, log_every_step=True, log_layers=True)
    rows, summary = received(server), server.runs["run"].summary
    layers = ["autoclip_layers/net.0", "autoclip_layers/net.2"]
    for key in [*(f"autoclip/{key}" for key in [*KEYS, *STEP_KEYS]), *layers]:
        values = [row[key] for row in rows if key in row]
        expected = {"min": min(values), "max": max(values), "mean": np.mean(values), "last": values[-1]}
        assert summary[key] == pytest.approx(expected), key


def crash() -> None:
    """Train in a process of its own, and fail in batch 7."""
    fit(Noting(ValueError), online(Path()), log_every_step=True)


def test_a_run_that_crashes_delivers_its_rows_and_is_marked_failed(server: Server) -> None:
    # An interpreter of its own: W&B learns of a crash from `sys.excepthook`, and of the end from `atexit`.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    code = "import test_wandb_online; test_wandb_online.crash()"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=TIME_LIMIT
    )
    assert done.returncode == 1
    assert "ValueError: stop" in done.stderr
    assert server.runs["run"].exit_code == 1
    same = Noting(ValueError)
    with pytest.raises(ValueError, match="stop"):
        fit(same, False)
    assert len(same.norms) == 7
    check_steps(received(server), "autoclip/", same.norms)
    check_windows(received(server), "autoclip/", figures(same.norms, [4, 6]))


@pytest.mark.parametrize("resume", ["must", "allow"])
def test_a_run_that_is_resumed_under_its_id_has_each_row_once(tmp_path: Path, server: Server, resume: str) -> None:
    first, second, saving = Noting(), Noting(), ModelCheckpoint(tmp_path, "saved", every_n_train_steps=7)
    options = {"log_every_step": True, "enable_checkpointing": True, "max_epochs": 3}
    fit(first, online(tmp_path), saving, max_steps=7, **options)
    assert sum("autoclip/grad_norm" in row or "autoclip/step/grad_norm" in row for row in received(server)) == 7
    wandb.teardown()
    logger = online(tmp_path, resume=resume)
    fit(second, logger, saving, max_steps=16, ckpt_path=tmp_path / "saved.ckpt", **options)
    rows, norms = received(server), first.norms + second.norms
    assert [row["_step"] for row in rows] == [*range(len(rows))]
    assert len(norms) == 16
    check_steps(rows, "autoclip/", norms)
    check_windows(rows, "autoclip/", figures(norms, [4, 6, 9, 14, 15]))


def test_each_of_two_optimizers_has_rows_of_its_own(tmp_path: Path, server: Server) -> None:
    model = OptimizerPerLayer(partial(Adam, lr=0.01), partial(SGD, lr=0.01))
    fit(model, online(tmp_path), log_every_step=True)
    rows, prefixes = received(server), ("autoclip/Adam/", "autoclip/SGD/")
    for prefix, norms in zip(prefixes, model.norms, strict=True):
        check_steps(rows, prefix, norms)
        check_windows(rows, prefix, figures(norms, [4, 9, 14, 15]))
    ours = {key for row in rows for key in row if "autoclip" in key} - {"autoclip/spikes"}
    assert ours == {prefix + key for prefix in prefixes for key in [*KEYS, *STEP_KEYS]}


def test_a_csv_file_beside_it_holds_the_same_rows(tmp_path: Path, server: Server) -> None:
    fit(Noting(), [online(tmp_path), CSVLogger(tmp_path, "", "csv")], bad={7: 100.0}, log_every_step=True)
    with (tmp_path / "csv" / "metrics.csv").open() as file:
        written = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
    rows = received(server)
    for key in [f"autoclip/{key}" for key in [*KEYS, *STEP_KEYS]]:
        series = {row["step"]: row[key] for row in written if key in row}
        assert [(row["step"], row[key]) for row in rows if key in row] == [*series.items()], key
    assert len([row for row in written if "train_loss" not in row]) == 16


@pytest.mark.parametrize(
    ("bad", "first", "what"),
    [({7: 100.0, 9: 1000.0}, 7, "spike"), ({6: math.nan, 7: 100.0}, 6, "nan"), ({13: math.inf}, 13, "inf")],
    ids=["spikes", "NaN, then a spike", "infinity"],
)
def test_a_spike_or_a_nonfinite_step_sends_an_alert(
    tmp_path: Path, server: Server, bad: dict[int, float], first: int, what: str
) -> None:
    model = Noting()
    fit(model, online(tmp_path), bad=bad, alert_above=3.0)
    received(server)
    alert = server.alerts[0] if what == "spike" else server.alerts[-1]
    assert (alert["entityName"], alert["projectName"], alert["runName"]) == ("team", "test", "run")
    assert (alert["severity"], alert["waitDuration"]) == ("WARN", 600_000)
    assert alert["title"] == f"autoclip: {'spike of the gradient norm' if what == 'spike' else 'non-finite gradient'}"
    assert len(alert["title"]) < 64  # what the client asks for
    assert f"step {first} (epoch 0, batch {first})" in alert["text"]
    typical = np.exp(np.log(model.norms[: first + 1]).mean())
    times = f"{model.norms[first]:.4g}, {model.norms[first] / typical:.1f} times the typical one, mostly in net."
    assert (times if what == "spike" else ", not finite") in alert["text"]


def test_alerts_of_a_spike_and_of_a_nan_do_not_hide_each_other(tmp_path: Path, server: Server) -> None:
    fit(Noting(), online(tmp_path), bad={3: math.nan, 7: 100.0, 12: 1000.0}, alert_above=3.0)
    received(server)
    delivered = [(alert["title"], alert["text"].partition(" (")[0]) for alert in server.delivered]
    assert sorted(delivered) == [
        ("autoclip: non-finite gradient", "At step 3"),
        ("autoclip: spike of the gradient norm", "At step 7"),
    ]


@pytest.mark.parametrize("percentile", [10, 90])
@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize(
    ("task", "poisons"),
    [("regression", {}), ("transformer", {}), ("regression", {31: 1000.0})],
    ids=["regression", "transformer", "with spikes"],
)
def test_a_healthy_run_sends_no_alert_and_a_spike_one(
    tmp_path: Path, server: Server, poisons: dict[int, float], task: str, algorithm: str, percentile: int
) -> None:
    """Of how far a norm is above a threshold, which is low where the percentile is, an alert knows nothing."""
    clipping = by_percentile(percentile, gradient_clip_algorithm=algorithm, alert_above=5)
    data = poisoned(poisons, TASKS[task][1])
    train(clipping, task, "Adam", 2e-3, data=data, epochs=3, shuffle=not poisons, logger=online(tmp_path))
    received(server)
    told = {alert["text"].partition(" (")[0] for alert in server.alerts}
    assert told == ({f"At step {step}" for step in (31, 71, 111)} if poisons else set())


@pytest.mark.parametrize(
    ("bad", "options"), [({}, {"alert_above": 100.0}), ({3: math.nan, 7: 100.0}, {})], ids=["no spike", "not asked for"]
)
def test_no_alert_is_sent(tmp_path: Path, server: Server, bad: dict[int, float], options: dict[str, float]) -> None:
    fit(Noting(), online(tmp_path), bad=bad, **options)
    assert received(server)
    assert not server.alerts


def test_the_histograms_are_those_of_the_finite_norms(tmp_path: Path, server: Server) -> None:
    model, key = Noting(), "autoclip/grad_norm_histogram"
    fit(model, online(tmp_path), bad={3: math.nan, 7: 100.0}, log_histogram=True)
    histograms = {row["step"]: row[key] for row in received(server) if key in row}
    assert [*histograms] == [4, 9, 14, 15]
    for start, end in zip([0, 5, 10, 15], histograms, strict=True):
        norms = np.array(model.norms[start : end + 1])
        counts, edges = np.histogram(norms[np.isfinite(norms)], bins=64)
        assert histograms[end]["_type"] == "histogram"
        assert histograms[end]["values"] == counts.tolist()
        assert histograms[end]["bins"] == pytest.approx(edges.tolist(), rel=1e-5)


def finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def test_the_table_of_spikes_arrives_with_its_file(tmp_path: Path, server: Server) -> None:
    run = fit(Noting(), online(tmp_path), bad={3: math.nan, 7: 100.0})
    ((step, table),) = [(row["step"], row["autoclip/spikes"]) for row in received(server) if "autoclip/spikes" in row]
    assert step == 16
    assert server.runs["run"].summary["autoclip/spikes"]["path"] == table["path"]
    (spikes,) = (callback.spikes() for callback in run.callbacks if isinstance(callback, AutoClip))
    assert {spike["step"] for spike in spikes} >= {3, 7}
    assert (table["_type"], table["nrows"]) == ("table-file", len(spikes))
    file = json.loads(server.uploads[table["path"]])
    assert file["columns"] == [*spikes[0]]
    assert [[*map(finite, row)] for row in file["data"]] == [[*map(finite, spike.values())] for spike in spikes]
