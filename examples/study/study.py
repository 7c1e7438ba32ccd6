"""How far one percentile goes instead of a sweep over thresholds: thousands of small trainings, rule against rule.

    python examples/study/study.py            # all of it, on every core; goes on where it was stopped
    python examples/study/study.py --quick    # a few minutes
    python examples/study/study.py --part new # the tasks of new ground

writes a row per training to runs/study/study.csv; then the tables (runs/study/summary.csv, results.md) and the figure.
Of new ground, the rows are in runs/study/new.csv, and a line per task and rule in runs/study/new-summary.csv.
"""

import argparse
import csv
import logging
import math
import multiprocessing
import os
import shutil
import time
import warnings
import zlib
from collections.abc import Generator, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from _new_ground import draw_rates
from _new_ground import tables as new_tables
from _problems import Batch, Problem, si_sdr_improvement
from _report import publish, read_summary, show_tables, summarise, write_report, write_summary
from _rules import BOUNDED, DEFAULT, RULES, TABLE, Candidates, by_callback
from _tasks import TASKS, Task
from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR
from torch.utils.data import DataLoader

from lightning_autoclip import GradientClipping

SCALE_RULES = ("none", *(name for name in RULES if name.startswith("fixed")), "norm p10", "norm p25", "norm p50",
               "norm p90", "value p10", "value p50", "both p10 x 3", DEFAULT, "norm p50 r0.12")  # fmt: skip
RATE_RULES = ("none", "fixed norm 0.1", "fixed norm 1", "norm p10", "norm p25", "norm p90", "value p10", "value p50",
              "both p10 x 3", "norm p50", DEFAULT, "norm p50 r0.12")  # fmt: skip
QUICK_TASKS = ("lstm, SGD, hot", "mlp, SGD, bad batches", "conv, SGD", "mlp, SGD, hot", "autoencoder, SGD, hot")
QUICK_RULES = ("none", "fixed norm 0.1", "fixed norm 1", "fixed value 0.01", "norm p10", "norm p50", "norm p90",
               "value p10", "both p10 x 3", "norm p10 full", "2 x median", "ZClip", DEFAULT)  # fmt: skip
NEW_RULES = ("none", *(name for name in RULES if name.startswith("fixed norm")), "fixed value 0.001",
             "fixed value 0.01", "fixed value 0.1", "fixed value 1", "norm p10", "norm p25", "norm p50", "norm p90",
             "AGC 0.01", *BOUNDED)  # fmt: skip
NEW = ("new", "further")
OF_GROUP = {"scale": SCALE_RULES, "rate": RATE_RULES, "paper": tuple(TABLE), "new": NEW_RULES,
            "further": ("none", "fixed norm 1", DEFAULT)}  # fmt: skip
COLUMNS = ("task", "rule", "seed", "steps", "error", "si_sdr", "clipped", "factor", "bounded", "update", "seconds")
OF_REPORT = {"clipped": "clipped_fraction", "factor": "clip_coef_mean", "bounded": "limited_fraction",
             "update": "update_ratio"}  # fmt: skip

Run = tuple[str, str, int, int]  # task, rule, seed, steps


class Learner(LightningModule):
    def __init__(self, task: Task, problem: Problem, steps: int) -> None:
        super().__init__()
        self.network, self.problem, self.task, self.steps = problem.network, problem, task, steps
        self.automatic_optimization = not problem.players
        self.errors: list[float] = []

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor | None:
        if self.problem.players:
            return self.play(batch)
        if torch.rand(()) < self.task.bad:
            batch = self.problem.spoil(batch)
        return self.task.loss_scale * self.problem.loss(self.network, batch)

    def play(self, batch: Batch) -> None:
        """One step of each player in turn."""
        for optimizer, loss in zip(self.optimizers(), self.problem.players.values(), strict=True):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(loss(self.network, batch))
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.errors.append(float((self.problem.error or self.problem.loss)(self.network, batch)))

    def train_dataloader(self) -> Iterator[Batch]:
        return self.problem.train

    def val_dataloader(self) -> DataLoader:
        return DataLoader([self.problem.validation], batch_size=None)

    def configure_optimizers(self) -> Any:
        if self.problem.players:
            parts = [self.network.get_submodule(name) for name in self.problem.players]
            return [self.task.optimizer(part.parameters(), self.task.lr) for part in parts]
        optimizer = self.task.optimizer(self.parameter_groups(), self.task.lr)
        if not self.task.decay:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.schedule(optimizer), "interval": "step"}}

    def parameter_groups(self) -> list[Any]:
        """What is trained; in groups where parts have rates of their own."""
        if not self.problem.rates:
            return [parameter for parameter in self.parameters() if parameter.requires_grad]
        return [
            {"params": list(self.network.get_submodule(name).parameters()), "lr": rate * self.task.lr}
            for name, rate in self.problem.rates.items()
        ]

    def schedule(self, optimizer: Optimizer) -> LRScheduler:
        rising = int(self.task.warmup * self.steps)
        falling = CosineAnnealingLR(optimizer, self.steps - rising)
        if not rising:
            return falling
        return SequentialLR(optimizer, [LinearLR(optimizer, 1 / rising, total_iters=rising), falling], [rising])


