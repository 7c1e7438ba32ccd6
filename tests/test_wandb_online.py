"""What W&B receives from the real client online, against norms that the model noted itself and numpy."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import wandb
from helpers import Net, by_percentile, loader, norm_of, read_csv, trainer
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from processes import ROOT, TIME_LIMIT
from test_logging import (
    KEYS,
    SETTINGS,
    WINDOW,
    Noting,
    Row,
    check,
    check_intervals,
    check_steps,
    figures,
)
from torch.optim import Adam
from wandb_server import Server, serve

from lightning_autoclip import AutoClip

STEP_KEYS = ["step/grad_norm", "step/threshold"]


@contextmanager
def serving(path: Path) -> Iterator[Server]:
    """W&B's client sends to a server of our own."""
    with serve() as server, pytest.MonkeyPatch.context() as patch:
        settings = {"MODE": "online", "BASE_URL": server.url, "API_KEY": "0" * 40, "DIR": str(path)}
        for name, value in {**settings, "SILENT": "true", "CONSOLE": "off", "ERROR_REPORTING": "false"}.items():
            patch.setenv(f"WANDB_{name}", value)
        wandb.teardown()  # the client keeps its settings from run to run
        yield server
        wandb.finish()
        wandb.teardown()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serving(tmp_path) as server:
        yield server


def online(path: Path, **kwargs: Any) -> WandbLogger:
    return WandbLogger(save_dir=path, project="test", id="run", **kwargs)


