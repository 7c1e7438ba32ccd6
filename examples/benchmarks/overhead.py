"""What clipping adds to an optimizer step on the CPU, in a real Trainer: `make bench` (docs/performance.md explains).

Each rule trains each model in turn, several rounds of it. What is timed is what the Trainer does between backward pass
and optimizer step: the hooks of all callbacks, and its own clipping. The time of a run without clipping is taken off,
and rules are compared within a round, so that a machine that slows down slows all of them down.
"""

import argparse
import json
import logging
import platform
import statistics
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _rules import HandWritten, rules
from _shapes import MLP, SHAPES, Shape
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_autoclip import AutoClip, GradientClipper, Percentile

BASELINE = {"norm": "Lightning, norm", "value": "Lightning, value"}
QUIET: dict[str, Any] = {
    "max_epochs": 1,
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def timed(method: Any, times: list[float]) -> Any:
    """The method, with the seconds of each of its calls added to ``times``."""

    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = method(*args, **kwargs)
        times.append(time.perf_counter() - start)
        return result

    return call


def seconds_per_step(shape: Shape, arguments: dict[str, Any], steps: int) -> float:
    """Mean seconds between backward pass and optimizer step, without the first tenth of the steps."""
    times: list[float] = []
    trainer = Trainer(**QUIET, **arguments)
    plugin = trainer.precision_plugin
    plugin._after_closure = timed(plugin._after_closure, times)  # hooks before the step, and Lightning's clipping
    trainer.fit(shape, shape.loader(steps))
    return statistics.fmean(times[steps // 10 :])


class Allocations(TorchDispatchMode):
    """Adds up the bytes of every tensor that an operator makes anew."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        owned = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        made = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        self.bytes += sum(t.nbytes for t in made if t.untyped_storage().data_ptr() not in owned)
        return result


def bytes_allocated(shape: Shape, arguments: dict[str, Any]) -> int:
    """Bytes of tensors that the clipping of one step makes, freed again or not."""
    asked: list[int] = []
    trainer = Trainer(**QUIET, **arguments)
    plugin = trainer.precision_plugin
    plain = plugin._after_closure

    def counted(*args: Any) -> None:
        with Allocations() as allocations:
            plain(*args)
        asked.append(allocations.bytes)

    plugin._after_closure = counted
    trainer.fit(shape, shape.loader(6))
    return max(asked[1:])


def compare(rounds: int, steps: dict[str, int]) -> list[dict[str, Any]]:
    """One row per model and rule: microseconds added per step, and the ratio to Lightning's clipping of that kind."""
    rows = []
    for name, count in steps.items():
        shape, seconds = SHAPES[name](), {rule: [] for rule in rules()}
        for _ in range(rounds):
            for rule, arguments in rules().items():
                seconds[rule].append(seconds_per_step(shape, arguments(), count))
        added = {rule: np.subtract(values, seconds["no clipping"]) for rule, values in seconds.items()}
        for rule, arguments in rules().items():
            baseline = BASELINE["value" if "value" in rule else "norm"]
            row = {
                "model": name,
                "rule": rule,
                "added_us": float(np.median(added[rule])) * 1e6,
                "ratio": float(np.median(added[rule] / added[baseline])) if rule != "no clipping" else 0.0,
                "allocated_bytes": bytes_allocated(shape, arguments()),
            }
            rows.append(row)
            print(
                f"{name:20s} {rule:28s} {row['added_us']:9.0f} µs {row['ratio']:6.2f}"
                f" {row['allocated_bytes'] / 1000:10.1f} kB",
                flush=True,
            )
    return rows


class Filled(Callback):
    """Gives the clipper that the fit has made the norm history of a long run."""

    def __init__(self, autoclip: AutoClip, norms: torch.Tensor) -> None:
        self.autoclip, self.norms = autoclip, norms

    def on_train_start(self, trainer: Trainer, pl_module: Shape) -> None:
        (clipper,) = self.autoclip.clippers
        history = {"values": self.norms.double().tolist(), "count": len(self.norms)}
        clipper.load_state_dict({**clipper.state_dict(), "history": history, "steps": len(self.norms)})


def histories(lengths: list[int], steps: int) -> list[dict[str, Any]]:
    """One row per length of the history: microseconds of one step's clipping of the small model."""
    rows = []
    base = seconds_per_step(MLP(), {}, steps)
    for length in lengths:
        norms = torch.randn(length).exp()
        window, full = AutoClip(verbose=False), AutoClip(window=None, verbose=False)
        arguments: dict[str, Any] = {
            "window of 100": {"callbacks": [window, Filled(window, norms)]},
            "full history": {"callbacks": [full, Filled(full, norms)]},
            "hand-written AutoClip": {"callbacks": [HandWritten(10, norms.tolist())]},
        }
        for rule, of_trainer in arguments.items():
            count = steps if rule != "hand-written AutoClip" or length < 1e5 else 20
            added = (seconds_per_step(MLP(), of_trainer, count) - base) * 1e6
            rows.append({"recorded": length, "rule": rule, "added_us": added})
            print(f"{length:10,d} norms   {rule:22s} {added:9.0f} µs", flush=True)
    return rows


def logging_share(name: str, steps: int, out: Path) -> dict[str, Any]:
    """What logging a row every 50 steps to a file adds to what clipping adds."""
    hooks, rows, autoclip = [], [], AutoClip(verbose=False)
    autoclip.on_before_optimizer_step = timed(autoclip.on_before_optimizer_step, hooks)  # type: ignore[method-assign]
    autoclip.on_train_batch_end = timed(autoclip.on_train_batch_end, rows)  # type: ignore[method-assign]
    shape = SHAPES[name]()
    arguments = QUIET | {"callbacks": [autoclip], "logger": CSVLogger(out), "log_every_n_steps": 50}
    Trainer(**arguments).fit(shape, shape.loader(steps))
    share = sum(rows) / sum(hooks)
    print(f"{name:20s} logging: {share:.1%} of the time of clipping", flush=True)
    return {"model": name, "share": share, "us_per_step": sum(rows) / steps * 1e6}


def long_sums() -> list[dict[str, Any]]:
    """Relative error of the norm of one large gradient against float64."""
    rows = []
    for entries in (1_000_000, 10_000_000, 50_000_000):
        parameter = torch.nn.Parameter(torch.zeros(entries))
        parameter.grad = torch.randn(entries, generator=torch.Generator().manual_seed(0))
        exact = float(torch.linalg.vector_norm(parameter.grad, dtype=torch.float64))
        record = GradientClipper(Percentile(100)).clip_([parameter])
        plain = torch.nn.utils.clip_grad_norm_(parameter, float("inf"))
        row = {"entries": entries, "ours": abs(float(record.norm) / exact - 1), "torch": abs(float(plain) / exact - 1)}
        rows.append(row)
        print(f"{entries:12,d} elements in one tensor: error {row['ours']:.0e}, clip_grad_norm_ {row['torch']:.0e}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="one short round of the small model, to see that it runs")
    parser.add_argument("--only", choices=SHAPES, help="this model alone, and only the rules")
    parser.add_argument("--out", type=Path, default=Path("runs/overhead"), help="folder of the JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module=r"lightning\.pytorch")
    warnings.filterwarnings("ignore", message=".*found in your.*")

    steps = dict(zip(SHAPES, (1000, 60, 40, 20), strict=True))
    names = ["MLP, 6 tensors"] if arguments.quick else [*SHAPES][:3]
    steps = {name: 60 if arguments.quick else steps[name] for name in ([arguments.only] if arguments.only else names)}
    lengths = [100, 1000] if arguments.quick else [100, 1000, 10_000, 100_000, 1_000_000]
    share = partial(logging_share, out=arguments.out)
    result: dict[str, Any] = {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "threads": arguments.threads,
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "rules": compare(1 if arguments.quick else arguments.rounds, steps),
    }
    if arguments.only is None:
        result["histories"] = histories(lengths, 60 if arguments.quick else 1000)
        result["logging"] = [share(name, max(100, count)) for name, count in steps.items()]
        result["long_sums"] = [] if arguments.quick else long_sums()
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "overhead.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nAll figures: {path}")


if __name__ == "__main__":
    main()
