"""What TensorBoard's, the CSV file's and MLflow's own readers find after training: the same rows in each."""

from __future__ import annotations

import csv
import io
import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from chaos.faults import small_files
from fsspec.implementations.local import LocalFileSystem
from helpers import Net, by_percentile, loader, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CometLogger, CSVLogger, Logger, MLFlowLogger, TensorBoardLogger
from mlflow.tracking import MlflowClient
from models import Noting, OptimizerPerLayer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from torch import Tensor

from lightning_autoclip import AutoClip, GradientClipping, History, Policy
from lightning_autoclip.monitoring.texts import replace_text

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
    series: Series = {}
    for path in sorted((directory / "run").glob("events*"), key=lambda path: path.stat().st_ctime_ns):
        events = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
        for tag in events.Tags()["scalars"]:
            series.setdefault(tag, []).extend((event.step, event.value) for event in events.Scalars(tag))
    return series


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


def health_of_tensorboard(directory: Path) -> str:
    events = EventAccumulator(str(directory / "run")).Reload()
    return events.Tensors("autoclip/health/text_summary")[-1].tensor_proto.string_val[0].decode()


HEALTHS = {
    "csv": lambda directory: (directory / "run" / "autoclip_health.txt").read_text(encoding="utf-8").strip(),
    "tensorboard": health_of_tensorboard,
    "mlflow": lambda directory: mlflow_runs(directory)[1][0].data.tags["autoclip/health"],
}
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
    autoclip = by_percentile(50, window=8, verbose=False, **ours)
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
    autoclip = by_percentile(50, warmup_steps=4, verbose=False)
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


@every_logger
@pytest.mark.parametrize("fails_at", [None, 12], ids=["whole", "broken off"])
def test_the_verdicts_of_the_report_stand_in_every_logger(tmp_path: Path, kind: str, fails_at: int | None) -> None:
    with pytest.raises(RuntimeError, match="stop") if fails_at else nullcontext():
        fit(Failing(fails_at, {3: math.nan, 7: 100.0}), MAKERS[kind](tmp_path))
    assert HEALTHS[kind](tmp_path) == "non-finite gradients"


@every_logger
def test_of_a_run_that_is_fitted_on_the_last_verdict_counts(tmp_path: Path, kind: str) -> None:
    autoclip, logger = by_percentile(50, verbose=False), MAKERS[kind](tmp_path)
    run = trainer(autoclip, logger=logger)
    run.fit(Net(sgd), loader())
    first = HEALTHS[kind](tmp_path)
    run.fit_loop.max_epochs = 5
    run.fit(run.lightning_module, loader())
    assert first == "too few steps to tell"
    assert HEALTHS[kind](tmp_path) == autoclip.report().summary == "healthy"


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


# --- settings as hyperparameters --------------------------------------------------------------------------------------


class WithHparams(Net):
    """A module with hyperparameters of its own."""

    def __init__(self, **hparams: Any) -> None:
        super().__init__(sgd)
        self.save_hyperparameters(hparams or {"lr": 0.02, "model": {"width": 8}})


def hparams_file(directory: Path) -> dict[str, Any]:
    return yaml.safe_load((directory / "run" / "hparams.yaml").read_text())


@pytest.mark.parametrize("kind", ["csv", "tensorboard"])
@pytest.mark.parametrize("model", [WithHparams, Net], ids=["with hyperparameters", "without"])
def test_the_settings_stand_in_hparams_yaml_beside_the_users_own(tmp_path: Path, kind: str, model: type[Net]) -> None:
    loggers = [MAKERS[kind](tmp_path / name) for name in ("without", "with")]
    trainer(logger=loggers[0]).fit(model(), loader())
    trainer(callback := by_percentile(25, window=8), logger=loggers[1]).fit(model(), loader())
    users = hparams_file(tmp_path / "without") if (tmp_path / "without" / "run" / "hparams.yaml").exists() else {}
    assert hparams_file(tmp_path / "with") == {**users, "lightning_autoclip": callback.settings}
    assert users == ({"lr": 0.02, "model": {"width": 8}} if model is WithHparams else {})


def hparams_of_tensorboard(directory: Path) -> list[Any]:
    """What the dashboard for hyperparameters is made of."""
    (path,) = (directory / "run").glob("events*")
    values = [value for event in EventFileLoader(str(path)).Load() for value in event.summary.value]
    return [
        (value.tag, value.metadata.plugin_data.content)
        for value in values
        if value.metadata.plugin_data.plugin_name == "hparams" or value.tag == "hp_metric"
    ]


