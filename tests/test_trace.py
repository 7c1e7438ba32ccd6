"""The trace of a run against numpy on every point that went into it."""

from __future__ import annotations

import copy
import dataclasses
import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_autoclip.monitoring import trace as module
from lightning_autoclip.monitoring.summary import SAME, Point, Summary
from lightning_autoclip.monitoring.trace import (
    MOST_BINS,
    MOST_SPIKES,
    Spike,
    Trace,
    by_module,
)

NAMES = ["net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias", "scale"]
NUMELS = [32, 8, 8, 1, 1]

# What stands here in place of a norm is one of few values, so that there are ties.
NORMS = st.one_of(st.floats(1e-6, 1e6), st.sampled_from([0.0, 1.0, 2.0, math.nan, math.inf]))
THRESHOLDS = st.one_of(st.floats(1e-3, 1e3), st.just(math.inf))
COEFS = st.one_of(st.floats(0.01, 1.0), st.just(1.0), st.just(math.nan))
RUNS = st.lists(st.tuples(NORMS, THRESHOLDS, COEFS), max_size=150)


@contextmanager
def most_bins(number: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MOST_BINS", number)
        yield


def points_of(run: Sequence[tuple[float, float, float]]) -> list[Point]:
    """Steps whose number, epoch and batches are no simple index; the statistic is another figure than the norm.

    Every seventh is left out for its size, if it is finite.
    """
    others = [(0.0, math.nan, float(i % 7 == 3 and math.isfinite(norm))) for i, (norm, _, _) in enumerate(run)]
    return [
        Point(7 + 3 * i, i // 5, 2 * i, 2 * i + i % 2, norm, norm * coef, norm / 4, threshold, *others[i])
        for i, (norm, threshold, coef) in enumerate(run)
    ]


def squares_of(points: Sequence[Point], seed: int = 0) -> Tensor:
    """Squared norms of five parameters, of which one never has a gradient and one often has none."""
    parts = np.random.default_rng(seed).lognormal(0, 3, (len(points), len(NAMES)))
    parts[:, 1], parts[::2, 3] = 0, 0
    for part, point in zip(parts, points, strict=True):
        part *= point.norm**2 / part.sum() if math.isfinite(point.norm) else 1
        if not math.isfinite(point.norm):
            part[point.step % 2 + 2] = point.norm
    return torch.from_numpy(parts)


def random_run(n: int, seed: int = 0) -> list[tuple[float, float, float]]:
    """A run with a trend, zeros and non-finite steps."""
    rng = np.random.default_rng(seed)
    norms = rng.lognormal(np.linspace(-3, 3, n), 1)
    norms[rng.random(n) < 0.05] = 0
    norms[rng.random(n) < 0.05] = math.nan
    norms[rng.random(n) < 0.02] = math.inf
    thresholds, coefs = rng.lognormal(size=n), rng.uniform(0.1, 1.5, n).clip(max=1)
    thresholds[:9], coefs[rng.random(n) < 0.3] = math.inf, math.nan
    return list(zip(norms.tolist(), thresholds.tolist(), coefs.tolist(), strict=True))


def take_in(trace: Trace, points: Sequence[Point], squares: Tensor | None, size: int = 7) -> Trace:
    """Give the points to the trace, some at a time."""
    for start in range(0, len(points), size):
        some = slice(start, start + size)
        trace.extend(points[some], None if squares is None else squares[some])
    return trace


def written(state: Any) -> str:
    """A state as text, in which NaN equals NaN and every bit of a number counts."""
    return repr({key: (value.dtype, value.tolist()) if isinstance(value, Tensor) else value for key, value in state})


def same(first: Trace, second: Trace) -> bool:
    return written(first.state_dict().items()) == written(second.state_dict().items())


def loaded(state: dict[str, Any]) -> dict[str, Any]:
    """Through a file."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def check_bins(bins: Sequence[Summary], points: Sequence[Point], most: int) -> None:
    """The bins sum up the points that they say they sum up: all of them, in order."""
    widths = [int(one.steps) for one in bins]
    assert len(bins) <= most
    assert sum(widths) == len(points)
    assert len(set(widths[:-1])) <= 1
    width = 2 ** math.ceil(math.log2(max(len(points) / most, 1)))
    assert widths[:1] == [min(width, len(points))][: len(points)], "no coarser than need be"
    ends = np.cumsum([0, *widths])
    for one, start, end in zip(bins, ends, ends[1:], strict=False):
        check_bin(one, points[start:end])


def check_bin(one: Summary, points: Sequence[Point]) -> None:
    norm = np.array([point.norm for point in points])
    statistic = np.array([point.statistic for point in points])
    clipped = np.array([point.clipped_norm for point in points])
    threshold = np.array([point.threshold for point in points])
    finite = np.isfinite(norm)
    counted = finite & (statistic > 0)
    left_out = np.array([point.left_out for point in points])
    known = finite & np.isfinite(clipped) & (left_out == 0)
    coefs = np.where(norm[known] > 0, np.minimum(clipped[known] / norm[known].clip(min=1e-300), 1), 1)
    set_thresholds = threshold[np.isfinite(threshold)]
    expected = {
        "first": points[0].step,
        "last": points[-1].step,
        "steps": len(points),
        "nonfinite": (~finite).sum(),
        "zero": (finite & (statistic == 0)).sum(),
        "total": norm[finite].sum(),
        "smallest": statistic[counted].min(initial=math.inf),
        "largest": statistic[counted].max(initial=0),
        "logs": np.log(statistic[counted]).sum(),
        "threshold": set_thresholds[-1] if len(set_thresholds) else math.nan,
        "measured": known.sum(),
        "clipped": (coefs < 1).sum(),
        "coefs": coefs.sum(),
        "coef_min": coefs.min(initial=1),
        "left_out": left_out.sum(),
    }
    found = dict(vars(one))
    expected |= dict.fromkeys(("weighed", "bounded", "updates", "excess"), 0)  # these steps have no bound
    top, at_top, largest = found.pop("top"), found.pop("at_top"), norm[counted].max(initial=0)
    assert top == pytest.approx(largest, rel=20 * SAME)
    assert (norm[counted] == largest).sum() <= at_top <= (norm[counted] >= largest * (1 - 20 * SAME)).sum()
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-9, nan_ok=True)
    assert one.norms == counted.sum()


def check_spikes(trace: Trace, points: Sequence[Point], squares: Tensor | None) -> None:
    """The largest norms, the first of equal ones first; the first non-finite ones; each with its own figures."""
    norms = np.array([point.norm for point in points])
    order = [
        i for i in np.argsort(np.where(np.isfinite(norms), -norms, np.inf), kind="stable") if np.isfinite(norms[i])
    ]
    nonfinite = np.flatnonzero(~np.isfinite(norms))
    for spikes, chosen in ((trace.largest, order), (trace.nonfinite, nonfinite)):
        assert [spike.point.step for spike in spikes] == [points[i].step for i in chosen[:MOST_SPIKES]]
        for spike, i in zip(spikes, chosen, strict=False):
            point = points[i]
            for name in ("epoch", "first_batch", "last_batch"):
                assert getattr(spike.point, name) == getattr(point, name)
            seen = spike.point.norm, spike.point.threshold
            assert seen == pytest.approx((point.norm, point.threshold), nan_ok=True)
            if point.norm > 0 and math.isfinite(point.norm):
                coef = np.nan if point.left_out else np.minimum(point.clipped_norm / point.norm, 1)  # NaN stays NaN
                assert spike.point.clip_coef == pytest.approx(coef, nan_ok=True)
            assert list(spike.parameters) == named_of(None if squares is None else squares[i].numpy(), point.norm)


def named_of(squares: np.ndarray[Any, Any] | None, norm: float) -> list[Any]:
    """The three parameters with the largest shares, or the first three that are not finite."""
    if squares is None or norm == 0:
        return []
    if not math.isfinite(norm):
        return [(NAMES[i], pytest.approx(math.nan, nan_ok=True)) for i in np.flatnonzero(~np.isfinite(squares))[:3]]
    top = np.argsort(-squares, kind="stable")[:3]
    return [(NAMES[i], pytest.approx(squares[i] / squares.sum(), rel=1e-9)) for i in top]


def mean_shares(points: Sequence[Point], squares: Tensor) -> dict[str, Any]:
    rows = [row / row.sum() for row, point in zip(squares.numpy(), points, strict=True) if 0 < point.norm < math.inf]
    return (
        {name: pytest.approx(share, abs=1e-9) for name, share in zip(NAMES, np.mean(rows, 0), strict=True)}
        if rows
        else {}
    )


@settings(max_examples=150, deadline=None)
@given(RUNS, st.sampled_from([1, 2, 3, 7, 8]), st.integers(1, 40))
def test_bins_sum_up_every_point_however_many_there_are(run: Any, most: int, size: int) -> None:
    points = points_of(run)
    with most_bins(most):
        bins = take_in(Trace(), points, None, size).bins
    check_bins(bins, points, most)


@pytest.mark.parametrize("n", [0, 1, MOST_BINS, MOST_BINS + 1, 2 * MOST_BINS, 2 * MOST_BINS + 1, 5000])
def test_a_long_run_stays_in_its_bounds(n: int) -> None:
    points = points_of(random_run(n))
    squares = squares_of(points)
    trace = take_in(Trace(NAMES, NUMELS), points, squares, 50)
    check_bins(trace.bins, points, MOST_BINS)
    check_spikes(trace, points, squares)
    assert trace.shares == mean_shares(points, squares)
    logs = [math.log(point.statistic) for point in points if 0 < point.norm < math.inf]
    assert Summary.merged(trace.bins).typical == pytest.approx(np.exp(np.mean(logs)) if logs else math.nan, nan_ok=True)


def test_a_trace_is_small_however_long_the_run() -> None:
    def size(n: int) -> int:
        file = io.BytesIO()
        points = points_of(random_run(n))
        torch.save(take_in(Trace(NAMES, NUMELS), points, squares_of(points), 50).state_dict(), file)
        return len(file.getvalue())

    assert size(5000) < size(1000) * 1.2 < 220_000


@settings(max_examples=150, deadline=None)
@given(RUNS, st.integers(1, 40), st.booleans())
def test_the_spikes_are_the_largest_norms_and_the_first_nonfinite_ones(run: Any, size: int, measured: bool) -> None:
    points = points_of(run)
    squares = squares_of(points) if measured else None
    with most_bins(8):
        trace = take_in(Trace(NAMES, NUMELS), points, squares, size)
    check_spikes(trace, points, squares)


@settings(max_examples=100, deadline=None)
@given(RUNS, st.integers(1, 40))
def test_shares_are_the_means_of_the_steps_with_a_finite_norm_above_zero(run: Any, size: int) -> None:
    points = points_of(run)
    squares = squares_of(points)
    shares = take_in(Trace(NAMES, NUMELS), points, squares, size).shares
    assert shares == mean_shares(points, squares)
    assert not shares or sum(shares.values()) == pytest.approx(1)


def test_shares_count_every_step_alike_however_large_its_norm() -> None:
    points = points_of([(1e30, 1, 1), (1e-10, 1, 1)])
    squares = torch.tensor([[1e60, 0, 0, 0, 0], [0, 0, 0, 0, 1e-20]], dtype=torch.float64)
    assert list(take_in(Trace(NAMES, NUMELS), points, squares).shares.values()) == [0.5, 0, 0, 0, 0.5]


def test_a_gradient_of_zero_whose_norm_after_clipping_was_not_measured_is_a_step_like_any() -> None:
    points = points_of([(1.0, 1.0, 1.0), (0.0, 1.0, math.nan), (0.0, 1.0, 1.0)])  # by value not every step is measured
    (one,) = take_in(Trace(), points[1:2], None).bins
    assert (one.steps, one.zero, one.norms, one.measured) == (1, 1, 0, 0)
    assert [spike.point.norm for spike in take_in(Trace(), points, None).largest] == [1, 0, 0]


def test_the_default_device_does_not_matter() -> None:
    points = points_of(random_run(60))
    squares = squares_of(points)
    with torch.device("meta"):  # as `torch.set_default_device("cuda")`
        trace = take_in(Trace(NAMES, NUMELS), points[:30], squares[:30])
        trace.follow(NAMES, NUMELS)
        trace = take_in(Trace.from_state(trace.state_dict()), points[30:], squares[30:])
    check_bins(trace.bins, points, MOST_BINS)
    assert trace.shares == mean_shares(points, squares)


def test_where_nobody_measures_parameters_there_are_no_shares() -> None:
    trace = take_in(Trace(NAMES, NUMELS), points_of(random_run(50)), None)
    assert trace.shares == {}
    assert {spike.parameters for spike in [*trace.largest, *trace.nonfinite]} == {()}


def test_a_spike_is_compared_with_the_typical_norm_of_the_steps_that_were_known_by_then() -> None:
    points = points_of(random_run(300))
    trace = take_in(Trace(), points, None)
    at = {point.step: i for i, point in enumerate(points)}
    for spike in trace.largest:
        i = at[spike.point.step]
        before = [p.statistic for p in points[max(i - 49, 0) : i + 1] if 0 < p.norm < math.inf]
        assert spike.times == pytest.approx(points[i].statistic / np.exp(np.mean(np.log(before))), rel=1e-9)


def test_a_spike_stands_out_by_as_much_among_merged_steps() -> None:
    points = points_of([(1.0, 1, 1)] * 5000 + [(100.0, 1, 0.01)])
    with most_bins(128):
        (first, *_) = take_in(Trace(), points, None).largest
    assert first.point.step == points[-1].step
    assert first.times == pytest.approx(100, rel=0.01)


@pytest.mark.parametrize(
    ("batches", "text"), [((4, 4), "4"), ((4, 6), "4-6"), ((0, 0), "0")], ids=["one", "several", "the first"]
)
def test_a_spike_becomes_a_row_of_a_table(batches: tuple[int, int], text: str) -> None:
    parameters = ("a.weight", 0.906), ("b.weight", 0.0941), ("c", math.nan)
    row = Spike(Point(9, 2, *batches, 3.0, 1.5, 3.0, 1.2, 0.0), 4.0, parameters).to_dict()
    assert row == {
        "step": 9,
        "epoch": 2,
        "batches": text,
        "norm": 3.0,
        "times": 4.0,
        "threshold": 1.2,
        "clip_coef": 0.5,
        "left_out": False,
        "parameters": "a.weight (91%), b.weight (9%), c",
    }


@pytest.mark.parametrize("steps", [0, 1, 30, 200])
def test_a_trace_that_was_saved_goes_on_as_if_nothing_had_happened(steps: int) -> None:
    points = points_of(random_run(400, seed=steps))
    squares = squares_of(points)
    with most_bins(16):
        whole = take_in(Trace(NAMES, NUMELS), points[:steps], squares[:steps])
        restored = Trace.from_state(loaded(whole.state_dict()))
        assert same(restored, whole)
        assert restored.shares == whole.shares
        for trace in (whole, restored):
            trace.follow(NAMES, NUMELS)
            take_in(trace, points[steps:], squares[steps:])
    assert same(restored, whole)
    assert (restored.names, restored.numels) == (NAMES, NUMELS)
    check_bins(restored.bins, points, 16)
    check_spikes(restored, points, squares)


def test_a_state_is_no_view_of_the_trace() -> None:
    points = points_of(random_run(60))
    squares = squares_of(points)
    trace = take_in(Trace(NAMES, NUMELS), points[:30], squares[:30])
    state = trace.state_dict()
    before = written(state.items())
    restored = Trace.from_state(state)
    take_in(trace, points[30:], squares[30:])
    take_in(restored, points[30:], squares[30:])
    trace.names.append("another")
    assert written(state.items()) == before


def test_a_fit_of_other_parameters_starts_new_shares_and_keeps_the_rest() -> None:
    points = points_of(random_run(60))
    squares = squares_of(points)
    trace = take_in(Trace(NAMES, NUMELS), points[:30], squares[:30])
    bins, largest = list(trace.bins), list(trace.largest)
    trace.follow(["other"], [3])
    assert (trace.names, trace.numels, trace.shares) == (["other"], [3], {})
    assert (repr(trace.bins), repr(trace.largest)) == (repr(bins), repr(largest))
    trace.extend(points[30:], torch.ones(30, 1, dtype=torch.float64))
    assert trace.shares == {"other": 1.0}


def test_a_fit_of_the_same_parameters_goes_on_with_the_shares_and_learns_their_sizes() -> None:
    points = points_of(random_run(60))
    squares = squares_of(points)
    trace = take_in(Trace(NAMES, [0] * 5), points[:30], squares[:30])  # as under FSDP1, which tells no sizes
    trace.follow(NAMES, NUMELS)
    take_in(trace, points[30:], squares[30:])
    assert trace.shares == mean_shares(points, squares)
    assert trace.numels == NUMELS


COLUMNS = len(dataclasses.fields(Summary))
BINS = torch.ones(3, COLUMNS, dtype=torch.float64)
POINT = (1, 0, 1, 1, 2.0, 1.0, 2.0, 1.0, 0.0, 3.0, 0.0, 0.5, 0.0)
SPIKE = (POINT, 2.0, (("scale", 1.0),))
SPIKES = [
    "missing",
    None,
    3,
    [None],
    [1.0],
    [()],
    [SPIKE[:2]],
    [(*SPIKE, 1)],
    ["one"],
    [("1",) * 3],
    [("1" * 9, *SPIKE[1:])],
]
SPIKES += [
    [(POINT[:9], *SPIKE[1:])],
    [((*POINT, 1.0), *SPIKE[1:])],
    [((1.0, *POINT[1:]), *SPIKE[1:])],
    [(POINT, "2", ())],
]
DAMAGES: dict[str, list[Any]] = {
    "": [None, {}, [], "state", 3],
    "names": ["missing", None, 3, "names", [1, 2, 3, 4, 5], NAMES[:2]],
    "numels": ["missing", None, 3, NUMELS[:2], ["1"] * 5],
    "bins": ["missing", None, [], [[1.0]], BINS[0], BINS[:, :5], torch.ones(3, COLUMNS + 1), BINS[..., None], "bins"],
    "width": ["missing", None, "one", math.nan, math.inf, 0, -1, [1]],
    "largest": SPIKES,
    "nonfinite": SPIKES,
    "share_sums": [
        "missing",
        None,
        "1",
        [0.0],
        1.0,
        torch.zeros(4),
        torch.zeros(5, 5),
        torch.zeros(()),
        torch.zeros(1),
    ],
    "share_steps": ["missing", None, "one", math.nan, math.inf, -1, [1]],
}


@pytest.mark.parametrize(
    ("entry", "value"), [(e, v) for e, values in DAMAGES.items() for v in values], ids=lambda v: str(v)[:40]
)
def test_a_damaged_state_is_refused(entry: str, value: Any) -> None:
    points = points_of(random_run(30))
    state = copy.deepcopy(take_in(Trace(NAMES, NUMELS), points, squares_of(points)).state_dict())
    if not entry:
        state = value
    elif isinstance(value, str) and value == "missing":
        del state[entry]
    else:
        state[entry] = value
    with pytest.raises(ValueError, match="trace of a run is damaged"):
        Trace.from_state(state)


@pytest.mark.parametrize(
    ("depth", "expected"),
    [
        (1, {"net": 0.5, "head": 0.25, "scale": 0.25}),
        (2, {"net.0": 0.25, "net.a": 0.25, "head": 0.25, "scale": 0.25}),
        (3, {"net.0": 0.25, "net.a.b": 0.25, "head": 0.25, "scale": 0.25}),
        (9, {"net.0": 0.25, "net.a.b": 0.25, "head": 0.25, "scale": 0.25}),
    ],
)
def test_shares_are_summed_up_by_module(depth: int, expected: dict[str, float]) -> None:
    shares = {"net.0.weight": 0.125, "net.0.bias": 0.125, "net.a.b.weight": 0.25, "head.weight": 0.25, "scale": 0.25}
    summed = by_module(shares, depth)
    assert summed == expected
    assert list(summed) == list(expected)


@settings(deadline=None)
@given(
    st.dictionaries(st.lists(st.sampled_from("abc"), min_size=1, max_size=4).map(".".join), st.floats(0, 1)),
    st.integers(1, 5),
)
def test_no_share_is_lost_in_the_sums(shares: dict[str, float], depth: int) -> None:
    assert sum(by_module(shares, depth).values()) == pytest.approx(sum(shares.values()))
