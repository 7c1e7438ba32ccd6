"""The files of loggers, read back: CSV files, TensorBoard's folders, directories of W&B runs."""

from __future__ import annotations

import csv
import glob
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

CONFIG_KEY = "lightning_autoclip"  # of the callback's settings among a run's hyperparameters
_STEP = "trainer/global_step"  # of W&B's rows
_TIME_LIMIT = 600.0  # seconds for W&B's client to read a run
_EVENTS = "events.out.tfevents.*"
_FILES = ("metrics.csv", _EVENTS, "*.wandb")
_MOST_NAMED = 5  # runs in a folder
_OURS = re.compile(r"(?:.*-)?autoclip(?:_layers|_layers_norm)?/")  # behind what a logger puts before every key
_SafeLoader: Any = type("_SafeLoader", (yaml.SafeLoader,), {})
_SafeLoader.add_multi_constructor("", lambda loader, tag, node: None)  # objects of the user's are nothing to us
Row = dict[str, float]


@dataclass(frozen=True)
class Log:
    """What a logger has written of a run.

    Attributes:
        source: What was read, in words.
        rows: This library's, in order, each with its ``"step"``.
        settings: The callback's arguments; ``None`` where they are not known.
        is_open: Whether it is said to be written still: it may be, or its process was killed.
    """

    source: str
    rows: list[Row]
    settings: dict[str, Any] | None = None
    is_open: bool = False


def read_log(path: Path) -> Log:
    """Read a `metrics.csv`, TensorBoard's folder of a run, or the directory of a W&B run.

    Raises:
        ValueError: It is none of these, or damaged.
    """
    if path.suffix == ".wandb" or path.match(_EVENTS):
        path = path.parent
    if path.is_dir() and (path / "metrics.csv").exists():
        path = path / "metrics.csv"
    if not path.is_dir():
        return _of_csv(path)
    return _of_tensorboard(path) if [*path.glob(_EVENTS)] else _of_wandb(path)


def is_settings(value: Any) -> bool:
    """Whether this is what the callback writes of its arguments, rather than something of the user's."""
    return (
        isinstance(value, dict)
        and value.get("gradient_clip_algorithm") in ("norm", "value")
        and "max_threshold" in value
        and type(warmup := value.get("warmup_steps")) is int
        and 0 <= warmup < 2**63
        and isinstance(policy := value.get("policy"), dict)
        and (policy.get("name") != "Percentile" or _is_percentile(policy))
    )


def _is_percentile(policy: Mapping[str, Any]) -> bool:
    percentile: Any = policy.get("percentile")
    multiplier: Any = policy.get("multiplier", 1)
    return {type(percentile), type(multiplier)} <= {int, float} and 0 <= percentile <= 100 and multiplier > 0


def _of_csv(path: Path) -> Log:
    with path.open(newline="", encoding="utf-8-sig") as file:  # programs for tables begin it with a mark
        try:
            rows = [_ours(row, "step") for row in csv.DictReader(file)]
        except (ValueError, TypeError, csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"Expected {path} to be a `metrics.csv` of `CSVLogger`: {error}") from error
    return Log(str(path), [*filter(None, rows)], _settings_beside(path))


def _of_tensorboard(path: Path) -> Log:
    try:
        from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    except ImportError as error:
        raise ValueError(f"To read {path} takes `tensorboard`, which is not installed: {error}.") from error
    parts = []
    for file in path.glob(_EVENTS):
        try:
            if events := [*EventFileLoader(str(file)).Load()]:
                parts.append((events[0].wall_time, _rows_of_events(events)))
        except Exception as error:  # whatever a damaged file leads to
            raise ValueError(
                f"Expected {file} to be an events file of TensorBoard, but it is damaged: {error}"
            ) from error
    parts.sort(key=lambda part: part[0])  # names tell the order of files of different seconds alone
    return Log(f"TensorBoard run {path.name}", _in_turn([rows for _, rows in parts]), _settings_beside(path / _EVENTS))


def _rows_of_events(events: Iterable[Any]) -> list[Row]:
    """Events hold a number each. A step may have several numbers of a key: each but the first begins a row."""
    rows: dict[tuple[int, int], Row] = {}
    seen: dict[tuple[int, str], int] = {}
    for event in events:
        for value in event.summary.value:
            if _OURS.match(value.tag) and value.tensor.float_val and math.isfinite(value.tensor.float_val[0]):
                nth = seen[event.step, value.tag] = seen.get((event.step, value.tag), -1) + 1
                rows.setdefault((event.step, nth), {"step": event.step})[value.tag] = value.tensor.float_val[0]
    return [row for _, row in sorted(rows.items(), key=lambda item: item[0])]


