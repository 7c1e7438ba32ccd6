"""Disks that are full or read-only, and loggers that fail: the error is the user's own, and nothing is lost for it."""

from __future__ import annotations

import resource
import signal
import subprocess
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import torch
from chaos import kills
from helpers import trainer, weights
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import Logger
from torch.utils.data import DataLoader

from lightning_autoclip import AutoClip
from lightning_autoclip.checkpoint import STATE_KEY, read_run

CALLS = ("log_metrics", "log_hyperparams", "save", "finalize", "after_save_checkpoint", "log_graph")
STEPS = 30


# --- disks ------------------------------------------------------------------------------------------------------------


@contextmanager
def small_files(limit: int) -> Iterator[None]:
    """No file of this process grows beyond so many bytes."""
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[bool]:
    """A disk of its own at a folder; whether this user may have one."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    try:
        is_mounted = not subprocess.run(command, capture_output=True).returncode
    except OSError:
        is_mounted = False
    try:
        yield is_mounted
    finally:
        if is_mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


class At(Callback):
    """Does something when so many steps have been made."""

    def __init__(self, step: int, do: Any) -> None:
        self.step, self.do = step, do

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.step:
            self.do()


def fit(rows: Any, checkpoints: Path, *callbacks: Any, ckpt: Any = None, every: int = 3) -> tuple[Any, Any, Any]:
    """Train on a disk that may fail; the callback, the module, and what was raised."""
    model, callback = kills.ByIndex(STEPS, 1), AutoClip(30, window=7, log_every_step=True, verbose=False)
    saved = ModelCheckpoint(checkpoints, "{step}", every_n_train_steps=every, save_top_k=2, monitor="step", mode="max")
    run = trainer(callback, *callbacks, saved, logger=rows, log_every_n_steps=5, enable_checkpointing=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # or the tests would have an error of each
            run.fit(model, DataLoader(range(STEPS)), ckpt_path=ckpt)
    except Exception as error:
        return callback, model, error
    return callback, model, None


def assert_resumes(folder: Path, callback: Any, error: Any, number: str) -> str:
    """The error is that of the disk; the report and a checkpoint are there; the run resumes to the same end."""
    assert isinstance(error, OSError), repr(error)
    assert number in str(error), error
    steps = callback.clippers[0].steps if callback.clippers else 0
    assert f"{steps} steps" in str(callback.report()) or not steps
    assert sum(each.steps for log in callback.logs.values() for each in log.bins) == steps
    found = [(torch.load(path, weights_only=True)["global_step"], path) for path in complete(folder / "checkpoints")]
    step, path = max(found) if found else (0, None)
    whole, expected, _ = fit(CSVLogger(folder.parent / "whole"), folder.parent / "whole" / "checkpoints")
    resumed, model, failed = fit(CSVLogger(folder.parent / "on"), folder.parent / "on" / "checkpoints", ckpt=path)
    assert failed is None
    assert torch.equal(weights(model), weights(expected))
    kills.assert_same(resumed.state_dict(), whole.state_dict(), "the state of the resumed run")
    return f"{type(error).__name__} after {steps} steps, resumed at {step}"


def complete(folder: Path) -> list[Path]:
    found = []
    for path in folder.glob("*.ckpt"):
        try:
            torch.load(path, weights_only=True)
            found.append(path)
        except (RuntimeError, EOFError, OSError):
            continue
    return found


def files_that_cannot_grow(folder: Path, random: Random) -> str:
    """The rows no longer fit: the error comes through, the history stays in memory."""
    limit = random.randint(500, 6000)
    first = folder / "disk"
    rows, many = CSVLogger(first), folder / "disk" / "checkpoints"
    with small_files(10**7):
        callback, _, error = fit(rows, many, At(random.randint(6, 20), lambda: _limit(limit)))
    return assert_resumes(first, callback, error, "File too large")


def _limit(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def a_disk_that_fills_up(folder: Path, random: Random) -> str:
    """Rows, tables and checkpoints on a disk that is too small for them."""
    size = random.randint(16, 64)
    with small_disk(folder / "disk", f"{size}k") as is_mounted:
        if not is_mounted:
            return "not tried: this user may not mount"
        callback, _, error = fit(CSVLogger(folder / "disk"), folder / "disk" / "checkpoints")
        if error is None:
            return f"{size} KiB sufficed"
        return f"{size} KiB: " + assert_resumes(folder / "disk", callback, error, "No space left")


def a_disk_that_becomes_read_only(folder: Path, random: Random) -> str:
    """Nothing can be written from some step on."""
    with small_disk(folder / "disk", "8m") as is_mounted:
        if not is_mounted:
            return "not tried: this user may not mount"
        command = ["mount", "-o", "remount,ro", str(folder / "disk")]
        step = random.randint(1, STEPS - 1)
        freeze = At(step, lambda: subprocess.run(command, check=True))
        callback, _, error = fit(CSVLogger(folder / "disk"), folder / "disk" / "checkpoints", freeze)
        return f"read-only at step {step}: " + assert_resumes(folder / "disk", callback, error, "Read-only file system")


def a_folder_below_a_file(folder: Path, random: Random) -> str:
    """What cannot be a folder: Lightning's own error comes through, and a run that writes nothing trains."""
    (folder / "file").touch()
    run = trainer(callback := AutoClip(30), logger=False, default_root_dir=folder / "file" / "below")
    run.fit(kills.ByIndex(STEPS, 1), DataLoader(range(STEPS)))
    assert callback.clippers[0].steps == STEPS
    callback, _, error = fit(CSVLogger(folder / "file" / "below"), folder / "checkpoints")
    assert isinstance(error, OSError), error
    assert "Not a directory" in str(error) or "File exists" in str(error), error
    return type(error).__name__


