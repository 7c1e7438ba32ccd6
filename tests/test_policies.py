"""Policies against numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_autoclip import Constant, History, Percentile, Policy, ZScore

NORMS = st.lists(st.floats(2**-10, 2**10, width=32), min_size=1, max_size=50)
CURRENT = {"float": float, "tensor": torch.tensor}  # the current norm: on the host, on an accelerator


class MeanPlusHalf(Policy):
    """A rule of one's own, from mean and deviation."""

    def __call__(self, history):
        return 2 * history.mean() + history.std() / 2


@pytest.mark.parametrize("kind", CURRENT)
@settings(deadline=None)
@given(norms=NORMS, percentile=st.floats(1, 100), factor=st.floats(0.1, 10))
def test_thresholds_are_those_of_numpy(kind, norms, percentile, factor):
    history, mean, deviation = History(None), np.mean(norms), np.std(norms)
    history.extend(norms[:-1])
    view = history.with_current(CURRENT[kind](norms[-1]))
    assert float(Percentile(percentile, factor)(view)) == pytest.approx(
        factor * np.percentile(norms, percentile), rel=1e-6
    )
    assert float(ZScore(factor)(view)) == pytest.approx(mean + factor * deviation, rel=1e-5)
    assert float(MeanPlusHalf()(view)) == pytest.approx(2 * mean + deviation / 2, rel=1e-5)
    assert Constant(factor)(view) == factor


BAD = [(0, ValueError), (-1.0, ValueError), (math.nan, ValueError), (True, TypeError), ("2", TypeError)]


@pytest.mark.parametrize(("value", "error"), [*BAD, (None, TypeError)], ids=repr)
@pytest.mark.parametrize(("policy", "name"), [(Constant, "threshold"), (ZScore, "z"), (Percentile, "multiplier")])
def test_a_bad_argument_raises(policy, name, value, error):
    with pytest.raises(error, match=f"Expected `{name}` to be a number above 0, but got"):
        policy(**{name: value})


@pytest.mark.parametrize(("percentile", "error"), [(-1, ValueError), (101, ValueError), ("10", TypeError)], ids=repr)
def test_a_bad_percentile_raises(percentile, error):
    with pytest.raises(error, match="Expected `percentile` to be a number between 0 and 100"):
        Percentile(percentile)
