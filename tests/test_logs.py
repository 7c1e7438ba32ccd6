"""The files of loggers, read back after training: CSV files, TensorBoard's folders, W&B's directories."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from chaos.faults import small_files
from fsspec.implementations.local import LocalFileSystem
from helpers import Net, by_percentile, loader, trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from models import Manual, Noting, OptimizerPerLayer
from processes import ROOT, TIME_LIMIT
from torch import Tensor
from torch.optim import SGD, Adam
from wandb_reader import finish

from lightning_autoclip import AutoClip, GradientClipping, History, Policy
from lightning_autoclip.__main__ import main
from lightning_autoclip.monitoring.runs import RecordedRun, read_run
from lightning_autoclip.monitoring.texts import replace_text

pytestmark = pytest.mark.usefixtures("wandb_offline")
MAKERS: dict[str, Callable[[Path], Logger]] = {
    "csv": lambda path: CSVLogger(path, name="", version="run"),
    "tensorboard": lambda path: TensorBoardLogger(path, name="", version="run"),
    "wandb": lambda path: WandbLogger(save_dir=path, project="test", id="run"),
}
every_logger = pytest.mark.parametrize("kind", MAKERS)
both_files = pytest.mark.parametrize("kind", ["csv", "tensorboard"])


def slowly(parameters: Any) -> SGD:
    return SGD(parameters, lr=0.01)


def read(path: Path, kind: str) -> RecordedRun:
    """The run that a logger has written below a directory."""
    finish(path)
    return read_run(path / ("wandb/latest-run" if kind == "wandb" else "run"))


def figures(run: Any) -> dict[str, Any]:
    (section,) = run.report().sections
    return {key: value for key, value in vars(section.figures).items() if key != "modules"}


# --- TensorBoard ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "trial"])
@pytest.mark.parametrize(
    "options", [{"log_every_step": True}, {"gradient_clip_algorithm": "value"}, {"warmup_steps": 30}]
)
def test_a_folder_of_tensorboard_is_read_as_the_csv_file_of_the_same_run(
    tmp_path: Path, options: dict[str, Any], prefix: str
) -> None:
    loggers = [CSVLogger(tmp_path, "", "csv", prefix=prefix), TensorBoardLogger(tmp_path, "", "tb", prefix=prefix)]
    model = Noting({5: math.nan, 41: 1000.0}, slowly)
    trainer(by_percentile(50, **options), logger=loggers, log_every_n_steps=4).fit(model, loader(n=240))
    csv, tensorboard = read_run(tmp_path / "csv"), read_run(tmp_path / "tb")
    assert tensorboard.source == "TensorBoard run tb"
    assert figures(tensorboard) == pytest.approx(figures(csv), rel=1e-5, nan_ok=True)
    for prefix_of_keys, norms in csv.norms.items():
        assert tensorboard.norms[prefix_of_keys] == pytest.approx(norms, rel=1e-6)
    assert tensorboard.settings == csv.settings
    assert [verdict.name for verdict in tensorboard.report().verdicts] == [v.name for v in csv.report().verdicts]


def test_the_file_of_events_will_do_as_its_folder_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(by_percentile(verbose=False), logger=MAKERS["tensorboard"](tmp_path)).fit(Net(), loader())
    (events,) = (tmp_path / "run").glob("events*")
    outputs = []
    for path in (events, events.parent):
        assert main(["report", str(path)]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    assert "autoclip: 16 steps" in outputs[0]


def test_suggest_reads_a_folder_of_tensorboard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger, model = MAKERS["tensorboard"](tmp_path), Noting(optimizer=slowly)
    trainer(by_percentile(100, log_every_step=True), logger=logger).fit(model, loader(n=240))
    capsys.readouterr()
    assert main(["suggest", str(tmp_path / "run")]) == 0
    thresholds = [np.percentile(model.norms[: i + 1], 90) for i in range(60)]
    (row,) = (line.split() for line in capsys.readouterr().out.splitlines() if line.split()[:2] == ["90", "100"])
    assert row[2] == f"{np.mean(model.norms > np.array(thresholds)):.1%}"


def test_of_several_optimizers_and_several_steps_in_a_batch_tensorboard_has_all(tmp_path: Path) -> None:
    class Twice(Manual):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            super().training_step(batch, batch_idx)
            super().training_step(batch, batch_idx)

    trainer(by_percentile(log_every_step=True), logger=MAKERS["tensorboard"](tmp_path / "1")).fit(Twice(), loader())
    assert len(read_run(tmp_path / "1" / "run").norms["autoclip/"]) == 32
    model = OptimizerPerLayer(slowly, lambda parameters: Adam(parameters, lr=0.01))
    trainer(by_percentile(log_every_step=True), logger=MAKERS["tensorboard"](tmp_path / "2")).fit(model, loader())
    norms = read_run(tmp_path / "2" / "run").norms
    assert norms["autoclip/SGD/"] == pytest.approx(model.norms[0], rel=1e-5)
    assert norms["autoclip/Adam/"] == pytest.approx(model.norms[1], rel=1e-5)


def test_the_files_of_a_tensorboard_run_are_read_in_the_order_in_which_they_were_written(tmp_path: Path) -> None:
    fit(Noting(optimizer=slowly), tmp_path, "tensorboard", max_steps=33)
    callback = fit(Noting(optimizer=slowly), tmp_path, "tensorboard", tmp_path / "saved.ckpt")
    files = sorted((tmp_path / "run").glob("events*"), key=lambda file: file.stat().st_ctime_ns)
    for file, number in zip(files, (9, 10), strict=True):
        file.rename(file.with_name(f"events.out.tfevents.1700000000.host.7.{number}"))
    assert len(read_run(tmp_path / "run").norms["autoclip/"]) == callback.clippers[0].steps


@pytest.mark.parametrize("cut", [0, 10, 100, -7])
def test_events_that_are_still_being_written_are_read_as_far_as_they_go(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], cut: int
) -> None:
    trainer(by_percentile(verbose=False), logger=MAKERS["tensorboard"](tmp_path), log_every_n_steps=2).fit(
        Net(), loader()
    )
    (events,) = (tmp_path / "run").glob("events*")
    events.write_bytes(events.read_bytes()[:cut])
    assert main(["report", str(tmp_path / "run")]) == (0 if cut == -7 else 1)
    if cut != -7:
        assert "on disk yet" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"no events" * 100, bytes(range(256)) * 8])
def test_events_that_are_none_are_one_clear_line(content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    Path("events.out.tfevents.1").write_bytes(content)
    assert main(["report", "."]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "damaged" in line or "has no rows" in line


# --- settings ---------------------------------------------------------------------------------------------------------


@every_logger
@pytest.mark.parametrize("percentile", [25, 90])
def test_the_report_of_rows_knows_the_percentile(tmp_path: Path, kind: str, percentile: int) -> None:
    callback = by_percentile(percentile, warmup_steps=10, verbose=False)
    trainer(callback, logger=MAKERS[kind](tmp_path), log_every_n_steps=5).fit(Net(), loader(n=240))
    found, expected = figures(read(tmp_path, kind)), callback.report().sections[0].figures
    assert found["expected_fraction"] == pytest.approx(expected.expected_fraction)
    assert not math.isnan(expected.expected_fraction)


HOSTILE = [
    "",
    "{}",
    "[1, 2]",
    "lightning_autoclip: 7",
    "lightning_autoclip: {policy: mine}",
    "x: !!int ''",
    "x: !!bool maybe",
    "x: !!timestamp foo",
    "lightning_autoclip: {policy: {}, gradient_clip_algorithm: norm, max_threshold: 1, warmup_steps: 1"
    + "0" * 400
    + "}",
    "lightning_autoclip: {policy: {name: Percentile, percentile: 5, multiplier: [1]}, gradient_clip_algorithm: norm,"
    " max_threshold: 0, warmup_steps: 1}",
    "lightning_autoclip: {policy: {}, gradient_clip_algorithm: norm, max_threshold: null, warmup_steps: many}",
    "lightning_autoclip: {policy: {percentile: [1]}, gradient_clip_algorithm: norm, max_threshold: 0, warmup_steps: 1}",
    "a: [",
    "\x00\x01",
    "[" * 5000,
    "a: &a [1]\nb: *c",
    "? [1, 2]\n: 3",
    "? {1: 2}\n: 3",
]


@both_files
@pytest.mark.parametrize("text", HOSTILE, ids=repr)
def test_of_hyperparameters_without_settings_no_share_is_expected(tmp_path: Path, kind: str, text: str) -> None:
    trainer(by_percentile(verbose=False), logger=MAKERS[kind](tmp_path)).fit(Net(), loader())
    (tmp_path / "run" / "hparams.yaml").write_text(text)
    assert math.isnan(figures(read_run(tmp_path / "run"))["expected_fraction"])


@both_files
def test_of_objects_among_the_hyperparameters_nothing_is_made(tmp_path: Path, kind: str) -> None:
    trainer(by_percentile(50, verbose=False), logger=MAKERS[kind](tmp_path)).fit(Net(), loader())
    path = tmp_path / "run" / "hparams.yaml"
    path.write_text(f"bad: !!python/object/apply:os.mkdir [made]\nother: !mine {{a: 1}}\n{path.read_text()}")
    assert figures(read_run(tmp_path / "run"))["expected_fraction"] == 0.5
    assert not Path("made").exists()


# --- runs in several parts --------------------------------------------------------------------------------------------


class Killed(Noting):
    """Its process dies at a step, as of SIGKILL."""

    def __init__(self, at: int) -> None:
        super().__init__(optimizer=slowly)
        self.at = at

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        if self.trainer.global_step == self.at:
            for logger in self.trainer.loggers:
                logger.save()
            os._exit(9)
        return super().training_step(batch, batch_idx)


def fit(
    model: Net, path: Path, kind: str, ckpt: Path | None = None, percentile: float = 50, **options: Any
) -> AutoClip:
    callback = by_percentile(percentile, log_every_step=True, verbose=False)
    options = {"log_every_n_steps": 10, "enable_checkpointing": True, "max_epochs": 2, **options}
    saving = ModelCheckpoint(path, "saved", every_n_train_steps=33)
    trainer(callback, saving, logger=MAKERS[kind](path), **options).fit(model, loader(n=240), ckpt_path=ckpt)
    return callback


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
@pytest.mark.parametrize("given", ["first", "last", "together"])
def test_the_parts_of_a_run_that_was_resumed_are_joined_by_step(tmp_path: Path, kind: str, given: str) -> None:
    first, second = Noting(optimizer=slowly), Noting(optimizer=slowly)
    fit(first, tmp_path, kind, max_steps=33)
    finish(tmp_path)
    callback = fit(second, tmp_path, kind, tmp_path / "saved.ckpt")
    finish(tmp_path)
    path = tmp_path / "run"
    if kind == "wandb":
        parts = sorted(each for each in (tmp_path / "wandb").glob("offline-run-*"))
        assert len(parts) == 2
        path = {"first": parts[0], "last": parts[1], "together": tmp_path / "wandb"}[given]
    run = read_run(path)
    assert run.norms["autoclip/"] == pytest.approx(first.norms + second.norms, rel=1e-5)
    found, exact = figures(run), vars(callback.report().sections[0].figures)
    assert found["steps"] == exact["steps"]
    for key in ("clipped_fraction", "clip_coef_mean", "norm_max", "threshold", "expected_fraction"):
        assert found[key] == pytest.approx(exact[key], rel=1e-4), key


def test_steps_that_were_made_once_more_after_a_crash_count_once(tmp_path: Path) -> None:
    process = get_context("fork").Process(target=fit, args=(Killed(47), tmp_path, "tensorboard"))
    process.start()
    process.join(TIME_LIMIT)
    assert process.exitcode == 9
    second = Noting(optimizer=slowly)
    callback = fit(second, tmp_path, "tensorboard", tmp_path / "saved.ckpt")
    assert len([*(tmp_path / "run").glob("events*")]) == 2
    run = read_run(tmp_path / "run")
    assert len(run.norms["autoclip/"]) == figures(run)["steps"] == callback.clippers[0].steps
    assert run.norms["autoclip/"][33:] == pytest.approx(second.norms, rel=1e-5)


@every_logger
def test_of_parts_with_different_percentiles_no_share_is_expected(tmp_path: Path, kind: str) -> None:
    fit(Noting(optimizer=slowly), tmp_path, kind, max_steps=33)
    finish(tmp_path)
    with pytest.warns(UserWarning, match="goes on with"):
        fit(Noting(optimizer=slowly), tmp_path, kind, tmp_path / "saved.ckpt", percentile=90)
    assert math.isnan(figures(read(tmp_path, kind))["expected_fraction"])


def test_a_folder_of_several_runs_is_refused_with_their_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two"):
        logger = WandbLogger(save_dir=tmp_path, project="test", id=name)
        trainer(by_percentile(verbose=False), logger=logger).fit(Net(), loader())
        finish(tmp_path)
    assert main(["report", str(tmp_path / "wandb")]) == 1
    assert "to hold one W&B run, but it has one, two" in capsys.readouterr().err


# --- runs that go on --------------------------------------------------------------------------------------------------


def test_of_a_wandb_run_that_goes_on_the_report_says_that_nothing_is_on_disk_yet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Look(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == 1:  # before the first row, for W&B writes when it likes
                capsys.readouterr()
                assert main(["report", str(Path(trainer.logger.experiment.dir).parent)]) == 1
                assert main(["suggest", str(Path(trainer.logger.experiment.dir).parent)]) == 1
                said.extend(capsys.readouterr().err.strip().splitlines())

    said: list[str] = []
    trainer(by_percentile(), Look(), logger=MAKERS["wandb"](tmp_path), log_every_n_steps=2).fit(Net(), loader())
    assert len(said) == 2
    assert all("on disk yet: the run goes on, or was killed" in line for line in said)


@both_files
def test_of_a_file_before_its_first_row_the_report_says_that_nothing_is_on_disk_yet(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    class Look(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 3:
                trainer.logger.log_metrics({"other": 1.0}, step=0)
                trainer.logger.save()
                assert main(["report", str(tmp_path / "run")]) == 1
                assert "on disk yet" in capsys.readouterr().err

    trainer(by_percentile(verbose=False), Look(), logger=MAKERS[kind](tmp_path)).fit(Net(), loader())


def test_a_run_without_the_callback_is_not_said_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind in MAKERS:
        trainer(logger=MAKERS[kind](tmp_path), log_every_n_steps=2).fit(Net(), loader())
        finish(tmp_path)
        assert main(["report", str(tmp_path / ("wandb/latest-run" if kind == "wandb" else "run"))]) == 1
        assert "has no rows of `AutoClip` or `GradientClipping` (keys" in capsys.readouterr().err
        for file in tmp_path.glob("run/*"):
            file.unlink()


@pytest.mark.parametrize("command", ["suggest", "report"])
def test_who_reads_no_further_ends_the_program_quietly(tmp_path: Path, command: str) -> None:
    run = trainer(by_percentile(log_every_step=True, verbose=False), logger=MAKERS["csv"](tmp_path))
    run.fit(Net(), loader(n=240))
    program = subprocess.Popen(
        [sys.executable, "-m", "lightning_autoclip", command, tmp_path / "run"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    program.stdout.close()  # before it writes
    error = program.stderr.read().decode()
    assert program.wait(TIME_LIMIT) == 0
    assert "Traceback" not in error
    assert "BrokenPipe" not in error


def test_a_file_that_cannot_be_written_anew_stays_as_it_was(tmp_path):
    path = tmp_path / "hparams.yaml"
    replace_text(LocalFileSystem(), str(path), "lr: 0.1\n")
    with small_files(100), pytest.raises(OSError, match="File too large"):
        replace_text(LocalFileSystem(), str(path), "lr: 0.2\n" * 100)
    assert path.read_text() == "lr: 0.1\n"
    assert [*tmp_path.iterdir()] == [path]


# --- rows -------------------------------------------------------------------------------------------------------------


class Masked(Net):
    """Some batches are masked: their gradient is exactly zero."""

    def __init__(self, is_masked: Callable[[int], bool]) -> None:
        super().__init__(slowly)
        self.is_masked = is_masked

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * (not self.is_masked(batch_idx))


@pytest.mark.parametrize("kind", ["csv", "tensorboard"])
@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("every", [1, 4], ids=["every second", "the last of every second row"])
def test_rows_of_gradients_that_are_zero_tell_what_the_checkpoint_tells(tmp_path, kind, algorithm, every):
    run = trainer(
        AutoClip(25, max_update_ratio=None, gradient_clip_algorithm=algorithm, verbose=False),
        logger=MAKERS[kind](tmp_path),
        log_every_n_steps=every,
        max_epochs=3,
    )
    model = Masked(lambda i: i % 2 == 1 if every == 1 else i % 8 == 7)
    run.fit(model, loader())
    run.save_checkpoint(tmp_path / "last.ckpt")
    of_rows, of_steps = (read_run(tmp_path / name).report().sections[0].figures for name in ("run", "last.ckpt"))
    if algorithm == "norm":
        assert of_rows.clipped_fraction == pytest.approx(of_steps.clipped_fraction)
        assert of_rows.clip_coef_mean == pytest.approx(of_steps.clip_coef_mean)
    assert of_rows.norm_first == pytest.approx(of_steps.norm_first, rel=0.5)
    assert (of_rows.steps, of_rows.nonfinite) == (of_steps.steps, of_steps.nonfinite) == (48, 0)


@pytest.mark.parametrize("kind", ["csv", "tensorboard"])
@pytest.mark.parametrize(
    "key", ["val/no_autoclip_elbo", "compare_autoclip/val_loss", "autoclip_p50-train/log_likelihood"]
)
def test_metrics_of_the_users_own_are_none_of_ours(tmp_path, kind, key):
    class Logging(Net):
        def on_train_batch_end(self, *args: Any) -> None:
            self.logger.log_metrics({key: -3.0}, step=self.trainer.global_step)

    run = trainer(by_percentile(50, verbose=False), logger=MAKERS[kind](tmp_path), log_every_n_steps=4)
    run.fit(Logging(slowly), loader())
    assert read(tmp_path, kind).report().sections[0].figures.steps == 16


def test_what_cannot_be_read_is_one_line(tmp_path, capsys):
    for path in (Path("x" * 300), Path("x" * 300) / "metrics.csv"):
        assert main(["report", str(path)]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert "that can be read" in line


def test_a_run_without_a_step_that_counts_says_so_to_who_asks_for_advice(tmp_path, capsys):
    run = trainer(by_percentile(log_every_step=True, verbose=False), logger=MAKERS["csv"](tmp_path))
    run.fit(Masked(lambda i: True), loader())
    assert main(["suggest", str(tmp_path / "run")]) == 1
    assert "no step with a finite norm above 0" in capsys.readouterr().err


def test_settings_of_several_lines_are_written_anew_and_not_once_more(tmp_path):
    @dataclass(frozen=True)
    class Mine(Policy):
        text: str

        def __call__(self, history: History) -> Any:
            return history.percentile(50)

    texts = []
    for _ in range(3):
        run = trainer(GradientClipping(Mine("one\n\ntwo"), verbose=False), logger=MAKERS["tensorboard"](tmp_path))
        run.fit(Net(slowly), loader())
        texts.append((tmp_path / "run" / "hparams.yaml").read_text())
    assert texts[0] == texts[1] == texts[2]
    assert yaml.safe_load(texts[0])["lightning_autoclip"]["policy"]["text"] == "one\n\ntwo"
