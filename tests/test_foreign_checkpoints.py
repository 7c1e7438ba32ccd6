"""Checkpoints that hold other people's objects are read, and nothing of theirs is run, imported or needed."""

from __future__ import annotations

import io
import pickle
import sys
import tracemalloc
import zipfile
from collections import Counter, OrderedDict, defaultdict, deque
from dataclasses import dataclass, field
from enum import Enum
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from helpers import Net, loader, trainer
from lightning.pytorch import Trainer
from processes import run_program
from torch import nn

from lightning_autoclip import AutoClip
from lightning_autoclip.__main__ import main
from lightning_autoclip.monitoring.runs import read_run


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, how: str = "call") -> None:
        self.how = how

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("exploded"),)) if self.how == "call" else (exec, ("open('exploded', 'w')",))


class Config:
    def __init__(self) -> None:
        self.layers, self.parent = [1, 2], self  # a circle


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
    "a bomb of code": lambda: Bomb("code"),
    "a bomb as a key": lambda: {Shape(1, 2): Bomb()},
    "a dataclass": lambda: Encoder(),
    "a class": lambda: Config(),
    "a class itself": lambda: Config,
    "slots": lambda: Slotted(),
    "a state of its own": lambda: WithState(),
    "an array": lambda: Encoder(table=np.arange(6.0).reshape(2, 3)),
    "an array of objects": lambda: Encoder(table=np.array([Encoder(), None], dtype=object)),
    "a scalar": lambda: np.float64(0.5),
    "a dtype": lambda: np.dtype("float32"),
    "an ordered dict of its own": lambda: Registry(a=1, b=Encoder()),
    "a list of its own": lambda: Words(["a", "b"]),
    "a set of its own": lambda: Tags({"a", "b"}),
    "an enum": lambda: [Kind.FIRST, Kind.SECOND],
    "a path": lambda: Path("data"),
    "a deque": lambda: deque([1, 2], maxlen=3),
    "a default dict": lambda: defaultdict(list, a=[1]),
    "a counter": lambda: Counter("abba"),
    "a partial": lambda: partial(torch.optim.SGD, lr=0.1),
    "a module": lambda: nn.Sequential(nn.Linear(3, 2), nn.ReLU()),
    "a function": lambda: torch.nn.functional.relu,
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


def saved(thing: Any, path: str = "foreign.ckpt") -> AutoClip:
    """A checkpoint of the run, with hyperparameters that hold the thing."""
    run, callback = trained()
    run.lightning_module.save_hyperparameters({"thing": thing, "lr": 0.1})
    run.save_checkpoint(path)
    Path("exploded").unlink(missing_ok=True)  # Lightning copies hyperparameters
    return callback


@pytest.mark.parametrize("make", OBJECTS.values(), ids=OBJECTS)
def test_the_report_of_a_checkpoint_with_a_foreign_object_is_that_of_the_callback(make, capsys):
    callback = saved(make())
    read = read_run(Path("foreign.ckpt"))
    assert (read.source, str(read.report())) == ("checkpoint foreign.ckpt", str(callback.report()))
    assert main(["suggest", "foreign.ckpt"]) == 0
    assert "64 norms" in capsys.readouterr().out
    assert not Path("exploded").exists()


def test_the_foreign_objects_are_harmful_indeed():
    saved(Bomb())
    torch.load("foreign.ckpt", weights_only=False)
    assert Path("exploded").exists()


def test_classes_of_a_package_that_is_not_there_are_not_needed(tmp_path, capsys):
    (tmp_path / "chemistry.py").write_text("class Featurizer:\n    pass\n")
    program = tmp_path / "program.py"
    program.write_text(
        "from test_foreign_checkpoints import saved; from chemistry import Featurizer; callback = saved(Featurizer());"
        "print(callback.report())"
    )
    done = run_program(program)
    assert done.returncode == 0, done.stderr
    assert main(["report", "foreign.ckpt"]) == 0
    assert capsys.readouterr().out == f"checkpoint foreign.ckpt\n{done.stdout}"
    assert "chemistry" not in sys.modules


PLACES = {
    "the whole entry": lambda state: Bomb("code"),
    "a trace": lambda state: {**state, "traces": {"autoclip/": Bomb("code")}},
    "a key": lambda state: {**state, Shape(1, 2): 1},
    "a record": lambda state: {**state, "scopes": {"autoclip/": Bomb("code")}},
    "the settings": lambda state: {**state, "settings": {**state["settings"], "groups": {"a": [Encoder()]}}},
    "a flag": lambda state: {**state, "has_scaler": Config},
}


@pytest.mark.parametrize("put", PLACES.values(), ids=PLACES)
def test_an_object_in_our_own_entry_is_damage_that_is_named_in_full(put, capsys):
    saved(None)
    checkpoint = torch.load("foreign.ckpt", weights_only=False)
    checkpoint["callbacks"]["GradientClipping"] = put(checkpoint["callbacks"]["GradientClipping"])
    torch.save(checkpoint, "bad.ckpt")
    assert main(["report", "bad.ckpt"]) == 1
    error = capsys.readouterr().err
    assert "bad.ckpt is damaged" in error
    assert len(error.strip().splitlines()) == 1
    module = "test_foreign_checkpoints"
    assert any(name in error for name in (".exec`", f"`{module}.Shape`", f"`{module}.Encoder`", f"`{module}.Config`"))
    assert not Path("exploded").exists()


