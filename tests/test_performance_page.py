"""docs/performance.md shows the figures of the recorded run, and the benchmark still runs."""

from __future__ import annotations

import json
import re

import pytest
from processes import ROOT, run_program

RECORDED = json.loads((ROOT / "docs" / "overhead.json").read_text())
PAGE = (ROOT / "docs" / "performance.md").read_text()
TABLES = [re.sub(r" ·|,|µs", "", line) for line in PAGE.splitlines() if line.startswith("|")]


def cells(first: str) -> list[list[float]]:
    """The numbers of the table row whose first cell is the given one, cell by cell."""
    (line,) = (line for line in TABLES if line.startswith(f"| {first} |"))
    return [[float(number) for number in cell.split()] for cell in line.strip("|").split("|")[1:]]


@pytest.mark.parametrize("rule", [row["rule"] for row in RECORDED["rules"] if row["model"].startswith("MLP")][1:])
def test_each_rule_shows_its_recorded_figures(rule):
    rows = [row for row in RECORDED["rules"] if row["rule"] == rule]
    assert cells(rule.replace(",", "")) == [[round(row["added_us"]), round(row["ratio"], 2)] for row in rows]


@pytest.mark.parametrize("length", sorted({row["recorded"] for row in RECORDED["histories"]}))
def test_each_length_of_the_record_shows_its_recorded_figures(length):
    rows = [row for row in RECORDED["histories"] if row["recorded"] == length]
    assert cells(str(length)) == [[round(row["added_us"])] for row in rows]


def test_the_benchmark_runs(tmp_path):
    """Its quick form, without the two packages that `make bench` installs beside it."""
    script = ROOT / "examples" / "benchmarks" / "overhead.py"
    done = run_program(script, "--quick", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "overhead.json").read_text())
    rules = {row["rule"]: row for row in result["rules"]}
    assert all(rule in done.stdout for rule in rules)
    assert rules["no clipping"]["added_us"] == 0
    assert rules["hand-written AutoClip, p50"]["allocated_bytes"] > 0
    assert {"ours, norm, p10", "ours, value, p90", "Lightning, norm", "Lightning, value"} <= set(rules)
    assert {row["recorded"] for row in result["histories"]} == {100, 1000}
    assert result["logging"][0]["share"] > 0
