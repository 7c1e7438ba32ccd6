"""From the rows of the trainings to one line per task and rule, and from there to tables and figure."""

import csv
import math
import re
import shutil
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _figure import draw
from _rules import BOUNDED, DEFAULT, RULES
from _tasks import TASKS

# By rule, of one task: its figures. Errors are means over the seeds, regrets how far these lie above the error of the
# best fixed threshold, in percent, and `standard_error` is that of the regret, from seeds that the two share.
Figures = dict[str, float]
Summary = dict[str, dict[str, Figures]]
COLUMNS = ("seeds", "error", "regret", "standard_error", "clipped", "factor", "si_sdr", "si_sdr_error", "bounded",
           "update")  # fmt: skip
SHOWN = ("none", "fixed norm 0.1", "fixed norm 1", "norm p10", "norm p25", "norm p50", DEFAULT, "norm p50 r0.12",
         "norm p90", "norm p10 full",
         "value p10", "both p10 x 3")  # fmt: skip
HALVES = ("choose", "report")
MEANS = ("clipped", "factor", "si_sdr", "bounded", "update")


def summarise(rows: Path) -> Summary:
    """One line per task and rule from one row per training."""
    runs: dict[str, dict[str, dict[int, dict[str, float]]]] = defaultdict(lambda: defaultdict(dict))
    with rows.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            figures = {name: float(row[name]) for name in ("error", *MEANS) if row.get(name, "")}
            runs[row["task"]][row["rule"]][int(row["seed"])] = figures
    return {task: _of_task(_with_bounded(task, runs[task])) for task in TASKS if task in runs}


def _with_bounded(task: str, rules: dict[str, Any]) -> dict[str, Any]:
    """The rules with those that are bounded by the weights, which without SGD are the same trainings as without."""
    if TASKS[task].is_sgd:
        return rules
    return rules | {rule: rules[plain] for rule in BOUNDED if (plain := rule.rpartition(" ")[0]) in rules}


def _of_task(rules: dict[str, dict[int, dict[str, float]]]) -> dict[str, Figures]:
    """The means over the seeds, and the regrets."""
    summary: dict[str, Figures] = {}
    for rule, seeds in rules.items():
        figures = summary[rule] = {"seeds": len(seeds)}
        for name in ("error", *MEANS):
            values = [run[name] for run in seeds.values() if not math.isnan(run.get(name, math.nan)) or name == "error"]
            if values:
                figures[name] = float(np.mean(values)) if np.isfinite(values).all() else math.inf
            if name == "si_sdr" and len(values) > 1:
                figures["si_sdr_error"] = float(np.std(values, ddof=1) / math.sqrt(len(values)))
    best = best_fixed(summary)
    for rule, figures in summary.items() if best else ():
        figures["regret"] = 100 * (figures["error"] / summary[best]["error"] - 1)
        shared = rules[rule].keys() & rules[best].keys()
        if math.isfinite(figures["error"]) and len(shared) > 1:
            gaps = [rules[rule][seed]["error"] - rules[best][seed]["error"] for seed in shared]
            spread = np.std(gaps, ddof=1) / math.sqrt(len(gaps))
            figures["standard_error"] = float(100 * spread / summary[best]["error"])
    return summary


def best_fixed(rules: dict[str, Figures], kind: str = "fixed") -> str:
    """The threshold that a sweep over all of them finds: of the lowest mean error."""
    return min((rule for rule in rules if rule.startswith(kind)), key=lambda rule: rules[rule]["error"], default="")


def write_summary(summary: Summary, path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["task", "rule", *COLUMNS])
        for task, rules in summary.items():
            for rule, figures in rules.items():
                table.writerow([task, rule, *[f"{figures[name]:.5g}" if name in figures else "" for name in COLUMNS]])


def read_summary(path: Path) -> Summary:
    summary: Summary = defaultdict(dict)
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            summary[row["task"]][row["rule"]] = {name: float(row[name]) for name in COLUMNS if row[name]}
    return dict(summary)


def write_report(rows: Path, out: Path) -> None:
    """Write ``summary.csv``, ``results.md`` and ``study.png``, and print the tables."""
    write_summary(summarise(rows), out / "summary.csv")
    summary = read_summary(out / "summary.csv")
    text = "\n\n".join(part for part in tables(summary).values() if part)
    print(text)
    (out / "results.md").write_text(f"{text}\n", encoding="utf-8")
    draw(in_group(summary, *HALVES), best_fixed, out / "study.png")


def publish(out: Path, docs: Path) -> None:
    """Take summary, figure and tables over into the documentation."""
    write_summary(summary := read_summary(out / "summary.csv"), docs / "study.csv")
    shutil.copy(out / "study.png", docs / "study.png")
    show_tables(docs, tables(summary))


def show_tables(docs: Path, shown: dict[str, str]) -> None:
    """Put tables where the page has the comments that name them."""
    page = (docs / "study.md").read_text(encoding="utf-8")
    for name, table in shown.items():
        page = re.sub(rf"(<!-- {name} -->\n).*?(<!-- end -->)", rf"\1\n{table}\n\n\2", page, flags=re.DOTALL)
    (docs / "study.md").write_text(page, encoding="utf-8")


def tables(summary: Summary) -> dict[str, str]:
    """What the documentation shows, by name."""
    compared = in_group(summary, *HALVES)
    return {
        "reading": reading(compared),
        "rules": rule_table(compared),
        "tasks": task_table(compared),
        "scale": by_task(in_group(summary, "scale"), divide=True),
        "rates": by_task(in_group(summary, "rate")),
        "paper": paper_table(in_group(summary, "paper")),
    }