def fit(model: Net, loggers: Any, *callbacks: Any, bad: dict[int, float] | None = None, **options: Any) -> Trainer:
    """Train on 16 batches; those in ``bad`` have their loss multiplied by its value."""
    kinds = ("log_every_step", "log_layers", "log_histogram", "alert_above", "percentile", "gradient_clip_algorithm")
    clip = {"percentile": 50, "multiplier": 1.0} | {key: options.pop(key) for key in kinds if key in options}
    data = loader(n=64, scales=[(bad or {}).get(i // 4, 1.0) for i in range(64)])
    checkpoint = options.pop("ckpt_path", None)
    autoclip = by_percentile(window=WINDOW, **clip)
    run = trainer(autoclip, *callbacks, logger=loggers, **{"log_every_n_steps": 5, **options})
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


class Done(NamedTuple):
    """A run with everything that is logged to W&B, and a CSV file beside it."""

    server: Server
    rows: list[Row]
    written: list[Row]
    model: NotingLayers
    spikes: list[dict[str, Any]]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Done]:
    path, model, bad = tmp_path_factory.mktemp("online"), NotingLayers(), {3: math.nan, 7: 100.0, 12: 1000.0}
    options = {"log_every_step": True, "log_layers": True, "log_histogram": True, "alert_above": 3.0}
    with serving(path) as server:
        run = fit(model, [online(path), CSVLogger(path, "", "csv")], bad=bad, **options)
        rows = received(server)
    written = [
        {key: float(value) for key, value in row.items() if value} for row in read_csv(path / "csv" / "metrics.csv")
    ]
    (spikes,) = (callback.spikes() for callback in run.callbacks if isinstance(callback, AutoClip))
    return Done(server, rows, written, model, spikes)


STARTS, ENDS = [0, 5, 10, 15], [4, 9, 14, 15]


def test_every_row_arrives_at_its_step_with_its_values(done: Done) -> None:
    check_steps(done.rows, "autoclip/", done.model.norms)
    check_intervals(done.rows, "autoclip/", figures(done.model.norms, ENDS))
    for name, shares in done.model.shares.items():
        means = {end: float(np.nanmean(shares[start : end + 1])) for start, end in zip(STARTS, ENDS, strict=True)}
        check(done.rows, f"autoclip_layers/{name}", means)
    run = done.server.runs["run"]
    assert (run.project, run.exit_code) == ("test", 0)
    assert run.config["lightning_autoclip"]["value"] == SETTINGS


def test_the_summary_has_the_extremes_of_every_key_and_a_csv_file_the_same_rows(done: Done) -> None:
    summary = done.server.runs["run"].summary
    layers = ["autoclip_layers/net.0", "autoclip_layers/net.2"]
    for key in [*(f"autoclip/{key}" for key in [*KEYS, *STEP_KEYS]), *layers]:
        points = [(row["step"], row[key]) for row in done.rows if key in row]
        values = [value for _, value in points]
        expected = {"min": min(values), "max": max(values), "mean": np.mean(values), "last": values[-1]}
        assert summary[key] == pytest.approx(expected), key
        assert points == [(row["step"], row[key]) for row in done.written if key in row], key


def test_the_histograms_are_those_of_the_finite_norms(done: Done) -> None:
    key = "autoclip/grad_norm_histogram"
    histograms = {row["step"]: row[key] for row in done.rows if key in row}
    assert [*histograms] == ENDS
    for start, end in zip(STARTS, ENDS, strict=True):
        norms = np.array(done.model.norms[start : end + 1])
        counts, edges = np.histogram(norms[np.isfinite(norms)], bins=64)
        assert histograms[end]["_type"] == "histogram"
        assert histograms[end]["values"] == counts.tolist()
        assert histograms[end]["bins"] == pytest.approx(edges.tolist(), rel=1e-5)


def test_the_table_of_large_steps_arrives_with_its_file(done: Done) -> None:
    ((step, table),) = [(row["step"], row["autoclip/spikes"]) for row in done.rows if "autoclip/spikes" in row]
    assert step == 16
    assert done.server.runs["run"].summary["autoclip/spikes"]["path"] == table["path"]
    assert (table["_type"], table["nrows"]) == ("table-file", len(done.spikes))
    file = json.loads(done.server.uploads[table["path"]])
    assert file["columns"] == [*done.spikes[0]]
    assert file["data"] == [[*map(finite, spike.values())] for spike in done.spikes]


def finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def test_alerts_of_a_spike_and_of_a_nan_do_not_hide_each_other(done: Done) -> None:
    norms, titles = done.model.norms, ("autoclip: non-finite gradient", "autoclip: spike of the gradient norm")
    usual = np.exp(np.log([norm for norm in norms[:8] if math.isfinite(norm)]).mean())
    texts = (
        r"At step 3 \(epoch 0, batch 3\) .* nan\. `spikes\(\)` of the callback",
        rf"At step 7 \(epoch 0, batch 7\) .* {norms[7]:.4g}, {norms[7] / usual:.1f} times the usual one, mostly in net",
    )
    assert sorted(alert["title"] for alert in done.server.alerts) == [titles[0], titles[1], titles[1]]
    delivered = sorted(done.server.delivered, key=lambda alert: alert["title"])
    for alert, title, text in zip(delivered, titles, texts, strict=True):
        assert (alert["entityName"], alert["projectName"], alert["runName"]) == ("team", "test", "run")
        assert (alert["severity"], alert["waitDuration"]) == ("WARN", 600_000)
        assert alert["title"] == title  # of less than the 64 characters that the client asks for
        assert re.match(text, alert["text"])


@pytest.mark.parametrize(
    ("bad", "options", "expected"),
    [
        ({}, {"alert_above": 5.0, "percentile": 10}, set()),
        ({11: 1000.0}, {"alert_above": 5.0, "percentile": 90}, {11, 27, 43}),
        ({11: 1000.0}, {"alert_above": 5.0, "percentile": 10, "gradient_clip_algorithm": "value"}, {11, 27, 43}),
        ({3: math.nan, 11: 1000.0}, {}, set()),
    ],
    ids=["no spike", "spikes", "by value", "not asked for"],
)
def test_alerts_are_sent_of_spikes_where_they_are_asked_for(
    tmp_path: Path, server: Server, bad: dict[int, float], options: dict[str, Any], expected: set[int]
) -> None:
    """How far a norm is above the threshold, which is low where the percentile is, does not matter."""
    fit(Net(partial(Adam, lr=2e-3)), online(tmp_path), bad=bad, max_epochs=3, **options)
    received(server)
    assert {int(re.match(r"At step (\d+) ", alert["text"])[1]) for alert in server.alerts} == expected


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
    check_intervals(received(server), "autoclip/", figures(same.norms, [4, 6]))


def test_a_run_that_is_resumed_under_its_id_has_each_row_once(tmp_path: Path, server: Server) -> None:
    first, second, saving = Noting(), Noting(), ModelCheckpoint(tmp_path, "saved", every_n_train_steps=7)
    options = {"log_every_step": True, "enable_checkpointing": True, "max_epochs": 3}
    fit(first, online(tmp_path), saving, max_steps=7, **options)
    assert sum("autoclip/grad_norm" in row or "autoclip/step/grad_norm" in row for row in received(server)) == 7
    wandb.teardown()
    logger = online(tmp_path, resume="must")
    fit(second, logger, saving, max_steps=16, ckpt_path=tmp_path / "saved.ckpt", **options)
    rows, norms = received(server), first.norms + second.norms
    assert [row["_step"] for row in rows] == [*range(len(rows))]
    assert len(norms) == 16
    check_steps(rows, "autoclip/", norms)
    check_intervals(rows, "autoclip/", figures(norms, [4, 6, 9, 14, 15]))
