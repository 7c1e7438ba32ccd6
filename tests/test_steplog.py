"""The table of a run against numpy on every step that went into it: rows, bins, largest steps, layers, state."""

from __future__ import annotations

import copy
import gc
import io
import math
import tracemalloc
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_autoclip.layers import by_module
from lightning_autoclip.step import StepRecord
from lightning_autoclip.steplog import MOST_STEPS, StepLog
from lightning_autoclip.table import MOST_BINS, SAME, LargeStep, Place, Step, merged, step_of

NAMES = ["net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias", "scale"]
NUMELS = [32, 8, 8, 1, 1]
LIMIT = 0.25

# Whole numbers, so that there are ties, and no two norms that differ by less than the part `SAME`.
NORMS = st.one_of(st.integers(0, 40).map(float), st.sampled_from([math.nan, math.inf]))
THRESHOLDS = st.one_of(st.floats(1e-3, 1e3), st.just(math.inf))
COEFS = st.one_of(st.floats(0.01, 1.0), st.just(1.0), st.just(math.nan))
RATIOS = st.one_of(st.floats(1e-3, 1e3), st.just(math.nan))
RUNS = st.lists(st.tuples(NORMS, THRESHOLDS, COEFS, RATIOS), max_size=60)


class Run:
    """Steps whose statistic is another figure than the norm, with the norms of five parameters.

    Every seventh finite one is skipped as an outlier, every eleventh has non-finite gradients in another group. One
    parameter never has a gradient, one often has none.
    """

    def __init__(self, steps: Sequence[Sequence[float]], seed: int = 0) -> None:
        i, n = np.arange(len(steps)), len(steps)
        self.norm, threshold, coef, self.ratio = np.array(steps, dtype=float).reshape(-1, 4).T
        self.finite = np.isfinite(self.norm) & (i % 11 != 5)
        self.skipped = self.finite & (i % 7 == 3)
        self.clipped_norm, self.statistic = self.norm * coef, self.norm / 4
        self.threshold = np.where(self.finite, threshold, math.inf)
        squares = np.random.default_rng(seed).lognormal(0, 3, (n, len(NAMES)))
        squares[:, 1], squares[::2, 3] = 0, 0
        squares *= np.where(np.isfinite(self.norm), self.norm**2, 1)[:, None] / squares.sum(1, keepdims=True)
        bad = ~np.isfinite(self.norm)
        squares[i[bad], i[bad] % 2 + 2] = self.norm[bad]
        self.squares = squares
        columns = self.norm, self.clipped_norm, self.statistic, self.threshold, self.ratio, self.finite, self.skipped
        numbers = zip(*(column.tolist() for column in columns), np.sqrt(squares).tolist(), strict=True)
        self.records = [StepRecord(*of_step) for of_step in numbers]

    @classmethod
    def random(cls, n: int, seed: int = 0) -> Run:
        """With a trend, zeros and non-finite steps."""
        rng = np.random.default_rng(seed)
        norm = rng.lognormal(np.linspace(-3, 3, n), 1)
        norm[rng.random(n) < 0.05] = 0
        norm[rng.random(n) < 0.05] = math.nan
        norm[rng.random(n) < 0.02] = math.inf
        threshold, coef, ratio = rng.lognormal(size=n), rng.uniform(0.1, 1.5, n).clip(max=1), rng.lognormal(-1, 1, n)
        threshold[:9], coef[rng.random(n) < 0.3], ratio[rng.random(n) < 0.2] = math.inf, math.nan, math.nan
        return cls(np.stack([norm, threshold, coef, ratio], 1), seed)

    def rows(self) -> list[Step]:
        places = map(place_of, range(len(self.records)))
        return [step_of(r, p.step, p.epoch, LIMIT, False) for r, p in zip(self.records, places, strict=True)]

    def merged(self, start: int, end: int) -> dict[str, float]:
        """The columns of the table for the steps from ``start`` to ``end``, by numpy."""
        at = np.arange(start, end)
        finite = at[self.finite[at]]
        norm, statistic = self.norm[finite], self.statistic[finite]
        used = finite[~self.skipped[finite]]
        known, with_ratio = used[np.isfinite(self.clipped_norm[used])], used[np.isfinite(self.ratio[used])]
        with np.errstate(invalid="ignore"):
            coef = np.nan_to_num(self.clipped_norm[known] / self.norm[known], nan=1.0).clip(max=1)
        above = with_ratio[self.ratio[with_ratio] > LIMIT]
        limited = above[self.threshold[above] >= self.norm[above] * LIMIT / self.ratio[above] * (1 - 1e-5)]
        return {
            "first": place_of(start).step,
            "last": place_of(end - 1).step,
            "epoch": place_of(end - 1).epoch,
            "steps": len(at),
            "nonfinite": len(at) - len(finite),
            "skipped": self.skipped[at].sum(),
            "zero": (statistic == 0).sum(),
            "norm": last(norm),
            "statistic": last(statistic),
            "threshold": last(self.threshold[at][np.isfinite(self.threshold[at])]),
            "norm_sum": norm.sum(),
            "norm_max": norm.max(initial=0),
            "norm_max_step": place_of(finite[norm.argmax()]).step if len(finite) else math.nan,
            "statistic_min": statistic[statistic > 0].min(initial=math.inf),
            "statistic_max": statistic.max(initial=0),
            "log_sum": np.log(statistic[statistic > 0]).sum(),
            "measured": len(known),
            "clipped": (coef < 1).sum(),
            "clipped_norm_sum": (coef * self.norm[known]).sum(),
            "coef_sum": coef.sum(),
            "coef_min": coef.min(initial=1),
            "with_ratio": len(with_ratio),
            "limited": len(limited),
            "ratio_log_sum": np.log(self.ratio[with_ratio]).sum(),
            "excess_log_sum": np.log(self.ratio[limited] / LIMIT).sum(),
        }

    def row(self, start: int, end: int) -> dict[str, float]:
        """What is logged of these steps: NaN where nothing is known."""
        part, so_far = self.merged(start, end), self.merged(0, end)
        finite, measured = part["steps"] - part["nonfinite"], part["measured"]
        with_ratio = part["with_ratio"]
        shares, norms = self.shares(start, end), self.module_norms(start, end)
        modules = {"net.0": shares[:2].sum(), "net.2": shares[2:4].sum(), "scale": shares[4]}
        ours = {
            "grad_norm": part["norm"],
            "grad_norm_mean": divided(part["norm_sum"], finite),
            "grad_norm_max": part["norm_max"] if finite else math.nan,
            "grad_norm_max_step": part["norm_max_step"],
            "grad_norm_clipped": divided(part["clipped_norm_sum"], measured),
            "threshold": part["threshold"],
            "clipped_fraction": divided(part["clipped"], measured),
            "clip_coef_mean": divided(part["coef_sum"], measured),
            "clip_coef_min": part["coef_min"] if measured else math.nan,
            "nonfinite_total": so_far["nonfinite"],
            "skipped_total": so_far["skipped"],
            "limited_fraction": divided(part["limited"], finite if with_ratio else 0),
            "update_ratio": np.exp(divided(part["ratio_log_sum"], with_ratio)),
        }
        return (
            {f"autoclip/{key}": value for key, value in ours.items()}
            | {f"autoclip_layers/{module}": share for module, share in modules.items()}
            | {f"autoclip_layers_norm/{module}": norm for module, norm in zip(modules, norms, strict=True)}
        )

    def shares(self, start: int = 0, end: int | None = None) -> np.ndarray:
        """Mean share of each parameter in the squared norm, over the finite steps with a gradient."""
        squares = self.squares[start:end][self.finite[start:end] & (self.norm[start:end] > 0)]
        return np.mean(squares / squares.sum(1, keepdims=True), 0) if len(squares) else np.full(len(NAMES), math.nan)

    def module_norms(self, start: int, end: int) -> np.ndarray:
        squares = self.squares[start:end][self.finite[start:end]]
        of_modules = np.stack([squares[:, :2].sum(1), squares[:, 2:4].sum(1), squares[:, 4]], 1)
        return np.sqrt(of_modules).mean(0) if len(squares) else np.full(3, math.nan)


