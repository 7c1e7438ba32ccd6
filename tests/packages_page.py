"""The page on other packages: its sections, and their code, which is what the tests of those packages run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import read_rows

from lightning_autoclip import GradientClipper

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "packages.md"


def sections() -> dict[str, str]:
    """What the page says of each package, by the headings of the second level."""
    _, *parts = re.split(r"^## (.+)\n", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def code(name: str) -> str:
    """The Python blocks of a package's section, one below the other."""
    blocks = re.findall(r"^```python\n(.*?)^```$", sections()[name], re.DOTALL | re.MULTILINE)
    assert blocks, f"the section of {name} has no code"
    return "\n".join(blocks)


def run(name: str, **given: Any) -> dict[str, Any]:
    """Run a section's code with the names that it takes as given; return all names that there are then."""
    names = {"__name__": "__main__", **given}
    exec(compile(code(name), f"{PAGE.name}: {name}", "exec"), names)
    return names


def last_row(log: Path) -> dict[str, float]:
    """The last figures in the folder of a CSV file or of a TensorBoard run, and their step."""
    if (log / "metrics.csv").exists():
        return read_rows(log / "metrics.csv")[-1]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(log)).Reload()
    last = {tag: events.Scalars(tag)[-1] for tag in events.Tags()["scalars"] if tag.startswith("autoclip")}
    return {"step": last["autoclip/nonfinite_total"].step, **{tag: event.value for tag, event in last.items()}}


def assert_logged(log: str | Path, clipper: GradientClipper, percentile: float = 50) -> None:
    """A logger's files, read back, end with the steps and the threshold of a run without a bound by the weights."""
    row = last_row(Path(log))
    norms = clipper.history.values.numpy()
    assert len(norms) == min(clipper.steps, 100)
    assert row["step"] == clipper.steps - 1
    assert row["autoclip/threshold"] == pytest.approx(np.percentile(norms, percentile), rel=1e-5)
    assert row["autoclip/grad_norm"] == pytest.approx(norms[-1], rel=1e-5)


def assert_goes_on(clipper: GradientClipper, first: GradientClipper) -> None:
    """A norm history begins with all that another one has seen."""
    before = first.history.values.tolist()
    assert clipper.history.count > first.history.count > 0
    assert clipper.history.values.tolist()[: len(before)] == before
