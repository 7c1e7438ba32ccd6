"""Runs on disk, read back for report, plot and advice: checkpoints, CSV files and offline W&B runs."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lightning_autoclip.trace import MOST_SPIKES, Bin, Spike, Trace, typical_norm

STATE_KEY = "GradientClipping"  # of the callback in a checkpoint
_KEYS = ("grad_norm", "grad_norm_mean", "grad_norm_max", "grad_norm_max_step", "threshold", "clipped_fraction")
_UNKNOWN = {"policy": {"name": "unknown"}, "gradient_clip_algorithm": "norm", "max_threshold": None}
Row = Mapping[str, float]


@dataclass
class RecordedRun:
    """What a file tells of a run.

    Attributes:
        traces: Per optimizer, by the prefix of its keys, what happened.
        norms: Likewise, the norms of single steps, oldest first, as far as the file has them.
        settings: The callback's arguments, as far as the file has them.
        has_scaler: Whether a loss scaler was at work.
        source: What was read, in words.
    """

    traces: dict[str, Trace]
    norms: dict[str, list[float]]
    source: str
    settings: dict[str, Any] = field(default_factory=lambda: dict(_UNKNOWN))
    has_scaler: bool = False


def read_run(path: Path) -> RecordedRun:
    """Read a Lightning checkpoint, a `metrics.csv` of `CSVLogger`, or the directory of an offline W&B run.

    Raises:
        ValueError: It is none of these, is damaged, or holds nothing of this library.
    """
    if not path.exists():
        raise ValueError(
            f"Expected a checkpoint, a `metrics.csv` or the directory of a W&B run, but {path} is missing."
        )
    if path.is_dir():
        csv_file = path / "metrics.csv"
        return _of_csv(csv_file) if csv_file.exists() else _of_wandb(path)
    return _of_csv(path) if path.suffix == ".csv" else _of_checkpoint(path)


def _of_checkpoint(path: Path) -> RecordedRun:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        state = checkpoint["callbacks"].get(STATE_KEY)
    except Exception as error:  # torch raises many kinds
        reason = str(error).partition(". ")[0]
        raise ValueError(
            f"Expected {path} to be a checkpoint that `torch.load(weights_only=True)` reads: {reason}."
        ) from error
    if not state:
        raise ValueError(
            f"{path} was written without `AutoClip` or `GradientClipping`: it has no state under {STATE_KEY!r}."
        )
    try:
        traces = {prefix: Trace.from_state(trace) for prefix, trace in state["traces"].items()}
        histories = [optimizer["history"]["values"].tolist() for optimizer in state["optimizers"]]
        settings, has_scaler = state["settings"], bool(state["has_scaler"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"The state of {STATE_KEY!r} in {path} is damaged: {error!r}.") from error
    norms = {
        prefix: _longer(trace, history) for (prefix, trace), history in zip(traces.items(), histories, strict=False)
    }
    return RecordedRun(traces, norms, f"checkpoint {path.name}", settings, has_scaler)


def _longer(trace: Trace, history: list[float]) -> list[float]:
    """The longer of what the record still holds and what the bins tell: step by step, or one typical norm per bin."""
    typical = [math.exp(one.logs / one.norms) for one in trace.bins if one.norms]
    return history if len(history) >= len(typical) else typical


def _of_csv(path: Path) -> RecordedRun:
    with path.open(newline="") as file:
        try:
            rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
        except (ValueError, TypeError, csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"Expected {path} to be a `metrics.csv` of `CSVLogger`: {error}") from error
    return _of_rows(rows, "step", f"{path.parent.name}/{path.name}", dict(_UNKNOWN))


def _of_wandb(path: Path) -> RecordedRun:
    if not list(path.glob("*.wandb")):
        raise ValueError(
            f"Expected {path} to hold the `.wandb` file of an offline run or a `metrics.csv`, but it has none."
        )
    command = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", str(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(
            f"Reading a W&B run needs wandb 0.31 or newer (`wandb leet`), which failed: {error}"
        ) from error
    records = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    rows = [_numbers(record["history"].get("item", {})) for record in records if record.get("type") == "history"]
    settings = dict(_UNKNOWN)
    for record in records:
        update = record.get(record.get("type", ""), {})
        settings |= (update.get("update", {}) if isinstance(update, dict) else {}).get("autoclip") or {}
    return _of_rows(rows, "trainer/global_step", f"W&B run {path.name}", settings)


def _numbers(item: Mapping[str, Any]) -> dict[str, float]:
    return {key: float(value) for key, value in item.items() if isinstance(value, int | float)}


def _of_rows(rows: Iterable[Row], step: str, source: str, settings: dict[str, Any]) -> RecordedRun:
    """From logged rows: a bin per row, and the series of steps if ``log_every_step`` logged it."""
    rows = [row for row in rows if step in row]
    prefixes = {
        key.removesuffix("grad_norm_max") for row in rows for key in row if key.endswith("autoclip/grad_norm_max")
    }
    prefixes |= {
        key.removesuffix("grad_norm_max")
        for row in rows
        for key in row
        if "autoclip/" in key and key.endswith("/grad_norm_max")
    }
    traces, norms = {}, {}
    for prefix in sorted(prefixes):
        found = [row for row in rows if all(prefix + key in row for key in (*_KEYS, "nonfinite_total"))]
        traces[prefix] = trace = Trace()
        last, nonfinite = found[0][step] - 1 if len(found) == 1 else 2 * found[0][step] - found[1][step], 0.0
        for row in found:
            trace.bins.append(_bin(row, prefix, max(last, -1.0), row[step], nonfinite))
            if row[prefix + "grad_norm_max"] > 0:
                trace.largest.append(_largest(row, prefix, trace.bins))
            last, nonfinite = row[step], row[prefix + "nonfinite_total"]
        trace.largest = sorted(trace.largest, key=lambda spike: -spike.norm)[:MOST_SPIKES]
        exact = [row[f"{prefix}step/grad_norm"] for row in rows if f"{prefix}step/grad_norm" in row]
        norms[prefix] = [norm for norm in exact or [row[prefix + "grad_norm_mean"] for row in found] if norm > 0]
    if not traces:
        raise ValueError(f"{source} has no rows of `AutoClip` or `GradientClipping` (keys `autoclip/...`).")
    return RecordedRun(traces, norms, source, settings)


def _largest(row: Row, prefix: str, bins: list[Bin]) -> Spike:
    """The largest norm of a row: of which batch, rows do not tell."""
    norm, coef = row[prefix + "grad_norm_max"], row.get(prefix + "clip_coef_min", math.nan)
    where = int(row[prefix + "grad_norm_max_step"]), -1, -1, -1
    return Spike(*where, norm, row[prefix + "threshold"], coef, norm / typical_norm(bins[-MOST_SPIKES:]), ())


def _bin(row: Row, prefix: str, before: float, step: float, nonfinite: float) -> Bin:
    steps, bad = max(step - before, 1.0), row[prefix + "nonfinite_total"] - nonfinite
    finite, mean = max(steps - bad, 0.0), row[prefix + "grad_norm_mean"]
    coef, least = (row.get(f"{prefix}clip_coef_{key}", math.nan) for key in ("mean", "min"))
    known = finite if coef == coef else 0.0
    one = Bin(before + 1, step, steps, nonfinite=bad, threshold=row[prefix + "threshold"])
    if finite and mean > 0:
        one.smallest, one.largest, one.logs = min(mean, row[prefix + "grad_norm"]), row[prefix + "grad_norm_max"], 0.0
        one.logs = finite * math.log(mean)
    if known:
        one.measured, one.clipped, one.coefs = known, known * row[prefix + "clipped_fraction"], known * coef
        one.coef_min = least
    return one
