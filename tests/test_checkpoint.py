"""What a checkpoint keeps: a resumed run takes the steps that an uninterrupted one would have taken."""

import copy
import math
import os
import pickle
import shutil
import signal
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import Net, by_percentile, loader, read_csv, trainer, weights, with_gradient
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.loggers import CSVLogger
from processes import SERVER, TIME_LIMIT
from torch import nn
from torchmetrics import MetricCollection

from lightning_autoclip import (
    AutoClip,
    GradientClipper,
    GradientClipping,
    Percentile,
    Policy,
    RunningPercentile,
    ZScore,
)

KEY = "AutoClip"
# The factor on the loss of each batch of four rows. Two of the ten steps of an epoch are non-finite.
SCALES = [factor for factor in (1, 3, math.nan, 0.5, 20, 1, math.inf, 2, 1, 8) for _ in range(4)]
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


class Watch(Callback):
    """Holds the norm and the threshold of every step; may do something once a given number of steps is taken."""

    def __init__(self, step=None, action=None):
        self.norms, self.thresholds, self.step, self.action = [], [], step, action

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == self.step:
            self.action()

    def on_train_batch_end(self, trainer, *args):
        for key, numbers in (("grad_norm", self.norms), ("threshold", self.thresholds)):
            numbers.append(float(trainer.callback_metrics.get(f"autoclip/{key}", math.nan)))


def fit(model, *callbacks, epochs=1, ckpt=None, scales=(1.0,)):
    """Train on ten batches per epoch in a fixed order."""
    checkpointing = any(isinstance(callback, Checkpoint) for callback in callbacks)
    run = trainer(*callbacks, max_epochs=epochs, log_every_n_steps=1, enable_checkpointing=checkpointing)
    run.fit(model, loader(n=40, scales=scales), ckpt_path=ckpt)
    return run


def history(callback):
    """Of each optimizer: the norms, how many there ever were, the non-finite steps."""
    assert callback.clippers
    return [(c.history.values.tolist(), c.history.count, c.nonfinite_steps) for c in callback.clippers]


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
    assert history(second) == history(whole)
    assert all(counts == [8 * epochs, 2 * epochs] for _, *counts in history(second))


@pytest.mark.parametrize("model", [Net, TwoOptimizers], ids=["one-optimizer", "two-optimizers"])
@pytest.mark.parametrize(("algorithm", "window"), [("norm", 7), ("value", None)])
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
def test_a_copied_callback_works_before_and_after_training(copied, tmp_path):
    # Lightning hangs the model's `log` on each callback, so that the model is copied along.
    model, callback = partial(Net, partial(torch.optim.SGD, lr=0.1, momentum=0.9)), partial(AutoClip, 30, window=7)
    before = copied(callback())
    fit(model(), before, scales=SCALES).save_checkpoint(tmp_path / "a.ckpt")
    after, then = copied(before), history(before)
    assert history(after) == then
    assert_resumes_as_if_uninterrupted(tmp_path / "a.ckpt", callback, resumed_by=after, model=model)
    assert history(before) == then


@pytest.mark.parametrize("types", [(float, int), (np.float32, np.int64)], ids=["python-numbers", "numpy-numbers"])
def test_the_state_loads_with_weights_only_into_preset_and_general_callback(types, tmp_path):
    real, whole = types
    options = {"max_threshold": real(3), "window": whole(7), "max_update_ratio": None}
    callback = AutoClip(real(10), multiplier=real(2), **options)
    fit(TwoOptimizers(), callback, scales=SCALES).save_checkpoint(tmp_path / "a.ckpt")
    for restored in (AutoClip(10, multiplier=2, **options), GradientClipping(Percentile(10, 2), **options)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            restored.load_state_dict(load(tmp_path / "a.ckpt")["callbacks"][KEY])
        assert history(restored) == history(callback)


def test_a_checkpoint_in_the_middle_of_an_epoch_holds_the_norms_so_far(tmp_path):
    watch = Watch(7, lambda: 1 / 0)
    checkpoints = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1)
    with pytest.raises(ZeroDivisionError):
        fit(Net(), by_percentile(), watch, checkpoints, OnExceptionCheckpoint(tmp_path, "exception"))
    for name, step in {"step=3": 3, "step=6": 6, "exception": 7}.items():
        saved = load(tmp_path / f"{name}.ckpt")["callbacks"][KEY]["groups"]["autoclip/"]["clipper"]["history"]
        assert saved["values"] == pytest.approx(watch.norms[:step], rel=1e-6)
        assert saved["count"] == step


