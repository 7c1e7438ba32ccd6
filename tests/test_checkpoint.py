"""What a checkpoint keeps: a resumed run takes the steps that an uninterrupted one would have taken."""

import copy
import math
import os
import pickle
import shutil
import signal
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Net, by_percentile, loader, read_csv, trainer, weights, with_gradient
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.loggers import CSVLogger
from models import OptimizerPerLayer
from processes import SERVER, TIME_LIMIT
from torch import nn
from torch.optim import SGD, Optimizer
from torchmetrics import MetricCollection

from lightning_autoclip import AutoClip, GradientClipper, GradientClipping, Percentile, RunningPercentile, ZScore
from lightning_autoclip.checkpoint import read_run
from lightning_autoclip.monitoring.summary import Point

KEY = "GradientClipping"
# The factor on the loss of each batch of four rows. Two of the ten steps of an epoch are not finite.
SCALES = [factor for factor in (1, 3, math.nan, 0.5, 20, 1, math.inf, 2, 1, 8) for _ in range(4)]
ALGORITHMS = pytest.mark.parametrize("algorithm", ["norm", "value"])
WINDOWS = pytest.mark.parametrize("window", [7, None], ids=["window", "full-history"])


class TwoOptimizers(Net):
    """Two networks, each with an optimizer that keeps a state of its own."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.other = nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        x, y, scale = batch
        for optimizer, net in zip(self.optimizers(), (self.net, self.other), strict=True):
            optimizer.zero_grad()
            self.manual_backward(((net(x) - y).square().squeeze(1) * scale).mean())
            optimizer.step()

    def configure_optimizers(self):
        return [super().configure_optimizers(), torch.optim.Adam(self.other.parameters(), lr=0.01)]


MODELS = pytest.mark.parametrize("model", [Net, TwoOptimizers], ids=["one-optimizer", "two-optimizers"])


class Watch(Callback):
    """Holds the norm and the threshold of every step; may do something once a given number of steps is taken."""

    def __init__(self, step=None, action=None):
        self.norms, self.thresholds, self.step, self.action = [], [], step, action

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == self.step:
            self.action()

    def on_train_batch_end(self, trainer, *args):
        self.norms.append(float(trainer.callback_metrics["autoclip/grad_norm"]))
        self.thresholds.append(float(trainer.callback_metrics["autoclip/threshold"]))


def fit(model, *callbacks, epochs=1, ckpt=None, scales=(1.0,)):
    """Train on ten batches per epoch in a fixed order."""
    checkpointing = any(isinstance(callback, Checkpoint) for callback in callbacks)
    run = trainer(*callbacks, max_epochs=epochs, log_every_n_steps=1, enable_checkpointing=checkpointing)
    run.fit(model, loader(n=40, scales=scales), ckpt_path=ckpt)
    return run


def record(callback):
    """Of each optimizer: the recorded norms, how many there ever were, the non-finite steps."""
    assert callback.clippers
    return [(c.history.recorded.tolist(), int(c.history.count), c.nonfinite_total) for c in callback.clippers]


def load(path):
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def of_one_epoch(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "interrupted.ckpt"
    fit(Net(), by_percentile(10, window=7)).save_checkpoint(path)
    return path


@pytest.fixture
def interrupted(of_one_epoch, tmp_path):
    """The checkpoint of one epoch: ten norms, of which a window of 7 holds the newest. Each test may spoil its own."""
    return Path(shutil.copy(of_one_epoch, tmp_path))


def assert_resumes_as_if_uninterrupted(checkpoint, callback, resumed_by=None, model=Net, epochs=3):
    """Resume a checkpoint, of training with ``SCALES``, to the given epoch and compare with a run in one go."""
    whole, second, expected, resumed = callback(), resumed_by or callback(), model(), model()
    fit(expected, whole, epochs=epochs, scales=SCALES)
    fit(resumed, second, epochs=epochs, ckpt=checkpoint, scales=SCALES)
    assert torch.equal(weights(resumed), weights(expected))
    assert record(second) == record(whole)
    assert all(counts == [8 * epochs, 2 * epochs] for _, *counts in record(second))


@MODELS
@WINDOWS
@ALGORITHMS
def test_a_resumed_run_takes_the_same_steps_as_an_uninterrupted_one(algorithm, window, model, tmp_path):
    # The warm-up ends in the second epoch, after the interruption.
    callback = partial(AutoClip, 30, gradient_clip_algorithm=algorithm, window=window, warmup_steps=12)
    fit(model(), callback(), scales=SCALES).save_checkpoint(tmp_path / "a.ckpt")
    assert_resumes_as_if_uninterrupted(tmp_path / "a.ckpt", callback, model=model)


def train_until_killed(folder):
    kill = Watch(25, lambda: os.kill(os.getpid(), signal.SIGKILL))
    fit(Net(), AutoClip(30, window=7), kill, ModelCheckpoint(folder, save_last=True), epochs=4, scales=SCALES)


@pytest.mark.distributed
def test_a_killed_run_that_is_resumed_takes_the_same_steps_as_an_uninterrupted_one(tmp_path):
    process = SERVER.Process(target=train_until_killed, args=(str(tmp_path),))
    process.start()
    process.join(TIME_LIMIT)
    process.kill()
    assert process.exitcode == -signal.SIGKILL
    assert load(tmp_path / "last.ckpt")["global_step"] == 20  # of the 25 steps that were taken
    assert_resumes_as_if_uninterrupted(tmp_path / "last.ckpt", partial(AutoClip, 30, window=7), epochs=4)


@pytest.mark.parametrize("copied", [lambda c: pickle.loads(pickle.dumps(c)), copy.deepcopy], ids=["pickle", "deepcopy"])
@ALGORITHMS
def test_a_copied_callback_works_before_and_after_training(algorithm, copied, tmp_path):
    # Lightning hangs the model's `log` on each callback, so that the model is copied along.
    model = partial(Net, partial(torch.optim.SGD, lr=0.1, momentum=0.9))
    callback = partial(AutoClip, 30, gradient_clip_algorithm=algorithm, window=7)
    before = copied(callback())
    fit(model(), before, scales=SCALES).save_checkpoint(tmp_path / "a.ckpt")
    after, then = copied(before), record(before)
    assert record(after) == then
    assert_resumes_as_if_uninterrupted(tmp_path / "a.ckpt", callback, resumed_by=after, model=model)
    assert record(before) == then


@pytest.mark.parametrize("types", [(float, int), (np.float32, np.int64)], ids=["python-numbers", "numpy-numbers"])
@MODELS
def test_the_state_loads_with_weights_only(model, types, tmp_path):
    real, whole = types
    arguments = {"percentile": real(10), "multiplier": real(2), "max_threshold": real(3), "window": whole(7)}
    callback, restored = by_percentile(**arguments), by_percentile(**arguments)
    fit(model(), callback, scales=SCALES).save_checkpoint(tmp_path / "a.ckpt")
    restored.load_state_dict(load(tmp_path / "a.ckpt")["callbacks"][KEY])
    assert record(restored) == record(callback)


@pytest.mark.parametrize("order", [1, -1], ids=["AutoClip-first", "GradientClipping-first"])
def test_the_preset_and_the_general_callback_read_each_others_state(order):
    first, second = [by_percentile(10, window=7), GradientClipping(Percentile(10), window=7)][::order]
    fit(Net(), first, scales=SCALES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second.load_state_dict(first.state_dict())
    assert record(second) == record(first)


def test_a_checkpoint_in_the_middle_of_an_epoch_holds_the_norms_recorded_so_far(tmp_path):
    watch = Watch(7, lambda: 1 / 0)
    checkpoints = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1)
    with pytest.raises(ZeroDivisionError):
        fit(Net(), by_percentile(), watch, checkpoints, OnExceptionCheckpoint(tmp_path, "exception"))
    for name, step in {"step=3": 3, "step=6": 6, "exception": 7}.items():
        history = load(tmp_path / f"{name}.ckpt")["callbacks"][KEY]["scopes"]["autoclip/"]["clipper"]["history"]
        assert history["values"].tolist() == watch.norms[:step]
        assert int(history["count"]) == step


@pytest.mark.parametrize(
    ("resumed", "oracle", "was", "now"),
    [
        (by_percentile(90, window=7), 90, r"'percentile': 10\.0", r"'percentile': 90\.0"),
        (GradientClipping(ZScore(1), window=7), lambda norms: norms.mean() + norms.std(), "Percentile", "ZScore"),
        (by_percentile(50, window=3), 50, "window=7", "window=3"),
        (by_percentile(50, window=12), 50, "window=7", "window=12"),
        (by_percentile(50, window=12, warmup_steps=9), 50, "warmup_steps=0", "warmup_steps=9"),
        (by_percentile(50, window=None), 50, "window=7", "window=None"),
        (by_percentile(10, window=7, nonfinite="raise"), 10, "nonfinite='skip'", "nonfinite='raise'"),
        (
            by_percentile(10, window=7, max_threshold=0.9),
            lambda norms: min(0.9, np.percentile(norms, 10)),
            "None",
            r"0\.9",
        ),
    ],
    ids=["percentile", "policy", "smaller", "larger", "larger-after-warm-up", "full-history", "nonfinite", "maximum"],
)
def test_resuming_with_another_setting_keeps_the_norms_and_warns(resumed, oracle, was, now, interrupted):
    kept = load(interrupted)["callbacks"][KEY]["scopes"]["autoclip/"]["clipper"]["history"]["values"].tolist()
    watch, window = Watch(), resumed.settings["window"] or 99
    with pytest.warns(UserWarning, match=f"The checkpoint was written with .*{was}.*; this run goes on with .*{now}"):
        fit(Net(), resumed, watch, epochs=2, ckpt=interrupted)
    norms = np.array(kept + watch.norms)
    seen = [norms[: len(kept) + i + 1][-window:] for i in range(10)]
    expected = [oracle(norms) if callable(oracle) else np.percentile(norms, oracle) for norms in seen]
    assert watch.thresholds == pytest.approx(expected, rel=1e-6)
    assert record(resumed)[0][0] == norms[-window:].tolist()


@ALGORITHMS
def test_resuming_with_the_other_algorithm_is_refused_with_a_way_out_that_works(algorithm, tmp_path):
    fit(Net(), by_percentile(gradient_clip_algorithm=algorithm)).save_checkpoint(tmp_path / "a.ckpt")
    resumed = by_percentile(gradient_clip_algorithm={"norm": "value", "value": "norm"}[algorithm])
    with pytest.raises(ValueError, match=rf"gradient_clip_algorithm='{algorithm}'.* delete `checkpoint\['callbacks'\]"):
        fit(Net(), resumed, epochs=2, ckpt=tmp_path / "a.ckpt")
    checkpoint = load(tmp_path / "a.ckpt")
    del checkpoint["callbacks"][KEY]
    torch.save(checkpoint, tmp_path / "b.ckpt")
    with pytest.warns(UserWarning, match="written without"):
        fit(Net(), resumed, epochs=2, ckpt=tmp_path / "b.ckpt")
    assert record(resumed)[0][1] == 10


@pytest.mark.parametrize("same_trainer", [False, True], ids=["new-trainer", "same-trainer"])
def test_a_checkpoint_written_without_the_callback_warns_and_starts_an_empty_record(same_trainer, tmp_path):
    fit(Net()).save_checkpoint(tmp_path / "plain.ckpt")
    callback = by_percentile()
    run = fit(Net(), callback) if same_trainer else trainer(callback)
    run.fit_loop.max_epochs = 2
    with pytest.warns(UserWarning, match="written without `AutoClip`.* starts empty"):
        run.fit(Net(), loader(n=40), ckpt_path=tmp_path / "plain.ckpt")
    assert record(callback)[0][1] == 10


def test_lightning_warns_when_the_callback_is_missing_at_the_resume(interrupted):
    with pytest.warns(UserWarning, match=rf"add the following callbacks: \['{KEY}'\]"):
        fit(Net(), epochs=2, ckpt=interrupted)


@pytest.mark.parametrize(("same_trainer", "steps"), [(True, 20), (False, 10)], ids=["same-trainer", "new-trainer"])
def test_a_second_fit_goes_on_with_the_record_if_the_trainer_is_the_same(same_trainer, steps):
    callback, watch = by_percentile(10, window=None), Watch()
    run = fit(Net(), callback, watch)
    if not same_trainer:
        run = trainer(callback, watch := Watch(), log_every_n_steps=1)
    run.fit_loop.max_epochs = steps // 10
    run.fit(Net(), loader(n=40))
    assert record(callback) == [(watch.norms, steps, 0)]
    expected = [np.percentile(watch.norms[: i + 1], 10) for i in range(steps)]
    assert watch.thresholds == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_evaluating_an_older_checkpoint_leaves_the_record_alone(stage, interrupted):
    callback, model = by_percentile(window=7), Net()
    model.validation_step = model.test_step = lambda batch, batch_idx: None
    run = fit(model, callback, epochs=2)
    before = record(callback)
    getattr(run, stage)(model, loader(n=40), ckpt_path=interrupted, verbose=False)
    assert record(callback) == before
    run.fit_loop.max_epochs = 3
    run.fit(model, loader(n=40))
    assert record(callback)[0][1] == 30


ONES, CLIPPER, HELD = torch.ones(7), "scopes.autoclip/.clipper", "scopes.autoclip/.held"
POINTS = torch.ones(2, len(Point._fields), dtype=torch.float64)
HISTORY = f"{CLIPPER}.history"
DAMAGES = {
    "": [{}, [1], "state", {"wait_count": 0, "best_score": 1.0}],
    "settings": [None, {}, []],
    "settings.groups": [1, {"a": "*"}],
    "has_scaler": [None, 1, "no", torch.tensor(True)],
    "several_policies": [None, 0],
    "scopes": [None, [], {}, [1], "autoclip/", {"autoclip/": None}],
    "scopes.autoclip/": [None, {}, [1]],
    "scopes.autoclip/.trace": [None, {}, [1]],
    HELD: [None, {}, [1], torch.ones(1)],
    f"{HELD}.points": [None, [1.0], ONES, POINTS.float(), POINTS[:, :9], POINTS * math.nan, POINTS[0]],
    f"{HELD}.told": [None, -1, 1000, 1.0, True],
    f"{HELD}.share_sums": [None, {"a": 1}, {1: 1.0}, [1]],
    f"{HELD}.share_steps": [None, -1, 1.0],
    f"{HELD}.norm_sums": [None, {"a": 1.0}, {1: 1.0}, [1]],
    f"{HELD}.norm_steps": [None, {"a": 1}, [1]],
    CLIPPER: [None, {}, [1]],
    f"{CLIPPER}.steps": [-1, 1.0, None, "1", True],
    f"{CLIPPER}.nonfinite_total": [-1, 1.0, None, "1"],
    f"{CLIPPER}.until_measured": [-1, 1.0, None, "1"],
    f"{CLIPPER}.weight_norms": [None, [1.0], ONES, -ONES.double(), ONES.double()[None], ONES.double() * math.nan],
    HISTORY: [None, {}, {"values": ONES}, {"count": 10}, {"mean_value": ONES, "weight": ONES}],
    f"{HISTORY}.unknown": [ONES],
    f"{HISTORY}.values": [None, [1.0], ONES.double(), ONES[None], ONES * math.nan, ONES * math.inf],
    f"{HISTORY}.count": [None, 6, -1, 10.0, True, "10", torch.tensor(10)],
}


@pytest.mark.parametrize(("entry", "value"), [(e, v) for e, values in DAMAGES.items() for v in values], ids=str)
def test_a_damaged_or_foreign_state_is_refused(entry, value, interrupted):
    callback, state = by_percentile(10, window=7), {"": load(interrupted)["callbacks"][KEY]}
    *path, last = f".{entry}".rstrip(".").split(".")
    parent = state
    for key in path:
        parent = parent[key]
    parent[last] = value
    with pytest.raises(ValueError, match=r"damaged|not written by it|records were made with groups="):
        callback.load_state_dict(state[""])
    assert not callback.clippers


@pytest.mark.parametrize(
    "entry",
    ["settings", "has_scaler", "several_policies", "scopes", "scopes.autoclip/.trace", HELD, f"{CLIPPER}.steps"],
)
def test_a_state_without_an_entry_is_damaged(entry, interrupted):
    callback, state = by_percentile(10, window=7), load(interrupted)["callbacks"][KEY]
    *path, last = entry.split(".")
    parent = state
    for key in path:
        parent = parent[key]
    del parent[last]
    with pytest.raises(ValueError, match="damaged or not"):
        callback.load_state_dict(state)
    assert not callback.clippers


def test_the_records_of_another_number_of_optimizers_are_refused(interrupted, tmp_path):
    checkpoint = load(interrupted)
    scopes = checkpoint["callbacks"][KEY]["scopes"]
    checkpoint["callbacks"][KEY]["scopes"] = {f"autoclip/{i}/": scopes["autoclip/"] for i in range(2)}
    torch.save(checkpoint, tmp_path / "two.ckpt")
    with pytest.raises(
        MisconfigurationException, match=r"holds the records autoclip/0/, autoclip/1/, but this run needs autoclip/\."
    ):
        fit(Net(), by_percentile(10, window=7), epochs=2, ckpt=tmp_path / "two.ckpt")


def clip(clipper, gradients):
    """Of each gradient the threshold and the non-finite steps so far, and what is left of it."""
    parameters = [with_gradient(gradient) for gradient in gradients]
    steps = [clipper.clip_([parameter]) for parameter in parameters]
    clipped = [None if parameter.grad is None else parameter.grad.tolist() for parameter in parameters]
    return [(float(step.threshold), float(step.nonfinite_total)) for step in steps], clipped


@WINDOWS
@ALGORITHMS
@pytest.mark.parametrize("steps", [11, 1020], ids=["in-the-warm-up", "before-the-full-history-grows"])
def test_a_clipper_goes_on_after_loading_as_if_nothing_had_happened(steps, algorithm, window, tmp_path):
    whole, first, second = (
        GradientClipper(Percentile(30), gradient_clip_algorithm=algorithm, window=window, warmup_steps=12)
        for _ in range(3)
    )
    gradients = torch.randn(steps + 20, 5, generator=torch.Generator().manual_seed(0)).exp()
    gradients[4, 1], gradients[steps + 8, 2] = math.nan, math.inf
    clip(whole, gradients[:steps])
    clip(first, gradients[:steps])
    clip(second, gradients[:3])  # what it held before it loads is forgotten
    torch.save(first.state_dict(), tmp_path / "clipper.pt")
    second.load_state_dict(load(tmp_path / "clipper.pt"))
    assert clip(second, gradients[steps:]) == clip(whole, gradients[steps:])


@pytest.mark.parametrize("window", [7, 3, 12, None], ids=["same", "smaller", "larger", "full-history"])
@pytest.mark.parametrize("groups", [False, True], ids=["separate", "compute-groups"])
def test_percentiles_in_a_module_go_on_after_loading(groups, window, tmp_path):
    percentiles, values = {"low": 20, "high": 90}, np.random.default_rng(0).lognormal(size=30)
    first, second = (
        MetricCollection({name: RunningPercentile(p, n) for name, p in percentiles.items()}, compute_groups=groups)
        for n in (7, window)
    )
    for value in values[:10]:
        first.update(value)
    torch.save(nn.ModuleDict({"norms": first}).state_dict(), tmp_path / "module.pt")
    nn.ModuleDict({"norms": second}).load_state_dict(load(tmp_path / "module.pt"))
    for end in range(10, 30):
        expected = {name: np.percentile(values[3:end][-(window or 30) :], p) for name, p in percentiles.items()}
        assert {name: float(value) for name, value in second.compute().items()} == pytest.approx(expected, rel=1e-6)
        second.update(values[end])


# --- states of another run --------------------------------------------------------------------------------------------

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


def test_a_state_that_is_loaded_by_hand_starts_a_new_run_with_its_norms(checkpoint, tmp_path):
    autoclip, callbacks = AutoClip(50, groups="param_groups", **ARGUMENTS), checkpoint["callbacks"]
    autoclip.load_state_dict(callbacks["GradientClipping"])
    before = [clipper.history.recorded.tolist() for clipper in autoclip.clippers]
    run = trainer(autoclip, log_every_n_steps=4, logger=CSVLogger(tmp_path, "", "run"), enable_checkpointing=True)
    with pytest.warns(UserWarning, match="goes up to step 28, and this fit begins with step 0: the norm history is"):
        run.fit(two_layers(), loader(n=64))
    for clipper, norms in zip(autoclip.clippers, before, strict=True):
        assert clipper.steps == 16
        assert len(clipper.history) == len(norms) + 16
        assert clipper.history.recorded.tolist()[: len(norms)] == norms
    assert {spike["step"] for spike in autoclip.spikes()} == set(range(16))
    rows = read_csv(tmp_path / "run" / "metrics.csv")
    assert [row["step"] for row in rows if row["autoclip/one/grad_norm_mean"]] == ["3", "7", "11", "15"]
    run.save_checkpoint("again.ckpt")
    assert "autoclip/one: 16 steps" in str(read_run(Path("again.ckpt")).report())
    resumed = AutoClip(50, groups="param_groups", **ARGUMENTS)
    trainer(resumed, max_epochs=2).fit(two_layers(), loader(n=64), ckpt_path="again.ckpt", weights_only=False)
    assert [clipper.steps for clipper in resumed.clippers] == [32, 32]