def test_the_users_hyperparameters_in_the_events_of_tensorboard_stay_as_they_are(tmp_path: Path) -> None:
    class LogsThemselves(WithHparams):
        def on_train_start(self) -> None:
            self.logger.log_hyperparams({"late": 1}, {"metric": 2.0})

    for model in (WithHparams, LogsThemselves):
        loggers = [MAKERS["tensorboard"](tmp_path / model.__name__ / name) for name in ("without", "with")]
        trainer(logger=loggers[0]).fit(model(), loader())
        trainer(by_percentile(), logger=loggers[1]).fit(model(), loader())
        without, ours = (hparams_of_tensorboard(tmp_path / model.__name__ / name) for name in ("without", "with"))
        assert [tag for tag, _ in ours] == [tag for tag, _ in without]
        assert [len(content) for _, content in ours] == [len(content) for _, content in without]
    events = EventAccumulator(str(tmp_path / "WithHparams" / "with" / "run")).Reload()
    (event,) = events.Tensors("autoclip/settings/text_summary")
    assert "| policy | {'name': 'Percentile', 'percentile': 50.0" in event.tensor_proto.string_val[0].decode()


def test_over_a_resume_in_the_same_folder_of_tensorboard_hyperparameters_stay_and_settings_are_the_last(
    tmp_path: Path,
) -> None:
    for percentile, model in ((10, WithHparams()), (20, Net(sgd))):  # the second one says nothing of its own
        callback = by_percentile(percentile, groups={"first": "net.0.*"})
        trainer(callback, logger=MAKERS["tensorboard"](tmp_path)).fit(model, loader())
        assert hparams_file(tmp_path) == {
            "lr": 0.02,
            "model": {"width": 8},
            "lightning_autoclip": callback.settings,
        }


def test_mlflow_has_the_settings_as_params_beside_the_users_own(tmp_path: Path) -> None:
    trainer(by_percentile(25, window=8), logger=MAKERS["mlflow"](tmp_path)).fit(WithHparams(), loader())
    (run,) = mlflow_runs(tmp_path)[1]
    users = {"lr": "0.02", "model/width": "8"}
    assert run.data.params.items() >= users.items()
    ours = {key: value for key, value in run.data.params.items() if key not in users}
    assert all(key.startswith("lightning_autoclip/") for key in ours)
    found = {key.removeprefix("lightning_autoclip/"): value for key, value in ours.items()}
    assert (found["policy/percentile"], found["window"], found["nonfinite"]) == ("25.0", "8", "skip")


def test_a_run_of_mlflow_that_is_resumed_with_other_settings_goes_on_with_a_word(tmp_path: Path) -> None:
    logger = MAKERS["mlflow"](tmp_path)
    trainer(by_percentile(25), logger=logger).fit(Net(sgd), loader())
    for percentile in (25, 30):
        resumed = MLFlowLogger("experiment", save_dir=str(tmp_path), run_id=logger.run_id)
        told = nullcontext() if percentile == 25 else pytest.warns(UserWarning, match="settings could not be logged to")
        with told:
            trainer(by_percentile(percentile), logger=resumed).fit(Net(sgd), loader())
    (run,) = mlflow_runs(tmp_path)[1]
    assert run.data.params["lightning_autoclip/policy/percentile"] == "25.0"
    assert run.info.status == "FINISHED"


@every_logger
@pytest.mark.parametrize("own", ["mine", {"policy": 1}, 0], ids=repr)
def test_a_hyperparameter_of_the_users_under_our_key_stays(tmp_path: Path, kind: str, own: Any) -> None:
    with pytest.warns(UserWarning, match="have a key `lightning_autoclip` of your own"):
        trainer(by_percentile(), logger=MAKERS[kind](tmp_path)).fit(WithHparams(lightning_autoclip=own), loader())
    if kind == "mlflow":
        params = mlflow_runs(tmp_path)[1][0].data.params
        assert params == (
            {"lightning_autoclip/policy": "1"} if own == {"policy": 1} else {"lightning_autoclip": str(own)}
        )
    else:
        assert hparams_file(tmp_path) == {"lightning_autoclip": own}


@every_logger
def test_numbers_of_numpy_and_objects_in_a_policy_are_written_so_that_they_can_be_read(
    tmp_path: Path, kind: str
) -> None:
    @dataclass(frozen=True)
    class Mine(Policy):
        rank: Any
        factor: Any
        parts: Any
        thing: Any

        def __call__(self, history: Any) -> Any:
            return 2 * history.mean()

    policy = Mine(np.int64(3), np.float32(0.5), (1, np.float64(2.0)), torch.zeros(1))
    trainer(GradientClipping(policy), logger=MAKERS[kind](tmp_path)).fit(Net(sgd), loader())
    if kind != "mlflow":
        found = hparams_file(tmp_path)["lightning_autoclip"]["policy"]
        assert found.items() >= {"rank": 3, "factor": 0.5, "parts": [1, 2], "thing": "tensor([0.])"}.items()


