"""Tables and figure of the tasks on new ground: what each rule costs at rates from a hundredth to a hundred times."""

import math
from pathlib import Path

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt
from _report import Summary, as_table, best_fixed, percent
from _rules import DEFAULT, RULES
from _tasks import FACTORS, FURTHER, NEW_TASKS

SHOWN = ("none", "fixed norm 1", "norm p10", "norm p50", "norm p90", "AGC 0.01", "norm p50 r0.12", DEFAULT)
DRAWN = {"none": ("no clipping", "#9a9a9a"), "fixed norm 1": ("gradient_clip_val=1.0", "#d62728"),
         DEFAULT: ("AutoClip()", "#1f77b4")}  # fmt: skip
LOST = 2.0  # times the error of the best fixed threshold at the tuned rate
_MOST = 10.0  # likewise, of the axis


def tables(summary: Summary) -> dict[str, str]:
    """What the documentation shows, by name."""
    return {"new rules": rule_table(summary), "new tasks": task_table(summary), "leaning": leaning_table(summary)}


def rule_table(summary: Summary) -> str:
    """For each rule, over the tasks at a factor: the worst and the mean regret, and how many tasks are lost."""
    rules = [rule for rule in RULES if rule in next(iter(summary.values()))]
    head = ["rule"]
    for factor in FACTORS:
        head += [f"x{factor}: worst", "mean", *(["lost"] if FACTORS[factor] > 1 else [])]
    rows = []
    for rule in rules:
        row = [rule]
        for label, factor in FACTORS.items():
            regrets = [summary[f"{name}, x{label}"][rule]["regret"] for name in NEW_TASKS]
            row += [percent(max(regrets)), percent(float(np.mean(regrets)))]
            row += [str(lost(summary, rule, label))] if factor > 1 else []
        rows.append(row)
    row = ["best fixed"]
    for label, factor in FACTORS.items():
        row += ["0", "0", *([str(lost(summary, "", label))] if factor > 1 else [])]
    return as_table(head, [row, *rows])


def lost(summary: Summary, rule: str, label: str) -> int:
    """How many tasks end at more than twice the error that a fixed threshold reaches at the tuned rate."""
    return sum(relative(summary, name, rule, label) > LOST for name in NEW_TASKS)


def relative(summary: Summary, name: str, rule: str, label: str) -> float:
    """The error of a rule, or of the best fixed threshold, in units of the latter's at the tuned rate."""
    rules, tuned = summary[f"{name}, x{label}"], summary[f"{name}, x1"]
    return rules[rule or best_fixed(rules)]["error"] / tuned[best_fixed(tuned)]["error"]


def task_table(summary: Summary) -> str:
    """What the sweep found for each task, and the regret of some rules."""
    rows = []
    for label in FACTORS:
        for name in NEW_TASKS:
            rules = summary[task := f"{name}, x{label}"]
            best = best_fixed(rules)
            row = [task, best.removeprefix("fixed "), f"{rules[best]['error']:.4g}"]
            for figures in (rules[rule] for rule in SHOWN):
                spread = figures.get("standard_error", 0.0)
                row.append(percent(figures["regret"]) + (f" ± {spread:.1f}" if 0.05 <= spread < 1000 else ""))
            rows.append(row)
    return as_table(["task", "best fixed", "its error", *SHOWN], rows)


def leaning_table(summary: Summary) -> str:
    """The share of the steps that the bound shortened, and the typical update ratio before clipping."""
    rows = []
    for name in NEW_TASKS:
        row = [name]
        for label in FACTORS:
            figures = summary[f"{name}, x{label}"][DEFAULT]
            row.append(f"{figures['bounded']:.0%}, {figures['update']:.2g}")
        rows.append(row)
    return as_table(["task", *[f"x{label}" for label in FACTORS]], rows)


def draw_rates(summary: Summary, path: Path) -> None:
    """The error against the learning rate: the median over the tasks, and the quartiles around it."""
    labels = sorted(FACTORS | FURTHER, key=lambda label: (FACTORS | FURTHER)[label])
    factors = [(FACTORS | FURTHER)[label] for label in labels]
    figure, axes = plt.subplots(figsize=(8, 4.6), layout="constrained")
    for rule, (name, color) in DRAWN.items():
        errors = np.array([[relative(summary, task, rule, label) for task in NEW_TASKS] for label in labels])
        errors = np.where(np.isfinite(errors), errors, math.inf).clip(max=_MOST)
        low, middle, high = np.percentile(errors, (25, 50, 75), axis=1)
        axes.fill_between(factors, low, high, color=color, alpha=0.15, lw=0)
        axes.plot(factors, middle, "o-", color=color, label=name, lw=2)
    axes.set(xscale="log", yscale="log", ylim=(0.9, 1.05 * _MOST), xlabel="learning rate, in units of the tuned one")
    axes.set_ylabel("final error, in units of the best\nfixed threshold's at the tuned rate")
    axes.set_yticks([1, 2, 3, 5, 10], ["1", "2", "3", "5", "10 or\ndiverged"])
    axes.set_xticks([0.01, 0.1, 1, 10, 100], ["1/100", "1/10", "tuned", "10", "100"])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")
    axes.set_title("Ten tasks on new ground, SGD: median and quartiles")
    figure.savefig(path, dpi=110)
    plt.close(figure)
