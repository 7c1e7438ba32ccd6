"""Checkpoint files on the command line: any foreign object loads inertly, and a bad file is one clear line."""

from __future__ import annotations

import os
import pickle
import sys
import zipfile
from collections import Counter, OrderedDict, defaultdict, deque
from dataclasses import dataclass, field
from enum import Enum
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from helpers import Net, loader, trainer
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from processes import run_program
from torch import nn

from lightning_autoclip import AutoClip
from lightning_autoclip.__main__ import main
from lightning_autoclip.checkpoint import read_run


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, how: str = "call") -> None:
        self.how = how

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("exploded"),)) if self.how == "call" else (exec, ("open('exploded', 'w')",))


class Config:
    """As omegaconf's: with a state, and in a circle."""

    class Mode(Enum):
        TRAIN = 1

    def __init__(self) -> None:
        self.layers, self.parent = [1, 2], self


class Slotted:
    __slots__ = ("width",)

    def __init__(self) -> None:
        self.width = 3


class WithState(Config):
    def __getstate__(self) -> tuple[int, str]:
        return 1, "two"

    def __setstate__(self, state: Any) -> None:
        Path("exploded").touch()


@dataclass
class Encoder:
    size: int = 8
    names: list[str] = field(default_factory=lambda: ["a", "b"])
    table: Any = field(default_factory=lambda: np.arange(3))


class Kind(Enum):
    FIRST = 1
    SECOND = "two"


class Shape(NamedTuple):
    rows: int
    columns: int


class Registry(OrderedDict):
    pass


class Words(list):
    pass


class Tags(set):
    pass


OBJECTS: dict[str, Any] = {
    "a bomb": lambda: Bomb(),
    "a bomb of code as a key": lambda: {Shape(1, 2): Bomb("code")},
    "a dataclass": lambda: Encoder(),
    "a class with a state, and itself": lambda: [Config(), Config],
    "slots": lambda: Slotted(),
    "a state of its own": lambda: WithState(),
    "arrays": lambda: [np.arange(6.0).reshape(2, 3), np.array([Encoder(), None], dtype=object)],
    "a scalar and a dtype": lambda: [np.float64(0.5), np.dtype("float32")],
    "an ordered dict of its own": lambda: Registry(a=1, b=Encoder()),
    "a list of its own": lambda: [Words(["a", "b"]), Words(["c"])],
    "a set of its own": lambda: Tags({"a", "b"}),
    "enums": lambda: [Kind.FIRST, Kind.SECOND, Config.Mode.TRAIN],
    "a path": lambda: Path("data"),
    "collections": lambda: [deque([1, 2], maxlen=3), defaultdict(list, a=[1]), Counter("abba")],
    "a partial and a function": lambda: [partial(torch.optim.SGD, lr=0.1), torch.nn.functional.relu],
    "a module": lambda: nn.Sequential(nn.Linear(3, 2), nn.ReLU()),
    "an odd tensor": lambda: torch.eye(3).to_sparse(),
    "a device and a size": lambda: [torch.device("cpu"), torch.Size([1, 2]), torch.float16, slice(1, 2), 1j, b"bytes"],
}


@cache
def trained() -> tuple[Trainer, AutoClip]:
    """A run of 64 steps: what is saved with it, below, has no part in them."""
    callback = AutoClip(50, verbose=False)
    run = trainer(callback, max_epochs=4)
    run.fit(Net(), loader())
    return run, callback


def saved(thing: Any, path: str = "run.ckpt", **options: Any) -> AutoClip:
    """A checkpoint of the run, with hyperparameters that hold the thing."""
    run, callback = trained()
    run.lightning_module.save_hyperparameters({"thing": thing, "lr": 0.1})
    run.save_checkpoint(path, **options)
    Path("exploded").unlink(missing_ok=True)  # Lightning copies hyperparameters
    return callback