# --- loggers ----------------------------------------------------------------------------------------------------------


class Failing(Logger):
    """Fails in one of its calls, from the so manyth on; else takes what it is given."""

    def __init__(self, call: str, at: int = 1) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.calls, self.call, self.at = 0, call, at
        for each in CALLS:
            setattr(self, each, self._of(each))

    name, version, save_dir = "failing", 0, None

    def _of(self, call: str) -> Any:
        def answer(*args: Any, **kwargs: Any) -> None:
            if call == self.call:
                self.calls += 1
                if self.calls >= self.at:
                    raise ConnectionError(f"{call} failed")
            elif call == "log_metrics":
                self.rows.append((kwargs["step"], args[0] if args else kwargs["metrics"]))

        return answer

    def log_metrics(self, *args: Any, **kwargs: Any) -> None: ...

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...


def a_logger_that_fails(folder: Path, random: Random) -> str:
    """In whichever call: its own error comes through, or a warning; the history is of the steps that were made."""
    said = []
    for call in CALLS:
        at, others = random.randint(1, 4), Failing("none")
        logger, last = Failing(call, at), OnExceptionCheckpoint(folder / call)
        callback, _, error = fit([logger, others], folder / call, last)
        assert error is None or str(error) == f"{call} failed", error
        steps = callback.clippers[0].steps if callback.clippers else 0
        assert error is not None or steps == STEPS, (call, steps)
        assert sum(each.steps for log in callback.logs.values() for each in log.bins) == steps
        assert f"{steps} steps" in str(callback.report()) or not steps
        if error is not None and steps:
            assert_nothing_is_lost(last.ckpt_path, others, call)
        said.append(f"{call}: {'continued' if error is None else f'raised after {steps} steps'}")
    return ", ".join(said)


def loaded(path: str) -> tuple[Any, Any]:
    """The clipper and the log of a checkpoint."""
    callback = AutoClip(30, window=7, log_every_step=True, verbose=False)
    callback.load_state_dict(torch.load(path, weights_only=True)["callbacks"][STATE_KEY])
    return callback.clippers[0], callback.logs["autoclip/"]


def waiting_steps(log: Any) -> range:
    """The steps that wait for their row."""
    first, last = log.span or (0, -1)
    return range(int(first), int(last) + 1)


def rows_of(logger: Failing, key: str) -> dict[int, dict[str, float]]:
    """By step the rows that have a key: of one step, all are equal."""
    rows: dict[int, dict[str, float]] = {}
    for step, row in logger.rows:
        if f"autoclip/{key}" in row:
            assert rows.setdefault(step, row) == row, (step, row)
    return rows


def assert_nothing_is_lost(path: str, other: Failing, call: str) -> None:
    """Every step up to the checkpoint is in a row that the other logger has taken, or waits for its row."""
    clipper, log = loaded(path)
    logged, waiting = max(rows_of(other, "nonfinite_total"), default=-1), waiting_steps(log)
    assert {*range(clipper.steps)} <= {*range(logged + 1), *waiting}, (call, logged, waiting)
    assert log.steps == clipper.steps
    assert read_run(Path(path)).report().sections


def a_single_logger_that_fails(folder: Path, random: Random) -> str:
    """A row that no logger has taken waits in the checkpoint, and the resumed run logs it."""
    at = random.choice([1, 2, 3, 4, 6, 7, 8, 9, 11, 12])  # the fifth and the tenth call are Lightning's own
    last, logger, whole = OnExceptionCheckpoint(folder), Failing("log_metrics", at), Failing("none")
    _, _, error = fit(logger, folder / "a", last, every=1000)
    assert str(error) == "log_metrics failed", error
    fit(whole, folder / "b", every=1000)
    fit(rest := Failing("none"), folder / "c", ckpt=last.ckpt_path, every=1000)
    waiting = waiting_steps(loaded(last.ckpt_path)[1])
    norms, of_steps = (
        {step: row["autoclip/step/grad_norm"] for step, row in rows_of(logger, "step/grad_norm").items()}
        for logger in (whole, rest)
    )
    assert len(waiting), "the steps of the row that the logger did not take"
    assert of_steps == {step: norm for step, norm in norms.items() if step in of_steps}
    first, row = next(iter(rows_of(rest, "grad_norm_max").items()))
    of_row = [norms[step] for step in range(waiting[0], first + 1) if step in norms]
    assert row["autoclip/grad_norm_max"] == max(of_row)
    assert abs(row["autoclip/grad_norm_mean"] - sum(of_row) / len(of_row)) < 1e-9 * max(of_row)
    return f"at call {at}: {len(waiting)} steps waited, and were logged by the resumed run"
