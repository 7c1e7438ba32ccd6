"""The page on other packages: those that `make test-packages` installs, their versions, and code that it runs."""

from __future__ import annotations

import ast
import importlib
import pickle
import pickletools
import re

import packages_page
import pytest
from packages_page import PAGE, ROOT, code, sections

from lightning_autoclip import AutoClip

MAKEFILE = (ROOT / "Makefile").read_text().replace("\\\n", " ")
INSTALLED = dict(re.findall(r"([a-z-]+)(?:\[\w+\])?==([\d.]+)", " ".join(re.findall(r"PACKAGES := (.*)", MAKEFILE))))
TESTS = {
    section: path
    for path in (ROOT / "tests" / "packages").glob("test_*.py")
    for section in re.findall(r'^SECTION = "(.+)"$', path.read_text(), re.MULTILINE)
}


def test_the_table_has_every_package_with_the_version_that_is_installed():
    rows = re.findall(r"^\| \[([\w-]+)\]\(#([\w-]+)\) \| ([\d.]+) \|", PAGE.read_text(), re.MULTILINE)
    assert len(INSTALLED) == 10
    assert {name: version for name, _, version in rows} == INSTALLED
    assert all(name == anchor for name, anchor, _ in rows)


def test_every_package_has_a_section_and_no_other():
    assert list(sections()) == list(INSTALLED)


def test_every_section_is_run_by_the_test_of_its_package():
    assert set(TESTS) == set(INSTALLED)
    for path in TESTS.values():
        assert "run_page(" in path.read_text()


def test_the_tests_run_where_their_package_is_installed():
    """A test file is left out where there is no module of its name, so it has to be the name of one."""
    for section, path in TESTS.items():
        assert path.stem.removeprefix("test_") == {"scvi-tools": "scvi"}.get(section, section.replace("-", "_"))
    (target,) = re.findall(r"^test-packages: .*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)
    assert re.findall(r"(\S+)/bin/pytest -q tests/packages$", target, re.MULTILINE) == [
        ".venv-packages",
        ".venv-packages-vision",
    ]


@pytest.mark.parametrize("name", sections())
def test_the_code_takes_from_this_library_what_is_there(name):
    taken = [
        (node.module, alias.name)
        for node in ast.walk(ast.parse(code(name)))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("lightning_autoclip")
        for alias in node.names
    ]
    assert ("lightning_autoclip", "AutoClip") in taken
    for module, attribute in taken:
        assert hasattr(importlib.import_module(module), attribute)


def test_the_page_names_every_class_that_safe_loading_asks_for():
    names = set()
    for operation, argument, _ in pickletools.genops(pickle.dumps(AutoClip(), 2)):
        if operation.name == "GLOBAL" and argument.startswith("lightning_autoclip"):
            names.add(argument.split()[1])
    (listed,) = re.findall(r"^with safe_globals\(\[(.*)\]\):$", code("darts"), re.MULTILINE)
    assert sorted(names) == listed.split(", ")


def test_a_section_without_code_is_noticed(monkeypatch, tmp_path):
    (tmp_path / "page.md").write_text("# Page\n\n## one\n\n```python\nx = given + 1\n```\n\n## two\n\nNothing.\n")
    monkeypatch.setattr(packages_page, "PAGE", tmp_path / "page.md")
    assert packages_page.run("one", given=1)["x"] == 2
    with pytest.raises(AssertionError, match="the section of two has no code"):
        code("two")