# --- other settings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("resumed", "oracle", "changes"),
    [
        (partial(by_percentile, 90, window=7), 90, r"percentile 10\.0 → 90\.0\.$"),
        (
            partial(GradientClipping, ZScore(1), window=7),
            lambda norms: norms.mean() + norms.std(),
            r"policy 'Percentile' → 'ZScore', percentile 10\.0 → None, multiplier 1\.0 → None, z None → 1\.0\.$",
        ),
        (partial(by_percentile, 50, window=3), 50, r"window 7 → 3, percentile 10\.0 → 50\.0\.$"),
        (partial(by_percentile, 50, window=12, warmup_steps=9), 50, "window 7 → 12, warmup_steps 0 → 9, "),
        (partial(by_percentile, 50, window=None), 50, "window 7 → None, "),
        (partial(by_percentile, 10, window=7, nonfinite="raise"), 10, r"nonfinite 'skip' → 'raise'\.$"),
        (
            partial(by_percentile, 10, window=7, max_threshold=0.9),
            lambda norms: min(0.9, np.percentile(norms, 10)),
            r"max_threshold None → 0\.9\.$",
        ),
    ],
    ids=["percentile", "policy", "smaller", "larger", "full-history", "nonfinite", "maximum"],
)
def test_resuming_with_another_setting_keeps_the_norms_and_warns(resumed, oracle, changes, interrupted):
    kept = load(interrupted)["callbacks"][KEY]["groups"]["autoclip/"]["clipper"]["history"]["values"]
    watch, resumed = Watch(), resumed()
    window = resumed.settings["window"] or 99
    with pytest.warns(UserWarning, match=f"written with other settings, and this run continues with: {changes}"):
        fit(Net(), resumed, watch, epochs=2, ckpt=interrupted)
    norms = np.array(kept + watch.norms)
    seen = [norms[: len(kept) + i + 1][-window:] for i in range(10)]
    expected = [oracle(norms) if callable(oracle) else np.percentile(norms, oracle) for norms in seen]
    assert watch.thresholds == pytest.approx(expected, rel=1e-6)
    assert history(resumed)[0][0] == pytest.approx(norms[-window:].tolist(), rel=1e-6)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_resuming_with_the_other_algorithm_raises_and_names_a_way_out_that_works(algorithm, tmp_path):
    fit(Net(), by_percentile(gradient_clip_algorithm=algorithm)).save_checkpoint(tmp_path / "a.ckpt")
    resumed = by_percentile(gradient_clip_algorithm={"norm": "value", "value": "norm"}[algorithm])
    with pytest.raises(ValueError, match=rf"gradient_clip_algorithm='{algorithm}'.* delete `checkpoint\['callbacks'\]"):
        fit(Net(), resumed, epochs=2, ckpt=tmp_path / "a.ckpt")
    checkpoint = load(tmp_path / "a.ckpt")
    del checkpoint["callbacks"][KEY]
    torch.save(checkpoint, tmp_path / "b.ckpt")
    with pytest.warns(UserWarning, match="written without"):
        fit(Net(), resumed, epochs=2, ckpt=tmp_path / "b.ckpt")
    assert history(resumed)[0][1] == 10