def error_of(capsys: pytest.CaptureFixture[str], path: str, command: str = "report") -> str:
    """The one line that a command says of a file that it cannot use."""
    assert main([command, path]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert path in line
    return line


# --- foreign objects --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", OBJECTS.values(), ids=OBJECTS)
def test_the_report_of_a_checkpoint_with_a_foreign_object_is_that_of_the_callback(make, capsys):
    callback = saved(make())
    assert str(read_run(Path("run.ckpt")).report()) == str(callback.report())
    assert main(["suggest", "run.ckpt"]) == 0
    assert "64 norms" in capsys.readouterr().out
    assert not Path("exploded").exists()


def test_the_foreign_objects_are_harmful_indeed():
    saved(Bomb())
    torch.load("run.ckpt", weights_only=False)
    assert Path("exploded").exists()


def test_classes_of_a_package_that_is_not_there_are_not_needed(tmp_path, capsys):
    (tmp_path / "chemistry.py").write_text("class Featurizer:\n    pass\n")
    program = tmp_path / "program.py"
    program.write_text(
        "from test_checkpoint_file import saved; from chemistry import Featurizer; callback = saved(Featurizer());"
        "print(callback.report())"
    )
    done = run_program(program)
    assert done.returncode == 0, done.stderr
    assert main(["report", "run.ckpt"]) == 0
    assert capsys.readouterr().out == f"checkpoint run.ckpt\n{done.stdout}"
    assert "chemistry" not in sys.modules


class Command:
    def __reduce__(self) -> Any:
        return os.system, ("touch exploded",)


def test_a_class_that_cannot_be_stood_in_for_is_named(capsys):
    saved(Command())
    assert "posix.system" in error_of(capsys, "run.ckpt")
    assert not Path("exploded").exists()


def test_a_file_cannot_have_it_tried_for_ever(capsys):
    name = b"<class 'lightning_autoclip.checkpoint.test_checkpoint_file.Config'>"
    saved([Config, Encoder])
    with zipfile.ZipFile("run.ckpt") as old, zipfile.ZipFile("bad.ckpt", "w") as new:
        for entry in old.namelist():
            data = old.read(entry)
            new.writestr(entry, data.replace(b"ctest_checkpoint_file\nEncoder\n", b"cos\n" + name + b"\n"))
    assert "whose module os is blocked" in error_of(capsys, "bad.ckpt")


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["report", "suggest"])
def test_of_a_folder_the_newest_checkpoint_below_it_is_read(command, capsys):
    logs = Path("lightning_logs", "version_0", "checkpoints")
    for age, path in enumerate(["z.old", logs / "last.ckpt", "a.ckpt", logs / "sharded.ckpt" / "model.pt"]):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        saved(None, str(path))
        os.utime(path, ns=(10**18 - age, 10**18 - age))
    for folder, path in ((".", logs / "last.ckpt"), ("lightning_logs/version_0", logs / "last.ckpt")):
        assert main([command, folder]) == 0
        assert capsys.readouterr().out.startswith(f"checkpoint {path}")
    assert main(["report", "lightning_logs", "--json"]) == 0
    assert f"checkpoint {logs / 'last.ckpt'}" in capsys.readouterr().err


def test_a_folder_without_a_checkpoint_is_one_clear_line(capsys):
    Path("logs").mkdir()
    Path("logs", "metrics.csv").write_text("step,autoclip/grad_norm\n1,2.0\n")
    assert "to have a checkpoint (`*.ckpt`) in it or below it, but found none" in error_of(capsys, "logs")


def test_a_weights_only_checkpoint_is_named_as_one(capsys):
    saved(None, weights_only=True)
    error = error_of(capsys, "run.ckpt")
    assert "is a weights-only checkpoint, which holds no state of callbacks" in error
    assert "`save_weights_only=True`" in error


def test_a_checkpoint_of_a_run_without_the_callback_is_named_as_one(capsys):
    run = trainer(ModelCheckpoint("."), enable_checkpointing=True)
    run.fit(Net(), loader())
    run.save_checkpoint("other.ckpt")
    assert "was written without `AutoClip` or `GradientClipping`" in error_of(capsys, "other.ckpt")


