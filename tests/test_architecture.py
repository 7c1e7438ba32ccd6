"""The house: imports flow one way, and the arithmetic knows nothing of the Trainer."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from processes import ROOT, run_program

import lightning_autoclip

PACKAGE = Path(lightning_autoclip.__file__).parent
_CLIPPING = [
    "_numbers",
    "record",
    "metric",
    "policies",
    "shards",
    "gradients",
    "clip",
    "gate",
    "optimizers",
    "bound",
]
_CLIPPING += ["outliers", "threshold", "step", "parts", "clipper"]
_MONITORING = [
    "summary",
    "trace",
    "held",
    "recorder",
    "verdicts",
    "report",
    "plot",
    "texts",
    "suggest",
]
_LOGGERS = ["wandb", "loggers", "workspace"]
WITHOUT_LIGHTNING = [
    "_text",
    "_checks",
    "clipping",
    *(f"clipping.{room}" for room in _CLIPPING),
    "groups",
    "monitoring",
    *(f"monitoring.{room}" for room in _MONITORING),
    "settings",
    "steps",
    "checkpoint",
    "__main__",
]
_LAST = ["scopes", "strategies", "telling", "callback", "autoclip"]
_WITH_LIGHTNING = [*(f"monitoring.{room}" for room in _LOGGERS), *_LAST]
ROOMS = [*WITHOUT_LIGHTNING, *_WITH_LIGHTNING, "lightning_autoclip"]


def file_of(room: str) -> Path:
    """The file of a room; of a folder its ``__init__.py``."""
    path = PACKAGE if room == "lightning_autoclip" else PACKAGE.joinpath(*room.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def imports(room: str) -> set[str]:
    """The full names of all modules that a room imports, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file_of(room).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{room}.py has a relative import"
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names |= {
                name if name.removeprefix("lightning_autoclip.") in ROOMS else str(node.module) for name in inside
            }
    return names


def test_every_file_is_a_room():
    assert sorted(PACKAGE.glob("**/*.py")) == sorted(map(file_of, ROOMS))


def test_the_page_lists_the_rooms_in_their_order():
    page = (ROOT / "docs" / "architecture.md").read_text()
    listed = re.findall(r"^\| `([\w/]+)\.py` \|", page, re.MULTILINE)
    files = [file_of(room).relative_to(PACKAGE).with_suffix("").as_posix() for room in ROOMS]
    assert listed == [file for file in files if "/__init__" not in file]


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_rooms_before_it(room):
    used = {name.removeprefix("lightning_autoclip.") for name in imports(room) if name.startswith("lightning_autoclip")}
    assert used <= set(ROOMS[: ROOMS.index(room)])


@pytest.mark.parametrize("room", WITHOUT_LIGHTNING)
def test_the_arithmetic_does_not_import_lightning(room):
    assert not {name for name in imports(room) if name.split(".")[0] in ("lightning", "pytorch_lightning")}


def test_the_command_line_and_a_loop_without_a_trainer_need_not_wait_for_lightning():
    program = (
        "import sys, lightning_autoclip.__main__; from lightning_autoclip import GradientClipper, Percentile\n"
        "sys.exit(str({'lightning', 'pytorch_lightning', 'torchmetrics'} & sys.modules.keys() or ''))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stderr.strip() == ""


def test_every_public_name_is_there_and_documented():
    assert set(lightning_autoclip.__all__) <= set(dir(lightning_autoclip))
    for name in lightning_autoclip.__all__:
        assert getattr(lightning_autoclip, name).__doc__.strip()
    with pytest.raises(AttributeError, match="has no attribute 'Autoclip'"):
        lightning_autoclip.Autoclip  # noqa: B018


def test_wandb_and_matplotlib_are_optional():
    Path("program.py").write_text(
        "import sys, lightning.pytorch, torchmetrics\n"  # they look for both themselves
        "sys.modules['wandb'] = sys.modules['wandb_workspaces'] = sys.modules['matplotlib'] = None\n"
        "from lightning_autoclip import AutoClip, create_workspace\nAutoClip()"
    )
    assert run_program(Path("program.py")).returncode == 0


@pytest.mark.parametrize("room", ROOMS)
def test_functions_stay_short(room):
    for node in ast.walk(ast.parse(file_of(room).read_text())):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = (body[-1].end_lineno - body[0].lineno + 1) if body else 0
            assert lines <= 40, f"{room}.py: {node.name} has {lines} lines"


def test_the_version_is_the_one_that_is_installed():
    from importlib.metadata import version

    assert version("lightning-autoclip") == lightning_autoclip.__version__