# --- Comet ------------------------------------------------------------------------------------------------------------


class CometExperiment:
    """Keeps what Lightning's logger and this library hand to Comet's client, which is not installed."""

    def __init__(self) -> None:
        self.metrics: list[tuple[int, str, float]] = []
        self.parameters: dict[str, Any] = {}
        self.tables: dict[str, list[list[Any]]] = {}
        self.others: dict[str, Any] = {}

    def __internal_api__log_metrics__(self, metrics: dict[str, Any], step: int, **kwargs: Any) -> None:
        self.metrics += [(step, key, value) for key, value in metrics.items()]

    def __internal_api__log_parameters__(self, parameters: dict[str, Any], **kwargs: Any) -> None:
        assert not self.parameters.keys() & parameters.keys()
        self.parameters |= parameters

    def log_table(self, filename: str, tabular_data: Any = None, headers: Any = False) -> None:
        self.tables[filename] = [headers, *tabular_data]

    def log_other(self, key: str, value: Any) -> None:
        self.others[key] = value

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


class Comet(CometLogger):
    """Lightning's logger, which asks for Comet's client in its constructor alone."""

    def __init__(self) -> None:
        Logger.__init__(self)
        self._experiment, self._prefix = CometExperiment(), None
        self._experiment_key = self._project_name = "key"
        self._comet_config = SimpleNamespace(offline_directory=".cometml-runs")
        self._online = False

    def finalize(self, status: str) -> None:
        """There is nothing to upload."""


def test_comet_gets_finite_rows_the_settings_and_the_table_of_spikes(tmp_path: Path) -> None:
    logger, model = Comet(), WithHparams()
    autoclip = by_percentile(50, window=8, warmup_steps=3, verbose=False)
    data = loader(scales=[math.nan if 20 <= row < 40 else 100.0 if 44 <= row < 48 else 1.0 for row in range(64)])
    trainer(autoclip, logger=logger, log_every_n_steps=5).fit(model, data)
    kept = logger.experiment
    ours = [(step, key, value) for step, key, value in kept.metrics if key.startswith("autoclip/")]
    assert all(math.isfinite(value) for _, _, value in ours)
    assert {step for step, _, _ in ours} == {4, 9, 14, 15}
    assert kept.parameters == {"lr": 0.02, "model": {"width": 8}, "lightning_autoclip": autoclip.settings}
    headers, *table = kept.tables["autoclip_spikes.csv"]
    assert headers == list(autoclip.spikes()[0])
    assert [row[1] for row in table] == [spike["step"] for spike in autoclip.spikes()]
    assert not any(
        (isinstance(cell, float) and not math.isfinite(cell)) or cell is None for row in table for cell in row
    )
    assert kept.others == {"autoclip/health": autoclip.report().summary}
    assert not [*Path().rglob("autoclip_*")]


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
    assert [*tmp_path.rglob("autoclip_health.txt")] == [directory / "autoclip_health.txt"]
    with found.open(newline="") as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == [spike["step"] for spike in autoclip.spikes()]


def test_a_logger_without_any_directory_gets_no_table_and_no_error(tmp_path: Path) -> None:
    fit(Noting(optimizer=sgd), WithoutDirectoryPerRun(None, "first"))
    assert not [*tmp_path.rglob("autoclip_*")]


def test_a_file_that_cannot_be_written_anew_stays_as_it_was(tmp_path):
    path = tmp_path / "hparams.yaml"
    replace_text(LocalFileSystem(), str(path), "lr: 0.1\n")
    with small_files(100), pytest.raises(OSError, match="File too large"):
        replace_text(LocalFileSystem(), str(path), "lr: 0.2\n" * 100)
    assert path.read_text() == "lr: 0.1\n"
    assert [*tmp_path.iterdir()] == [path]


def test_settings_of_several_lines_are_written_anew_and_not_once_more(tmp_path):
    @dataclass(frozen=True)
    class Mine(Policy):
        text: str

        def __call__(self, history: History) -> Any:
            return history.percentile(50)

    texts = []
    for _ in range(3):
        run = trainer(GradientClipping(Mine("one\n\ntwo"), verbose=False), logger=MAKERS["tensorboard"](tmp_path))
        run.fit(Net(), loader())
        texts.append((tmp_path / "run" / "hparams.yaml").read_text())
    assert texts[0] == texts[1] == texts[2]
    assert yaml.safe_load(texts[0])["lightning_autoclip"]["policy"]["text"] == "one\n\ntwo"