def _of_wandb(path: Path) -> Log:
    directories = _directories_of_run(path.resolve())
    records = [_records(directory) for directory in directories]
    parts = [
        [
            row
            for record in part
            if record.get("type") == "history" and (row := _ours(record["history"].get("item", {}), _STEP))
        ]
        for part in records
    ]
    written = [
        update[CONFIG_KEY]
        for part in records
        for record in part
        if is_settings((update := record.get("config", {}).get("update", {})).get(CONFIG_KEY))
    ]
    settings = dict(written[-1]) if written else None
    if settings and any(each["policy"] != settings["policy"] for each in written):
        settings["several_policies"] = True
    is_open = not any(record.get("type") == "exit" for record in records[-1])
    name = directories[-1].name + (f" and {len(directories) - 1} before it" if len(directories) > 1 else "")
    return Log(f"W&B run {name}", _in_turn(parts), _of_whole_run(settings), is_open)


def _directories_of_run(path: Path) -> list[Path]:
    """A run that was resumed has a directory for each time, oldest first."""
    found = sorted({file.name for file in [*path.glob("*.wandb")] or path.glob("*run-*/*.wandb")})
    if not found:
        below = {file.parent for kind in _FILES for file in islice(path.rglob(kind), _MOST_NAMED)}
        below |= {*islice(path.rglob("*.ckpt"), _MOST_NAMED)}
        named = ", ".join(sorted(str(folder) for folder in below)[:_MOST_NAMED])
        found_below = f" There are runs or checkpoints below it: name one of {named}." if named else ""
        raise ValueError(
            f"Expected {path} to hold the `.wandb` file of an offline run (as wandb/latest-run), a `metrics.csv` or"
            f" the events of a TensorBoard run.{found_below}"
        )
    if len(found) > 1:
        runs = ", ".join(name.removeprefix("run-").removesuffix(".wandb") for name in found)
        raise ValueError(f"Expected {path} to hold one W&B run, but it has {runs}. Name the directory of one of them.")
    parent = path.parent if (path / found[0]).exists() else path
    beside = [file.parent for file in parent.glob(f"*run-*/{glob.escape(found[0])}") if not file.parent.is_symlink()]
    return sorted({path, *beside} if parent != path else beside, key=lambda each: each.name.partition("run-")[2])


def _records(path: Path) -> list[dict[str, Any]]:
    """All records of a directory of a W&B run, as its client has them on disk."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_TIME_LIMIT)
    except (OSError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None) or getattr(error, "stdout", None) or str(error)
        said = output.strip().splitlines()[-1:]
        raise ValueError(
            f"`python -m wandb leet inspect`, which needs wandb 0.31 or newer, cannot read {path}: {' '.join(said)}"
        ) from error
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def _in_turn(parts: Sequence[Sequence[Row]]) -> list[Row]:
    """The rows of a run that was resumed: each part takes the place of what the one before has from its first step on.

    A run that was killed has made, and logged, more steps than the checkpoint that it went on from.
    """
    rows: list[Row] = []
    for part in filter(None, parts):
        first = min(row["step"] for row in part)
        rows = [*(row for row in rows if row["step"] < first), *part]
    return rows


def _ours(item: Mapping[str, Any], step: str) -> Row:
    """The numbers of this library in a row, and its step; nothing if it has none of them."""
    row = dict(_numbers(item, step))
    return row if "step" in row and len(row) > 1 else {}


def _numbers(item: Mapping[str, Any], step: str) -> Iterator[tuple[str, float]]:
    for key, value in item.items():
        if key is not None and (key == step or _OURS.match(key)):
            try:
                number = float(value)
            except (TypeError, ValueError):
                continue  # a table, or an empty cell
            if math.isfinite(number):
                yield "step" if key == step else key, number


def _settings_beside(path: Path) -> dict[str, Any] | None:
    """The settings in the `hparams.yaml` beside a file, if there is one; of whatever else is in it nothing is made."""
    try:
        content = yaml.load(path.with_name("hparams.yaml").read_text(encoding="utf-8"), Loader=_SafeLoader)
    except Exception:  # whatever the texts behind its tags lead to
        return None
    settings = content.get(CONFIG_KEY) if isinstance(content, dict) else None
    return _of_whole_run(settings) if is_settings(settings) else None


def _of_whole_run(settings: dict[str, Any] | None) -> dict[str, Any] | None:
    """What holds for every step."""
    if settings and settings.get("several_policies"):
        return {**settings, "policy": {"name": "several"}}
    return settings
