"""The study: it runs, goes on where it was stopped, and the documentation shows what it found."""

import re
import sys

import numpy as np
import pytest
from helpers import read_csv
from processes import ROOT, run_program

STUDY, DOCS = ROOT / "examples" / "study", ROOT / "docs"


@pytest.fixture(scope="module", autouse=True)
def study_on_path():
    sys.path.insert(0, str(STUDY))
    yield
    sys.path.remove(str(STUDY))


def quick_study(out, processes):
    arguments = ["--quick", "--steps=6", "--seeds=1", f"--processes={processes}", "--out", out]
    done = run_program(STUDY / "study.py", *arguments, cwd=out)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    return out, quick_study(out, processes=2)


@pytest.mark.distributed
def test_the_quick_study_trains_every_rule_on_every_task_and_draws_what_it_found(quick):
    from study import QUICK_RULES, QUICK_TASKS

    out, printed = quick
    rows = read_csv(out / "quick.csv")
    assert {(row["task"], row["rule"]) for row in rows} == {(t, r) for t in QUICK_TASKS for r in QUICK_RULES}
    assert len(rows) == len(QUICK_TASKS) * len(QUICK_RULES)
    assert (out / "study.png").stat().st_size > 20_000
    assert all(rule in printed for rule in QUICK_RULES)


@pytest.mark.distributed
def test_regret_is_what_the_rows_say(quick):
    out, _ = quick
    errors = {(row["task"], row["rule"]): float(row["error"]) for row in read_csv(out / "quick.csv")}
    for row in read_csv(out / "summary.csv"):
        best = min(error for (task, rule), error in errors.items() if task == row["task"] and rule.startswith("fixed"))
        regret = 100 * (errors[row["task"], row["rule"]] / best - 1)
        np.testing.assert_allclose(float(row["regret"]), regret, rtol=1e-4, atol=1e-4)


@pytest.mark.distributed
def test_a_study_that_was_stopped_goes_on_where_it_was_and_repeats_to_the_bit_on_fewer_processes(quick):
    out, _ = quick
    path = out / "quick.csv"
    whole = path.read_text().splitlines(keepends=True)
    path.write_text("".join(whole[:-5]))
    assert f"{len(whole) - 6} trainings are done, 5 to do" in quick_study(out, processes=1)
    without_seconds = [{line.rsplit(",", 1)[0] for line in lines} for lines in (whole, path.read_text().splitlines())]
    assert without_seconds[0] == without_seconds[1]


@pytest.mark.parametrize("name", ["reading", "rules", "tasks", "scale", "rates", "paper"])
def test_the_page_shows_the_tables_of_the_recorded_figures(name):
    from _report import read_summary, tables

    page = (DOCS / "study.md").read_text(encoding="utf-8")
    shown = re.search(rf"<!-- {name} -->\n\n(.*?)\n\n<!-- end -->", page, re.DOTALL)
    assert shown
    assert shown[1] == tables(read_summary(DOCS / "study.csv"))[name]


@pytest.mark.parametrize("page", ["choosing.md", "study.md"])
def test_figures_in_tables_by_task_are_those_of_the_study(page):
    from _report import read_summary

    summary = read_summary(DOCS / "study.csv")
    tables = re.findall(r"^\| (regret|factor) \|(.*)\n\|[-| ]+\n((?:\|.*\n)+)", (DOCS / page).read_text(), re.MULTILINE)
    assert tables or page != "choosing.md"
    for figure, rules, lines in tables:
        names = [rule.strip() for rule in rules.strip(" |").split("|")]
        for line in lines.splitlines():
            task, *cells = [cell.strip() for cell in line.strip("| ").split("|")]
            for rule, cell in zip(names, cells, strict=True):
                value = summary[task][rule][figure]
                digits = 2 if figure == "factor" else 0 if abs(value) >= 99.5 else 1
                assert cell == ("diverged" if value >= 1e4 else f"{value:.{digits}f}"), (task, rule)


def test_the_recorded_study_is_whole():
    """At least ten tasks with three seeds of every rule."""
    from _report import read_summary
    from _rules import RULES
    from _tasks import TASKS

    summary = read_summary(DOCS / "study.csv")
    compared = [task for task in TASKS if TASKS[task].group in ("choose", "report")]
    assert len(compared) >= 10
    for task in compared:
        assert {rule: figures["seeds"] for rule, figures in summary[task].items()} == dict.fromkeys(
            RULES, 3 * TASKS[task].repeats
        )
