"""Reads back, in process, what the real W&B client wrote to disk in offline mode."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import wandb
from processes import TIME_LIMIT
from wandb.proto.wandb_internal_pb2 import MetricRecord, Record

_HEADER, _BLOCK = 7, 32 * 1024  # length of the file's header and of each chunk's; no chunk crosses a block
_WHOLE, _FIRST, _LAST = 1, 2, 4  # a record is one whole chunk, or a first one, some in the middle (3) and a last


@dataclass
class Run:
    """What a run's file holds."""

    history: list[dict[str, Any]]
    metrics: list[MetricRecord]
    config: dict[str, Any]
    summary: dict[str, Any]


def read_runs(directory: Path) -> list[Run]:
    """All finished runs below a directory, oldest first."""
    return [_read_run(path) for path in sorted(directory.rglob("*.wandb"), key=lambda path: path.stat().st_ctime_ns)]


def finish(directory: Path) -> None:
    """End the client's run and wait until it is on disk: a next run of the same id may cut off what is to come."""
    wandb.finish()
    read_runs(directory)


def rows_on_disk(path: Path) -> list[dict[str, Any]]:
    """The rows of a run's file as far as it goes, also of a run that was killed."""
    return [_values(record.history.item) for record in _records(path.read_bytes()) if record.HasField("history")]


def _read_run(path: Path) -> Run:
    records = _wait_for_exit(path)

    def of(kind: str) -> Iterator[Any]:
        return (getattr(record, kind) for record in records if record.HasField(kind))

    return Run(
        history=[_values(history.item) for history in of("history")],
        metrics=list(of("metric")),
        config=_values(item for config in of("config") for item in config.update),
        summary=_values(item for summary in of("summary") for item in summary.update),
    )


def _wait_for_exit(path: Path) -> list[Record]:
    """All records, as soon as the exit record is one of them: `finish` can return before everything is written.

    What a run logs is written before its exit record. That need not be the last one: the client measures the machine
    at the same time, and a measurement that arrives before the exit record is handled is written after it.
    """
    deadline = time.monotonic() + TIME_LIMIT
    while True:
        data = path.read_bytes()
        records = [*_records(data)]
        if any(record.HasField("exit") for record in records):
            return records
        if time.monotonic() > deadline:
            kinds = [record.WhichOneof("record_type") for record in records]
            size = sum(record.ByteSize() for record in records)
            raise TimeoutError(
                f"{path} has no exit record after {TIME_LIMIT:.0f} s. Of its {len(data)} bytes, {size} are in"
                f" {len(records)} records that could be read; the last ones are {kinds[-5:]}."
            )
        time.sleep(0.02)


def _records(data: bytes) -> Iterator[Record]:
    """LevelDB's log framing, up to the first chunk that is not there in full."""
    at, record = _HEADER, b""
    while True:
        rest = _BLOCK - at % _BLOCK
        start = at + _HEADER + (rest if rest < _HEADER else 0)  # the end of a block too short for a chunk is padding
        at = start + int.from_bytes(data[start - 3 : start - 1], "little")
        if len(data) < at:
            return
        kind = data[start - 1]
        record = data[start:at] if kind in (_WHOLE, _FIRST) else record + data[start:at]
        if kind in (_WHOLE, _LAST):
            yield Record.FromString(record)


def _values(items: Iterable[Any]) -> dict[str, Any]:
    return {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