def last(column: np.ndarray) -> float:
    return float(column[-1]) if len(column) else math.nan


def divided(total: float, number: float) -> float:
    return total / number if number else math.nan


def place_of(i: Any) -> Place:
    """Step, epoch and batches of a step, none of which is its index."""
    return Place(7 + 3 * int(i), int(i) // 5, 2 * int(i), 2 * int(i) + int(i) % 2)


def new(depth: int = 2) -> StepLog:
    log = StepLog("autoclip/", skips_outliers=True, layer_depth=depth)
    log.max_update_ratio = LIMIT
    log.set_parameters(NAMES, NUMELS)
    return log


def add(log: StepLog, run: Run, start: int = 0, end: int | None = None) -> StepLog:
    """Add some of a run's steps."""
    for i, record in enumerate(run.records[start:end], start):
        log.add(record, i + 1, place_of(i))
    return log


def check_bins(log: StepLog, run: Run) -> None:
    """The bins merge all steps, in order: equally many in each, and no more than they must."""
    n, bins = len(run.records), log.bins
    width = 2 ** math.ceil(math.log2(max(n / MOST_BINS, 1)))
    starts = range(0, n, width)
    assert len(bins) == len(starts) <= MOST_BINS
    for row, start in zip(bins, starts, strict=True):
        end = min(start + width, n)
        found, norm = row._asdict(), run.norm[start:end][run.finite[start:end]]
        at_max, largest = found.pop("at_max"), norm.max(initial=0)
        assert (norm[norm > 0] == largest).sum() <= at_max <= (norm[norm > 0] >= largest * (1 - 20 * SAME)).sum()
        assert found == pytest.approx(run.merged(start, end), rel=1e-9, abs=1e-9, nan_ok=True)


def check_large(log: StepLog, run: Run) -> None:
    """The largest norms, the first of equal ones first; the first non-finite ones; each with its own figures."""
    order = np.argsort(np.where(run.finite, -run.norm, np.inf), kind="stable")[: run.finite.sum()]
    for found, chosen in ((log.largest, order), (log.nonfinite, np.flatnonzero(~run.finite))):
        assert [large.place for large in found] == [place_of(i) for i in chosen[:MOST_STEPS]]
        for large, i in zip(found, chosen, strict=False):
            check_one(large, run, i)


def check_one(large: LargeStep, run: Run, i: Any) -> None:
    norm, coef, squares = run.norm[i], math.nan, run.squares[i]
    if run.finite[i] and not run.skipped[i] and np.isfinite(run.clipped_norm[i]):
        coef = min(run.clipped_norm[i] / norm, 1) if norm else 1.0
    seen = large.norm, large.threshold, large.clip_coef
    assert seen == pytest.approx((norm, run.threshold[i], coef), nan_ok=True)
    assert large.is_skipped == run.skipped[i]
    if not run.finite[i]:
        assert [name for name, _ in large.parameters] == [NAMES[j] for j in np.flatnonzero(~np.isfinite(squares))]
        assert all(math.isnan(share) for _, share in large.parameters)
    else:
        top = np.argsort(-squares, kind="stable")[:3] if norm else []
        assert [name for name, _ in large.parameters] == [NAMES[j] for j in top]
        assert [share for _, share in large.parameters] == pytest.approx([squares[j] / squares.sum() for j in top])


def loaded(log: StepLog) -> StepLog:
    """Another log with the same state, through a file."""
    file, other = io.BytesIO(), StepLog("autoclip/", skips_outliers=True, layer_depth=log.layer_depth)
    torch.save(log.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    other.max_update_ratio = LIMIT
    return other


# --- rows and bins ----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(RUNS, st.lists(st.integers(1, 20), min_size=1, max_size=8))
def test_a_row_at_any_step_of_random_intervals_agrees_with_numpy(steps: Any, lengths: list[int]) -> None:
    run, log, start = Run(steps), new(), 0
    for end in np.minimum(np.cumsum([*lengths, 60]), len(steps)).tolist():
        for now in range(start + 1, end + 1):
            add(log, run, now - 1, now)
            assert log.row() == pytest.approx(run.row(start, now), rel=1e-9, nan_ok=True)
            assert log.span == (place_of(start).step, place_of(now - 1).step)
        log.flush()
        assert log.span is None
        start = end
    check_large(log, run)


@pytest.mark.parametrize("n", [1, MOST_BINS, MOST_BINS + 1, 3000, 50_000])
def test_however_many_steps_are_in_one_interval_all_figures_agree_with_numpy(n: int) -> None:
    run = Run.random(n, seed=1)
    log = add(new(), run)
    check_bins(log, run)
    check_large(log, run)
    assert log.row() == pytest.approx(run.row(0, n), rel=1e-9, nan_ok=True)
    assert log.shares == pytest.approx(dict(zip(NAMES, run.shares(), strict=True)), abs=1e-9)


@settings(max_examples=100, deadline=None)
@given(RUNS.filter(bool), st.lists(st.integers(0, 60), max_size=6))
def test_merging_is_associative(steps: Any, cuts: list[int]) -> None:
    """In whatever parts, the rows become one and the same: that of numpy."""
    run = Run(steps)
    rows, ends = run.rows(), sorted({min(cut, len(steps)) for cut in cuts} | {0, len(steps)})
    parts = [merged(rows[start:end]) for start, end in pairwise(ends)]
    whole = merged(rows)._asdict()
    assert merged(parts)._asdict() == pytest.approx(whole, rel=1e-9, abs=1e-12, nan_ok=True)
    assert whole.pop("at_max") == (run.norm[run.finite & (run.norm > 0)] == whole["norm_max"]).sum()
    assert whole == pytest.approx(run.merged(0, len(steps)), rel=1e-9, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("by_value", [False, True], ids=["norm", "value"])
def test_before_any_step_a_row_has_every_key_and_no_figure_but_counts(by_value: bool) -> None:
    log = StepLog("autoclip/", by_value, skips_outliers=True, layer_depth=2)
    log.set_parameters(NAMES, NUMELS)
    row = log.row()
    assert list(row) == log.keys
    counts = {"autoclip/nonfinite_total": 0, "autoclip/skipped_total": 0}
    assert row == pytest.approx({**dict.fromkeys(row, math.nan), **counts}, nan_ok=True)
    assert ("autoclip/grad_rms" in row) == by_value
    assert (log.shares, log.bins, log.span, log.norms()) == ({}, (), None, ())


def test_the_norms_of_an_interval_are_there_also_where_a_row_was_read_in_it() -> None:
    """A histogram is made of them."""
    run, log = Run.random(40), new()
    add(log, run, 0, 30).row()
    assert list(add(log, run, 30).norms()) == run.norm[run.finite].tolist()


def test_a_step_number_that_was_added_already_is_ignored() -> None:
    run, log = Run.random(40), new()
    add(add(log, run, 0, 30), run, 20, 30)
    assert repr(add(log, run, 10).state_dict()) == repr(add(new(), run).state_dict())
    assert log.steps == 40


def test_the_rows_of_single_steps_are_taken_one_by_one() -> None:
    run, log = Run.random(20), StepLog("autoclip/Adam/", by_value=True)
    log.set_parameters(NAMES, NUMELS)
    log.step_rows = []
    add(log, run)
    columns = {"grad_norm": run.norm, "threshold": run.threshold, "grad_rms": run.statistic}
    known = {"grad_norm": run.finite, "threshold": np.isfinite(run.threshold), "grad_rms": run.finite}
    for i, (step, row) in enumerate(log.step_rows):
        assert step == place_of(i).step
        expected = {f"autoclip/Adam/step/{key}": columns[key][i] if known[key][i] else math.nan for key in columns}
        assert row == pytest.approx(expected, nan_ok=True)
    assert len(log.step_rows) == 20


# --- memory -----------------------------------------------------------------------------------------------------------


def test_norms_of_many_parameters_that_wait_for_a_row_are_bounded_in_bytes() -> None:
    log, steps, parameters = StepLog("autoclip/"), 300, 10_000
    log.set_parameters([f"{i}.weight" for i in range(parameters)], [1] * parameters)
    tracemalloc.start()
    for i in range(steps):
        norm, norms = float(i + 1), np.full(parameters, 0.01 * (i + 1)).tolist()
        log.add(StepRecord(norm, norm, norm, math.inf, parameter_norms=norms), i + 1, Place(i))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16e6
    assert log.row()["autoclip/grad_norm_mean"] == (steps + 1) / 2


def test_rows_of_many_steps_that_wait_for_a_row_are_bounded() -> None:
    log, most = StepLog("autoclip/"), 0
    before = rows_in_memory()
    for i in range(100_000):
        norm = float(i + 1)
        log.add(StepRecord(norm, norm, norm, math.inf), i + 1, Place(i))
        if i % 19_997 == 0:
            most = max(most, rows_in_memory() - before)
    assert 1000 < most <= 2 * MOST_BINS + 1  # the bins, those that wait, and the interval
    assert log.row()["autoclip/grad_norm_mean"] == 100_001 / 2


def rows_in_memory() -> int:
    return sum(type(thing) is Step for thing in gc.get_objects())


def test_a_state_is_small_however_long_the_run() -> None:
    def size(n: int) -> int:
        file = io.BytesIO()
        log = add(new(), Run.random(n))
        log.flush()
        torch.save(log.state_dict(), file)
        return len(file.getvalue())

    assert size(8000) < 1.1 * size(1000) < 300_000


# --- largest steps and layers -----------------------------------------------------------------------------------------


def test_a_large_step_is_compared_with_the_geometric_mean_of_the_fifty_steps_up_to_it() -> None:
    run = Run.random(300)
    at = {place_of(i).step: i for i in range(300)}
    for large in add(new(), run).largest:
        i = at[large.place.step]
        window = slice(max(i - 49, 0), i + 1)
        before = run.statistic[window][run.finite[window] & (run.statistic[window] > 0)]
        assert large.times == pytest.approx(run.statistic[i] / np.exp(np.log(before).mean()), rel=1e-9)


def test_a_large_step_stands_out_by_as_much_among_merged_steps() -> None:
    run = Run([(1.0, 1.0, 1.0, math.nan)] * 5000 + [(100.0, 1.0, 0.01, math.nan)])
    (first, *_) = add(new(), run).largest
    assert (first.place, first.times) == (place_of(5000), pytest.approx(100, rel=0.1))


def test_where_parameters_are_not_measured_there_are_no_shares_and_no_names() -> None:
    run, log = Run.random(50), new()
    for i, record in enumerate(run.records):
        log.add(record._replace(parameter_norms=None), i + 1, place_of(i))
    assert log.shares == {}
    assert {large.parameters for large in [*log.largest, *log.nonfinite]} == {()}
    assert math.isnan(log.row()["autoclip_layers/net.0"])


def test_other_parameters_start_new_shares_and_the_rest_stays() -> None:
    run = Run.random(60)
    log = add(new(), run, 0, 30)
    bins, largest = log.bins, log.largest
    log.set_parameters(["other"], [3])
    assert (log.names, log.numels, log.shares) == (["other"], [3], {})
    assert (repr(log.bins), repr(log.largest)) == (repr(bins), repr(largest))
    log.add(StepRecord(2.0, 2.0, 2.0, math.inf, parameter_norms=[2.0]), 31, place_of(30))
    assert log.shares == {"other": 1.0}


def test_parameters_that_stay_keep_their_shares_where_others_join_and_learn_their_sizes() -> None:
    run = Run.random(60)
    log = add(new(), run, 0, 30)
    log.set_parameters(NAMES, [1] * 5)  # under FSDP1 sizes are not known
    log.set_parameters(["late", *NAMES], [2, *NUMELS])
    expected = dict(zip(NAMES, run.shares(0, 30), strict=True))
    assert log.shares == pytest.approx({"late": 0.0, **expected})
    assert log.numels == [2, *NUMELS]


def test_the_default_device_does_not_matter() -> None:
    run = Run.random(60)
    with torch.device("meta"):  # as `torch.set_default_device("cuda")`
        log = loaded(add(new(), run, 0, 30))
        log.set_parameters(NAMES, NUMELS)
        row = add(log, run, 30).row()
    assert row == pytest.approx(run.row(0, 60), rel=1e-9, nan_ok=True)


# --- state ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("saved_at", [0, 1, 30, 200, 1500])
def test_a_log_that_is_restored_within_an_interval_continues_as_one_that_was_not_saved(saved_at: int) -> None:
    """To the bit: the next rows, the bins, all of its state."""
    run, whole = Run.random(2200, seed=saved_at), new()
    add(whole, run, 0, saved_at // 2)
    whole.flush()
    before = copy.deepcopy(whole)  # which never is saved
    restored = loaded(add(whole, run, saved_at // 2, saved_at))
    logs = [add(before, run, saved_at // 2, saved_at), whole, restored]
    for log in logs:
        log.set_parameters(NAMES, NUMELS)
    seen = []
    for log in logs:
        rows = []
        for start, end in ((saved_at, 2000), (2000, 2200)):
            rows.append(add(log, run, start, end).row())
            log.flush()
        seen.append(repr((rows, [[*map(float, row)] for row in log.bins], log.largest, log.nonfinite, log.shares)))
    assert seen[0] == seen[1] == seen[2]
    assert repr(whole.state_dict()) == repr(restored.state_dict())
    check_bins(restored, run)
    check_large(restored, run)


def test_a_state_is_no_view_of_the_log() -> None:
    run = Run.random(60)
    log = add(new(), run, 0, 30)
    state, other = log.state_dict(), new()
    before = repr(state)
    other.load_state_dict(state)
    add(log, run, 30), add(other, run, 30)
    log.names.append("another")
    assert repr(state) == before


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("bins", None), ("bins", [1]), ("bins", [1.0] * 3), ("width", -1), ("steps", 1.0), ("names", "names")),
        *(("version", 2), ("run_layers", {}), ("largest", "missing"), ("another", 1)),
    ],
)
def test_a_damaged_state_raises_one_error(key: str, value: Any) -> None:
    state = add(new(), Run.random(30)).state_dict()
    if value == "missing":
        del state[key]
    else:
        state[key] = value
    log = new()
    with pytest.raises(ValueError, match=r"The state of `StepLog.*damaged"):
        log.load_state_dict(state)
    assert (log.steps, log.names) == (0, NAMES)


# --- modules ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "expected"),
    [
        (1, {"net": 0.5, "head": 0.25, "scale": 0.25}),
        (2, {"net.0": 0.25, "net.a": 0.25, "head": 0.25, "scale": 0.25}),
        (9, {"net.0": 0.25, "net.a.b": 0.25, "head": 0.25, "scale": 0.25}),
    ],
)
def test_shares_are_summed_up_by_module(depth: int, expected: dict[str, float]) -> None:
    shares = {"net.0.weight": 0.125, "net.0.bias": 0.125, "net.a.b.weight": 0.25, "head.weight": 0.25, "scale": 0.25}
    assert list(by_module(shares, depth).items()) == list(expected.items())
