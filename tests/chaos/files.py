"""Checkpoints of runs, damaged at random places: a report or one clear line, never an exception."""

from __future__ import annotations

import io
import math
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from random import Random

from helpers import Net, loader, trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_autoclip import AutoClip
from lightning_autoclip.__main__ import main

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


def says_something(command: str, path: Path) -> bool:
    """Whether a command of ours has a report of a file, rather than one line that says why not."""
    said, errors = io.StringIO(), io.StringIO()
    with redirect_stdout(said), redirect_stderr(errors):
        code = main([command, str(path), *(["--plot", str(path.parent / "plot.png")] if command == "report" else [])])
    lines = errors.getvalue().splitlines()
    assert code == (0 if said.getvalue() else 1), (code, lines)
    assert code == 0 or len(lines) == 1, lines
    assert all(line.isprintable() for line in [*said.getvalue().splitlines(), *lines])
    return code == 0


def damaged_files(folder: Path, random: Random, tries: int = 60) -> str:
    """Damage a run's checkpoint again and again; how many of them had a report still."""
    saves = ModelCheckpoint(folder, "last")
    callback = AutoClip(50, log_every_step=True, log_layers=True, verbose=False)
    trainer(callback, saves, log_every_n_steps=4, enable_checkpointing=True).fit(Net(), loader(n=160))
    file, reports = folder / "last.ckpt", 0
    sound = file.read_bytes()
    assert says_something("report", file)
    for _ in range(tries):
        file.write_bytes(damaged(sound, random))
        reports += says_something(random.choice(["report", "report", "suggest"]), file)
    return f"{tries} damaged files, {reports} reports"
