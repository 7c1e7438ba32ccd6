"""Cost of a threshold and of an appended norm, on one CPU thread: `python tests/bench_percentile.py`."""

from __future__ import annotations

import copy
import random
import statistics
import time

import torch

from lightning_autoclip import History, Percentile


def microseconds(window: int | None, appended: int, repeats: int) -> float:
    """Median time of a threshold and a commit after so many norms."""
    history, policy, times = History(window), Percentile(10), list[float]()
    history.extend(random.random() for _ in range(appended))
    for _ in range(repeats + 20):
        norm, start = random.random(), time.perf_counter()
        policy(history.with_current(norm))
        history = copy.copy(history)
        history.append(norm)
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times[20:])


if __name__ == "__main__":
    torch.set_num_threads(1)
    for window, appended in ((100, 100), (1000, 1000), (None, 100_000), (None, 1_000_000)):
        cost = microseconds(window, appended, 300 if appended > 10_000 else 3000)
        print(f"window {window!s:>5}, {appended:>9,} norms: {cost:6.1f} µs per threshold and append")
