"""What the CSV file's, TensorBoard's and MLflow's own readers find after a run: the same in each; and Comet's."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from helpers import Net, by_percentile, loader, read_csv, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CometLogger, CSVLogger, Logger, MLFlowLogger, TensorBoardLogger
from mlflow.tracking import MlflowClient
from models import Noting
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from torch import Tensor

from lightning_autoclip import AutoClip, GradientClipping, Policy

Series = dict[str, list[tuple[int, float]]]

MAKERS: dict[str, Callable[[Path], Logger]] = {
    "csv": lambda path: CSVLogger(path, name="", version="run"),
    "tensorboard": lambda path: TensorBoardLogger(path, name="", version="run"),
    "mlflow": lambda path: MLFlowLogger("experiment", save_dir=str(path)),
}


@pytest.fixture(autouse=True, scope="module")
def _mlflow_on_disk() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow 3 raises unless asked for it so
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        yield


def rows_of_csv(directory: Path) -> Series:
    series: Series = {}
    for row in read_csv(directory / "run" / "metrics.csv"):
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


FACTORS = {3: math.inf, **dict.fromkeys(range(5, 10), math.nan), 11: 100.0}
HPARAMS = {"lr": 0.02, "model": {"width": 8}}


class Model(Noting):
    """A module with hyperparameters of its own; may fail at a batch."""

    def __init__(
        self, factors: dict[int, float] | None = None, fails_at: int | None = None, hparams: Any = HPARAMS
    ) -> None:
        super().__init__(factors, sgd)
        self.fails_at = fails_at
        self.save_hyperparameters(hparams)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        if batch_idx == self.fails_at:
            raise RuntimeError("stop")
        return super().training_step(batch, batch_idx)


def fit(model: Net, loggers: Any, *callbacks: Any, ckpt: Any = None, **kwargs: Any) -> AutoClip:
    ours = {
        key: kwargs.pop(key) for key in ("gradient_clip_algorithm", "log_every_step", "log_layers") if key in kwargs
    }
    autoclip = by_percentile(50, window=8, multiplier=1.0, verbose=False, **ours)
    options = {"log_every_n_steps": 5, "enable_checkpointing": bool(callbacks), **kwargs}
    trainer(autoclip, *callbacks, logger=loggers, **options).fit(model, loader(), ckpt_path=ckpt)
    return autoclip


def of_all_loggers(directory: Path) -> list[Logger]:
    return [make(directory / kind) for kind, make in MAKERS.items()]


# --- the same in every logger -----------------------------------------------------------------------------------------


class Done(NamedTuple):
    """A run with all loggers, by norm; or one by value that an exception has ended before batch 13."""

    directory: Path
    norms: list[float]
    is_whole: bool


@pytest.fixture(scope="module", params=["whole", "interrupted"])
def done(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Done:
    directory, is_whole = tmp_path_factory.mktemp(request.param), request.param == "whole"
    model = Model(FACTORS, None if is_whole else 13)
    options = {"log_every_step": True, "log_layers": True, "gradient_clip_algorithm": "norm" if is_whole else "value"}
    with nullcontext() if is_whole else pytest.raises(RuntimeError, match="stop"):
        fit(model, of_all_loggers(directory), **options)
    return Done(directory, model.norms, is_whole)


def test_every_logger_has_the_same_rows_of_finite_numbers_at_the_steps_of_the_loss(done: Done) -> None:
    ends = (4, 14, 15) if done.is_whole else (4, 12)  # between them is one of nothing but non-finite steps
    found = {kind: read(done.directory / kind) for kind, read in READERS.items()}
    ours = {key for key in found["csv"] if key.startswith("autoclip")}
    assert len(ours) == 10 + 2 + 4 + (0 if done.is_whole else 2)  # figures, of single steps, of layers, by value
    for kind, series in found.items():
        assert {key for key in series if key.startswith("autoclip")} == ours, kind
        assert [step for step, _ in series["train_loss"]] == [4, 9, 14][: 3 if done.is_whole else 2]
        for key in ours:
            steps, values = zip(*series[key], strict=True)
            is_count = key == "autoclip/nonfinite_total"
            finite = tuple(step for step in range(len(done.norms)) if math.isfinite(done.norms[step]))
            assert steps == (finite if "/step/" in key else (4, 9, *ends[1:]) if is_count else ends), (kind, key)
            expected = [value for _, value in found["csv"][key]]
            exact = 1e-6 if kind == "tensorboard" else 0  # TensorBoard keeps float32
            assert values == pytest.approx(expected, rel=exact), (kind, key)
    assert dict(found["mlflow"]["autoclip/grad_norm"]) == pytest.approx(
        {end: done.norms[end] for end in ends}, rel=1e-5
    )
    assert [count for _, count in found["csv"]["autoclip/nonfinite_total"]] == [1, *[6] * len(ends)]


def test_every_logger_has_the_table_of_large_steps_with_nothing_where_a_number_is_not_finite(done: Done) -> None:
    norms = [norm for norm in done.norms if math.isfinite(norm)]
    for kind, table_of in TABLES.items():
        text = table_of(done.directory / kind)
        assert not {"nan", "inf"} & set(text.replace("\n", ",").split(","))
        written = [*csv.DictReader(io.StringIO(text))]
        assert [int(row["step"]) for row in written[:7]] == [3, *range(5, 10), 11]  # the non-finite ones, the largest
        assert [row["norm"] for row in written[:6]] == [""] * 6
        assert [float(row["norm"]) for row in written[6:]] == pytest.approx(sorted(norms, reverse=True), rel=1e-3)
        assert {row["skipped"] for row in written[:6]} == {"non-finite"}


def test_every_logger_has_the_diagnoses_of_the_report(done: Done) -> None:
    for kind, health_of in HEALTHS.items():
        assert health_of(done.directory / kind) == "non-finite gradients"


def test_every_logger_has_the_settings_beside_the_users_own_hyperparameters(done: Done) -> None:
    settings = {
        **{"policy": "Percentile", "percentile": 50.0, "multiplier": 1.0, "window": 8, "warmup_steps": 0},
        **{"gradient_clip_algorithm": "norm" if done.is_whole else "value", "nonfinite": "skip"},
        **dict.fromkeys(("max_threshold", "max_update_ratio", "skip_above", "groups")),
    }
    assert json.loads((done.directory / "csv" / "run" / "autoclip_settings.json").read_text()) == settings
    for kind in ("csv", "tensorboard"):  # which a module is loaded with
        assert hparams_file(done.directory / kind) == HPARAMS
    (run,) = mlflow_runs(done.directory / "mlflow")[1]
    ours = {f"lightning_autoclip/{key}": str(value) for key, value in settings.items()}
    assert run.data.params == {"lr": "0.02", "model/width": "8", **ours}
    assert run.info.status == ("FINISHED" if done.is_whole else "FAILED")


def hparams_file(directory: Path) -> dict[str, Any]:
    return yaml.safe_load((directory / "run" / "hparams.yaml").read_text())


def test_of_a_run_that_is_fitted_further_the_last_diagnosis_counts(tmp_path: Path) -> None:
    autoclip = by_percentile(50, verbose=False)
    run = trainer(autoclip, logger=of_all_loggers(tmp_path))
    for epochs, summary in ((1, "too few steps to tell"), (5, "no problems found in the gradient norms")):
        run.fit_loop.max_epochs = epochs
        run.fit(run.lightning_module if epochs > 1 else Net(sgd), loader())
        assert [of(tmp_path / kind) for kind, of in HEALTHS.items()] == [summary] * 3
    assert autoclip.report().summary == summary


def test_over_a_resume_in_the_same_run_each_row_is_there_once(tmp_path: Path) -> None:
    first, second = Noting({7: 100.0}, sgd), Noting({7: 100.0}, sgd)
    _, tensorboard, mlflow = of_all_loggers(tmp_path)  # a new CSVLogger deletes what is in its directory
    saving = ModelCheckpoint(tmp_path, "saved", every_n_train_steps=8)
    fit(first, [tensorboard, mlflow], saving, max_steps=8, log_every_step=True)
    resumed = MLFlowLogger("experiment", save_dir=str(tmp_path / "mlflow"), run_id=mlflow.run_id)
    options = {"log_every_step": True, "max_epochs": 2, "max_steps": 20}
    fit(
        second,
        [MAKERS["tensorboard"](tmp_path / "tensorboard"), resumed],
        saving,
        ckpt=saving.best_model_path,
        **options,
    )
    for kind in ("tensorboard", "mlflow"):
        series = READERS[kind](tmp_path / kind)
        steps, values = zip(*series["autoclip/step/grad_norm"], strict=True)
        assert steps == tuple(range(20))
        assert values == pytest.approx(first.norms + second.norms, rel=1e-5)
        assert [step for step, _ in series["autoclip/threshold"]] == [4, 7, 9, 14, 19]  # and at the end of the first
        assert [step for step, _ in series["train_loss"]] == [4, 9, 14, 19]


def test_each_run_of_an_mlflow_experiment_keeps_its_own_table_of_large_steps(tmp_path: Path) -> None:
    for worst in (3, 11):
        fit(Noting({worst: 100.0}, sgd), MAKERS["mlflow"](tmp_path))
    client, runs = mlflow_runs(tmp_path)
    texts = [Path(client.download_artifacts(run.info.run_id, "autoclip_spikes.csv")).read_text() for run in runs]
    assert [int(next(csv.DictReader(io.StringIO(text)))["step"]) for text in texts] == [3, 11]


class Rows(Logger):
    """Keeps the rows; may fail at one of them, once."""

    name, version = "rows", 0

    def __init__(self, fails_at: int | None = None) -> None:
        super().__init__()
        self.fails_at, self.rows = fails_at, list[tuple[int, dict[str, float]]]()

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if "autoclip/grad_norm" in metrics:
            if step == self.fails_at:
                self.fails_at = None
                raise OSError("no space left")
            self.rows.append((step, metrics))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """There are none."""


def test_where_a_logger_fails_the_others_get_the_row_once(tmp_path: Path) -> None:
    first, second, model = Rows(fails_at=9), Rows(), Noting(optimizer=sgd)
    with pytest.raises(OSError, match="no space left"):
        fit(model, [first, second])
    assert len(model.norms) == 10
    assert [[step for step, _ in logger.rows] for logger in (first, second)] == [[4], [4, 9]]
    assert second.rows[-1][1]["autoclip/grad_norm_mean"] == pytest.approx(np.mean(model.norms[5:]), rel=1e-5)


# --- settings as hyperparameters --------------------------------------------------------------------------------------


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
    class LogsThemselves(Model):
        def on_train_start(self) -> None:
            self.logger.log_hyperparams({"late": 1}, {"metric": 2.0})

    for model in (Model, LogsThemselves):
        loggers = [MAKERS["tensorboard"](tmp_path / model.__name__ / name) for name in ("without", "with")]
        trainer(logger=loggers[0]).fit(model(), loader())
        trainer(by_percentile(), logger=loggers[1]).fit(model(), loader())
        without, ours = (hparams_of_tensorboard(tmp_path / model.__name__ / name) for name in ("without", "with"))
        assert [tag for tag, _ in ours] == [tag for tag, _ in without]
        assert [len(content) for _, content in ours] == [len(content) for _, content in without]
    events = EventAccumulator(str(tmp_path / "Model" / "with" / "run")).Reload()
    (event,) = events.Tensors("autoclip/settings/text_summary")
    assert "| percentile | 50.0 |" in event.tensor_proto.string_val[0].decode()


def test_a_run_of_mlflow_that_is_resumed_with_other_settings_continues_with_a_warning(tmp_path: Path) -> None:
    logger = MAKERS["mlflow"](tmp_path)
    trainer(by_percentile(25), logger=logger).fit(Net(sgd), loader())
    for percentile in (25, 30):
        resumed = MLFlowLogger("experiment", save_dir=str(tmp_path), run_id=logger.run_id)
        with nullcontext() if percentile == 25 else pytest.warns(UserWarning, match="settings could not be logged to"):
            trainer(by_percentile(percentile), logger=resumed).fit(Net(sgd), loader())
    (run,) = mlflow_runs(tmp_path)[1]
    assert run.data.params["lightning_autoclip/percentile"] == "25.0"
    assert run.info.status == "FINISHED"


@pytest.mark.parametrize("own", [{"policy": 1}, 0], ids=repr)
def test_a_hyperparameter_of_the_users_under_our_key_stays(tmp_path: Path, own: Any) -> None:
    with pytest.warns(UserWarning, match="settings could not be logged to `MLFlowLogger`.* of your own"):
        fit(Model(hparams={"lightning_autoclip": own}), of_all_loggers(tmp_path))
    for kind in ("csv", "tensorboard"):
        assert hparams_file(tmp_path / kind) == {"lightning_autoclip": own}
    params = mlflow_runs(tmp_path / "mlflow")[1][0].data.params
    assert params == ({"lightning_autoclip": "0"} if own == 0 else {"lightning_autoclip/policy": "1"})


@dataclass(frozen=True)
class Mine(Policy):
    rank: Any
    factor: Any
    parts: Any
    thing: Any
    text: str

    def __call__(self, history: Any) -> Any:
        return 2 * history.mean()


def test_numbers_of_numpy_and_objects_in_a_policy_are_written_so_that_they_can_be_read(tmp_path: Path) -> None:
    policy = Mine(np.int64(3), np.float32(0.5), (1, np.float64(2.0)), torch.zeros(1), "one\n\ntwo")
    trainer(GradientClipping(policy), logger=of_all_loggers(tmp_path)).fit(Net(sgd), loader())
    found = json.loads((tmp_path / "csv" / "run" / "autoclip_settings.json").read_text())
    expected = {"rank": 3, "factor": 0.5, "parts": [1, 2], "thing": "tensor([0.])", "text": "one\n\ntwo"}
    assert found.items() >= expected.items()


def test_a_module_with_any_arguments_loads_with_the_file_of_its_hyperparameters(tmp_path: Path) -> None:
    class AnyArguments(Net):
        def __init__(self, **kwargs: Any) -> None:
            assert kwargs.keys() <= {"lr"}, kwargs
            super().__init__(sgd)
            self.save_hyperparameters()

    for kind in ("csv", "tensorboard"):
        run = trainer(by_percentile(), logger=MAKERS[kind](tmp_path / kind))
        run.fit(AnyArguments(lr=0.1), loader())
        run.save_checkpoint(tmp_path / "a.ckpt")
        file = tmp_path / kind / "run" / "hparams.yaml"
        assert AnyArguments.load_from_checkpoint(tmp_path / "a.ckpt", hparams_file=str(file)).hparams == {"lr": 0.1}


# --- Comet, and others ------------------------------------------------------------------------------------------------


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
    logger, model = Comet(), Model()
    autoclip = by_percentile(50, window=8, warmup_steps=3, verbose=False)
    data = loader(scales=[math.nan if 20 <= row < 40 else 100.0 if 44 <= row < 48 else 1.0 for row in range(64)])
    trainer(autoclip, logger=logger, log_every_n_steps=5).fit(model, data)
    kept = logger.experiment
    ours = [(step, key, value) for step, key, value in kept.metrics if key.startswith("autoclip/")]
    assert all(math.isfinite(value) for _, _, value in ours)
    assert {step for step, _, _ in ours} == {4, 9, 14, 15}
    settings = kept.parameters.pop("lightning_autoclip")
    assert (settings["policy"], settings["percentile"], settings["window"]) == ("Percentile", 50.0, 8)
    assert kept.parameters == HPARAMS
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


@pytest.mark.parametrize("version", ["first", 0], ids=repr)
def test_beside_a_logger_without_a_directory_per_run_the_files_are_with_the_runs_checkpoints(
    tmp_path: Path, version: Any
) -> None:
    saving = ModelCheckpoint(every_n_epochs=1)
    autoclip = fit(Noting({7: 100.0}, sgd), WithoutDirectoryPerRun(tmp_path, version), saving)
    directory = Path(saving.dirpath).parent
    assert directory.parent == tmp_path / "project"
    files = ("autoclip_spikes.csv", "autoclip_health.txt", "autoclip_settings.json")
    assert {*tmp_path.rglob("autoclip_*")} == {directory / name for name in files}
    steps = [int(row["step"]) for row in read_csv(directory / "autoclip_spikes.csv")]
    assert steps == [spike["step"] for spike in autoclip.spikes()]


def test_a_logger_without_any_directory_gets_no_table_and_no_error(tmp_path: Path) -> None:
    fit(Noting(optimizer=sgd), WithoutDirectoryPerRun(None, "first"))
    assert not [*tmp_path.rglob("autoclip_*")]
