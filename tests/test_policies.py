"""Policies against numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers import FORMS
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_autoclip import Constant, History, Percentile, Policy, ZScore

NORMS = st.lists(st.floats(2**-10, 2**10, width=32), min_size=1, max_size=50)


def threshold(policy, norms: list[float], which: str = FORMS[0]) -> float:
    history = History(None)
    for norm in norms:
        history.record(norm if which == FORMS[0] else torch.tensor(norm))
    return float(policy(history))


@pytest.mark.parametrize("which", FORMS)
@settings(deadline=None)
@given(norms=NORMS, percentile=st.floats(1, 100), multiplier=st.floats(0.1, 10))
def test_percentile_is_a_multiple_of_numpys(which, norms, percentile, multiplier):
    expected = multiplier * np.percentile(norms, percentile)
    assert threshold(Percentile(percentile, multiplier), norms, which) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("which", FORMS)
@settings(deadline=None)
@given(norms=NORMS, z=st.floats(0.1, 10))
def test_zscore_is_numpys_mean_and_standard_deviation(which, norms, z):
    expected = np.mean(norms) + z * np.std(norms)
    assert threshold(ZScore(z), norms, which) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("which", FORMS)
@settings(deadline=None)
@given(norms=NORMS)
def test_a_rule_from_mean_and_deviation_is_that_of_numpy(which, norms):
    class MeanPlusHalf(Policy):
        def __call__(self, history):
            return 2 * history.mean() + history.std() / 2

    assert threshold(MeanPlusHalf(), norms, which) == pytest.approx(2 * np.mean(norms) + np.std(norms) / 2, rel=1e-4)


@settings(deadline=None)
@given(NORMS)
def test_constant_does_not_look_at_the_norms(norms):
    assert threshold(Constant(0.25), norms) == 0.25


BAD = [(0, ValueError), (-1.0, ValueError), (math.nan, ValueError), (True, TypeError), ("2", TypeError)]


@pytest.mark.parametrize(("value", "error"), [*BAD, (None, TypeError)], ids=repr)
@pytest.mark.parametrize(
    ("policy", "name"), [(Constant, "threshold"), (ZScore, "z"), (Percentile, "multiplier")], ids=lambda v: str(v)
)
def test_a_bad_argument_is_refused(policy, name, value, error):
    with pytest.raises(error, match=f"Expected `{name}` to be a number above 0, but got"):
        policy(**{name: value})


@pytest.mark.parametrize(("percentile", "error"), [(-1, ValueError), (101, ValueError), ("10", TypeError)], ids=repr)
def test_a_bad_percentile_is_refused(percentile, error):
    with pytest.raises(error, match="Expected `percentile` to be a number between 0 and 100"):
        Percentile(percentile)
