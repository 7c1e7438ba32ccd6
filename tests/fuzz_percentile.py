"""RunningPercentile against numpy on random sequences, windows and percentiles: `make fuzz`.

Not collected by pytest: 100,000 sequences take minutes. `--sequences` and `--seed` change the run.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from helpers import FORMS, in_form

from lightning_autoclip import RunningPercentile

NON_FINITE = np.array([np.nan, np.inf, -np.inf], dtype=np.float32)


def random_values(rng: np.random.Generator) -> np.ndarray:
    """Up to 200 norms (rarely up to 3,000) of some spread, sometimes with ties, sometimes not finite."""
    size = int(rng.integers(1, 3000 if rng.random() < 0.002 else rng.choice([4, 30, 200])))
    values = rng.lognormal(rng.normal(0, 5), rng.choice([0.01, 1.0, 6.0]), size).astype(np.float32)
    if rng.random() < 0.3:
        values = rng.choice(values[: max(1, size // 4)], size)
    if rng.random() < 0.4:
        bad = rng.random(size) < rng.choice([0.05, 0.5, 1.0])
        values[bad] = rng.choice(NON_FINITE, int(bad.sum()))
    return values


def check(rng: np.random.Generator) -> int:
    """Compare one sequence, at its end and at a few moments before; return the number of comparisons."""
    values = random_values(rng)
    window = None if rng.random() < 0.3 else int(rng.integers(1, 1 + int(rng.choice([3, 20, 300]))))
    percentile = float(rng.choice([0.0, 100.0, 50.0, rng.uniform(1, 100)]))
    metric, compared = RunningPercentile(percentile, window), 0
    moments = set(rng.integers(0, len(values), 3).tolist()) | {len(values) - 1}
    for i, value in enumerate(values):
        metric.update(torch.tensor(value))
        if i in moments:
            finite = values[: i + 1][np.isfinite(values[: i + 1])].astype(np.float64)
            kept = finite if window is None else finite[-window:]
            expected = np.percentile(kept, percentile) if kept.size else np.nan
            np.testing.assert_allclose(metric.compute().item(), expected, rtol=1e-6)
            np.testing.assert_array_equal(metric.recorded.numpy(), kept.astype(np.float32))
            compared += 1
    return compared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start, compared = time.perf_counter(), 0
    for i in range(arguments.sequences):
        try:
            with in_form(FORMS[i % 2]):
                compared += check(np.random.default_rng([arguments.seed, i]))
        except AssertionError as error:
            raise SystemExit(f"Sequence {i} of seed {arguments.seed} disagrees with numpy: {error}") from None
    seconds = time.perf_counter() - start
    print(f"{arguments.sequences} sequences, {compared} comparisons with numpy, none differs ({seconds:.0f} s).")


if __name__ == "__main__":
    main()
