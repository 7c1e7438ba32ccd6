"""The command line: ``python -m lightning_autoclip report last.ckpt``, ``... suggest lightning_logs``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_autoclip.checkpoint import RecordedRun, read_run
from lightning_autoclip.suggest import table, table_by_value

_FILES = "a Lightning checkpoint, or a folder: the newest *.ckpt below it is read"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m lightning_autoclip", description="Look back at a run.")
    commands = parser.add_subparsers(dest="command", required=True)
    report = commands.add_parser("report", help="what clipping did, and what it may hide")
    report.add_argument("path", type=Path, help=_FILES)
    report.add_argument("--plot", type=Path, help="draw the plot into this file")
    report.add_argument("--json", action="store_true", help="print the report as JSON")
    suggest = commands.add_parser("suggest", help="what several percentiles, or a fixed threshold, would have clipped")
    suggest.add_argument("path", type=Path, help=_FILES)
    parsed = parser.parse_args(arguments)
    try:
        run = read_run(parsed.path)
        _report(run, parsed.plot, parsed.json) if parsed.command == "report" else _suggest(run)
        sys.stdout.flush()
    except ValueError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # as of `... | head`, which has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter flushes into it again
        return 0
    return 0


def _report(run: RecordedRun, plot: Path | None, as_json: bool) -> None:
    report = run.report()
    print(f"checkpoint {run.path}", file=sys.stderr if as_json else sys.stdout)
    print(json.dumps(report.to_dict(), indent=1) if as_json else report)
    if plot is None:
        return
    try:
        run.plot().savefig(plot, dpi=150, format=plot.suffix.lstrip(".") or "png")  # else the name would get a suffix
    except ImportError:
        raise ValueError("The plot needs matplotlib, which the extra `plot` installs.") from None
    except Exception as error:  # of the disk, or of the program that a format takes
        raise ValueError(f"Expected `--plot` to be a file that can be written, but got {plot}: {error}") from error


def _suggest(run: RecordedRun) -> None:
    by_value, policy = run.settings["gradient_clip_algorithm"] == "value", run.settings["policy"]
    is_percentile = policy["class"] == "lightning_autoclip.policies.Percentile"
    used = policy["arguments"] if is_percentile else {}
    unit = "values of the gradient RMS" if by_value else "norms"
    for prefix, norms in run.norms.items():
        shown = table_by_value(norms, **used) if by_value else table(norms)
        print(f"checkpoint {run.path}, {prefix.strip('/')}: {len(norms):,} {unit}\n{shown}\n")


if __name__ == "__main__":
    sys.exit(main())
