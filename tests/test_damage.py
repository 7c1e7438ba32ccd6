"""Checkpoints of which an entry is damaged: refused, or whatever they lead to is none of our errors."""

from __future__ import annotations

import json
import math
import random
import re
import warnings
from collections.abc import Iterator
from contextlib import suppress
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
from torch import Tensor
from torch.optim import SGD, Optimizer

from lightning_autoclip import AutoClip
from lightning_autoclip.__main__ import main
from lightning_autoclip.monitoring.runs import read_run

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


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every entry, at whatever depth; of a tensor a few of its numbers."""
    if path:
        yield path
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from places(entry, (*path, key))
    elif isinstance(value, (list, tuple)):
        for i, entry in enumerate(value[:3]):
            yield from places(entry, (*path, i))
    elif isinstance(value, Tensor):
        yield from ((*path, i) for i in range(min(value.numel(), 40)))


def damaged(value: Any, path: tuple[Any, ...], by: Any) -> Any:
    """A copy with another entry there; with none, where `by` is ``"gone"``."""
    first, *rest = path
    if isinstance(value, Tensor):
        changed = value.clone()
        if isinstance(by, (int, float)) and not isinstance(by, bool):
            changed.view(-1)[first] = torch.tensor(by, dtype=torch.float64).to(value.dtype)
            return changed
        return changed[:-1] if by == "gone" else by
    changed = dict(value) if isinstance(value, dict) else list(value)
    if rest:
        changed[first] = damaged(value[first], tuple(rest), by)
    elif isinstance(by, str) and by == "gone":
        del changed[first]
    else:
        changed[first] = by
    return tuple(changed) if isinstance(value, tuple) else changed


BAD: list[Any] = ["gone", None, True, -1, 0, 3, 10**18, 10**30, -1.5, 0.5, 1e30, 1e308, math.nan, math.inf, -math.inf]
BAD += ["", "x", [], [1.0], {}, {"x": 1}, (), torch.ones(2), torch.tensor(-1e308, dtype=torch.float64)]
BAD += [torch.ones(3, 40, dtype=torch.float64) * 1e300, torch.zeros(0), torch.ones(2, dtype=torch.int64), b"x", 1j]


def go_on_from(state: dict[str, Any], folder: Path) -> None:
    """Load the state, train on, look back."""
    autoclip = AutoClip(50, groups="param_groups", **ARGUMENTS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        autoclip.load_state_dict(state)
        run = trainer(autoclip, log_every_n_steps=4, max_steps=6, logger=CSVLogger(folder))
        run.fit(two_layers(), loader())
    assert autoclip.report().to_markdown()
    assert autoclip.report().to_dict()
    assert len(autoclip.spikes()) > 6
    autoclip.plot()
    run.save_checkpoint(folder / "again.ckpt")
    AutoClip(50, groups="param_groups", **ARGUMENTS).load_state_dict(autoclip.state_dict())


def every_damage(state: dict[str, Any]) -> list[tuple[tuple[Any, ...], Any]]:
    """Each entry with each bad value, of one group; in an order that is the same each time."""
    found = [path for path in places(state) if "autoclip/two/" not in path]
    cases = [(path, by) for path in found for by in BAD]
    random.Random(0).shuffle(cases)
    return cases


def test_a_damaged_entry_is_refused_by_one_sentence_or_does_no_harm(checkpoint, tmp_path):
    state, refused = checkpoint["callbacks"]["GradientClipping"], []
    accepted: dict[tuple[str, ...], Any] = {}
    cases = every_damage(state)
    for path, by in cases:
        changed = damaged(state, path, by)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                AutoClip(50, groups="param_groups", **ARGUMENTS).load_state_dict(changed)
            accepted[tuple(key for key in path if isinstance(key, str))] = changed
        except ValueError as error:
            refused.append(str(error))
    assert not [text for text in refused if not re.search(r"damaged|checkpoint's records? (was|were) made with", text)]
    assert max(map(len, refused)) < 1000
    assert len(refused) > 0.8 * len(cases)  # the rest is another setting, or nothing that a record could tell
    for changed in accepted.values():
        go_on_from(changed, tmp_path)


def test_what_is_shortened_or_exchanged_is_refused(checkpoint):
    state = checkpoint["callbacks"]["GradientClipping"]
    one, two = (state["scopes"][f"autoclip/{group}/"] for group in ("one", "two"))
    history, bins = one["clipper"]["history"], one["trace"]["bins"]
    changes = [("clipper", "history", {**history, "values": history["values"][1:]}), ("clipper", "steps", 7)]
    for entry, part, other in [*changes, ("trace", "bins", bins[1:]), ("trace", "bins", bins.flip(0))]:
        scopes = {"autoclip/one/": {**one, entry: {**one[entry], part: other}}, "autoclip/two/": two}
        with pytest.raises(ValueError, match="damaged"):
            AutoClip(50, groups="param_groups", **ARGUMENTS).load_state_dict({**state, "scopes": scopes})


def test_a_report_of_a_damaged_checkpoint_is_one_line_or_right(checkpoint, tmp_path):
    state, refused = checkpoint["callbacks"]["GradientClipping"], []
    for number, (path, by) in enumerate(every_damage(state)[:150]):
        callbacks = {"GradientClipping": damaged(state, path, by)}
        torch.save({**checkpoint, "callbacks": callbacks}, tmp_path / "run.ckpt")
        try:
            run = read_run(tmp_path / "run.ckpt")
        except ValueError as error:
            refused.append(str(error))
            continue
        assert str(run.report())
        assert json.dumps(run.report().to_dict(), allow_nan=False)
        if number % 15 == 0:
            assert main(["report", str(tmp_path / "run.ckpt"), "--plot", str(tmp_path / "plot.png")]) == 0
    assert len(refused) > 75
    assert all("damaged" in text and len(text) < 1000 for text in refused)


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


def test_a_record_that_is_loaded_by_hand_goes_on_in_a_new_training(checkpoint, tmp_path, capsys):
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
    assert main(["report", "again.ckpt"]) == 0
    assert "They begin at step" not in capsys.readouterr().err
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


@pytest.mark.parametrize("by", [5, None, 1.5, (1, 2), True], ids=repr)
def test_a_report_of_a_record_without_a_name_is_one_line(checkpoint, by):
    state = checkpoint["callbacks"]["GradientClipping"]
    scopes = {by: state["scopes"]["autoclip/one/"]}
    torch.save({**checkpoint, "callbacks": {"GradientClipping": {**state, "scopes": scopes}}}, "run.ckpt")
    with pytest.raises(ValueError, match="damaged"):
        read_run(Path("run.ckpt"))


@pytest.mark.parametrize("values", [torch.tensor(1.0), torch.ones(2, 2), torch.ones(2, dtype=torch.int64)], ids=str)
def test_a_report_of_a_history_that_is_none_is_one_line(checkpoint, values):
    state = checkpoint["callbacks"]["GradientClipping"]
    scope = state["scopes"]["autoclip/one/"]
    clipper = {**scope["clipper"], "history": {**scope["clipper"]["history"], "values": values}}
    scopes = {"autoclip/one/": {**scope, "clipper": clipper}}
    torch.save({**checkpoint, "callbacks": {"GradientClipping": {**state, "scopes": scopes}}}, "run.ckpt")
    with pytest.raises(ValueError, match="damaged"):
        read_run(Path("run.ckpt"))


@pytest.mark.parametrize("at", [0.3, 0.6, 0.97, 0.985, 0.999])
def test_an_archive_whose_bytes_are_others_is_one_line_or_right(checkpoint, at):
    torch.save(checkpoint, "run.ckpt")
    sound = Path("run.ckpt").read_bytes()
    for number in range(40):
        place = int(at * len(sound)) + number
        if place < len(sound):
            Path("run.ckpt").write_bytes(sound[:place] + bytes([sound[place] ^ 0xFF]) + sound[place + 1 :])
            with suppress(ValueError):
                read_run(Path("run.ckpt")).report()


def test_settings_that_cannot_be_compared_are_changed_ones(checkpoint):
    state = checkpoint["callbacks"]["GradientClipping"]
    changed = {**state, "settings": {**state["settings"], "window": np.array([1, 2])}}
    with pytest.warns(match="written with window=array"):
        AutoClip(50, groups="param_groups", **ARGUMENTS).load_state_dict(changed)
