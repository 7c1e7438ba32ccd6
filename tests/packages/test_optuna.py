"""The callback in trials of Optuna."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import optuna
import pytest
from helpers import Net, loader
from optuna.trial import TrialState
from packages_page import assert_logged, last_row
from torch.optim import Adam

SECTION = "optuna"


class Validated(Net):
    """The network with a validation loss."""

    def validation_step(self, batch, batch_idx):
        self.log("loss", self.loss(batch))


@pytest.fixture(scope="module")
def page(run_page):
    return run_page(
        build_model=partial(Validated, partial(Adam, lr=0.01)), train_loader=loader(), val_loader=loader(seed=1)
    )


def test_each_trial_records_and_logs_its_own_steps(page):
    trials = page["study"].get_trials(states=[TrialState.COMPLETE])
    assert len(trials) == len(page["autoclips"]) >= 2
    for trial, callback in zip(trials, page["autoclips"], strict=True):
        (clipper,) = callback.clippers
        assert clipper.steps == 3 * 16
        log = page["folder"] / f"lightning_logs/version_{trial.number}"
        assert_logged(log, clipper, trial.params["percentile"])


def test_a_trial_that_is_pruned_has_logged_its_last_rows_and_prints_nothing(page, capsys):
    study = optuna.create_study(pruner=optuna.pruners.ThresholdPruner(upper=-1))
    study.optimize(page["objective"], n_trials=1)
    (trial,) = study.trials
    assert trial.state == TrialState.PRUNED
    assert "autoclip: " not in capsys.readouterr().out
    assert last_row(max(Path("lightning_logs").iterdir()))["step"] == 15  # of the first epoch
