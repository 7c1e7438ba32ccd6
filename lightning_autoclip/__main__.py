"""The command line: ``python -m lightning_autoclip report last.ckpt``, ``... suggest lightning_logs``."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_autoclip._text import printable
from lightning_autoclip.checkpoint import RecordedRun, read_run
from lightning_autoclip.monitoring.suggest import table, table_by_value

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PLOT = Path("autoclip.png")
_FILES = "a Lightning checkpoint, or a folder: the newest *.ckpt below it is read"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m lightning_autoclip", description="Look back at a run.")
    commands = parser.add_subparsers(dest="command", required=True)
    report = commands.add_parser("report", help="what clipping did, and what it may hide; writes the plot")
    report.add_argument("path", type=Path, help=_FILES)
    report.add_argument("--plot", type=Path, help="where to write it; by default a new autoclip.png")
    report.add_argument("--json", action="store_true", help="print the report as JSON")
    suggest = commands.add_parser("suggest", help="what several percentiles, or a fixed threshold, would have clipped")
    suggest.add_argument("path", type=Path, help=_FILES)
    parsed = parser.parse_args(arguments)
    try:
        run = read_run(parsed.path)
        _report(run, parsed.plot, parsed.json) if parsed.command == "report" else _suggest(run)
        sys.stdout.flush()
    except ValueError as error:
        print(f"{parser.prog}: {printable(str(error))}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # as of `... | head`, which has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter flushes into it again
        return 0
    return 0


def _report(run: RecordedRun, plot: Path | None, as_json: bool) -> None:
    report = run.report()
    print(f"checkpoint {printable(str(run.path))}", file=sys.stderr if as_json else sys.stdout)
    print(json.dumps(report.to_dict(), indent=1) if as_json else report)
    try:
        figure = run.plot()
    except ImportError:
        if plot is not None:
            raise ValueError("The plot needs matplotlib, which the extra `plot` installs.") from None
        print("No plot: it needs matplotlib, which the extra `plot` installs.", file=sys.stderr)
        return
    try:
        if plot is not None and plot.exists() and plot.samefile(run.path):
            raise ValueError("it is what the report is of")
        path, told = _save(figure, plot, _mark(run.path))
    except Exception as error:  # of the disk, or of the program that a format takes
        raise ValueError(
            f"Expected `--plot` to be a file that can be written, but got {plot or _PLOT}: {error}"
        ) from error
    print(printable(f"Plot: {path}{told}"), file=sys.stderr)


def _save(figure: Figure, plot: Path | None, mark: str) -> tuple[Path, str]:
    """Write the plot: over whatever stands where it was asked for, else never over the picture of another run.

    Returns:
        Where it is, and what else is to be said.
    """
    if plot is not None:
        told = " (in place of the one that was there)" if plot.exists() else ""
        drawn = _drawn(figure, plot.suffix.lstrip(".") or "png")
        plot.write_bytes(drawn)  # into that very file, whatever its name ends in
        return plot, told
    drawn = _drawn(figure, "png", metadata={"Comment": mark})
    for path in (_PLOT, *(_PLOT.with_stem(f"{_PLOT.stem}-{number}") for number in range(1, 1000))):
        if not os.path.lexists(path):  # a link to nothing is somebody's too
            path.write_bytes(drawn)
            return path, "" if path == _PLOT else f" ({_PLOT} shows something else: `--plot {_PLOT}` would replace it)"
        if path.is_file() and mark.encode() in (there := path.read_bytes()):
            path.write_bytes(drawn)
            return path, " (as it was)" if there == drawn else " (in place of an older one of this run)"
    raise OSError("there are a thousand of them: name one with `--plot`")


def _mark(path: Path) -> str:
    """What tells a run's pictures from those of others, and of its path nothing else."""
    return f"lightning-autoclip {hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:24]}"


def _drawn(figure: Figure, kind: str, **options: Any) -> bytes:
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=150, format=kind, **options)
    return drawn.getvalue()


def _suggest(run: RecordedRun) -> None:
    by_value, policy = run.settings["gradient_clip_algorithm"] == "value", run.settings["policy"]
    is_percentile = policy.get("name") == "Percentile"  # another's fields may mean something else
    used = {key: policy[key] for key in ("percentile", "multiplier") if is_percentile and key in policy}
    unit = "root-mean-square entries" if by_value else "norms"
    for prefix, norms in run.norms.items():
        shown = table_by_value(norms, **used) if by_value else table(norms)
        name = printable(f"{run.path}, {prefix.strip('/')}")
        print(f"checkpoint {name}: {len(norms):,} {unit}\n{shown}\n")


if __name__ == "__main__":
    sys.exit(main())
