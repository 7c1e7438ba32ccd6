"""History and RunningPercentile against numpy."""

from __future__ import annotations

import copy
import math

import matplotlib as mpl
import numpy as np
import pytest
import torch
from helpers import FORMS, in_form
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics import MetricCollection

from lightning_autoclip import History, RunningPercentile

NORMS = st.one_of(st.floats(2**-20, 2**20, width=32), st.sampled_from([1.0, 2.0, 3.0]))  # with ties
ANY = st.one_of(NORMS, st.sampled_from([math.nan, math.inf, -math.inf]))
WINDOWS = st.one_of(st.none(), st.integers(1, 12))
PERCENTILES = st.one_of(st.sampled_from([0.0, 100.0, 50.0, 10.0]), st.floats(0, 100))
CURRENT = {"float": float, "tensor": torch.tensor}  # the current norm: on the host, on an accelerator


def counted(values: list[float], window: int | None) -> np.ndarray:
    finite = [value for value in values if math.isfinite(value)]
    return np.array(finite if window is None else finite[-window:], dtype=np.float64)


def assert_as_numpy(view, norms: np.ndarray, percentile: float) -> None:
    assert float(view.percentile(percentile)) == pytest.approx(np.percentile(norms, percentile), rel=1e-6)
    assert float(view.mean()) == pytest.approx(np.mean(norms), rel=1e-6)
    # A deviation from the mean is known as well as the norms are, in float32.
    assert float(view.std()) == pytest.approx(np.std(norms), rel=1e-6, abs=1e-6 * norms.max())


@pytest.mark.parametrize("kind", CURRENT)
@settings(deadline=None, max_examples=100)
@given(norms=st.lists(NORMS, min_size=1, max_size=40), percentile=PERCENTILES, window=WINDOWS)
def test_the_history_with_and_without_the_current_norm_agrees_with_numpy(kind, norms, percentile, window):
    history = History(window)
    for i, norm in enumerate(norms):
        view = history.with_current(CURRENT[kind](norm))
        assert isinstance(view.percentile(percentile), float if kind == "float" else torch.Tensor)
        assert_as_numpy(view, counted(norms[: i + 1], window), percentile)
        assert (history.count, len(history)) == (i, min(i, window or i))  # the current norm is not appended
        history.append(norm)
        assert history.values.tolist() == counted(norms[: i + 1], window).tolist()
        assert_as_numpy(history, counted(norms[: i + 1], window), percentile)


@pytest.mark.parametrize("kind", CURRENT)
@pytest.mark.parametrize("window", [3, 1500, None], ids=["3", "1500", "full history"])
def test_long_series_of_copies_agree_with_numpy_and_leave_each_original_unchanged(kind, window):
    """As at each commit: a copy is appended to, and takes the place of the original."""
    norms = np.random.default_rng(0).lognormal(0, 2, 6000).astype(np.float32).astype(np.float64).tolist()
    history = History(window)
    for i, norm in enumerate(norms):
        other = copy.copy(history)
        other.append(norm)
        assert (history.count, other.count) == (i, i + 1)
        if i and i % 700 in (0, 1, 2, 699):  # between them, the order is not asked for
            assert_as_numpy(history.with_current(CURRENT[kind](norm)), counted(norms[: i + 1], window), 10)
            for one in (history, other, history):
                assert one.values.tolist() == counted(norms[: one.count], window).tolist()
                assert_as_numpy(one, counted(norms[: one.count], window), 30)
        history = other


def test_without_norms_there_is_no_percentile_mean_or_deviation():
    history = History()
    history.extend([math.nan, math.inf])
    assert [math.isnan(each) for each in (history.percentile(50), history.mean(), history.std())] == [True] * 3
    view = history.with_current(3.0)
    assert (view.percentile(10), view.mean(), view.std()) == (3, 3, 0)