def test_a_checkpoint_in_the_old_format_is_refused_in_one_sentence(capsys):
    saved(None)
    checkpoint = torch.load("foreign.ckpt", weights_only=False)
    torch.save(checkpoint, "old.ckpt", _use_new_zipfile_serialization=False)
    assert main(["report", "old.ckpt"]) == 1
    assert "old.ckpt to be a checkpoint, as `torch.save` writes it since torch 1.6" in capsys.readouterr().err


def rewritten(replace: Any) -> None:
    """The checkpoint with the names and contents in its archive replaced."""
    with zipfile.ZipFile("foreign.ckpt") as old, zipfile.ZipFile("bad.ckpt", "w") as new:
        for name in old.namelist():
            content = replace(name, old.read(name))
            if content is not None:
                new.writestr(name, content)


def pickled(value: Any) -> bytes:
    file = io.BytesIO()
    pickle.Pickler(file, 2).dump(value)
    return file.getvalue()


DAMAGES: dict[str, Any] = {
    "no pickle": lambda name, data: None if name.endswith("data.pkl") else data,
    "half a pickle": lambda name, data: data[: len(data) // 2] if name.endswith("data.pkl") else data,
    "an empty pickle": lambda name, data: b"" if name.endswith("data.pkl") else data,
    "another pickle": lambda name, data: pickled([1, 2]) if name.endswith("data.pkl") else data,
    "a bomb": lambda name, data: pickled(Bomb()) if name.endswith("data.pkl") else data,
    "no numbers": lambda name, data: None if "/data/" in name else data,
    "too few numbers": lambda name, data: data[:8] if "/data/" in name else data,
    "odd numbers": lambda name, data: data[:-1] if "/data/" in name else data,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_one_clear_line(damage, capsys):
    saved(Encoder())
    rewritten(damage)
    assert main(["report", "bad.ckpt"]) == 1
    error = capsys.readouterr().err
    assert "bad.ckpt" in error
    assert len(error.strip().splitlines()) == 1
    assert not Path("exploded").exists()


def test_an_entry_that_holds_itself_is_damage(capsys):
    saved(None)
    checkpoint = torch.load("foreign.ckpt", weights_only=False)
    state = checkpoint["callbacks"]["GradientClipping"]
    state["settings"]["groups"] = state
    torch.save(checkpoint, "bad.ckpt")
    assert main(["report", "bad.ckpt"]) == 1
    assert "bad.ckpt is damaged" in capsys.readouterr().err


def test_a_few_bytes_do_not_take_gigabytes(capsys):
    """The index of a memo, and the strides of a tensor, are numbers that anybody can write."""
    saved(None)
    memo = b"\x80\x02}r" + (2**26).to_bytes(4, "little") + b"."
    rewritten(lambda name, data: memo if name.endswith("data.pkl") else data)
    tracemalloc.start()
    try:
        assert main(["report", "bad.ckpt"]) == 1
        checkpoint = torch.load("foreign.ckpt", weights_only=False)
        record = checkpoint["callbacks"]["GradientClipping"]["scopes"]["autoclip/"]["clipper"]["history"]
        record["values"] = torch.zeros(1).expand(10**12)
        torch.save(checkpoint, "bad.ckpt")
        assert main(["report", "bad.ckpt"]) == 1
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()  # it slows everything that follows
    assert "a tensor of shape (1000000000000,) has 1 numbers" in capsys.readouterr().err


def shared_lists(record: dict[str, Any]) -> None:
    doubled: Any = []
    for _ in range(64):  # 2**64 entries in as many lists
        doubled = [doubled, doubled]
    record["values"] = doubled


def many_views(record: dict[str, Any]) -> None:
    whole = torch.zeros(100_000)
    record["values"] = [whole[:] for _ in range(2000)]  # 800 MB of 400 kB


@pytest.mark.parametrize("put", [shared_lists, many_views])
def test_what_is_shared_is_read_once_or_refused(put, capsys):
    saved(None)
    checkpoint = torch.load("foreign.ckpt", weights_only=False)
    put(checkpoint["callbacks"]["GradientClipping"]["scopes"]["autoclip/"]["clipper"]["history"])
    torch.save(checkpoint, "bad.ckpt")
    tracemalloc.start()
    try:
        assert main(["report", "bad.ckpt"]) == 1
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()
    assert "damaged" in capsys.readouterr().err


def test_a_compressed_archive_is_refused(capsys):
    saved(None)
    with zipfile.ZipFile("foreign.ckpt") as old, zipfile.ZipFile("bad.ckpt", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    assert main(["report", "bad.ckpt"]) == 1
    assert "is compressed" in capsys.readouterr().err
