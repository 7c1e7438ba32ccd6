"""The documentation: links and anchors resolve, and its pages, names and options are those of the code. No network."""

from __future__ import annotations

import importlib
import re
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import yaml

import lightning_autoclip
from lightning_autoclip.__main__ import main
from lightning_autoclip.steplog import StepLog

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("**/*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]
API = (ROOT / "docs" / "api.md").read_text()


def prose(text: str) -> str:
    """The text without its code blocks and code spans: what looks like a link in them is none."""
    text = re.sub(r"^( *)```.*?^\1```$", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "code", text)


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as code hosts and the site make them, but not of a name's second heading."""
    text = re.sub(r"^( *)```.*?^\1```$", "", text, flags=re.DOTALL | re.MULTILINE)
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", text, re.MULTILINE):
        title = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").replace("*", "")
        found.add(re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-"))
    return found


def targets(page: Path) -> list[str]:
    """What a page links to or shows, except other sites: in Markdown, HTML, or as a reference."""
    text = prose(page.read_text())
    found = re.findall(r"\]\(<?([^()\s>]+)>?(?: +\"[^\"]*\")?\)", text)
    found += re.findall(r"(?:href|src)=\"([^\"]+)\"", text)
    found += re.findall(r"^\[[^\]]+\]: +(\S+)", text, re.MULTILINE)
    return [target for target in found if not re.match(r"https?://|mailto:", target)]


def problem(page: Path, target: str) -> str | None:
    """What is wrong with a link of this page, if anything is."""
    path, _, anchor = unquote(target).partition("#")
    file = (page.parent / path).resolve() if path else page
    if path.startswith("/") or not file.is_relative_to(ROOT):
        return f"{target} leaves the repository"
    if not file.exists():
        return f"{target} does not exist"
    if anchor and (file.suffix != ".md" or anchor not in anchors(file.read_text())):
        return f"{target} has no such heading"
    if page.parent.name == "docs" and not file.is_relative_to(ROOT / "docs"):
        return f"{target} is not on the site"
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_anchor_and_image_resolves(page):
    assert [problem(page, target) for target in targets(page) if problem(page, target)] == []


def test_the_link_check_sees_what_it_should(tmp_path, monkeypatch):
    (tmp_path / "docs").mkdir()
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    (tmp_path / "README.md").write_text("# Here\n\n## `a_b`, what?\n\n```text\n# no heading\n```\n")
    page = tmp_path / "docs" / "page.md"
    page.write_text(
        "# Page\n\n[a](page.md#page) [b](#page) [c](#here) [`d`](gone.md) ![e](no.png) [f](../README.md) [h](/at.md)\n"
        "`[g](no.md)` [i](https://example.org/#x)\n\n```python\n[k](no.md)\n```\n"
    )
    assert anchors((tmp_path / "README.md").read_text()) == {"here", "a_b-what"}
    assert targets(page) == ["page.md#page", "#page", "#here", "gone.md", "no.png", "../README.md", "/at.md"]
    assert [problem(page, target) is None for target in targets(page)] == [True, True] + 5 * [False]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_stands_only_in_blocks_that_are_run(page):
    fences = re.findall(r"^( *)(`{3,}|~{3,})(.*)$", page.read_text(), re.MULTILINE)
    opening = [(indent, fence, language) for indent, fence, language in fences[::2]]
    assert all(fence == "```" and not indent for indent, fence, _ in opening)
    assert {language for *_, language in opening} <= {"python", "bash", "text", "diff", "yaml", ""}
    assert all(language == "" for *_, language in fences[1::2])


def test_the_api_page_has_every_public_name_once_and_what_it_names_exists():
    named = re.findall(r"^::: (\S+)$", API, re.MULTILINE)
    assert len(named) == len(set(named))
    for name in named:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name
    public = {f"lightning_autoclip.{name}" for name in lightning_autoclip.__all__}
    assert {name for name in named if name.count(".") == 1} == public
    blocks = re.findall(r"^::: lightning_autoclip\.(\w+)\n(?: .*\n)*? +members: \[(.*)\]$", API, re.MULTILINE)
    assert blocks
    for name, members in blocks:
        for member in members.split(", "):
            assert getattr(getattr(lightning_autoclip, name), member).__doc__, f"{name}.{member}"


@pytest.mark.parametrize("command", ["report", "suggest"])
def test_the_api_page_shows_the_options_of_the_command_line(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    options = set(re.findall(r"--[a-z]+", capsys.readouterr().out)) - {"--help"}
    (usage,) = re.findall(rf"^python -m lightning_autoclip {command} (.*)$", API, re.MULTILINE)
    assert set(re.findall(r"--[a-z]+", usage)) == options


def test_the_api_page_lists_the_logged_keys():
    listed = set(re.findall(r"^\| `(autoclip/\w+(?:/\w+)*)`", API, re.MULTILINE))
    log = StepLog("autoclip/", by_value=True, skips_outliers=True)
    log.max_update_ratio, log.step_rows = 0.25, []
    assert listed == set(log.keys)


class _Plain(yaml.SafeLoader):
    """YAML without the tags, which only mkdocs knows."""


_Plain.add_multi_constructor("", lambda loader, suffix, node: None)


def site() -> dict[str, Any]:
    """The settings in mkdocs.yml."""
    return yaml.load((ROOT / "mkdocs.yml").read_text(), _Plain)


def test_the_navigation_names_every_page_once():
    pages = [page for entry in site()["nav"] for page in entry.values()]
    assert sorted(pages) == [str(page.relative_to(ROOT / "docs")) for page in DOCS]


def test_the_site_fetches_nothing_from_elsewhere():
    settings = site()
    assert settings["strict"] is True
    assert settings["theme"]["font"] is False
    assert "repo_url" not in settings
    assert "://" not in (ROOT / "mkdocs.yml").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_line_of_prose_begins_like_a_numbered_item(page):
    """A site would show it as one, and swallow the number."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    lines = ["", *text.splitlines()]
    for before, line in pairwise(lines):
        if re.match(r"\s*\d+[.)] ", line):
            assert not before.strip() or re.match(r"\d+[.)] |\s+\S", before), line