def with_group(state: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    group = state["groups"]["autoclip/"]
    return {**state, "groups": {"autoclip/": {**group, key: value}}}


STATES: dict[str, Any] = {
    "without keys": lambda state: {"groups": {}},
    "a list": lambda state: [1],
    "a foreign object": lambda state: Encoder(),
    "another version": lambda state: {**state, "version": 7},
    "settings without the policy": lambda state: {**state, "settings": {"window": 7}},
    "a number for a group": lambda state: {**state, "groups": {"autoclip/": 1}},
    "a list for a log": lambda state: with_group(state, "log", [1]),
    "a foreign clipper": lambda state: with_group(state, "clipper", Encoder()),
    "a log whose largest steps are numbers": lambda state: with_group(
        state, "log", {**state["groups"]["autoclip/"]["log"], "largest": [1, 2]}
    ),
}


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_a_state_that_is_none_of_ours_is_one_clear_line(state, capsys):
    sound = trained()[1].state_dict()
    torch.save({"pytorch-lightning_version": "2.6", "callbacks": {"AutoClip": state(sound)}}, "other.ckpt")
    assert "The norm history in other.ckpt cannot be read" in error_of(capsys, "other.ckpt")


def old_format(path: str) -> None:
    torch.save({"callbacks": {}}, path, _use_new_zipfile_serialization=False)


FILES: dict[str, tuple[Any, str]] = {
    "missing.ckpt": (lambda path: None, "No such file"),
    f"{'x' * 300}.ckpt": (lambda path: None, "name too long"),
    "empty.ckpt": (lambda path: Path(path).touch(), "to be a checkpoint of `torch.save`"),
    "text.ckpt": (lambda path: Path(path).write_text("no checkpoint"), "to be a checkpoint of `torch.save`"),
    "metrics.csv": (lambda path: Path(path).write_text("step,loss\n1,2.0\n"), "to be a checkpoint of `torch.save`"),
    "bytes.ckpt": (lambda path: Path(path).write_bytes(Random(0).randbytes(4000)), "to be a checkpoint of"),
    "pickle.ckpt": (lambda path: Path(path).write_bytes(pickle.dumps(Bomb())), "to be a checkpoint of `torch.save`"),
    "zip.ckpt": (lambda path: zipfile.ZipFile(path, "w").close(), "to be a checkpoint of `torch.save`"),
    "old.ckpt": (old_format, "to be a checkpoint of `torch.save`"),
    "weights.pt": (lambda path: torch.save(Net().state_dict(), path), "but it is another file of torch"),
    "tensor.pt": (lambda path: torch.save(torch.ones(3), path), "but it is another file of torch"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_checkpoint_is_one_clear_line(capsys, name):
    write, message = FILES[name]
    write(name)
    for command in ("report", "suggest"):
        assert message in error_of(capsys, name, command)
    assert not Path("exploded").exists()


@pytest.mark.parametrize("part", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_one_clear_line(capsys, part):
    saved(Encoder())
    whole = Path("run.ckpt").read_bytes()
    Path("run.ckpt").write_bytes(whole[: int(part * len(whole))])
    assert "to be a checkpoint of `torch.save`, but it cannot be read" in error_of(capsys, "run.ckpt")


def test_a_file_with_other_bytes_is_a_report_or_one_clear_line(capsys):
    saved(Encoder())
    whole, random, reports = Path("run.ckpt").read_bytes(), Random(0), 0
    for _ in range(100):
        at = random.randrange(len(whole))
        Path("run.ckpt").write_bytes(whole[:at] + random.randbytes(random.choice([1, 4, 30])) + whole[at + 4 :])
        reports += (code := main(["report", "run.ckpt"])) == 0
        said = capsys.readouterr()
        assert code == 0 or (said.out == "" and len(said.err.splitlines()) == 1), said
    assert reports < 100
