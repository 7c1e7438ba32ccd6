"""The report of a run: the figures of each optimizer and what they may mean, as text, markdown and plain values."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from textwrap import fill
from typing import Any

from lightning_autoclip._text import as_markdown
from lightning_autoclip.diagnoses import LEAST_STEPS, Diagnosis, Figures, diagnoses_of, figures_of
from lightning_autoclip.steplog import StepLog

_TOO_FEW = "too few steps to tell"
_NOTHING = "no problems found in the gradient norms"
_WIDTH = 100  # of a printed line
_MOST_NAMED = 3  # optimizers or groups with a diagnosis
_NO_STEP = (
    "No step was clipped in this process. `fit` has not run yet, or its steps were made past the callback, of which a"
    " warning tells, or it ran in other processes: strategies that start some (ddp_spawn, ddp_fork, ddp_notebook) print"
    " their report there, and their norm history is in the checkpoints that they write."
)


@dataclass(frozen=True)
class Section:
    """The report of one optimizer, or of one group: its figures and what they may mean.

    Attributes:
        name: The prefix of its keys.
        figures: What clipping did.
        diagnoses: What that may mean.
        measure: What the norms among the figures are: the ``"norm"``, or by value the ``"gradient RMS"``.
    """

    name: str
    figures: Figures
    diagnoses: tuple[Diagnosis, ...]
    measure: str = "norm"


@dataclass(frozen=True)
class Report:
    """What clipping did in a run, per optimizer, and what it may hide. Print it, or take it apart.

    Attributes:
        sections: One per optimizer.
    """

    sections: tuple[Section, ...]

    @property
    def diagnoses(self) -> tuple[Diagnosis, ...]:
        """Those of all optimizers; none where nothing was found, or there are too few steps to tell."""
        return tuple(diagnosis for section in self.sections for diagnosis in section.diagnoses)

    @property
    def summary(self) -> str:
        """The diagnoses' names, each with its optimizers if not all have it; else that nothing was found.

        Of more than three optimizers or groups it says how many they are.
        """
        found: dict[str, list[str]] = {}
        for section in self.sections:
            for diagnosis in section.diagnoses:
                found.setdefault(diagnosis.name, []).append(section.name.removeprefix("autoclip/"))
        total, is_enough = len(self.sections), any(section.figures.steps >= LEAST_STEPS for section in self.sections)
        names = [name if len(own) == total else f"{name} ({_few(own, total)})" for name, own in found.items()]
        return "; ".join(names) or (_NOTHING if is_enough else _TOO_FEW)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and finite numbers, fit for JSON; ``None`` for what is not known or infinite."""
        plain: dict[str, Any] = _plain({"sections": [asdict(section) for section in self.sections]})
        return plain

    def to_markdown(self) -> str:
        """A heading, a table and the diagnoses of each optimizer."""
        return "\n".join(line for section in self.sections for line in _markdown(section)) or _NO_STEP

    def __str__(self) -> str:
        return "\n".join(line for section in self.sections for line in _lines(section)) or _NO_STEP


def report_of(logs: Mapping[str, StepLog], settings: Mapping[str, Any], has_scaler: bool = False) -> Report:
    """The report of a run.

    Args:
        logs: What happened, per optimizer, by the prefix of its keys.
        settings: The callback's settings as it saves them.
        has_scaler: Whether a loss scaler was at work, which finds its scale by overflows.
    """
    measure = "norm" if settings["gradient_clip_algorithm"] == "norm" else "gradient RMS"
    sections = []
    for prefix, log in logs.items():
        if log.steps:
            figures = figures_of(log, settings)
            sections.append(Section(prefix.strip("/"), figures, tuple(diagnoses_of(log, figures, has_scaler)), measure))
    return Report(tuple(sections))


def _few(names: Sequence[str], total: int) -> str:
    return ", ".join(names) if len(names) <= _MOST_NAMED else f"{len(names)} of {total}"


def _nothing(section: Section) -> str:
    """What to say where there is no diagnosis."""
    return (_NOTHING if section.figures.steps >= LEAST_STEPS else _TOO_FEW).capitalize()


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
        else (f", {figures.clipped_fraction:.1%} clipped{expected}, mean coefficient {figures.clip_coef_mean:.2g}")
    )
    limited = f"; {figures.limited_fraction:.1%} limited by `max_update_ratio`" if figures.limited_fraction > 0 else ""
    plural = "s" if figures.skipped > 1 else ""
    skipped = f"; {figures.skipped:,} step{plural} skipped as outlier{plural}" if figures.skipped else ""
    text = (
        f"{section.name}: {figures.steps:,} steps{clipped}; mean {section.measure} {_course(figures)}, threshold"
        f" {figures.threshold:.3g}{limited}{skipped}."
    )
    text += "" if section.diagnoses else f" {_nothing(section)}."
    yield fill(text, _WIDTH, subsequent_indent="  ")
    yield from (fill(f"  - {each}", _WIDTH, subsequent_indent="    ") for each in section.diagnoses)


def _course(figures: Figures) -> str:
    """How the norm went: of few steps, a tenth is one or two of them."""
    if figures.steps < LEAST_STEPS:
        return _known(figures.norm_mean)
    return f"{_known(figures.norm_first)} in the first tenth, {_known(figures.norm_last)} in the last"


def _known(norm: float) -> str:
    return "not known" if math.isnan(norm) else f"{norm:.3g}"


def _markdown(section: Section) -> Iterator[str]:
    """The section as a heading, a table and a list."""
    yield from (f"## {as_markdown(section.name)}", "", "| figure | value |", "|---|---|")
    for key, value in asdict(section.figures).items():
        if key != "modules":
            yield f"| {key} | {value:,} |" if isinstance(value, int) else f"| {key} | {value:.4g} |"
    for module, share in list(section.figures.modules.items())[:5]:
        yield f"| share of {as_markdown(module)} in the squared norm | {share:.1%} |"
    yield ""
    for diagnosis in section.diagnoses:  # whose own words have marks too
        text = re.sub(r"([<\[])", r"\\\1", f"{diagnosis.evidence} {diagnosis.advice}")
        yield f"- **{diagnosis.name}**: {text}"
    yield from (() if section.diagnoses else (f"{_nothing(section)}.",))
    yield ""