def in_group(summary: Summary, *groups: str) -> Summary:
    return {task: rules for task, rules in summary.items() if TASKS[task].group in groups}


def regrets(summary: Summary, rule: str) -> list[float]:
    return [rules[rule]["regret"] for rules in summary.values() if rule in rules]


def reading(summary: Summary) -> str:
    """What the figures say of the default, of percentile 10, and of the rule that the first half would choose."""
    sane = {task: rules for task, rules in summary.items() if not TASKS[task].hot}
    first, held_out = in_group(summary, "choose"), in_group(summary, "report")
    adaptive = [rule for rule in RULES if not rule.startswith(("none", "fixed")) and regrets(summary, rule)]
    lines = [f"- {rule} on {name}: worst regret {_signed(max(regrets(tasks, rule)))}, mean"
             f" {_signed(np.mean(regrets(tasks, rule)))}, of {len(tasks)} tasks."
             for name, tasks in (("all tasks", summary), ("sane rates", sane))
             for rule in (DEFAULT, "norm p10")]  # fmt: skip
    for name, tasks in (("all tasks", summary), ("sane rates", sane)):
        best = min(adaptive, key=lambda rule: max(regrets(tasks, rule)))
        lines.append(
            f"- Lowest worst regret of an adaptive rule on {name}: {best}, {_signed(max(regrets(tasks, best)))}."
        )
    if first and held_out:
        chosen = min(adaptive, key=lambda rule: max(regrets(first, rule)))
        lines.append(
            f"- Chosen by its worst regret on the first half: {chosen}, {_signed(max(regrets(first, chosen)))};"
            f" on the held-out half {_signed(max(regrets(held_out, chosen)))} ({DEFAULT}:"
            f" {_signed(max(regrets(first, DEFAULT)))} and {_signed(max(regrets(held_out, DEFAULT)))})."
        )
    errors = [rules[DEFAULT].get("standard_error", math.nan) for rules in summary.values()]
    lines.append(f"- Standard error of one task's regret ({DEFAULT}): {np.mean(errors):.1f} % on average.")
    return "\n".join(lines)


def rule_table(summary: Summary) -> str:
    """Regret of each rule over all tasks, where rates are sane, and on each half."""
    sane = {task: rules for task, rules in summary.items() if not TASKS[task].hot}
    parts = [part for part in (sane, in_group(summary, "choose"), in_group(summary, "report")) if part]
    rows = []
    for rule in (rule for rule in RULES if regrets(summary, rule)):
        every = regrets(summary, rule)
        quarters = " to ".join(percent(float(np.percentile(np.minimum(every, 1e9), q))) for q in (25, 75))
        row = [rule, percent(max(every)), percent(np.mean(every)), percent(np.median(every)), quarters]
        rows.append([*row, *[percent(f(regrets(part, rule))) for part in parts for f in (max, np.mean)]])
    head = ["rule", "worst", "mean", "median", "quartiles", "sane: worst", "mean", "first half: worst", "mean",
            "held out: worst", "mean"]  # fmt: skip
    return as_table(head[: 5 + 2 * len(parts)], rows)


def task_table(summary: Summary) -> str:
    """What the sweep found for each task, and the regret of some rules."""
    shown = [rule for rule in SHOWN if any(rule in rules for rules in summary.values())]
    rows = []
    for task, rules in summary.items():
        best = best_fixed(rules)
        row = [task, f"{TASKS[task].lr:g}", best.removeprefix("fixed "), f"{rules[best]['error']:.4g}"]
        for figures in (rules.get(rule, {}) for rule in shown):
            spread = figures.get("standard_error", 0.0)
            plus = f" ± {spread:.1f}" if 0.05 <= spread < 1000 else ""
            row.append(percent(figures["regret"]) + plus if figures else "")
        rows.append(row)
    return as_table(["task", "rate", "best fixed", "its error", *shown], rows)


def by_task(summary: Summary, divide: bool = False) -> str:
    """The errors of each rule, a column per task; divided by the scale of the loss if asked."""
    if not summary:
        return ""
    scales = [TASKS[task].loss_scale if divide else 1.0 for task in summary]
    rules = list(next(iter(summary.values())))
    rows = [
        [rule, *[_number(summary[task][rule]["error"] / scale) for task, scale in zip(summary, scales, strict=True)]]
        for rule in rules
        if all(rule in of_task for of_task in summary.values())
    ]
    return as_table(["rule", *summary], rows)


def paper_table(summary: Summary) -> str:
    """SI-SDR improvement in dB by rule, a column per loss."""
    rows = []
    for rule in next(iter(summary.values()), {}):
        row = [rule]
        for figures in (rules.get(rule, {}) for rules in summary.values()):
            plus = f" ± {figures['si_sdr_error']:.2f}" if "si_sdr_error" in figures else ""
            row.append(f"{figures['si_sdr']:.2f}{plus}" if "si_sdr" in figures else "")
        rows.append(row)
    return as_table(["rule", *[task.removeprefix("paper ") for task in summary]], rows) if rows else ""


def as_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def percent(value: float) -> str:
    if not value < 1e4:
        return "diverged"
    return f"{value:.1f}" if abs(value) < 99.5 else f"{value:.0f}"


def _signed(value: float) -> str:
    shown = percent(value)
    return shown if shown == "diverged" else f"{shown} %"


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 1e4 else "diverged"