@pytest.mark.parametrize("same_trainer", [False, True], ids=["new-trainer", "same-trainer"])
def test_a_checkpoint_written_without_the_callback_warns_and_starts_an_empty_history(same_trainer, tmp_path):
    fit(Net()).save_checkpoint(tmp_path / "plain.ckpt")
    callback = by_percentile()
    run = fit(Net(), callback) if same_trainer else trainer(callback)
    run.fit_loop.max_epochs = 2
    with pytest.warns(UserWarning, match="written without `AutoClip`.* starts empty"):
        run.fit(Net(), loader(n=40), ckpt_path=tmp_path / "plain.ckpt")
    assert history(callback)[0][1] == 10


def test_lightning_warns_when_the_callback_is_missing_at_the_resume(interrupted):
    with pytest.warns(UserWarning, match=rf"add the following callbacks: \['{KEY}'\]"):
        fit(Net(), epochs=2, ckpt=interrupted)


# --- policies of the user's own ---------------------------------------------------------------------------------------


class FailsOnceError(Exception):
    """What a policy raises."""


class FailsOnce(Policy):
    """Raises at its seventh call."""

    def __init__(self):
        self.calls = 0

    def __call__(self, history):
        self.calls += 1
        if self.calls == 7:
            raise FailsOnceError
        return history.percentile(50)