@settings(deadline=None)
@given(
    before=st.lists(NORMS, max_size=20),
    after=st.tuples(st.lists(NORMS, min_size=1, max_size=20), st.lists(NORMS, min_size=1, max_size=20)),
    window=WINDOWS,
)
def test_copies_that_are_appended_to_in_turn_are_independent(before, after, window):
    history = History(window)
    history.extend(before)
    states = [(history, list(before)), (copy.copy(history), list(before)), (copy.copy(history), list(before))]
    for each in zip(*after, strict=False):
        for (one, norms), norm in zip(states[1:], each, strict=True):
            one.append(norm)
            norms.append(norm)
        for one, norms in states:
            assert (one.values.tolist(), one.count) == (counted(norms, window).tolist(), len(norms))
            if norms:
                assert_as_numpy(one, counted(norms, window), 30)


@settings(deadline=None)
@given(norms=st.lists(NORMS, max_size=30), more=st.lists(NORMS, max_size=5), windows=st.tuples(WINDOWS, WINDOWS))
def test_a_state_is_restored_with_the_newest_norms_that_the_window_holds(norms, more, windows):
    saved, restored = (History(window) for window in windows)
    saved.extend(norms)
    restored.load_state_dict(saved.state_dict())
    restored.extend(more)
    assert restored.count == len(norms) + len(more)
    assert restored.values.tolist() == counted([*counted(norms, windows[0]), *more], windows[1]).tolist()


# --- the metric -------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=100)
@given(
    values=st.lists(st.tuples(ANY, st.sampled_from(FORMS)), min_size=1, max_size=40),
    percentile=st.one_of(st.just(0), st.floats(1, 100)),
    window=WINDOWS,
)
def test_the_metric_agrees_with_numpy_at_every_step_whatever_its_device(values, percentile, window):
    metric = RunningPercentile(percentile, window)
    for i, (value, form) in enumerate(values):
        with in_form(form):
            metric.update(torch.tensor(value))
            result = metric.compute()
        expected = counted([value for value, _ in values[: i + 1]], window)
        assert result.dtype == torch.float32
        if expected.size:
            assert result.item() == pytest.approx(np.percentile(expected, percentile), rel=1e-6)
        else:
            assert result.isnan()
        assert metric.values.tolist() == expected.tolist()


@settings(deadline=None, max_examples=100)
@given(st.lists(ANY, max_size=30), st.lists(ANY, max_size=30), st.lists(ANY, max_size=30), WINDOWS)
def test_extend_is_update_for_each_value(before, bulk, after, window):
    one_by_one, at_once = RunningPercentile(30, window), RunningPercentile(30, window)
    for value in [*before, *bulk, *after]:
        one_by_one.update(value)
    for value in before:
        at_once.update(value)
    at_once.extend(torch.tensor(bulk))
    for value in after:
        at_once.update(value)
    assert torch.equal(one_by_one.values, at_once.values)
    assert torch.equal(one_by_one.compute().nan_to_num(-1.0), at_once.compute().nan_to_num(-1.0))


def test_a_million_values_are_exact():
    values = np.random.default_rng(0).lognormal(0, 3, 1_000_000).astype(np.float32)
    metric = RunningPercentile(33.3, None)
    metric.extend(torch.from_numpy(values[:-1]))
    metric.update(torch.tensor(values[-1]))
    assert metric.compute().item() == pytest.approx(np.percentile(values.astype(np.float64), 33.3), rel=1e-6)
    for percentile, extreme in ((0, values.min()), (100, values.max())):
        assert metric.history.percentile(percentile) == extreme  # to the bit


def test_reset_forgets_everything(form):
    metric = RunningPercentile(50, 3)
    for value in (5.0, 6.0, 7.0, 8.0):
        metric.update(torch.tensor(value))
    metric.reset()
    metric.update(1.0)
    assert metric.compute() == 1.0
    assert metric.values.tolist() == [1.0]


def test_compute_is_not_stale_after_an_update(form):
    metric = RunningPercentile(100)
    metric.update(torch.tensor(1.0))
    assert metric.compute() == 1.0
    metric.extend(torch.tensor([2.0]))
    assert metric.compute() == 2.0
    metric.update(torch.tensor(3.0))
    assert metric.compute() == 3.0


