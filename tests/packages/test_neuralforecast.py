"""The callback in neuralforecast."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from neuralforecast import NeuralForecast
from neuralforecast.models import MLP
from packages_page import assert_goes_on, assert_logged

from lightning_autoclip import AutoClip

SECTION = "neuralforecast"


def frame() -> pd.DataFrame:
    days = pd.date_range("2020-01-01", periods=120)
    parts = [pd.DataFrame({"unique_id": name, "ds": days, "y": np.sin(np.arange(120) / 4)}) for name in "ab"]
    return pd.concat(parts, ignore_index=True)


@pytest.fixture(scope="module")
def page(run_page):
    return run_page(frame=frame())


def test_a_copy_is_fitted_and_has_recorded_every_step(page):
    assert page["autoclip"] is not page["nhits"].trainer_kwargs["callbacks"][0]
    assert page["nhits"].trainer_kwargs["callbacks"][0].clippers == []
    (clipper,) = page["autoclip"].clippers
    assert clipper.steps == 30
    assert_logged(page["folder"] / "lightning_logs/version_0", clipper)


def test_a_load_drops_callbacks_and_a_record_that_is_carried_goes_on(page):
    assert "callbacks" not in NeuralForecast.load(str(page["folder"] / "saved")).models[0].trainer_kwargs
    assert_goes_on(page["again"].clippers[0], page["autoclip"].clippers[0])
    assert page["again"].clippers[0].steps == 30


@pytest.mark.parametrize("verbose", [False, True])
def test_a_cross_validation_prints_a_report_per_window_unless_it_is_told_not_to(verbose, capsys):
    callback = AutoClip(verbose=verbose)
    model = MLP(h=4, input_size=8, max_steps=3, hidden_size=8, callbacks=[callback], logger=False)
    NeuralForecast([model], freq="D").cross_validation(frame(), n_windows=3, refit=True)
    assert capsys.readouterr().out.count("autoclip: ") == (3 if verbose else 0)
