"""States of the callback that are damaged, or are those of another run."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Net, loader, read_csv, trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from models import OptimizerPerLayer
from torch.optim import SGD, Optimizer

from lightning_autoclip import AutoClip
from lightning_autoclip.checkpoint import read_run

ARGUMENTS: dict[str, Any] = {"log_layers": True, "log_every_step": True, "skip_above": 20.0, "verbose": False}


def two_layers() -> Net:
    def optimizer(parameters: Any) -> SGD:
        parameters = list(parameters)
        return SGD([{"params": parameters[:2], "name": "one"}, {"params": parameters[2:], "name": "two"}], 0.01, 0.9)

    return Net(optimizer)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> dict[str, Any]:
    """Of a run with two groups, steps that wait for their row, one that is not finite and one that is left out."""
    path = tmp_path_factory.mktemp("damage")
    scales = [1.0] * 20 + [math.nan] * 4 + [1.0] * 84 + [300.0] * 4 + [1.0] * 8
    autoclip = AutoClip(50, groups="param_groups", **ARGUMENTS)
    saves = ModelCheckpoint(path, filename="run", every_n_train_steps=29)
    run = trainer(autoclip, saves, log_every_n_steps=8, logger=CSVLogger(path), enable_checkpointing=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.fit(two_layers(), loader(n=120, scales=scales))
    return torch.load(path / "run.ckpt", weights_only=True)


def test_what_is_shortened_or_exchanged_is_refused(checkpoint):
    state = checkpoint["callbacks"]["GradientClipping"]
    one, two = (state["scopes"][f"autoclip/{group}/"] for group in ("one", "two"))
    history, bins = one["clipper"]["history"], one["trace"]["bins"]
    changes = [("clipper", "history", {**history, "values": history["values"][1:]}), ("clipper", "steps", 7)]
    for entry, part, other in [*changes, ("trace", "bins", bins[1:]), ("trace", "bins", bins.flip(0))]:
        scopes = {"autoclip/one/": {**one, entry: {**one[entry], part: other}}, "autoclip/two/": two}
        with pytest.raises(ValueError, match="damaged"):
            AutoClip(50, groups="param_groups", **ARGUMENTS).load_state_dict({**state, "scopes": scopes})


class OtherOrder(OptimizerPerLayer):
    """The optimizers of the two layers, the other way round."""

    def configure_optimizers(self) -> list[Optimizer]:
        return super().configure_optimizers()[::-1]


def test_optimizers_in_another_order_are_refused_and_renamed_ones_go_on(tmp_path):
    sgd, run = partial(SGD, lr=0.01), trainer(AutoClip(50, verbose=False))
    run.fit(OptimizerPerLayer(sgd, sgd), loader())
    state = run.callbacks[0].state_dict()

    def go_on(net: type[OptimizerPerLayer], **names: str) -> AutoClip:
        autoclip = AutoClip(50, verbose=False)
        autoclip.load_state_dict(state)
        for trace in autoclip.traces.values():
            trace.names = [names.get("called", "") + name for name in trace.names]
        trainer(autoclip).fit(net(sgd, sgd), loader())
        return autoclip

    assert [len(clipper.history) for clipper in go_on(OptimizerPerLayer).clippers] == [32, 32]
    assert [len(clipper.history) for clipper in go_on(OtherOrder, called="before.").clippers] == [32, 32]
    with pytest.raises(MisconfigurationException, match="is of the parameters that `autoclip/SGD-1/` has in this run"):
        go_on(OtherOrder)


def test_a_record_that_is_loaded_by_hand_goes_on_in_a_new_training(checkpoint, tmp_path):
    autoclip, callbacks = AutoClip(50, groups="param_groups", **ARGUMENTS), checkpoint["callbacks"]
    autoclip.load_state_dict(callbacks["GradientClipping"])
    before = [clipper.history.recorded.tolist() for clipper in autoclip.clippers]
    steps = autoclip.clippers[0].steps
    run = trainer(autoclip, log_every_n_steps=4, logger=CSVLogger(tmp_path, "", "run"), enable_checkpointing=True)
    with pytest.warns(UserWarning, match="goes up to step 28, and this fit begins with step 0: it goes on, and in"):
        run.fit(two_layers(), loader(n=64))
    for clipper, norms in zip(autoclip.clippers, before, strict=True):
        assert clipper.steps == steps + 16
        assert clipper.history.recorded.tolist()[: len(norms)] == norms
    assert [trace.bins[0].first for trace in autoclip.traces.values()] == [-steps, -steps]
    assert {spike["step"] for spike in autoclip.spikes() if spike["left_out"] or math.isnan(spike["norm"])} < {
        *range(-29, 0)
    }
    autoclip.plot()
    rows = read_csv(tmp_path / "run" / "metrics.csv")
    assert [row["step"] for row in rows if row["autoclip/one/grad_norm_mean"]] == ["3", "7", "11", "15"]
    run.save_checkpoint("again.ckpt")
    assert f"autoclip/one: {steps + 16} steps" in str(read_run(Path("again.ckpt")).report())
    resumed = AutoClip(50, groups="param_groups", **ARGUMENTS)
    trainer(resumed, max_epochs=2).fit(two_layers(), loader(n=64), ckpt_path="again.ckpt", weights_only=False)
    assert [clipper.steps for clipper in resumed.clippers] == [steps + 32, steps + 32]


def test_earlier_steps_of_several_optimizers_keep_their_distance():
    sgd, autoclip = partial(SGD, lr=0.01), AutoClip(50, verbose=False)
    trainer(autoclip).fit(OptimizerPerLayer(sgd, sgd), loader())
    again = AutoClip(50, verbose=False)
    again.load_state_dict(autoclip.state_dict())
    second = again.traces["autoclip/SGD-1/"]
    second.bins[-1] = replace(second.bins[-1], first=14.0, last=14.0)  # its last step was one batch before
    with pytest.warns(UserWarning, match="goes up to step 15"):
        trainer(again, max_steps=2).fit(OptimizerPerLayer(sgd, sgd), loader())
    assert [trace.bins[15].last for trace in again.traces.values()] == [-1, -2]


@pytest.mark.parametrize("step", [10**12, 10**5])
def test_steps_that_wait_are_in_order_and_none_is_behind_the_last(checkpoint, step):
    state = checkpoint["callbacks"]["GradientClipping"]
    for place in (0, -1):
        scope = state["scopes"]["autoclip/one/"]
        points = scope["held"]["points"].clone()
        points[place, 0] = step
        scopes = {**state["scopes"], "autoclip/one/": {**scope, "held": {**scope["held"], "points": points}}}
        with pytest.raises(ValueError, match="damaged"):
            AutoClip(50, groups="param_groups", **ARGUMENTS).load_state_dict({**state, "scopes": scopes})


def test_settings_that_cannot_be_compared_are_changed_ones(checkpoint):
    state = checkpoint["callbacks"]["GradientClipping"]
    changed = {**state, "settings": {**state["settings"], "window": np.array([1, 2])}}
    with pytest.warns(match="written with window=array"):
        AutoClip(50, groups="param_groups", **ARGUMENTS).load_state_dict(changed)
