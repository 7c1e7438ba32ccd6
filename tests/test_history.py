"""RunningPercentile against numpy."""

from __future__ import annotations

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

NORMS = st.floats(2**-20, 2**20, width=32)
ANY = st.one_of(NORMS, st.sampled_from([math.nan, math.inf, -math.inf, 1.0, 2.0]))
WINDOWS = st.one_of(st.none(), st.integers(1, 12))
PERCENTILES = st.one_of(st.sampled_from([0, 100, 50, 10]), st.floats(1, 100))


def kept(values: list[float], window: int | None) -> np.ndarray:
    finite = [value for value in values if math.isfinite(value)]
    return np.array(finite if window is None else finite[-window:])


@pytest.mark.parametrize("which", FORMS)
@settings(deadline=None, max_examples=200)
@given(values=st.lists(ANY, min_size=1, max_size=40), percentile=PERCENTILES, window=WINDOWS)
def test_percentile_agrees_with_numpy_at_every_step(which, values, percentile, window):
    metric = RunningPercentile(percentile, window)
    for i, value in enumerate(values):
        with in_form(which):
            metric.update(torch.tensor(value))
            result = metric.compute()
        expected = kept(values[: i + 1], window)
        if expected.size:
            assert result.item() == pytest.approx(np.percentile(expected, percentile), rel=1e-6)
        else:
            assert result.isnan()
        np.testing.assert_array_equal(metric.recorded.numpy(), expected.astype(np.float32))


@settings(deadline=None)
@given(values=st.lists(ANY, min_size=1, max_size=40), window=WINDOWS, switch=st.integers(0, 40))
def test_a_record_that_moves_between_devices_goes_on(values, window, switch):
    """The two forms keep one and the same state, so that a record can go from an accelerator to the CPU and back."""
    metric, reference = RunningPercentile(50, window), RunningPercentile(50, window)
    for i, value in enumerate(values):
        reference.update(torch.tensor(value))
        with in_form(FORMS[(i < switch) ^ (i % 5 == 0)]):
            metric.update(torch.tensor(value))
        assert torch.equal(metric.recorded, reference.recorded)
        assert metric.history.count == reference.history.count
        for percentile in (0, 33.3, 100):
            assert float(metric.history.percentile(percentile)) == pytest.approx(
                reference.history.percentile(percentile), rel=1e-6, nan_ok=True
            )


@settings(deadline=None, max_examples=100)
@given(st.lists(ANY, max_size=30), st.lists(ANY, max_size=30), st.lists(ANY, max_size=30), PERCENTILES, WINDOWS)
def test_extend_is_update_for_each_value(before, bulk, after, percentile, window):
    one_by_one, at_once = RunningPercentile(percentile, window), RunningPercentile(percentile, window)
    for value in [*before, *bulk, *after]:
        one_by_one.update(value)
    for value in before:
        at_once.update(value)
    at_once.extend(torch.tensor(bulk))
    for value in after:
        at_once.update(value)
    assert torch.equal(one_by_one.recorded, at_once.recorded)
    assert torch.equal(one_by_one.compute().nan_to_num(-1.0), at_once.compute().nan_to_num(-1.0))


@pytest.mark.parametrize("window", [1024, 1500, None], ids=str)
def test_the_record_grows_past_its_first_capacity(form, window):
    values = np.random.default_rng(0).lognormal(0, 2, 3000).astype(np.float32)
    metric = RunningPercentile(10, window)
    for value in values:
        metric.update(torch.tensor(value))
    expected = kept(values.tolist(), window)
    assert metric.compute().item() == pytest.approx(np.percentile(expected.astype(np.float64), 10), rel=1e-6)
    np.testing.assert_array_equal(metric.recorded.numpy(), expected.astype(np.float32))


def test_a_million_values_are_exact():
    values = np.random.default_rng(0).lognormal(0, 3, 1_000_000).astype(np.float32)
    metric = RunningPercentile(33.3, None)
    metric.extend(torch.from_numpy(values[:-1]))
    metric.update(torch.tensor(values[-1]))
    assert metric.compute().item() == pytest.approx(np.percentile(values.astype(np.float64), 33.3), rel=1e-6)


@pytest.mark.parametrize("percentile", [0, 100])
def test_the_extremes_are_recorded_values_to_the_bit(percentile):
    values = np.random.default_rng(1).lognormal(0, 3, 500).astype(np.float32)
    metric = RunningPercentile(percentile, None)
    metric.extend(torch.from_numpy(values))
    assert metric.compute().item() == (values.max() if percentile else values.min())


def test_reset_forgets_everything():
    metric = RunningPercentile(50, 3)
    for value in (5.0, 6.0, 7.0, 8.0):
        metric.update(value)
    metric.reset()
    metric.update(1.0)
    assert metric.compute() == 1.0
    assert metric.recorded.tolist() == [1.0]


@pytest.mark.parametrize("window", [3, None], ids=str)
def test_compute_is_not_stale_after_an_update(window):
    metric = RunningPercentile(100, window)
    metric.update(1.0)
    assert metric.compute() == 1.0
    metric.extend(torch.tensor([2.0]))
    assert metric.compute() == 2.0
    metric.update(3.0)
    assert metric.compute() == 3.0


def test_forward_returns_the_value_of_its_argument_and_records_it():
    metric = RunningPercentile(50, 3)
    assert [metric(value).item() for value in (4.0, 1.0, 3.0, 2.0)] == [4.0, 1.0, 3.0, 2.0]
    assert metric.compute() == 2.0
    assert metric.recorded.tolist() == [1.0, 3.0, 2.0]


