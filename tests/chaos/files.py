"""Logs and checkpoints of runs, damaged at random places: a report or one clear line, never an exception."""

from __future__ import annotations

import io
import math
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from random import Random
from typing import Any

from chaos import kills
from helpers import Net, loader, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_autoclip import AutoClip
from lightning_autoclip.__main__ import main

KINDS = {"csv": "metrics.csv", "tensorboard": "events.*", "checkpoint": "*.ckpt", "wandb": "*.wandb"}
NUMBERS = (0, -1, 2**31, 2**62, -(2**63), 1e-45, 3.4e38, 1e308, -1.0, math.inf, -math.inf, math.nan)
TEXTS = ("", "\x1b[31m", "=1+1", "autoclip/", "a\nb", "-", "\x00", "\ud7ff", "1_0", "9" * 5000, '"', "|" * 200)


def damaged(data: bytes, random: Random) -> bytes:
    """The bytes with something else at a random place: others, none, the same once more, or nothing from there on."""
    at, length = random.randrange(len(data) + 1), random.choice([1, 1, 4, 30, 3000])
    kinds = {
        "flipped": bytes(byte ^ 1 << random.randrange(8) for byte in data[at : at + length]),
        "random": random.randbytes(length),
        "gone": b"",
        "twice": 2 * data[at : at + length],
        "zeros": bytes(length),
        "text": random.choice(TEXTS).encode(),
        "number": str(random.choice(NUMBERS)).encode(),
        "another place": data[(other := random.randrange(len(data) + 1)) : other + length],
    }
    kind = random.choice([*kinds, "cut off", "written over"])
    if kind == "cut off":
        return data[:at]
    if kind == "written over":
        return random.randbytes(random.choice([0, 1, 7, 4000]))
    return data[:at] + kinds[kind] + data[at + length :]


def absurd_events(random: Random) -> bytes:
    """A file of TensorBoard's that is sound in form, with steps, names and numbers that no run has."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter

    keys = ("grad_norm", "grad_norm_mean", "grad_norm_max", "threshold", "clipped_fraction", "nonfinite_total", "steps")
    written = io.BytesIO()
    records = RecordWriter(written)
    for step in range(random.choice([1, 7, 40])):
        for key in random.sample(keys, random.randint(1, len(keys))):
            tag = f"autoclip/{random.choice(['', 'a/', *TEXTS])}{key}"
            number = float(random.choice([*NUMBERS, 1.0, step]))
            value = Summary.Value(tag=tag, simple_value=number)
            at = int(random.choice([step, step, step, *NUMBERS[:5]]))
            records.write(Event(wall_time=step, step=at, summary=Summary(value=[value])).SerializeToString())
    return written.getvalue()


def says_something(command: str, path: Path) -> bool:
    """Whether a command of ours has a report of a file, rather than one line that says why not."""
    said, refused = io.StringIO(), io.StringIO()
    with redirect_stdout(said), redirect_stderr(refused):
        code = main([command, str(path), *(["--plot", str(path.parent / "plot.png")] if command == "report" else [])])
    lines = refused.getvalue().splitlines()
    assert code == (0 if said.getvalue() else 1), (code, lines)
    assert code == 0 or len(lines) == 1, lines
    assert all(line.isprintable() for line in [*said.getvalue().splitlines(), *lines])
    return code == 0


def record(folder: Path, kind: str) -> list[Path]:
    """Train a run; the files that tell of it."""
    if kind == "wandb":
        kills.uninterrupted(kills.Plan({"log_every_step": True}, logger="wandb", steps=40), folder / "run")
        return [*(folder / "run").rglob("*.wandb")][:1]
    logger: Any = TensorBoardLogger if kind == "tensorboard" else CSVLogger
    saves = ModelCheckpoint(folder / "run", "last")
    callback = AutoClip(50, log_every_step=True, log_layers=True, verbose=False)
    run = trainer(callback, saves, logger=logger(folder, "", "run"), log_every_n_steps=4, enable_checkpointing=True)
    run.fit(Net(), loader(n=160))
    files = [*(folder / "run").glob(KINDS[kind])]
    return files if kind == "checkpoint" else [*files, folder / "run" / "hparams.yaml"]


def damaged_files(folder: Path, random: Random, kind: str = "csv", tries: int = 60) -> str:
    """Damage a run's files again and again, one at a time; how many of them had a report still."""
    files = record(folder, kind)
    sound, reports = {file: file.read_bytes() for file in files}, 0
    assert says_something("report", files[0])
    for _ in range(tries):
        file = random.choice(files)
        is_absurd = kind == "tensorboard" and file is files[0] and random.random() < 0.5
        file.write_bytes(absurd_events(random) if is_absurd else damaged(sound[file], random))
        try:
            reports += says_something(random.choice(["report", "report", "suggest"]), files[0])
        except BaseException:
            (folder / f"damaged-{file.name}").write_bytes(file.read_bytes())
            raise
        file.write_bytes(sound[file])
    return f"{tries} damaged files, {reports} reports"
