"""The norm history against numpy on random norms, windows and percentiles: `make fuzz`.

Not collected by pytest: 100,000 histories take minutes. `--histories` and `--seed` change the run.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch

from lightning_autoclip import History

NON_FINITE = np.array([np.nan, np.inf, -np.inf], dtype=np.float32)


def random_norms(rng: np.random.Generator) -> np.ndarray:
    """Up to 200 norms (rarely up to 3,000) of some spread, sometimes with ties, sometimes non-finite."""
    size = int(rng.integers(1, 3000 if rng.random() < 0.002 else rng.choice([4, 30, 200])))
    values = rng.lognormal(rng.normal(0, 5), rng.choice([0.01, 1.0, 6.0]), size).astype(np.float32)
    if rng.random() < 0.3:
        values = rng.choice(values[: max(1, size // 4)], size)
    if rng.random() < 0.4:
        bad = rng.random(size) < rng.choice([0.05, 0.5, 1.0])
        values[bad] = rng.choice(NON_FINITE, int(bad.sum()))
    return values


def check(rng: np.random.Generator) -> int:
    """Compare one history, at its end and at a few moments before; return the number of comparisons.

    At each of them the current norm is there in both forms, as a float and as a tensor, before it is appended.
    """
    norms = random_norms(rng)
    window = None if rng.random() < 0.3 else int(rng.integers(1, 1 + int(rng.choice([3, 20, 300]))))
    percentile = float(rng.choice([0.0, 100.0, 50.0, rng.uniform(1, 100)]))
    history, compared = History(window), 0
    moments = set(rng.integers(0, len(norms), 3).tolist()) | {len(norms) - 1}
    for i, norm in enumerate(norms):
        if i in moments and np.isfinite(norm):
            counted = of_window(norms[: i + 1], window)
            for current in (float(norm), torch.tensor(norm)):
                view = history.with_current(current)
                np.testing.assert_allclose(float(view.percentile(percentile)), np.percentile(counted, percentile), 1e-6)
                np.testing.assert_allclose(float(view.mean()), counted.mean(), 1e-6)
                np.testing.assert_allclose(float(view.std()), counted.std(), 1e-6, 1e-6 * counted.max())
                compared += 1
        history.extend([norm])
        if i in moments:
            counted = of_window(norms[: i + 1], window)
            expected = np.percentile(counted, percentile) if counted.size else np.nan
            np.testing.assert_allclose(history.percentile(percentile), expected, 1e-12)
            np.testing.assert_array_equal(history.values.numpy(), counted)
            compared += 1
    return compared


def of_window(norms: np.ndarray, window: int | None) -> np.ndarray:
    """The finite ones among the last norms."""
    finite = norms[np.isfinite(norms)].astype(np.float64)
    return finite if window is None else finite[-window:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--histories", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start, compared = time.perf_counter(), 0
    for i in range(arguments.histories):
        try:
            compared += check(np.random.default_rng([arguments.seed, i]))
        except AssertionError as error:
            raise SystemExit(f"History {i} of seed {arguments.seed} disagrees with numpy: {error}") from None
    seconds = time.perf_counter() - start
    print(f"{arguments.histories} histories, {compared} comparisons with numpy, none differs ({seconds:.0f} s).")


if __name__ == "__main__":
    main()
