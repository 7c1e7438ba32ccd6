"""Cost of one update and one compute of RunningPercentile, on one CPU thread: `python tests/bench_percentile.py`."""

from __future__ import annotations

import statistics
import time

import torch

from lightning_autoclip import RunningPercentile


def microseconds(window: int | None, recorded: int, repeats: int) -> float:
    """Median time of an update and a compute with so many recorded values."""
    metric = RunningPercentile(10, window)
    metric.extend(torch.rand(recorded))
    times = []
    for value in torch.rand(repeats + 20):
        start = time.perf_counter()
        metric.update(value)
        metric.compute()
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times[20:])


if __name__ == "__main__":
    torch.set_num_threads(1)
    for window, recorded in ((100, 100), (1000, 1000), (None, 100_000), (None, 1_000_000)):
        cost = microseconds(window, recorded, 300 if recorded > 10_000 else 3000)
        print(f"window {window!s:>5}, {recorded:>9,} recorded: {cost:6.0f} µs per update and compute")
