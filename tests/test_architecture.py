"""The package: imports go one way, and nothing outside ``lightning/`` knows the Trainer."""

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
WITHOUT_LIGHTNING = [
    *(
        "_text",
        "_checks",
        "history",
        "policies",
        "settings",
        "shards",
        "gradients",
        "clip",
        "optimizers",
        "skip",
        "step",
    ),
    *("table", "layers", "steplog", "update_ratio", "committed", "clipper", "metric", "param_groups"),
    *("clipped_optimizer", "diagnoses", "report", "plot", "suggest", "checkpoint", "workspace", "__main__"),
]
WITH_LIGHTNING = [
    *("trainer", "strategies", "clipped_optimizers", "wandb", "loggers", "monitor", "callback", "autoclip"),
]
MODULES = [*WITHOUT_LIGHTNING, "lightning", *(f"lightning.{name}" for name in WITH_LIGHTNING), "lightning_autoclip"]


def file_of(module: str) -> Path:
    """The file of a module; of a folder its ``__init__.py``."""
    path = PACKAGE if module == "lightning_autoclip" else PACKAGE.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


TREES = {module: ast.parse(file_of(module).read_text()) for module in MODULES}


def imports(module: str) -> set[str]:
    """The full names of all modules that a module imports, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names |= {
                name if name.removeprefix("lightning_autoclip.") in MODULES else str(node.module) for name in inside
            }
    return names


def test_every_file_is_listed():
    assert sorted(PACKAGE.glob("**/*.py")) == sorted(map(file_of, MODULES))


def test_the_page_lists_the_modules_in_their_order():
    page = (ROOT / "docs" / "architecture.md").read_text()
    listed = re.findall(r"^\| `([\w/]+)\.py` \|", page, re.MULTILINE)
    files = [file_of(module).relative_to(PACKAGE).with_suffix("").as_posix() for module in MODULES]
    assert listed == [file for file in files if "__init__" not in file]


def test_a_module_imports_only_modules_before_it():
    for place, module in enumerate(MODULES):
        used = {name.removeprefix("lightning_autoclip.") for name in imports(module) if "lightning_autoclip" in name}
        assert used <= set(MODULES[:place]), module


def test_nothing_outside_of_its_folder_imports_lightning():
    for module in WITHOUT_LIGHTNING:
        assert not {name for name in imports(module) if name.split(".")[0] in ("lightning", "pytorch_lightning")}


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


def test_functions_stay_short():
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lines = (body[-1].end_lineno - body[0].lineno + 1) if body else 0
                assert lines <= 40, f"{module}: {node.name} has {lines} lines"


def test_the_version_is_the_one_that_is_installed():
    from importlib.metadata import version

    assert version("lightning-autoclip") == lightning_autoclip.__version__
