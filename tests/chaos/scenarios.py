"""All scenarios by name: what is tried with a folder and a source of random numbers, and says what it did.

`tests/test_chaos.py` tries some of them with fixed seeds, `tests/chaos/long.py` all of them for so many minutes.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from chaos import faults, files, kills, sharing

Scenario = Callable[[Path, Random], str]
CLIPS: list[dict[str, Any]] = [
    {},
    {"log_every_step": True, "log_layers": True},
    {"gradient_clip_algorithm": "value"},
    {"window": None, "skip_above": 6.0},
    {"groups": {"first": "net.0.*", "last": "net.2.*"}, "log_every_step": True},
    {"max_update_ratio": None, "warmup_steps": 25},
]


def killed(folder: Path, random: Random, kill_times: int = 6, **options: Any) -> str:
    """Kills of a run whose settings are drawn too."""
    plan = kills.Plan(random.choice(CLIPS), every=random.choice([1, 3, 4, 7]), keep=random.random() < 0.5, **options)
    return kills.kill_and_resume(folder, random, plan, kill_times)


def interrupted(folder: Path, random: Random, number: int = signal.SIGINT, times: int = 6) -> str:
    """Signals that a process may answer."""
    clip = {**random.choice(CLIPS[:4]), "window": None, "skip_above": None}
    plan = kills.Plan(clip, every=random.choice([3, 7, 100]), saves_on_exception=True)
    return kills.interrupt_and_resume(folder, random, plan, times, number)


SCENARIOS: dict[str, Scenario] = {
    "kill -9, CSV": killed,
    "kill -9, two ranks": partial(killed, ranks=2, kill_times=3),
    "kill -9, W&B offline": partial(killed, logger="wandb", kill_times=3),
    "Ctrl-C": interrupted,
    "SIGTERM": partial(interrupted, number=signal.SIGTERM, times=3),
    "files that cannot grow": faults.files_that_cannot_grow,
    "a disk that fills up": faults.a_disk_that_fills_up,
    "a disk that becomes read-only": faults.a_disk_that_becomes_read_only,
    "a folder below a file": faults.a_folder_below_a_file,
    "a logger that fails, beside another": faults.a_logger_that_fails,
    "a single logger that fails": faults.a_single_logger_that_fails,
    "damaged checkpoints": files.damaged_files,
    "one callback, two Trainers in turn": sharing.one_after_the_other,
    "copies in mid-fit": sharing.copied_in_mid_fit,
    "a fit in a thread": sharing.outside_the_main_thread,
}
