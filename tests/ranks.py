"""Two processes of one process group: those that work on the runs of tests, and those of ``ddp_spawn``.

They rendezvous over a file in a test's folder, so that two runs of the tests on one machine cannot meet. A process that
is done leaves by ``os._exit``: gloo's threads, which DTensors keep alive beyond the process group, may otherwise run
into the interpreter's finalisation and abort it.
"""

from __future__ import annotations

import os
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from processes import SERVER, TIME_LIMIT
from torch import distributed

GRACE = 60.0  # seconds in which a rank reports when the other one has failed


def join_group(rank: int, store: Path) -> None:
    """Make this process one of two of a gloo group."""
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)


def leave(code: int = 0) -> NoReturn:
    """End this process; one that has not failed waits for the other and leaves no group behind."""
    if code == 0:
        distributed.barrier()
        distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _work(rank: int, store: Path, runs: Connection) -> NoReturn:
    """Work on the runs as they come, until `None` comes or one fails."""
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)  # Lightning then starts no processes
    os.chdir(store.parent)
    try:
        join_group(rank, store)
        while (run := _next(runs)) is not None:
            function, path = run
            torch.save(function(), f"{path}-{rank}.pt")
            runs.send(None)
        leave()
    except BaseException:
        runs.send(traceback.format_exc())
        leave(1)


def _next(runs: Connection) -> tuple[Callable[[], Any], Path] | None:
    try:
        return runs.recv()
    except EOFError:  # the tests are over, whatever ended them
        leave(1)


class TwoRanks:
    """Two processes that work on the runs of all test files, one after the other; they start at the first run.

    A run is a function without arguments that pickles; both ranks call it. If one fails, dies or deadlocks, the others
    continue in two new processes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runs: dict[Path, Callable[[], Any]] = {}  # not through yet, in order
        self.failures: dict[Path, str] = {}
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._pairs = self._tables = 0

    def start(self, table: Mapping[str, Callable[[], Any]]) -> Callable[[str], list[Any]]:
        """Start on the runs of a table; the answer gives what the two ranks returned from the one that is named."""
        self._tables += 1
        paths = {name: self.folder / f"{self._tables}-{number}" for number, name in enumerate(table)}
        for name, run in table.items():
            self.runs[paths[name]] = run
            if self._processes:
                self._send(paths[name])
        if not self._processes:
            self._start_processes()

        def results(name: str) -> list[Any]:
            path = paths[name]
            while path in self.runs:
                self._wait_for_the_next()
            if path in self.failures:
                raise RuntimeError(f"The run {name!r} failed. {self.failures[path]}")
            return [torch.load(f"{path}-{rank}.pt", weights_only=True) for rank in range(2)]

        return results

    def close(self) -> list[int | None]:
        """End the processes, at once if there is something left to do; return their exit codes."""
        if not self._processes:
            return []
        if self.runs:
            self._kill()
            return []
        for pipe in self._pipes:
            with suppress(ConnectionError):  # the process has died: its exit code says so
                pipe.send(None)
        for process in self._processes:
            process.join(TIME_LIMIT)
        codes = [process.exitcode for process in self._processes]
        self._kill()
        return codes

    def _start_processes(self) -> None:
        self._pairs += 1
        for rank in range(2):
            ours, theirs = SERVER.Pipe()
            arguments = rank, self.folder / f"store-{self._pairs}", theirs
            process = SERVER.Process(target=_work, args=arguments, daemon=True)
            process.start()
            theirs.close()  # so that the end of the process is the end of the pipe
            self._processes.append(process)
            self._pipes.append(ours)
        for path in self.runs:
            self._send(path)

    def _send(self, path: Path) -> None:
        for pipe in self._pipes:
            with suppress(ConnectionError):  # the process has died, which the reader of the pipe reports
                pipe.send((self.runs[path], path))

    def _wait_for_the_next(self) -> None:
        """Wait for both ranks to finish their next run."""
        path, waiting, problems = next(iter(self.runs)), dict(zip(self._pipes, range(2), strict=True)), {}
        while waiting:
            ready = wait(list(waiting), limit := GRACE if problems else TIME_LIMIT)
            for pipe in ready:
                rank = waiting.pop(pipe)
                if (problem := self._read(pipe, rank)) is not None:
                    problems[rank] = problem
            if not ready:
                problems |= dict.fromkeys(waiting.values(), f"is not through after {limit:.0f} s: a deadlock?")
                break
        del self.runs[path]
        if problems:
            self.failures[path] = "\n".join(f"Rank {rank} {problem}" for rank, problem in sorted(problems.items()))
            self._kill()
            if self.runs:
                self._start_processes()

    def _read(self, pipe: Connection, rank: int) -> str | None:
        """What went wrong in a process that has reported, if anything did."""
        try:
            problem = pipe.recv()
        except (EOFError, ConnectionError):
            self._processes[rank].join(GRACE)
            return f"died with exit code {self._processes[rank].exitcode}."
        return problem and f"raised\n{problem}"

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []


class _LeavingMultiProcessingLauncher(_MultiProcessingLauncher):
    """Lightning's, but with a limit of time and processes that leave by :func:`leave`."""

    def launch(self, *args: Any, **kwargs: Any) -> Any:
        def give_up() -> None:
            print(f"Lightning's processes are not through after {TIME_LIMIT:.0f} s: a deadlock?", file=sys.stderr)
            for process in self.procs:
                process.kill()  # which Lightning raises

        limit = threading.Timer(TIME_LIMIT, give_up)
        limit.start()
        try:
            return super().launch(*args, **kwargs)
        finally:
            limit.cancel()

    def _wrapping_function(self, *args: Any, **kwargs: Any) -> None:
        super()._wrapping_function(*args, **kwargs)  # an exception goes to the parent before the process ends
        leave()


class SpawnedDDP(DDPStrategy):
    """``ddp_spawn`` on two processes, whose rendezvous is a file in ``folder``; or from the server, which is faster."""

    def __init__(self, folder: Path, start_method: Literal["spawn", "forkserver"] = "spawn") -> None:
        super().__init__(start_method=start_method)
        self.folder = folder

    def _configure_launcher(self) -> None:
        self._launcher = _LeavingMultiProcessingLauncher(self, start_method=self._start_method)

    def setup_distributed(self) -> None:
        self.set_world_ranks()
        join_group(self.global_rank, self.folder / "store")
        super().setup_distributed()  # which finds the group
