"""The table of docs/strategies.md says what the tests and the code say."""

from __future__ import annotations

import re
from pathlib import Path

import test_precision
import test_sharded

from lightning_autoclip.lightning.strategies import _GRADIENTS

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/strategies.md").read_text()
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("| ")]
STRATEGIES = [row for row in ROWS if len(row) == 5 and row[0] != "strategy"]
PRECISIONS = [row for row in ROWS if len(row) == 4 and row[0] != "precision"]


def test_the_rows_are_the_strategies_that_the_code_supports():
    named = {name for row in STRATEGIES for name in re.findall(r"`(\w+Strategy)`", row[1])}
    assert named == set(_GRADIENTS)
    for row in STRATEGIES:
        assert all(re.match(r"tested$|refused$|by hand: |read: ", cell) for cell in row[2:4]), row
        kinds = {_GRADIENTS[name] for name in re.findall(r"`(\w+)`", row[1])}
        assert (row[3] == "refused") == (kinds <= {"in an engine"}), row


def test_the_sharded_rows_are_the_cases_of_the_tests():
    rows = [row for row in STRATEGIES if "tests/test_sharded.py" in row[4]]
    for case in test_sharded.STRATEGIES:
        sharding = case.split()[1] if case.startswith("FSDP1") else case
        assert any(sharding in row[0] for row in rows), case
    cases = " ".join(test_sharded.STRATEGIES)
    for row in rows:
        words = re.findall(r"`([A-Z_]+)`", row[0]) or [re.sub(r"^both, | in one model$|,.*", "", row[0])]
        assert all(word in cases for word in words), row
        assert row[2:4] == ["tested", "tested"]
    assert test_sharded.ALGORITHMS == ("norm", "value")


def test_every_precision_of_the_tests_has_a_row():
    tested = {
        name for row in PRECISIONS if row[1:3] == ["tested", "tested"] for name in re.findall(r"`([\w-]+)`", row[0])
    }
    assert tested - {"GradScaler"} == {mode for mode, *_ in test_precision.CASES}
