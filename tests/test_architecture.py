"""The house: imports flow one way, and the arithmetic knows nothing of the Trainer."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_autoclip

PACKAGE = Path(lightning_autoclip.__file__).parent
_ARITHMETIC = ["_checks", "_numbers", "history", "policies", "gradients", "optimizers", "clipper", "groups"]
_LOOKING_BACK = ["trace", "report", "plot", "recorded", "suggest", "__main__"]
WITHOUT_LIGHTNING = [*_ARITHMETIC, *_LOOKING_BACK]
_WITH_LIGHTNING = ["strategies", "recorder", "wandb", "workspace", "tables", "callback", "autoclip"]
ROOMS = [*WITHOUT_LIGHTNING, *_WITH_LIGHTNING, "__init__"]


def imports(room: str) -> set[str]:
    """The full names of all modules that a room imports, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{room}.py").read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{room}.py has a relative import"
            if node.module == "lightning_autoclip":
                names |= {f"lightning_autoclip.{alias.name}" for alias in node.names}
            else:
                names.add(str(node.module))
    return names


def test_every_file_is_a_room():
    assert sorted(path.stem for path in PACKAGE.glob("**/*.py")) == sorted(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_rooms_before_it(room):
    used = {name.removeprefix("lightning_autoclip.") for name in imports(room) if name.startswith("lightning_autoclip")}
    assert used <= set(ROOMS[: ROOMS.index(room)])


@pytest.mark.parametrize("room", WITHOUT_LIGHTNING)
def test_the_arithmetic_does_not_import_lightning(room):
    assert not {name for name in imports(room) if name.split(".")[0] in ("lightning", "pytorch_lightning")}


def test_every_public_name_is_there_and_documented():
    for name in lightning_autoclip.__all__:
        assert getattr(lightning_autoclip, name).__doc__.strip()


def test_wandb_and_matplotlib_are_optional():
    code = (
        "import sys, lightning.pytorch, torchmetrics;"  # they look for both themselves
        "sys.modules['wandb'] = sys.modules['matplotlib'] = None;"
        "from lightning_autoclip import AutoClip; AutoClip()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)


@pytest.mark.parametrize("room", ROOMS)
def test_functions_stay_short(room):
    for node in ast.walk(ast.parse((PACKAGE / f"{room}.py").read_text())):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = (body[-1].end_lineno - body[0].lineno + 1) if body else 0
            assert lines <= 40, f"{room}.py: {node.name} has {lines} lines"


def test_the_version_is_the_one_that_is_installed():
    from importlib.metadata import version

    assert version("lightning-autoclip") == lightning_autoclip.__version__
