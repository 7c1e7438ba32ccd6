"""Processes that tests start: forked from a server that has imported torch and Lightning once, which takes seconds.

The server has no threads and has imported nothing of ours, nor `pytorch_lightning`, wandb or matplotlib, so that a
process of it is as good as a fresh one for all that tests ask.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import sys
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[1]
TIME_LIMIT = 300.0  # seconds for one program or run, whatever else the machine does: a deadlock takes for ever
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["lightning.pytorch.cli"])


def run_program(path: Path, *arguments: object, cwd: Path | None = None) -> CompletedProcess[str]:
    """Run ``python path arguments``, with this repository's package, in a directory or the current one."""
    words = [str(path.absolute()), *map(str, arguments)]
    with TemporaryDirectory() as folder:
        written = Path(folder, "stdout"), Path(folder, "stderr")
        process = SERVER.Process(target=_run, args=(words, cwd or Path.cwd(), dict(os.environ), written))
        process.start()
        process.join(TIME_LIMIT)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise TimeoutExpired(words, TIME_LIMIT)
        return CompletedProcess(words, process.exitcode, *(path.read_text(encoding="utf-8") for path in written))


def _run(words: list[str], cwd: Path, environment: dict[str, str], written: tuple[Path, Path]) -> None:
    """Become the program: an exception's traceback and the exit code come about as in any process."""
    for number, path in enumerate(written, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = words
    sys.path[:0] = [str(Path(words[0]).parent), str(ROOT)]
    try:
        runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # which `multiprocessing` leaves out
