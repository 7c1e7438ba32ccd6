"""Runs that are killed or interrupted at random moments, and resumed until they are done, as if nothing had been."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
from helpers import Net, dataset, read_rows, trainer, weights
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from processes import SERVER, TIME_LIMIT
from ranks import join_group
from torch.utils.data import DataLoader
from wandb_reader import read_runs, rows_on_disk

from lightning_autoclip import AutoClip
from lightning_autoclip.checkpoint import STATE_KEY

SCALES = (1, 3, float("nan"), 0.5, 40, 1, float("inf"), 2, 1, 8, 1, 1, 5)


@dataclass(frozen=True)
class Plan:
    """A run.

    Attributes:
        clip: Arguments of the callback.
        steps: How many optimizer steps it has.
        logger: ``"csv"`` or ``"wandb"``.
        ranks: How many processes train.
        every: Every how many steps a checkpoint is written.
        keep: Whether all checkpoints stay, or only the newest.
        saves_on_exception: Whether an interrupt leaves a checkpoint of its own.
    """

    clip: dict[str, Any] = field(default_factory=dict)
    steps: int = 60
    logger: str = "csv"
    ranks: int = 1
    every: int = 3
    keep: bool = True
    saves_on_exception: bool = False


class ByIndex(Net):
    """Takes its batches by their index, so that a resumed run sees those that an uninterrupted one would see."""

    def __init__(self, steps: int, ranks: int) -> None:
        super().__init__()
        self.rows, self.ranks = dataset(8 * steps), ranks

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        share = 8 // self.ranks
        first = 8 * batch_idx + share * self.global_rank
        return super().training_step(self.rows[first : first + share], batch_idx) * SCALES[batch_idx % len(SCALES)]


class Weights(Callback):
    """The weights after each step, of an uninterrupted run; says when training begins."""

    def __init__(self, begun: Path) -> None:
        self.begun, self.at, self.after = begun, 0.0, list[torch.Tensor]()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.begun.touch()
        self.at = time.monotonic()
        self.after.append(weights(pl_module).clone())

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.after.append(weights(pl_module).clone())


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """The complete checkpoints of a run with their steps, oldest first."""
    found = []
    for path in folder.glob("checkpoints/*.ckpt"):
        try:
            found.append((torch.load(path, weights_only=True)["global_step"], path))
        except (RuntimeError, EOFError, OSError):
            continue  # the process was killed while it wrote it
    return sorted(found)


def logger_of(plan: Plan, folder: Path, part: int) -> Any:
    if plan.logger == "csv":
        return CSVLogger(folder, name="rows", version=f"part-{part:03}")
    from lightning.pytorch.loggers import WandbLogger

    return WandbLogger(save_dir=folder, offline=True, id="chaos", version="chaos")


def train(plan: Plan, folder: Path, part: int, rank: int = 0) -> None:
    """Train in this process from the newest complete checkpoint to the end; what came of it is in a file."""
    torch.set_num_threads(1)
    os.environ |= {"TMPDIR": str(folder), "WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_CONSOLE": "off"}
    os.chdir(folder)
    found, options, strategy = checkpoints(folder), {}, "auto"
    if plan.ranks > 1:
        os.environ["LOCAL_RANK"] = str(rank)
        join_group(rank, folder / f"store-{part}")
        strategy, options = DDPStrategy(), {"devices": plan.ranks, "use_distributed_sampler": False}
    saved = ModelCheckpoint(
        folder / "checkpoints",
        "{step}",
        every_n_train_steps=plan.every,
        save_top_k=-1 if plan.keep else 1,
        save_last=True,
        save_on_exception=plan.saves_on_exception,
    )
    callback, model = AutoClip(30, **{"window": 7, "verbose": False, **plan.clip}), ByIndex(plan.steps, plan.ranks)
    run = trainer(
        callback,
        noted := Weights(folder / f"begun-{part}-{rank}"),
        saved,
        logger=logger_of(plan, folder, part),
        log_every_n_steps=5,
        enable_checkpointing=True,
        strategy=strategy,
        **options,
    )
    run.fit(model, DataLoader(range(plan.steps)), ckpt_path=found[-1][1] if found else None)
    result = {
        "seconds": time.monotonic() - noted.at,
        "weights": weights(model),
        "state": callback.state_dict(),
        "report": str(callback.report()),
        "spikes": str(callback.spikes()),
        "after": noted.after,
    }
    torch.save(result, folder / f"result-{rank}.tmp")
    if plan.logger == "wandb":
        import wandb

        wandb.finish()
    (folder / f"result-{rank}.tmp").rename(folder / f"result-{rank}.pt")


def _process(plan: Plan, folder: Path, part: int, rank: int) -> None:
    with (folder / f"log-{part}-{rank}.txt").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    train(plan, folder, part, rank)
    os._exit(0)  # gloo's threads may run into the interpreter's end


def start(plan: Plan, folder: Path, part: int) -> list[Any]:
    """Start the processes of a run, and wait until they train."""
    folder.mkdir(exist_ok=True)
    processes = [SERVER.Process(target=_process, args=(plan, folder, part, rank)) for rank in range(plan.ranks)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + TIME_LIMIT
    for rank, process in enumerate(processes):
        while not (folder / f"begun-{part}-{rank}").exists() and process.is_alive():
            assert time.monotonic() < deadline
            time.sleep(0.002)
    return processes


def finish(processes: list[Any], what: Any) -> None:
    for process in processes:
        process.join(TIME_LIMIT)
        process.kill()
        process.join()
    assert [process.exitcode for process in processes] == [0] * len(processes), what


def uninterrupted(plan: Plan, folder: Path) -> float:
    """Train in one go; how long that took."""
    finish(start(plan, folder, 0), folder)
    return torch.load(folder / "result-0.pt", weights_only=True)["seconds"]


def is_done(plan: Plan, folder: Path) -> bool:
    return all((folder / f"result-{rank}.pt").exists() for rank in range(plan.ranks))


def break_off(plan: Plan, folder: Path, part: int, delay: float, number: int, random: Random) -> bool:
    """Train, and send a signal after so many seconds, to one rank or all; whether it came before the end."""
    processes = start(plan, folder, part)
    time.sleep(delay)
    struck = random.sample(processes, random.randint(1, plan.ranks))
    for process in struck:
        time.sleep(random.random() * 0.02 if process is not struck[0] else 0.0)
        if process.is_alive():
            os.kill(process.pid, number)
    if len(struck) < len(processes):
        time.sleep(0.1)  # in which the rank that is left may get on
    for process in processes:
        if number == signal.SIGKILL or process not in struck:
            process.kill()
        process.join(TIME_LIMIT)
        assert not process.is_alive(), f"{folder} does not end after signal {number}"
    return not is_done(plan, folder)


def assert_same(first: Any, second: Any, where: str) -> None:
    """Two states are equal to the bit, NaNs included."""
    if isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype, where
        assert first.shape == second.shape, where
        assert torch.equal(first.nan_to_num(-7.0), second.nan_to_num(-7.0)), where
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key in first:
            assert_same(first[key], second[key], f"{where}.{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), where
        for at, (one, other) in enumerate(zip(first, second, strict=True)):
            assert_same(one, other, f"{where}[{at}]")
    else:
        assert first == second or str(first) == str(second) == "nan", (where, first, second)


def assert_same_end(plan: Plan, expected: Path, folder: Path) -> None:
    """Weights, history, log and report are those of the uninterrupted run, on every rank."""
    for rank in range(plan.ranks):
        first, second = (torch.load(each / f"result-{rank}.pt", weights_only=True) for each in (expected, folder))
        for key in ("weights", "state", "report", "spikes"):
            assert_same(first[key], second[key], f"{folder}, rank {rank}: {key}")


def parts_of_rows(folder: Path) -> list[list[dict[str, float]]]:
    files = sorted(folder.glob("rows/part-*/metrics.csv"))
    return [read_rows(file) for file in files]


def merged(parts: list[list[dict[str, float]]]) -> dict[float, dict[str, float]]:
    """The rows of several parts by their step: of one that several have, all are equal."""
    rows: dict[float, dict[str, float]] = {}
    for part in parts:
        for row in part:
            assert rows.setdefault(row["step"], row) == row, f"two rows of step {row['step']} differ"
    return rows


def assert_same_rows(plan: Plan, expected: Path, folder: Path) -> None:
    """The rows of the parts are those of the uninterrupted run: none is missing, none is another.

    A rank that outlives another one ends with an error, at which it logs what waited for its row: its last one.
    """
    whole, of_parts = merged(parts_of_rows(expected)), parts_of_rows(folder)
    for part in of_parts:
        if part and part[-1] != whole.get(part[-1]["step"]) and plan.ranks > 1:
            part.pop()
    parts = merged(of_parts)
    assert sorted(whole) == sorted(parts), f"{folder}: steps {sorted(set(whole) ^ set(parts))}"
    assert whole == parts, folder


def rows_of_wandb(folder: Path) -> list[dict[str, float]]:
    """The rows of a finished run: each part takes the place of the one before from its first step on."""
    files, rows = sorted(folder.glob("wandb/*run-*/*.wandb")), list[dict[str, float]]()
    read_runs(files[-1].parent)  # waits for the end of the last part; others were killed
    for file in files:
        part = [
            {"step": row["trainer/global_step"], **{key: row[key] for key in row if key.startswith("autoclip")}}
            for row in rows_on_disk(file)
            if any(key.endswith("/grad_norm_mean") for key in row)  # else it is a table
        ]
        rows = [*(row for row in rows if not part or row["step"] < part[0]["step"]), *part]
    return rows


def assert_rows_of_wandb(expected: Path, folder: Path, since: int) -> int:
    """The rows that are on disk are those of the uninterrupted run; how many are lost of those before the last resume.

    What the part that was not killed has logged, from its first step on, is all there.
    """
    whole, rows = (merged([rows_of_wandb(each)]) for each in (expected, folder))
    assert all(whole[step] == row for step, row in rows.items()), folder
    assert not {step for step in whole if step >= since} - rows.keys(), folder
    return len(whole) - len(rows)


def kill_and_resume(folder: Path, random: Random, plan: Plan, kills: int) -> str:
    """Kill a run so many times, each time at a random moment, and resume it from its newest complete checkpoint."""
    duration, struck, begun_at = uninterrupted(plan, folder / "whole"), 0, []
    for part in range(kills):
        left = 0.7 * (1 - (begun_at[-1] / plan.steps if begun_at else 0))
        if not break_off(plan, folder / "killed", part, random.random() * duration * left, signal.SIGKILL, random):
            break
        found, struck = checkpoints(folder / "killed"), struck + 1
        begun_at.append(found[-1][0] if found else 0)
    if not is_done(plan, folder / "killed"):
        finish(start(plan, folder / "killed", kills), folder)
    assert_same_end(plan, folder / "whole", folder / "killed")
    said = f"{struck} kills, resumed at {begun_at}"
    if plan.logger == "wandb":
        lost = assert_rows_of_wandb(folder / "whole", folder / "killed", begun_at[-1] if begun_at else 0)
        return f"{said}, {lost} rows of W&B lost"
    assert_same_rows(plan, folder / "whole", folder / "killed")
    return said


def interrupt_and_resume(folder: Path, random: Random, plan: Plan, times: int, number: int) -> str:
    """Interrupt or terminate a run; what it saves then has the weights and the history of the same step."""
    duration, struck, torn = uninterrupted(plan, folder / "whole"), 0, 0
    after = torch.load(folder / "whole" / "result-0.pt", weights_only=True)
    norms = norms_of(folder / "whole")
    for part in range(times):
        if not break_off(plan, folder / f"{part}", 0, random.random() * duration, number, random):
            continue
        struck += 1
        for _, path in checkpoints(folder / f"{part}"):
            saved = torch.load(path, weights_only=True)
            vector = saved_vector(saved)
            equal = [made for made, each in enumerate(after["after"]) if each.numpy().tobytes() == vector]
            if is_within_a_step(saved):  # the weights may have made all or a part of what nobody has counted yet
                torn += 1
                equal.append(saved["global_step"])
            assert_history_of(saved, equal, norms, path)
        if number == signal.SIGTERM:
            finish(start(plan, folder / f"{part}", 1), folder)
            assert_same_end(plan, folder / "whole", folder / f"{part}")
    return f"{struck} signals, {torn} within the optimizer's own step"


def norms_of(folder: Path) -> list[float]:
    state = torch.load(folder / "result-0.pt", weights_only=True)["state"]
    return state["groups"]["autoclip/"]["clipper"]["history"]["values"]


def saved_vector(saved: dict[str, Any]) -> bytes:
    return torch.cat([each.flatten() for each in saved["state_dict"].values()]).numpy().tobytes()


def is_within_a_step(saved: dict[str, Any]) -> bool:
    """Whether a checkpoint was written while Lightning was making a step, from its forward pass on."""
    made = saved["loops"]["fit_loop"]["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["total"]
    return bool(made["ready"] != made["completed"])


def assert_history_of(saved: dict[str, Any], steps: list[int], norms: list[float], path: Path) -> None:
    """The history is of one of so many steps (those that were skipped change no weight)."""
    group = saved["callbacks"][STATE_KEY]["groups"]["autoclip/"]
    clipper, values = group["clipper"], group["clipper"]["history"]["values"]
    assert clipper["steps"] in steps, (path, clipper["steps"], steps)
    assert group["log"]["steps"] == clipper["steps"], path
    assert values == norms[: len(values)], path
    assert len(values) == clipper["steps"] - clipper["nonfinite_steps"], path
