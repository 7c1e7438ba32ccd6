"""The reader of W&B's files on disk, which other tests rest on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import wandb
import wandb_reader
from wandb.proto.wandb_internal_pb2 import Record, StatsRecord
from wandb_reader import finish, read_runs

pytestmark = pytest.mark.usefixtures("wandb_offline")


def finished(directory: Path) -> Path:
    """The file of a run that logged a value."""
    wandb.init(dir=directory, project="test").log({"loss": 0.5})
    finish(directory)
    (path,) = directory.rglob("*.wandb")
    return path


def test_a_run_is_read_whose_machine_was_measured_after_its_exit_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = Record(stats=StatsRecord()).SerializeToString()
    with finished(tmp_path).open("ab") as file:
        file.write(bytes(4) + len(late).to_bytes(2, "little") + b"\1" + late)  # one whole chunk, its checksum unread
    monkeypatch.setattr(wandb_reader, "TIME_LIMIT", 0.0)
    (run,) = read_runs(tmp_path)
    assert [row["loss"] for row in run.history] == [0.5]


def test_an_unfinished_run_is_an_error_that_says_what_was_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = finished(tmp_path)
    path.write_bytes(data := path.read_bytes()[:-1])  # the exit record is cut off
    monkeypatch.setattr(wandb_reader, "TIME_LIMIT", 0.0)
    with pytest.raises(TimeoutError, match=rf"{re.escape(path.name)} has no exit.*{len(data)} bytes.*'summary'\]"):
        read_runs(tmp_path)
