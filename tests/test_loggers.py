"""What TensorBoard's, the CSV file's and MLflow's own readers find after training: the same rows in each."""

from __future__ import annotations

import csv
import io
import math
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Net, loader, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger
from mlflow.tracking import MlflowClient
from models import Noting, OptimizerPerLayer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from lightning_autoclip import AutoClip

Series = dict[str, list[tuple[int, float]]]

MAKERS: dict[str, Callable[[Path], Logger]] = {
    "csv": lambda path: CSVLogger(path, name="", version="run"),
    "tensorboard": lambda path: TensorBoardLogger(path, name="", version="run"),
    "mlflow": lambda path: MLFlowLogger("experiment", save_dir=str(path)),
}
every_logger = pytest.mark.parametrize("kind", MAKERS)


@pytest.fixture(autouse=True)
def _mlflow_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow 3 refuses it unless asked for it so
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


def rows_of_csv(directory: Path) -> Series:
    series: Series = {}
    with (directory / "run" / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            for key in row.keys() - {"step"}:
                if row[key]:
                    series.setdefault(key, []).append((int(row["step"]), float(row[key])))
    return series


def rows_of_tensorboard(directory: Path) -> Series:
    events = EventAccumulator(str(directory / "run"), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def mlflow_runs(directory: Path) -> tuple[MlflowClient, list[Any]]:
    client = MlflowClient(f"file:{directory}")
    experiment = client.get_experiment_by_name("experiment")
    return client, client.search_runs([experiment.experiment_id], order_by=["attributes.start_time"])


def rows_of_mlflow(directory: Path) -> Series:
    client, (run,) = mlflow_runs(directory)
    histories = {key: client.get_metric_history(run.info.run_id, key) for key in run.data.metrics}
    return {key: [(metric.step, metric.value) for metric in history] for key, history in histories.items()}


READERS = {"csv": rows_of_csv, "tensorboard": rows_of_tensorboard, "mlflow": rows_of_mlflow}


def table_of_csv(directory: Path) -> str:
    return (directory / "run" / "autoclip_spikes.csv").read_text()


def table_of_tensorboard(directory: Path) -> str:
    """The markdown as CSV: without the row of dashes."""
    events = EventAccumulator(str(directory / "run")).Reload()
    (event,) = events.Tensors("autoclip/spikes/text_summary")
    lines = event.tensor_proto.string_val[0].decode().splitlines()
    return "\n".join(",".join(line.strip("| ").split(" | ")) for line in [lines[0], *lines[2:]])


def table_of_mlflow(directory: Path) -> str:
    client, (run,) = mlflow_runs(directory)
    return Path(client.download_artifacts(run.info.run_id, "autoclip_spikes.csv")).read_text()


sgd, adam = partial(torch.optim.SGD, lr=0.02), partial(torch.optim.Adam, lr=0.01)
TABLES = {"csv": table_of_csv, "tensorboard": table_of_tensorboard, "mlflow": table_of_mlflow}


class Failing(Noting):
    """May break off at a batch."""

    def __init__(self, fails_at: int | None, factors: dict[int, float]) -> None:
        super().__init__(factors, sgd)
        self.fails_at = fails_at

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        if batch_idx == self.fails_at:
            raise RuntimeError("stop")
        return super().training_step(batch, batch_idx)


def fit(model: Net, loggers: Any, *callbacks: Any, ckpt: Any = None, **kwargs: Any) -> AutoClip:
    ours = {
        key: kwargs.pop(key) for key in ("gradient_clip_algorithm", "log_every_step", "log_layers") if key in kwargs
    }
    autoclip = AutoClip(50, window=8, verbose=False, **ours)
    options = {"log_every_n_steps": 5, "enable_checkpointing": bool(callbacks), **kwargs}
    trainer(autoclip, *callbacks, logger=loggers, **options).fit(model, loader(), ckpt_path=ckpt)
    return autoclip


def of_all_loggers(directory: Path) -> list[Logger]:
    return [make(directory / kind) for kind, make in MAKERS.items()]


@pytest.mark.parametrize("options", [{}, {"log_every_step": True, "log_layers": True}], ids=["default", "everything"])
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_every_logger_has_the_same_rows_at_the_steps_of_the_loss(
    tmp_path: Path, algorithm: str, options: dict[str, Any]
) -> None:
    model = Noting({3: math.nan, 7: 100.0}, sgd)
    fit(model, of_all_loggers(tmp_path), gradient_clip_algorithm=algorithm, **options)
    found = {kind: read(tmp_path / kind) for kind, read in READERS.items()}
    ours = {key for key in found["csv"] if key.startswith("autoclip")}
    assert len(ours) >= 9
    for kind, series in found.items():
        assert {key for key in series if key.startswith("autoclip")} == ours, kind
        assert [step for step, _ in series["train_loss"]] == [4, 9, 14]
        for key in ours:
            steps, values = zip(*series[key], strict=True)
            every = tuple(range(16)) if "threshold" in key else (*range(3), *range(4, 16))  # the norm of step 3 is NaN
            assert steps == (every if "/step/" in key else (4, 9, 14, 15)), (kind, key)
            expected = [value for _, value in found["csv"][key]]
            exact = 1e-6 if kind == "tensorboard" else 0  # TensorBoard keeps float32
            assert values == pytest.approx(expected, rel=exact), (kind, key)
    assert dict(found["mlflow"]["autoclip/grad_norm"]) == pytest.approx(
        {step: model.norms[step] for step in (4, 9, 14, 15)}, rel=1e-5
    )


@every_logger
def test_a_row_of_nothing_but_nonfinite_steps_can_be_read_back(tmp_path: Path, kind: str) -> None:
    fit(Noting(dict.fromkeys(range(5, 10), math.nan), sgd), MAKERS[kind](tmp_path))
    series = READERS[kind](tmp_path)
    assert [step for step, _ in series["autoclip/grad_norm_max"]] == [4, 14, 15]
    assert dict(series["autoclip/nonfinite_total"]) == {4: 0, 9: 5, 14: 5, 15: 5}
    assert all(math.isfinite(value) for points in series.values() for _, value in points)


@every_logger
def test_the_spike_table_has_nothing_where_a_number_is_not_finite(tmp_path: Path, kind: str) -> None:
    autoclip = AutoClip(50, warmup_steps=4, verbose=False)
    trainer(autoclip, logger=MAKERS[kind](tmp_path)).fit(Noting({1: math.nan, 2: math.inf, 7: 100.0}, sgd), loader())
    text = TABLES[kind](tmp_path)
    assert not {"nan", "inf"} & set(text.replace("\n", ",").split(","))
    written = [*csv.DictReader(io.StringIO(text))]
    assert [int(row["step"]) for row in written[:3]] == [1, 2, 7]
    assert [row["norm"] != "" for row in written[:3]] == [False, False, True]


@every_logger
def test_the_keys_of_several_optimizers_and_their_layers_arrive_as_they_are(tmp_path: Path, kind: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(OptimizerPerLayer(adam, adam), MAKERS[kind](tmp_path), log_layers=True, log_every_step=True)
    assert not [str(warning.message) for warning in caught if "autoclip" in str(warning.message)]
    keys = {key for key in READERS[kind](tmp_path) if "autoclip" in key}
    for optimizer, layer in (("Adam", "net.0"), ("Adam-1", "net.2")):
        assert {f"autoclip/{optimizer}/threshold", f"autoclip/{optimizer}/step/grad_norm"} <= keys
        assert f"autoclip_layers/{optimizer}/{layer}" in keys
    assert all(key.split("/")[1] in ("Adam", "Adam-1") for key in keys)


@every_logger
@pytest.mark.parametrize("fails_at", [None, 12], ids=["whole", "broken off"])
def test_the_spike_table_arrives_even_if_the_run_breaks_off(tmp_path: Path, kind: str, fails_at: int | None) -> None:
    model = Failing(fails_at, {3: math.nan, 7: 100.0})
    logger = MAKERS[kind](tmp_path)
    if fails_at:
        with pytest.raises(RuntimeError, match="stop"):
            fit(model, logger)
    else:
        fit(model, logger)
    written = [*csv.DictReader(io.StringIO(TABLES[kind](tmp_path)))]
    assert [int(row["step"]) for row in written[:2]] == [3, 7]  # the one that was not finite, then the largest
    norms = [norm for norm in model.norms if math.isfinite(norm)]
    assert [float(row["norm"]) for row in written[1:]] == pytest.approx(sorted(norms, reverse=True), rel=1e-3)
    if kind == "mlflow":
        assert mlflow_runs(tmp_path)[1][0].info.status == ("FAILED" if fails_at else "FINISHED")


@pytest.mark.parametrize("kind", ["tensorboard", "mlflow"])  # a new CSVLogger deletes what stands in its directory
def test_over_a_resume_in_the_same_run_each_row_is_there_once(tmp_path: Path, kind: str) -> None:
    first, second = Noting({7: 100.0}, sgd), Noting({7: 100.0}, sgd)
    logger, saving = MAKERS[kind](tmp_path / "logs"), ModelCheckpoint(tmp_path, "saved", every_n_train_steps=8)
    fit(first, logger, saving, max_steps=8, log_every_step=True)
    resumed = MAKERS[kind](tmp_path / "logs")
    if kind == "mlflow":
        resumed = MLFlowLogger("experiment", save_dir=str(tmp_path / "logs"), run_id=logger.run_id)
    fit(second, resumed, saving, ckpt=tmp_path / "saved.ckpt", log_every_step=True, max_epochs=2, max_steps=20)
    series, norms = READERS[kind](tmp_path / "logs"), first.norms + second.norms
    steps, values = zip(*series["autoclip/step/grad_norm"], strict=True)
    assert steps == tuple(range(20))
    assert values == pytest.approx(norms, rel=1e-5)
    assert [step for step, _ in series["autoclip/threshold"]] == [4, 7, 9, 14, 19]  # and at the end of the first fit
    assert [step for step, _ in series["train_loss"]] == [4, 9, 14, 19]


def test_each_run_of_an_mlflow_experiment_keeps_its_own_spike_table(tmp_path: Path) -> None:
    for worst in (3, 11):
        fit(Noting({worst: 100.0}, sgd), MAKERS["mlflow"](tmp_path))
    client, runs = mlflow_runs(tmp_path)
    texts = [Path(client.download_artifacts(run.info.run_id, "autoclip_spikes.csv")).read_text() for run in runs]
    assert [int(next(csv.DictReader(io.StringIO(text)))["step"]) for text in texts] == [3, 11]


class WithoutDirectoryPerRun(Logger):
    """Like those that only know where their runs are together."""

    name = "project"

    def __init__(self, save_dir: Path | None, version: int | str | None) -> None:
        super().__init__()
        self.directory, self._version = save_dir, version

    @property
    def save_dir(self) -> Any:
        return self.directory

    @property
    def version(self) -> Any:
        return self._version

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Kept by nobody."""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """There are none."""


@pytest.mark.parametrize("version", ["first", 0, None], ids=repr)
def test_a_table_beside_a_logger_without_a_directory_per_run_stands_with_the_runs_checkpoints(
    tmp_path: Path, version: Any
) -> None:
    saving = ModelCheckpoint(every_n_epochs=1)
    autoclip = fit(Noting({7: 100.0}, sgd), WithoutDirectoryPerRun(tmp_path, version), saving)
    directory = Path(saving.dirpath).parent
    assert directory.parent == tmp_path / "project"
    (found,) = tmp_path.rglob("autoclip_spikes.csv")
    assert found == directory / "autoclip_spikes.csv"
    with found.open(newline="") as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == [spike["step"] for spike in autoclip.spikes()]


def test_a_logger_without_any_directory_gets_no_table_and_no_error(tmp_path: Path) -> None:
    fit(Noting(optimizer=sgd), WithoutDirectoryPerRun(None, "first"))
    assert not [*tmp_path.rglob("autoclip_spikes.csv")]
