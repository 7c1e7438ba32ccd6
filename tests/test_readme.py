"""Every Python block of README and docs runs, in order, and what they say of files is true."""

from __future__ import annotations

import re
from pathlib import Path

import packages_page
import pytest
from helpers import Net, loader

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
RUN_HERE = [page for page in PAGES if page != packages_page.PAGE]  # `make test-packages` runs the blocks of that one


@pytest.mark.parametrize("page", RUN_HERE, ids=lambda page: page.name)
@pytest.mark.filterwarnings("ignore")  # Lightning's advice on data loaders and loggers
def test_every_python_block_runs(page):
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert blocks or page.name != "README.md"
    names = {"model": Net(), "train_loader": loader()}
    for block in blocks:
        exec(compile(block, page.name, "exec"), names)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_every_file_that_is_named_exists(page):
    text = page.read_text()
    for target in re.findall(r"`(tests/[\w./]+)`", text):
        assert (ROOT / target).exists(), target
    for target in re.findall(r"`(\w+\.py)`", text):
        assert any([*(ROOT / folder).rglob(target)] for folder in ("examples", "lightning_autoclip")), target


def test_every_make_target_that_is_named_exists():
    targets = set(re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = re.findall(r"make (\w[\w-]*)", (ROOT / "README.md").read_text() + (ROOT / "CONTRIBUTING.md").read_text())
    assert named
    assert set(named) <= targets
