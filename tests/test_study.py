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
    return out, quick_study(out, processes=1)


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
def test_a_study_that_was_stopped_goes_on_where_it_was_and_repeats_to_the_bit_on_more_processes(quick):
    out, _ = quick
    path = out / "quick.csv"
    whole = path.read_text().splitlines(keepends=True)
    path.write_text("".join(whole[:-5]))
    assert f"{len(whole) - 6} trainings are done, 5 to do" in quick_study(out, processes=2)
    without_seconds = [{line.rsplit(",", 1)[0] for line in lines} for lines in (whole, path.read_text().splitlines())]
    assert without_seconds[0] == without_seconds[1]


@pytest.mark.parametrize("name", ["reading", "rules", "tasks", "scale", "rates", "paper"])
def test_the_page_shows_the_tables_of_the_recorded_figures(name):
    from _report import read_summary, tables

    page = (DOCS / "study.md").read_text(encoding="utf-8")
    shown = re.search(rf"<!-- {name} -->\n\n(.*?)\n\n<!-- end -->", page, re.DOTALL)
    assert shown
    assert shown[1] == tables(read_summary(DOCS / "study.csv"))[name]


@pytest.mark.parametrize("name", ["new rules", "new tasks", "leaning"])
def test_the_page_shows_the_tables_of_new_ground(name):
    from _new_ground import tables
    from _report import read_summary

    shown = re.search(rf"<!-- {name} -->\n\n(.*?)\n\n<!-- end -->", (DOCS / "study.md").read_text(), re.DOTALL)
    assert shown
    assert shown[1] == tables(read_summary(DOCS / "new-ground.csv"))[name]


@pytest.mark.parametrize("page", ["choosing.md", "study.md"])
def test_figures_in_tables_by_task_are_those_of_the_study(page):
    from _report import read_summary

    summary = read_summary(DOCS / "study.csv") | read_summary(DOCS / "new-ground.csv")
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


def test_the_recorded_study_of_new_ground_is_whole():
    """Three seeds of every rule on every task at every rate."""
    from _report import read_summary
    from _tasks import TASKS
    from study import OF_GROUP

    summary = read_summary(DOCS / "new-ground.csv")
    for task in (task for task in TASKS if TASKS[task].group in ("new", "further")):
        seeds = {rule: figures["seeds"] for rule, figures in summary[task].items()}
        assert seeds == dict.fromkeys(OF_GROUP[TASKS[task].group], 3)


def test_with_adam_a_rule_that_is_bounded_is_the_rule_without_the_bound():
    from study import RULES, TASKS, planned, train

    planned_rules = {rule for name, rule, *_ in planned(1, False, 5) if name == "lstm, Adam"}
    assert planned_rules == {rule for rule in RULES if " r0." not in rule}
    bounded, plain = (train(("lstm, Adam", rule, 0, 5))["error"] for rule in ("norm p50 r0.25", "norm p50"))
    assert bounded == plain
    assert not TASKS["lstm, Adam"].is_sgd


NEW = ("resnet BN, SGD", "resnet LN, Nesterov", "regression, SGD without momentum", "deep mlp, SGD of momentum 0.99",
       "gru, Nesterov", "words, SGD", "adapters, SGD", "logistic from zero, SGD", "GAN, SGD without momentum",
       "fine-tuning in groups, SGD")  # fmt: skip


def test_every_task_of_new_ground_is_there_at_four_rates():
    from _tasks import NEW_TASKS, TASKS

    assert tuple(NEW_TASKS) == NEW
    for name in NEW:
        rates = [TASKS[f"{name}, x{factor}"].lr for factor in ("1/4", "1", "4", "16")]
        np.testing.assert_allclose(rates, np.array([0.25, 1, 4, 16]) * NEW_TASKS[name].lr)


@pytest.mark.parametrize("name", NEW)
def test_rules_train_on_new_ground_from_the_same_start(name):
    """What never clips is what is not clipped, to the bit, whatever the way to clip; AGC leaves a last layer alone."""
    from study import train

    rules = ("none", "fixed norm 0.01", "fixed value 10", "norm p50", "AGC 0.01")
    errors = {rule: train((f"{name}, x1", rule, 0, 5))["error"] for rule in rules}
    assert all(np.isfinite(error) and error > 0 for error in errors.values())
    assert errors["none"] == errors["fixed value 10"]
    assert errors["none"] != errors["fixed norm 0.01"]
    assert (errors["none"] == errors["AGC 0.01"]) == name.startswith("logistic")


def test_what_is_trained_is_what_the_task_says():
    from _tasks import TASKS
    from study import Learner

    def optimizers(name):
        task = TASKS[f"{name}, x1"]
        found = Learner(task, task.problem(), 100).configure_optimizers()
        return found if isinstance(found, list) else [found]

    (adapters,) = optimizers("adapters, SGD")
    assert len(adapters.param_groups[0]["params"]) == 8
    (groups,) = optimizers("fine-tuning in groups, SGD")
    np.testing.assert_allclose(groups.param_groups[0]["lr"] * 10, groups.param_groups[1]["lr"])
    assert len(optimizers("GAN, SGD without momentum")) == 2


def test_the_rate_rises_along_a_line_and_falls_along_a_cosine():
    from _tasks import TASKS
    from study import Learner

    task = TASKS["resnet BN, SGD, x1"]
    found = Learner(task, task.problem(), 100).configure_optimizers()
    optimizer, schedule = found["optimizer"], found["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"] / task.lr)
        optimizer.step()
        schedule.step()
    falling = (1 + np.cos(np.pi * np.arange(90) / 90)) / 2
    np.testing.assert_allclose(rates, [*np.linspace(0.1, 0.91, 10), *falling], atol=1e-6)


def test_a_pretrained_network_is_the_same_whenever_it_is_trained():
    import torch
    from _heldout import _pretrained, adapters

    drawn = []
    for _ in range(2):  # trained anew, then taken from memory
        torch.manual_seed(3)
        network = adapters().network
        drawn.append((network[0].down.detach().clone(), network[0].frozen.weight.clone(), torch.rand(())))
    _pretrained.cache_clear()
    torch.manual_seed(3)
    network = adapters().network
    drawn.append((network[0].down.detach(), network[0].frozen.weight, torch.rand(())))
    for again in drawn[1:]:
        assert all(torch.equal(*pair) for pair in zip(drawn[0], again, strict=True))
