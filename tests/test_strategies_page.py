"""The table of docs/strategies.md says what the tests and the code say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import test_precision
import test_sharded

from lightning_autoclip.strategies import _GRADIENTS

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/strategies.md").read_text()
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("| ")]
STRATEGIES = [row for row in ROWS if len(row) == 5 and row[0] != "strategy"]
PRECISIONS = [row for row in ROWS if len(row) == 4 and row[0] != "precision"]


def test_every_strategy_that_the_code_names_has_a_row_and_no_other():
    named = {name for row in STRATEGIES for name in re.findall(r"`(\w+Strategy)`", row[1])}
    assert named == set(_GRADIENTS)


@pytest.mark.parametrize("row", STRATEGIES, ids=lambda row: row[0])
def test_a_row_says_what_the_code_does(row):
    kinds = {_GRADIENTS[name] for name in re.findall(r"`(\w+)`", row[1])}
    for cell in row[2:4]:
        assert re.match(r"tested$|refused$|by hand: |read: ", cell)
    if kinds <= {"refused"}:
        assert row[2:4] == ["refused", "refused"]
    elif "in an engine" in kinds:
        assert row[3] == "refused"
    else:
        assert "refused" not in row[2:4]


@pytest.mark.parametrize("case", test_sharded.STRATEGIES)
def test_every_sharded_case_of_the_tests_has_a_row(case):
    sharding = (
        case.split()[1] if case.startswith("FSDP1") else {"two meshes": "two meshes in one model"}.get(case, case)
    )
    assert any(sharding in row[0] and row[4] == "`tests/test_sharded.py`" for row in STRATEGIES)


@pytest.mark.parametrize(
    "row", [row for row in STRATEGIES if "tests/test_sharded.py" in row[4]], ids=lambda row: row[0]
)
def test_every_sharded_row_is_a_case_of_the_tests(row):
    cases = " ".join(test_sharded.STRATEGIES)
    words = re.findall(r"`([A-Z_]+)`", row[0]) or [re.sub(r"^both, | in one model$|,.*", "", row[0])]
    assert all(word in cases for word in words)
    assert row[2:4] == ["tested", "tested"]
    assert test_sharded.ALGORITHMS == ("norm", "value")


def test_every_precision_of_the_tests_has_a_row():
    tested = {
        name for row in PRECISIONS if row[1:3] == ["tested", "tested"] for name in re.findall(r"`([\w-]+)`", row[0])
    }
    assert tested - {"GradScaler"} == set(test_precision.MODES)
