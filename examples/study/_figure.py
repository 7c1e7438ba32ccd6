"""The figure: no threshold serves all tasks, and what one rule costs on each of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from _rules import DEFAULT
from _tasks import TASKS

_WITHIN = 5.0  # percent of the best: as good
_LEAST, _MOST = -10.0, 1000.0  # percent, of the axis
_OURS, _OTHERS, _HOT = "#1f77b4", "#9a9a9a", "#d62728"


_RULES = ("none", "fixed norm 0.1", "fixed norm 1", "norm p10", "norm p25", "norm p50", DEFAULT, "norm p50 r0.12",
          "norm p90", "norm p10 full",
          "2 x median", "z-score 2.5", "ZClip", "value p10", "both p10 x 3")  # fmt: skip


def draw(summary: dict[str, Any], best_fixed: Callable[..., str], path: Path) -> None:
    """Left: which fixed norms are within 5 % of the best, by task. Right: each rule's regret, a dot per task."""
    shown = [rule for rule in _RULES if all(rule in rules for rules in summary.values())]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5.2), layout="constrained", width_ratios=(2, 3))
    tasks = list(summary)[::-1]
    for y, task in enumerate(tasks):
        rules = summary[task]
        best = rules[best_fixed(rules, "fixed norm")]["error"]
        for rule in (rule for rule in rules if rule.startswith("fixed norm")):
            good = rules[rule]["error"] <= best * (1 + _WITHIN / 100)
            left.plot(float(rule.split()[-1]), y, "o", ms=8 if good else 3, color=_OURS if good else "#c8c8c8")
    left.set(xscale="log", xlabel="threshold", title=f"Fixed thresholds within {_WITHIN:g} % of a task's best")
    left.set_yticks(range(len(tasks)), tasks)
    for y, rule in enumerate(shown[::-1]):
        color = _OTHERS if rule.startswith(("none", "fixed")) else _OURS
        for i, (task, rules) in enumerate(summary.items()):
            x = min(max(rules[rule]["regret"], _LEAST), _MOST)
            height = y + 0.5 * (i / len(summary) - 0.5)
            right.plot(x, height, "o", ms=5, alpha=0.75, mec="none", color=_HOT if TASKS[task].hot else color)
    right.set_xscale("symlog", linthresh=10)
    right.set_xlim(1.5 * _LEAST, 1.3 * _MOST)
    right.set_xticks([_LEAST, 0, 5, 10, 30, 100, 300, _MOST], ["≤ -10", "0", "5", "10", "30", "100", "300", "≥ 1000"])
    right.axvline(0, color="black", lw=0.8)
    right.grid(axis="x", alpha=0.3)
    right.set_yticks(range(len(shown)), shown[::-1])
    title = "Each dot a task; red: at four times the tuned learning rate"
    right.set(xlabel="final error above that of the task's best fixed threshold, %", title=title)
    figure.savefig(path, dpi=110)
    plt.close(figure)