def train(run: Run) -> dict[str, Any]:
    """One training, as a row of the table."""
    name, rule, seed, steps = run
    task = TASKS[name]
    quiet()
    torch.manual_seed(seed + zlib.crc32(task.group.encode()) % 1000)  # the groups share no seed, the rules do
    learner = Learner(task, task.problem(), steps)
    clipping = (TABLE | RULES)[rule]()
    players = len(learner.problem.players)
    if players and "gradient_clip_val" in clipping:
        clipping = by_callback(**clipping)
    trainer = Trainer(
        max_steps=steps * max(1, players), val_check_interval=max(1, steps // 16), check_val_every_n_epoch=None,
        num_sanity_val_steps=0, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, **clipping,
    )  # fmt: skip
    start = time.perf_counter()
    trainer.fit(learner)
    seconds = time.perf_counter() - start
    last = learner.errors[-4:]  # of the last quarter: one validation is noise where the rate does not decay
    row: dict[str, Any] = {"task": name, "rule": rule, "seed": seed, "steps": steps, "seconds": round(seconds, 2)}
    row["error"] = sum(last) / len(last)
    if task.objective and math.isfinite(row["error"]):
        row["si_sdr"] = si_sdr_improvement(learner.problem, task.objective)
    for callback in clipping.get("callbacks", []):
        if isinstance(callback, GradientClipping):
            figures = [section.figures for section in callback.report().sections]
            for column, figure in OF_REPORT.items():
                row[column] = sum(getattr(each, figure) for each in figures) / len(figures)
        elif isinstance(callback, Candidates):
            factors = [factor for candidate in callback.rules.values() for factor in candidate.factors]
            row["factor"] = sum(factors) / max(1, len(factors))
            row["clipped"] = sum(factor < 1 for factor in factors) / max(1, len(factors))
    return row


def quiet() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)


def planned(seeds: int, quick: bool, steps: int | None, new: bool = False) -> Iterator[Run]:
    """Every training, the first seed of all before the second of any."""
    for round_ in range(seeds):
        for name, task in TASKS.items():
            if new != (task.group in NEW) or (quick and name not in QUICK_TASKS):
                continue
            rules = QUICK_RULES if quick else OF_GROUP.get(task.group, RULES)
            repeats = 1 if quick else task.repeats
            for seed in range(round_ * repeats, (round_ + 1) * repeats):
                for rule in rules:
                    if task.is_sgd or rule not in BOUNDED:  # else the training is that without the bound
                        yield name, rule, seed, steps or task.steps


def finished(path: Path) -> set[Run]:
    if not path.exists():
        return set()
    with path.open(newline="", encoding="utf-8") as file:
        return {(row["task"], row["rule"], int(row["seed"]), int(row["steps"])) for row in csv.DictReader(file)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="five tasks, thirteen rules, two seeds")
    parser.add_argument("--part", choices=("first", "new", "all"), default="all", help="which tasks")
    parser.add_argument("--seeds", type=int, help="of each rule on each task (default: 3; quick: 2)")
    parser.add_argument("--steps", type=int, help="of each training, instead of the tasks' own")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--docs", type=Path, help="folder of the documentation, to take the results over")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    seeds = args.seeds or (2 if args.quick else 3)
    if args.quick or args.part != "new":
        path = args.out / ("quick.csv" if args.quick else "study.csv")
        train_all(list(planned(seeds, args.quick, args.steps)), path, args.processes)
        write_report(path, args.out)
        if args.docs:
            publish(args.out, args.docs)
    if not args.quick and args.part != "first":
        path = args.out / "new.csv"
        train_all(list(planned(seeds, False, args.steps, new=True)), path, args.processes)
        write_summary(summarise(path), args.out / "new-summary.csv")
        summary = read_summary(args.out / "new-summary.csv")
        print("\n\n".join(new_tables(summary).values()))
        draw_rates(summary, args.out / "rates.png")
        if args.docs:
            shutil.copy(args.out / "new-summary.csv", args.docs / "new-ground.csv")
            shutil.copy(args.out / "rates.png", args.docs / "rates.png")
            show_tables(args.docs, new_tables(summary))


def train_all(runs: list[Run], path: Path, processes: int) -> None:
    """Write a row of each to the table, but of those that it has."""
    done = finished(path)
    todo = [run for run in runs if run not in done]
    print(f"{len(done)} trainings are done, {len(todo)} to do on {processes} processes.")
    start = time.perf_counter()
    with path.open("a", newline="", encoding="utf-8") as file, closing(rows_of(todo, processes)) as rows:
        table = csv.DictWriter(file, COLUMNS)
        if not done:
            table.writeheader()
        for number, row in enumerate(rows, 1):
            table.writerow(row)
            file.flush()
            if number % 50 == 0:
                minutes = (time.perf_counter() - start) / 60
                whole = minutes * len(todo) / number
                print(f"{number}/{len(todo)} in {minutes:.1f} min, {whole:.0f} in all", flush=True)


def rows_of(runs: list[Run], processes: int) -> Generator[dict[str, Any], None, None]:
    """The row of each training as it ends; one process is this one."""
    if processes == 1:
        yield from map(train, runs)
        return
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"))
    try:
        for future in as_completed([pool.submit(train, run) for run in runs]):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)  # of what is left, when one fails


if __name__ == "__main__":
    main()
