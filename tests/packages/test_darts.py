"""The callback in darts."""

from __future__ import annotations

import numpy as np
import pytest
from darts import TimeSeries
from darts.models import BlockRNNModel
from packages_page import assert_goes_on, assert_logged
from pytorch_lightning.loggers import CSVLogger

from lightning_autoclip import AutoClip

SECTION = "darts"


def series(length: int = 200) -> TimeSeries:
    return TimeSeries.from_values(np.sin(np.arange(length) / 5).astype(np.float32))


@pytest.fixture(scope="module")
def page(run_page):
    return run_page(series=series(), validation=series(60))


def model(callback: AutoClip) -> BlockRNNModel:
    trainer = {"accelerator": "cpu", "callbacks": [callback], "logger": False, "enable_progress_bar": False}
    return BlockRNNModel(12, 4, n_epochs=1, pl_trainer_kwargs=trainer)


def test_the_fitted_copy_has_recorded_and_logged_every_step(page):
    (clipper,) = page["autoclip"].clippers
    assert clipper.steps == page["model"].trainer.global_step == 12
    assert_logged(page["model"].trainer.log_dir, clipper)


def test_a_loaded_model_goes_on_with_the_record(page):
    (first,), (second,) = page["autoclip"].clippers, page["again"].clippers
    assert_goes_on(second, first)
    assert second.steps == 2 * first.steps == page["loaded"].trainer.global_step
    assert_logged(page["loaded"].trainer.log_dir, second)


def test_safe_loading_refuses_the_callback_by_name(page):
    page["model"].save("model.pt")
    with pytest.raises(Exception, match=r"lightning_autoclip.lightning.autoclip.AutoClip` is not allow-listed"):
        BlockRNNModel.load("model.pt")


def test_a_logger_object_is_refused_likewise(page):
    logger = CSVLogger("logs")
    other = BlockRNNModel(12, 4, pl_trainer_kwargs={"logger": logger})
    other.save("other.pt")
    with pytest.raises(Exception, match=r"CSVLogger` is not allow-listed"):
        BlockRNNModel.load("other.pt")


def test_a_trusted_file_loads_and_a_fit_after_it_begins_a_new_record(page):
    page["model"].save("model.pt")
    loaded = BlockRNNModel.load("model.pt", trusted=True)
    loaded.fit(series(), val_series=series(60), epochs=1)
    assert loaded.trainer_params["callbacks"][-1].clippers[0].steps == loaded.trainer.global_step == 6


def test_a_clean_file_loads_as_it_is(page):
    page["model"].save("clean.pt", clean=True)
    assert len(BlockRNNModel.load("clean.pt").predict(4, series=series())) == 4


@pytest.mark.parametrize("verbose", [False, True])
def test_a_back_test_prints_a_report_per_fit_unless_it_is_told_not_to(verbose, capsys):
    callback = AutoClip(verbose=verbose)
    forecasts = model(callback).historical_forecasts(
        series(60), start=0.9, retrain=True, forecast_horizon=4, last_points_only=False
    )
    assert len(forecasts) == 4
    assert capsys.readouterr().out.count("autoclip: ") == (len(forecasts) if verbose else 0)
    assert callback.clippers == []  # copies were fitted
