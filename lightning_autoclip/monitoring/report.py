"""The health report: the figures and the verdicts of each optimizer, as text, markdown and plain values."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from textwrap import fill
from typing import Any

from lightning_autoclip._text import as_markdown, printable
from lightning_autoclip.monitoring.trace import Trace
from lightning_autoclip.monitoring.verdicts import LEAST_STEPS, Figures, Verdict, figures_of, verdicts_of

_TOO_FEW = "too few steps to tell"
_WIDTH = 100  # of a printed line
_MOST_NAMED = 3  # optimizers or groups with a verdict
_NO_STEP = (
    "No step was seen in this process. Either `fit` has not run yet, or it ran in others: strategies that start some"
    " (ddp_spawn, ddp_fork, ddp_notebook) print their report there, and their record is in the checkpoints that they"
    " write."
)


@dataclass(frozen=True)
class Section:
    """The report of one optimizer, or of one group: its figures and what they may mean.

    Attributes:
        name: The prefix of its keys.
        figures: What clipping did.
        verdicts: What that may mean.
        measure: What the norms among the figures are: the ``"norm"``, or by value the ``"root-mean-square entry"``.
        unbounded: Whether ``max_update_ratio`` was asked for, and the optimizer is none that it can be had of.
    """

    name: str
    figures: Figures
    verdicts: tuple[Verdict, ...]
    measure: str = "norm"
    unbounded: bool = False

    @property
    def enough(self) -> bool:
        """Whether there are enough steps to see a trend of the norms."""
        return self.figures.steps >= LEAST_STEPS


@dataclass(frozen=True)
class Report:
    """What clipping did in a run, per optimizer, and what it may hide. Print it, or take it apart.

    Attributes:
        sections: One per optimizer.
    """

    sections: tuple[Section, ...]

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """Those of all optimizers."""
        return tuple(verdict for section in self.sections for verdict in section.verdicts)

    @property
    def healthy(self) -> bool:
        """Whether nothing was found."""
        return not self.verdicts

    @property
    def summary(self) -> str:
        """The verdicts' names, each with its optimizers if not all have it; ``"healthy"``; or that there is too little.

        Of more than three optimizers or groups it tells how many they are.
        """
        found: dict[str, list[str]] = {}
        for section in self.sections:
            for verdict in section.verdicts:
                found.setdefault(verdict.name, []).append(section.name.removeprefix("autoclip/"))
        of_all, enough = len(self.sections), any(section.enough for section in self.sections)
        told = [name if len(own) == of_all else f"{name} ({_few(own, of_all)})" for name, own in found.items()]
        return "; ".join(told) or ("healthy" if enough else _TOO_FEW)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and finite numbers, fit for JSON; ``None`` for what is not known or infinite."""
        plain: dict[str, Any] = _plain(
            {"healthy": self.healthy, "sections": [asdict(section) for section in self.sections]}
        )
        return plain

    def to_markdown(self) -> str:
        """A heading, a table and the verdicts of each optimizer."""
        return "\n".join(line for section in self.sections for line in _markdown(section)) or _NO_STEP

    def __str__(self) -> str:
        return "\n".join(line for section in self.sections for line in _lines(section)) or _NO_STEP


def report_of(traces: Mapping[str, Trace], settings: Mapping[str, Any], has_scaler: bool = False) -> Report:
    """The report of a run.

    Args:
        traces: Per optimizer, what happened, by the prefix of its keys.
        settings: The callback's arguments as it saves them.
        has_scaler: Whether a loss scaler was at work, which finds its scale by overflows.
    """
    sections = []
    for prefix, trace in traces.items():
        if trace.bins:
            figures = figures_of(trace, settings)
            measure = "norm" if settings["gradient_clip_algorithm"] == "norm" else "root-mean-square entry"
            verdicts = tuple(verdicts_of(trace, figures, has_scaler))
            unbounded = settings.get("max_update_ratio") is not None and math.isnan(figures.bounded_fraction)
            sections.append(Section(prefix.strip("/"), figures, verdicts, measure, unbounded))
    return Report(tuple(sections))


def _few(names: Sequence[str], of_all: int) -> str:
    return ", ".join(names) if len(names) <= _MOST_NAMED else f"{len(names)} of {of_all}"


def _nothing(section: Section) -> str:
    """Return what to say where there is no verdict."""
    return ("Healthy" if section.enough else _TOO_FEW).capitalize()


def _plain(value: Any) -> Any:
    """The value as JSON has it."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _lines(section: Section) -> Iterator[str]:
    """The section as a short paragraph."""
    figures = section.figures
    share = figures.expected_fraction
    expected = "" if math.isnan(share) else f" ({share:.0%} expected at percentile {figures.percentile:g})"
    clipped = (
        ""
        if math.isnan(figures.clipped_fraction)
        else (f", {figures.clipped_fraction:.1%} clipped{expected}, mean factor {figures.clip_coef_mean:.2g}")
    )
    text = (
        f"{section.name}: {figures.steps:,} steps{clipped}; typical {section.measure} {_course(figures)}, threshold"
        f" {figures.threshold:.3g}{_bound(section)}{_left_out(figures)}."
    )
    text = printable(text + ("" if section.verdicts else f" {_nothing(section)}."))
    yield fill(text, _WIDTH, subsequent_indent="  ")
    yield from (fill(printable(f"  - {each}"), _WIDTH, subsequent_indent="    ") for each in section.verdicts)


def _course(figures: Figures) -> str:
    """How the norm went: of few steps, a tenth is one or two of them."""
    if figures.steps < LEAST_STEPS:
        return _known(figures.norm_typical)
    return f"{_known(figures.norm_first)} in the first tenth, {_known(figures.norm_last)} in the last"


def _known(norm: float) -> str:
    return "not known" if math.isnan(norm) else f"{norm:.3g}"


def _left_out(figures: Figures) -> str:
    """What to say of steps that were left out for their size."""
    if not figures.left_out:
        return ""
    return f"; {figures.left_out:,} step{'s' if figures.left_out > 1 else ''} left out, far above the typical norm"


def _bound(section: Section) -> str:
    """What to say of the bound relative to the weights."""
    share = section.figures.bounded_fraction
    if section.unbounded:
        return "; no bound by the weights with this optimizer"
    return f"; {share:.1%} of the steps bounded by the weights" if share > 0 else ""


def _markdown(section: Section) -> Iterator[str]:
    """The section as a heading, a table and a list."""
    yield from (f"## {as_markdown(section.name)}", "", "| figure | value |", "|---|---|")
    for key, value in asdict(section.figures).items():
        if key != "modules":
            yield f"| {key} | {value:,} |" if isinstance(value, int) else f"| {key} | {value:.4g} |"
    for module, share in list(section.figures.modules.items())[:5]:
        yield f"| share of {as_markdown(module)} in the squared norm | {share:.1%} |"
    yield ""
    for verdict in section.verdicts:  # whose own words have marks too
        told = re.sub(r"([<\[])", r"\\\1", printable(f"{verdict.evidence} {verdict.advice}"))
        yield f"- **{verdict.name}**: {told}"
    yield from (() if section.verdicts else (f"{_nothing(section)}.",))
    yield ""