def test_forward_returns_the_value_of_its_argument_and_appends_it():
    metric = RunningPercentile(50, 3)
    assert [metric(value).item() for value in (4.0, 1.0, 3.0, 2.0)] == [4.0, 1.0, 3.0, 2.0]
    assert metric.compute() == 2.0
    assert metric.values.tolist() == [1.0, 3.0, 2.0]


def test_values_that_are_not_persistent_are_neither_saved_nor_missed():
    metric, other = RunningPercentile(50), RunningPercentile(50)
    metric.persistent(False)
    other.persistent(False)
    metric.update(1.0)
    assert not metric.state_dict()
    other.load_state_dict(metric.state_dict())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64], ids=str)
def test_values_of_any_real_dtype_are_kept_in_float64(form, dtype):
    metric = RunningPercentile(50)
    metric.update(torch.tensor([3], dtype=dtype))
    assert metric.values.dtype == torch.float64
    assert metric.compute() == 3.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_module_that_is_cast_leaves_the_values_as_they_are(dtype):
    module = torch.nn.Module()
    module.metric = RunningPercentile(50)
    module.to(dtype)
    module.metric.update(1234567.8)
    module.metric.set_dtype(dtype)
    module.metric.update(1234567.8)
    assert module.metric.values.tolist() == [1234567.8] * 2
    assert module.metric.compute().dtype == torch.float32


def test_plot_shows_the_values_and_the_percentile():
    mpl.use("Agg")
    metric = RunningPercentile(50, 3)
    metric.extend(torch.tensor([9.0, 1.0, 3.0, 2.0]))
    figure, axes = metric.plot()
    values, line = axes.get_lines()
    assert (list(values.get_xdata()), list(values.get_ydata())) == ([2, 3, 4], [1.0, 3.0, 2.0])
    assert set(line.get_ydata()) == {2.0}
    assert metric.plot(ax=axes)[0] is figure


def test_percentiles_of_several_windows_share_a_collection():
    windows = (None, 1024, 2000, None)
    both = MetricCollection({str(i): RunningPercentile(50, window) for i, window in enumerate(windows)})
    for value in range(3000):
        both.update(float(value))
    expected = {str(i): np.percentile(np.arange(3000)[-(window or 3000) :], 50) for i, window in enumerate(windows)}
    assert {key: value.item() for key, value in both.compute().items()} == expected


def test_several_values_at_once_raise_before_anything_is_appended():
    metric = RunningPercentile(50, 2)
    metric.extend(torch.tensor([1.0, 2.0]))
    with pytest.raises(ValueError, match=r"Expected one `value`, but got a tensor of shape \(2,\)"):
        metric.update(torch.ones(2))
    assert metric.values.tolist() == [1.0, 2.0]


def test_values_that_came_in_inference_mode_are_followed_by_others(form):
    metric = RunningPercentile(50)
    with torch.inference_mode():
        metric.update(torch.tensor(1.0))
    metric.update(torch.tensor(3.0))
    assert float(metric.compute()) == 2.0


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("percentile", "error"),
    [
        *((value, ValueError) for value in (-0.1, 100.1, math.nan, math.inf)),
        *((value, TypeError) for value in (True, "10", None)),
    ],
    ids=repr,
)
def test_a_bad_percentile_raises(percentile, error):
    with pytest.raises(error, match="Expected `percentile` to be a number between 0 and 100, but got"):
        RunningPercentile(percentile)


@pytest.mark.parametrize(("window", "error"), [(0, ValueError), (1.5, TypeError), (True, TypeError), ("9", TypeError)])
def test_a_bad_window_raises(window, error):
    for make in (History, lambda window: RunningPercentile(10, window)):
        with pytest.raises(error, match="Expected `window` to be an integer of at least 1"):
            make(window)


def test_a_percentile_that_looks_like_a_fraction_warns():
    with pytest.warns(UserWarning, match="write `percentile=90`"):
        RunningPercentile(0.9)
