"""docs/performance.md shows the figures of the recorded runs, and the benchmarks still run."""

from __future__ import annotations

import json
import re
import sys
from functools import partial

import pytest
from processes import ROOT, run_program

sys.path.append(str(ROOT / "examples" / "benchmarks"))
from operations import RULES, of_groups, of_rule, of_torch

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


MANY = json.loads((ROOT / "docs" / "overhead-many.json").read_text())["rules"]


@pytest.mark.parametrize("row", MANY[1:], ids=lambda row: row["rule"])
def test_each_rule_shows_its_recorded_figures_of_many_tensors(row):
    name = f"{row['rule']} in 10,000".replace(",", "")
    assert cells(name) == [[round(row["added_us"] / 1000)], [round(row["ratio"], 2)]]


@pytest.mark.parametrize("length", sorted({row["recorded"] for row in RECORDED["histories"]}))
def test_each_length_of_the_history_shows_its_recorded_figures(length):
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


@pytest.mark.parametrize("name", ["torch, norm", "torch, value", *(f"ours, {rule[0]}" for rule in RULES)])
def test_a_step_dispatches_the_operations_that_the_page_shows(name):
    of = {f"ours, {rule[0]}": partial(of_rule, rule) for rule in RULES}
    of |= {f"torch, {algorithm}": partial(of_torch, algorithm) for algorithm in ("norm", "value")}
    (line,) = (line for line in PAGE.splitlines() if line.startswith(f"| {name} |") and " ms " not in line)
    shown = [int(cell.replace(",", "")) for cell in line.strip("|").split("|")[1:]]
    assert [sum(of[name](count).values()) for count in (6, 100, 1000)] == shown


def most_of(rule):
    """The most operations of one step: of torch's `clip_grad_norm_` they are 8."""
    by_value, has_limit = rule[1] == "value", rule[-1] is not None
    return 3 + by_value if "one read" in rule[0] else (17 + 9 * has_limit if by_value else 16 + 6 * has_limit)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule[0])
def test_what_a_step_dispatches_is_bounded(rule):
    for window in (10, None):
        nonfinite = [] if "raise" in rule[0] else [float("nan")]  # which ends a run there
        for factor in (5.0, 0.5, 0.0, *nonfinite):
            assert sum(of_rule(rule, 6, window, factor).values()) <= most_of(rule), (window, factor)


def test_each_further_group_dispatches_nine_operations_at_most():
    two, five = (sum(of_groups(count).values()) for count in (2, 5))
    assert two <= 16 + 1 + 9  # to pick the norms of the first group takes one
    assert five - two <= 3 * 9


ON_CUDA = json.loads((ROOT / "docs" / "overhead-cuda.json").read_text())["rows"]


@pytest.mark.parametrize("rule", list(dict.fromkeys(row["rule"] for row in ON_CUDA)))
def test_each_rule_shows_its_recorded_figures_on_a_gpu(rule):
    (head,) = (line for line in PAGE.splitlines() if line.startswith("| device time"))
    (line,) = (line for line in PAGE.splitlines() if line.startswith(f"| {rule} |") and " ms " in line)
    recorded = {(row["model"], row["dtype"]): row for row in ON_CUDA if row["rule"] == rule}
    for title, cell in zip(head.strip("|").split(" | ")[1:], line.strip("|").split("|")[1:], strict=True):
        row = recorded.get(tuple(title.strip(" |").rsplit(", ", 1)))
        shown = f"{row['device_ms']:.2f} ms · {row['device_ratio']:.2f}" if row else "-"
        assert cell.strip() == shown
    assert all(row["waits"] == ("one read" in rule) for row in recorded.values())


SOAKED = json.loads((ROOT / "docs" / "soak.json").read_text())


@pytest.mark.parametrize(
    ("where", "run"), [(name, run) for name, key in (("CPU", "cpu"), ("H100", "gpu")) for run in SOAKED[key]["runs"]]
)
def test_each_long_run_shows_its_recorded_figures(where, run):
    first, last = run["parts"][1], run["parts"][-1]
    memory, took = (f"{first[key]:.0f} to {last[key]:.0f}" for key in ("memory_mb", "step_us"))
    name = f"{where}, window {run['window'] or 'of all steps'}"
    (line,) = (line for line in PAGE.splitlines() if line.startswith(f"| {name} |"))
    assert f"| {run['steps']:,} | {memory} MB | {took} µs | {run['entry_kb']:.0f} kB |" in line
    assert line.endswith("| nothing |") == (run["worst_threshold"] == 0)
    assert run["rows"] == run["steps"]
    assert last["memory_mb"] < 1.05 * first["memory_mb"]


def test_the_soak_runs(tmp_path):
    program = ROOT / "examples" / "benchmarks" / "soak.py"
    done = run_program(program, "--steps", 400, "--out", tmp_path / "soak.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "soak.json").read_text())
    assert [(run["rows"], run["worst_threshold"] < 1e-6) for run in found["runs"]] == [(400, True)] * 2
    assert all(each["worst_threshold"] < 1e-6 for each in found["histories"])
