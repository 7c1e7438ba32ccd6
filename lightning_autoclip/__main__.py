"""The command line: ``python -m lightning_autoclip report last.ckpt``, ``... suggest metrics.csv``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_autoclip.monitoring.runs import RecordedRun, read_run
from lightning_autoclip.monitoring.suggest import candidates, table

_FILES = "a Lightning checkpoint, a metrics.csv of CSVLogger, TensorBoard's folder or W&B's directory of a run"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m lightning_autoclip", description="Look back at a run.")
    commands = parser.add_subparsers(dest="command", required=True)
    report = commands.add_parser("report", help="what clipping did, and what it may hide; writes the plot")
    report.add_argument("path", type=Path, help=_FILES)
    report.add_argument("--plot", type=Path, help="where to write it; by default autoclip.png")
    report.add_argument("--json", action="store_true", help="print the report as JSON")
    suggest = commands.add_parser("suggest", help="what several percentiles would have clipped")
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
    print(json.dumps(report.to_dict(), indent=1) if as_json else f"{run.source}\n{report}")
    if not any(trace.names for trace in run.traces.values()):
        print("Layers and batches are known from checkpoints only: these are logged rows.", file=sys.stderr)
    try:
        figure = run.plot()
    except ImportError:
        if plot is not None:
            raise ValueError("The plot needs matplotlib, which the extra `plot` installs.") from None
        print("No plot: it needs matplotlib, which the extra `plot` installs.", file=sys.stderr)
        return
    path = plot or Path("autoclip.png")
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise ValueError(f"Expected `--plot` to be a file that can be written, but got {path}: {error}") from error
    print(f"Plot: {path}", file=sys.stderr)


def _suggest(run: RecordedRun) -> None:
    if not all(run.norms.values()):
        raise ValueError(
            f"Expected the norms of single steps, but {run.source} has rows of many steps. Use a checkpoint, or log"
            " with `log_every_step=True`."
        )
    if run.settings["gradient_clip_algorithm"] != "norm":
        raise ValueError(f"Expected a run that was clipped by norm, but {run.source} was clipped by value.")
    for prefix, norms in run.norms.items():
        print(f"{run.source}, {prefix.strip('/')}: {len(norms):,} norms\n{table(candidates(norms))}\n")


if __name__ == "__main__":
    sys.exit(main())