def test_a_record_that_is_not_persistent_is_neither_saved_nor_missed():
    metric, other = RunningPercentile(50), RunningPercentile(50)
    metric.persistent(False)
    other.persistent(False)
    metric.update(1.0)
    assert not metric.state_dict()
    other.load_state_dict(metric.state_dict())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64], ids=str)
def test_any_real_dtype_is_recorded_as_float32(dtype):
    metric = RunningPercentile(50)
    metric.update(torch.tensor([3], dtype=dtype))
    assert metric.recorded.dtype == torch.float32
    assert metric.compute() == 3.0


def test_half_leaves_the_record_in_float32():
    metric = RunningPercentile(50).half()
    metric.update(1e6)
    assert metric.compute() == 1e6


def test_plot_shows_the_record_and_the_percentile():
    mpl.use("Agg")
    metric = RunningPercentile(50, 3)
    metric.extend(torch.tensor([9.0, 1.0, 3.0, 2.0]))
    figure, axes = metric.plot()
    recorded, line = axes.get_lines()
    assert (list(recorded.get_xdata()), list(recorded.get_ydata())) == ([2, 3, 4], [1.0, 3.0, 2.0])
    assert set(line.get_ydata()) == {2.0}
    assert metric.plot(ax=axes)[0] is figure


@pytest.mark.parametrize(
    ("percentile", "error"),
    [
        *((value, ValueError) for value in (-0.1, 100.1, math.nan, math.inf)),
        *((value, TypeError) for value in (True, "10", None)),
    ],
    ids=repr,
)
def test_a_bad_percentile_is_refused(percentile, error):
    with pytest.raises(error, match="Expected `percentile` to be a number between 0 and 100, but got"):
        RunningPercentile(percentile)


@pytest.mark.parametrize(
    ("window", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError), ("9", TypeError)]
)
def test_a_bad_window_is_refused(window, error):
    with pytest.raises(error, match="Expected `window` to be an integer of at least 1"):
        RunningPercentile(10, window)


def test_a_percentile_that_looks_like_a_fraction_warns():
    with pytest.warns(UserWarning, match="write `percentile=90`"):
        RunningPercentile(0.9)


@pytest.mark.parametrize("window", [None, 1500], ids=str)
def test_forward_grows_the_record_too(window):
    metric = RunningPercentile(50, window)
    for value in range(1600):
        metric(float(value))
    assert metric.compute() == np.percentile(np.arange(1600)[-(window or 1600) :], 50)


@pytest.mark.parametrize("windows", [(None, 2000), (1024, None), (1024, 2000), (None, None)], ids=str)
def test_percentiles_of_several_windows_share_a_collection(windows):
    both = MetricCollection({str(i): RunningPercentile(50, window) for i, window in enumerate(windows)})
    for value in range(3000):
        both.update(float(value))
    expected = {str(i): np.percentile(np.arange(3000)[-(window or 3000) :], 50) for i, window in enumerate(windows)}
    assert {key: value.item() for key, value in both.compute().items()} == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_module_that_is_cast_leaves_the_record_in_float32(dtype):
    module = torch.nn.Module()
    module.metric = RunningPercentile(50)
    module.to(dtype)
    module.metric.update(1.2345678)
    module.metric.set_dtype(dtype)
    module.metric.update(1.2345678)
    assert module.metric.compute().item() == pytest.approx(1.2345678, rel=1e-7)


def test_several_values_at_once_are_refused_before_anything_is_recorded():
    metric = RunningPercentile(50, 2)
    metric.extend(torch.tensor([1.0, 2.0]))
    with pytest.raises(ValueError, match=r"Expected one `value`, but got a tensor of shape \(2,\)"):
        metric.update(torch.ones(2))
    assert metric.recorded.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("which", FORMS)
@settings(deadline=None, max_examples=100)
@given(
    values=st.lists(st.one_of(NORMS, st.sampled_from([1.0, 2.0, 3.0])), min_size=1, max_size=20),
    counts=st.lists(st.booleans(), min_size=20, max_size=20),
    window=WINDOWS,
    loaded=st.integers(0, 20),
)
def test_the_state_before_the_newest_value_is_the_one_that_was(which, values, counts, window, loaded):
    history = History(window)
    for at, (value, does_count) in enumerate(zip(values, counts, strict=False)):
        before = history.state_dict()
        if at == loaded:
            history = History(window)
            history.load_state_dict(before)
        if which == "cpu form":
            history.record(value)
        else:
            history.record(torch.tensor(value), torch.tensor(does_count))
        again = history.state_before()
        assert again["values"].tolist() == before["values"].tolist()
        assert again["count"] == before["count"]


def test_the_state_before_a_value_that_came_in_the_other_form():
    for forms in ((float, torch.tensor), (torch.tensor, float)):
        history = History(3)
        for at, value in enumerate([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]):
            before = history.state_dict()
            history.record(forms[at % 2](value))
            assert history.state_before()["values"].tolist() == before["values"].tolist()


@pytest.mark.parametrize("form", FORMS)
def test_values_that_came_in_inference_mode_are_followed_by_others(form):
    with in_form(form):
        metric = RunningPercentile(50)
        with torch.inference_mode():
            metric.update(torch.tensor(1.0))
        metric.update(torch.tensor(3.0))
        assert float(metric.compute()) == 2.0
