"""The callback in pytorch-forecasting."""

from __future__ import annotations

from pickle import UnpicklingError

import numpy as np
import pandas as pd
import pytest
from lightning.pytorch import Trainer
from packages_page import assert_goes_on, assert_logged
from pytorch_forecasting import TemporalFusionTransformer, TimeSeriesDataSet
from pytorch_forecasting.tuning import Tuner

from lightning_autoclip import AutoClip

SECTION = "pytorch-forecasting"


@pytest.fixture(scope="module")
def training():
    time = np.arange(60)
    parts = [
        pd.DataFrame({"time": time, "series": name, "value": np.sin(time / 4 + phase)})
        for phase, name in enumerate("abcd")
    ]
    return TimeSeriesDataSet(
        pd.concat(parts, ignore_index=True),
        time_idx="time",
        target="value",
        group_ids=["series"],
        max_encoder_length=12,
        max_prediction_length=4,
        time_varying_unknown_reals=["value"],
    )


@pytest.fixture(scope="module")
def loader(training):
    return training.to_dataloader(train=True, batch_size=16, num_workers=0)


@pytest.fixture(scope="module")
def page(run_page, training, loader):
    return run_page(training=training, train_dataloader=loader)


def test_a_resumed_run_goes_on_with_the_record_and_logs_it(page, loader):
    (clipper,) = page["autoclip"].clippers
    assert clipper.steps == page["trainer"].global_step == 4 * len(loader)
    assert_goes_on(clipper, page["first"].clippers[0])
    assert_logged(page["trainer"].log_dir, clipper)


def test_a_checkpoint_is_refused_by_weights_only_without_the_callback_too(training, loader, tmp_path):
    model = TemporalFusionTransformer.from_dataset(training, hidden_size=8)
    trainer = Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False)
    trainer.fit(model, loader)
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(UnpicklingError, match="weights_only"):
        TemporalFusionTransformer.load_from_checkpoint(tmp_path / "plain.ckpt", weights_only=True)


def test_the_learning_rate_finder_runs_without_the_callback(training, loader, capsys):
    model = TemporalFusionTransformer.from_dataset(training, hidden_size=8, learning_rate=0.03)
    callback = AutoClip()
    trainer = Trainer(accelerator="cpu", max_epochs=1, callbacks=[callback], logger=False)
    Tuner(trainer).lr_find(model, loader, num_training=8, update_attr=False)
    assert callback.clippers == []
    assert "autoclip: " not in capsys.readouterr().out
    trainer.fit(model, loader)
    assert callback.clippers[0].steps == len(loader)
    assert capsys.readouterr().out.count("autoclip: ") == 1