class Catching(Net):
    """Manual optimization that continues after a step that failed."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization, self.failed = False, 0

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        try:
            optimizer.step()
        except FailsOnceError:
            self.failed += 1


@pytest.mark.parametrize("groups", [None, {"first": "net.0.*", "last": "net.2.*"}], ids=["one history", "two groups"])
def test_a_run_continues_after_a_policy_that_raised_once_and_its_checkpoints_load(groups, tmp_path):
    model, callback = Catching(), GradientClipping(FailsOnce(), groups=groups, window=None)
    checkpoints = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    fit(model, callback, checkpoints)
    assert model.failed == 1
    assert [clipper.steps for clipper in callback.clippers] == [9] * (2 if groups else 1)
    found = sorted(load(path)["global_step"] for path in tmp_path.glob("*.ckpt"))
    assert found == [*range(1, 10)]
    for step in found:
        saved = load(tmp_path / f"step={step}.ckpt")["callbacks"][KEY]["groups"]
        assert all(group["clipper"]["steps"] == group["log"]["steps"] == step for group in saved.values())
    resumed = GradientClipping(FailsOnce(), groups=groups, window=None)
    fit(Catching(), resumed, epochs=2, ckpt=tmp_path / "step=9.ckpt")
    for whole, rest in zip(callback.clippers, resumed.clippers, strict=True):
        assert rest.history.values.tolist()[:9] == whole.history.values.tolist()


def policies():
    @dataclass(frozen=True)
    class Percentile(Policy):
        """Called as one of ours."""

        size: float = 2.0

        def __call__(self, history):
            return history.percentile(0) * self.size

    @dataclass(frozen=True)
    class Named(Policy):
        """Its fields have names that our state and settings have too."""

        name: str = "small"
        window: int = 3

        def __call__(self, history):
            return history.mean() * self.window

    return [(Percentile, "size", 3.0), (Named, "name", "large"), (Named, "window", 4)]


@pytest.mark.parametrize(
    ("policy", "field", "value"), policies(), ids=lambda value: getattr(value, "__name__", str(value))
)
def test_a_policy_of_any_name_and_fields_resumes_and_a_changed_field_is_warned_of(policy, field, value, tmp_path):
    callback = partial(GradientClipping, policy(), window=7)
    fit(Net(), callback(), scales=SCALES).save_checkpoint(tmp_path / "a.ckpt")
    assert_resumes_as_if_uninterrupted(tmp_path / "a.ckpt", callback)
    state, was = load(tmp_path / "a.ckpt")["callbacks"][KEY], getattr(policy(), field)
    with pytest.warns(UserWarning, match=f"continues with: .*{field} {was!r} → {value!r}"):
        GradientClipping(policy(**{field: value}), window=7).load_state_dict(state)


def test_a_changed_setting_is_warned_of_though_the_policy_has_a_field_of_that_name():
    (*_, (policy, _, _)) = policies()
    fit(Net(), callback := GradientClipping(policy(), window=7))
    with pytest.warns(UserWarning, match="continues with: .*window 7 → 9"):
        GradientClipping(policy(), window=9).load_state_dict(callback.state_dict())


# --- several fits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("same_trainer", "steps"), [(True, 20), (False, 10)], ids=["same-trainer", "new-trainer"])
def test_a_second_fit_continues_the_history_if_the_trainer_is_the_same(same_trainer, steps):
    callback, watch = by_percentile(10, window=None), Watch()
    run = fit(Net(), callback, watch)
    if not same_trainer:
        run = trainer(callback, watch := Watch(), log_every_n_steps=1)
    run.fit_loop.max_epochs = steps // 10
    run.fit(Net(), loader(n=40))
    assert history(callback) == [(pytest.approx(watch.norms, rel=1e-6), steps, 0)]
    expected = [np.percentile(watch.norms[: i + 1], 10) for i in range(steps)]
    assert watch.thresholds == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_evaluating_an_older_checkpoint_leaves_the_history_alone(stage, interrupted):
    callback, model = by_percentile(window=7), Net()
    model.validation_step = model.test_step = lambda batch, batch_idx: None
    run = fit(model, callback, epochs=2)
    before = history(callback)
    getattr(run, stage)(model, loader(n=40), ckpt_path=interrupted, verbose=False)
    assert history(callback) == before
    run.fit_loop.max_epochs = 3
    run.fit(model, loader(n=40))
    assert history(callback)[0][1] == 30


def test_a_state_that_is_loaded_by_hand_starts_a_new_run_with_its_norms(tmp_path):
    before, autoclip, states = by_percentile(50, verbose=False), by_percentile(50, verbose=False), []
    watch = Watch(27, lambda: states.append(before.state_dict()))  # some steps wait for their log row
    trainer(before, watch, log_every_n_steps=8).fit(Net(), loader(n=4 * 28))
    autoclip.load_state_dict(states[0])
    run = trainer(autoclip, log_every_n_steps=4, logger=CSVLogger(tmp_path, "", "run"))
    run.fit(Net(), loader(n=64))
    assert history(autoclip)[0][1] == 27 + 16
    assert history(autoclip)[0][0][:27] == history(before)[0][0][:27]
    rows = read_csv(tmp_path / "run" / "metrics.csv")
    assert [row["step"] for row in rows if row["autoclip/grad_norm_mean"]] == ["3", "7", "11", "15"]
    assert autoclip.report().sections[0].figures.steps == 16
    assert {spike["step"] for spike in autoclip.spikes()} == set(range(16))


# --- damaged and foreign states ---------------------------------------------------------------------------------------

GROUP = "groups.autoclip/"
MISSING = object()
DAMAGES = {
    "a missing key": (f"{GROUP}.clipper.steps", MISSING, r"expected `GradientClipper` to have the keys \['gradient_"),
    "an extra key": (f"{GROUP}.log.waiting_steps", 1, "expected `StepLog` to have the keys "),
    "a missing setting": ("settings.window", MISSING, r"expected `AutoClip.settings` to have the keys \['gradient"),
    "no settings": ("settings", None, "expected `AutoClip.settings` to be of type `dict`, but got None"),
    "another callback's state": ("", {"wait_count": 0, "best_score": 1.0}, r"keys .*but got \['best_score', 'wait_"),
    "a text": (f"{GROUP}.clipper.steps", "7", "expected `GradientClipper.steps` to be of type `int`, but got '7'"),
    "a count below 0": (f"{GROUP}.clipper.history.count", -1, "`GradientClipper.history.count` to be of type `int`"),
    "a tensor": (f"{GROUP}.clipper.history.values", torch.ones(7), r"`GradientClipper.history.values` to be \[<class"),
    "no groups": (GROUP, None, "to have the keys .*but got .?a `NoneType`"),
    "another version": ("version", 2, "expected `AutoClip.version` to be 1, but got 2"),
    "a clipper's version": (f"{GROUP}.clipper.version", 0, "expected `GradientClipper.version` to be 1, but got 0"),
    "half a row": (f"{GROUP}.log.bins", [1.0] * 7, "expected rows of [0-9]+ numbers"),
    "another algorithm": (f"{GROUP}.clipper.gradient_clip_algorithm", "value", "whose thresholds have another unit"),
    "other groups": ("settings.groups", {"a": "*"}, "recorded with groups=.*but this run has groups=None"),
}


@pytest.mark.parametrize(("entry", "value", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_or_foreign_state_raises_and_changes_nothing(entry, value, message, interrupted):
    callback, state = by_percentile(10, window=7), {"": load(interrupted)["callbacks"][KEY]}
    *path, last = f".{entry}".rstrip(".").split(".")
    parent = state
    for key in path:
        parent = parent[key]
    if value is MISSING:
        del parent[last]
    else:
        parent[last] = value
    with pytest.raises(ValueError, match=message):
        callback.load_state_dict(state[""])
    assert not callback.clippers


def test_the_histories_of_another_number_of_optimizers_raise(interrupted, tmp_path):
    checkpoint = load(interrupted)
    groups = checkpoint["callbacks"][KEY]["groups"]
    checkpoint["callbacks"][KEY]["groups"] = {f"autoclip/{i}/": groups["autoclip/"] for i in range(2)}
    torch.save(checkpoint, tmp_path / "two.ckpt")
    with pytest.raises(
        MisconfigurationException,
        match=r"holds the norm histories 'autoclip/0/', 'autoclip/1/', but this run needs 'autoclip/'\.",
    ):
        fit(Net(), by_percentile(10, window=7), epochs=2, ckpt=tmp_path / "two.ckpt")


# --- without a Trainer ------------------------------------------------------------------------------------------------


def clip(clipper, gradients):
    """Of each gradient the threshold and the non-finite steps so far, and what is left of it."""
    figures = []
    for gradient in gradients:
        record = clipper.clip_([parameter := with_gradient(gradient)])
        left = None if parameter.grad is None else parameter.grad.tolist()
        figures.append((record.threshold, clipper.nonfinite_steps, left))
    return figures


def by_torch_save(first, second, folder):
    torch.save(first.state_dict(), folder.with_suffix(".pt"))
    second.load_state_dict(load(folder.with_suffix(".pt")))


def by_dcp(first, second, folder):
    dcp.save({"clipper": first.state_dict()}, checkpoint_id=folder)
    dcp.load(state := {"clipper": second.state_dict()}, checkpoint_id=folder)
    second.load_state_dict(state["clipper"])


def by_dcp_as_stateful(first, second, folder):
    dcp.save({"clipper": first}, checkpoint_id=folder)
    dcp.load({"clipper": second}, checkpoint_id=folder)


WAYS = [by_torch_save, by_dcp, by_dcp_as_stateful]


@pytest.mark.filterwarnings("ignore:torch.distributed is")  # a single process
@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("restore", WAYS, ids=lambda way: way.__name__)
@WINDOWS
def test_a_clipper_continues_after_loading_as_if_nothing_had_happened(window, restore, algorithm, tmp_path):
    whole, first, second, fresh = (
        GradientClipper(Percentile(30), gradient_clip_algorithm=algorithm, window=window, warmup_steps=12)
        for _ in range(4)
    )
    gradients = torch.randn(60, 5, generator=torch.Generator().manual_seed(0)).exp()
    gradients[4, 1], gradients[48, 2] = math.nan, math.inf
    clip(whole, gradients[:40])
    clip(first, gradients[:40])
    clip(second, gradients[:3])  # what it held before it loads is forgotten
    expected = str(clip(whole, gradients[40:]))
    for loaded, name in ((second, "a"), (fresh, "b")):
        restore(first, loaded, tmp_path / name)
        assert str(clip(loaded, gradients[40:])) == expected


@pytest.mark.parametrize("window", [7, 3, 12, None], ids=["same", "smaller", "larger", "full-history"])
@pytest.mark.parametrize("groups", [False, True], ids=["separate", "compute-groups"])
def test_percentiles_in_a_module_continue_after_loading(groups, window, tmp_path):
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
