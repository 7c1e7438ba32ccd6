"""Groups of parameters: each is clipped as if it were alone, except at steps with non-finite gradients."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from helpers import Net, by_percentile, in_form, loader, read_csv, trainer, weights
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from models import NaNInLastBias
from test_clipper import NoDispatchedReads, NoReads
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import SGD, AdamW

from lightning_autoclip import Constant, GradientClipper, NonFiniteGradientError, Percentile
from lightning_autoclip.__main__ import main
from lightning_autoclip.clipper import clip_together_

ALGORITHMS = pytest.mark.parametrize("algorithm", ["norm", "value"])
LAYERS = {"first": "net.0.*"}  # and the rest: the second layer
KEYS = ["autoclip/first/", "autoclip/rest/"]
FIRST, SECOND = [[f"net.{i}.{name}" for name in ("weight", "bias")] for i in (0, 2)]
# The factor on the loss of each batch of four rows. Two of the ten steps of an epoch are non-finite.
SCALES = [factor for factor in (1, 3, math.nan, 0.5, 20, 1, math.inf, 2, 1, 8) for _ in range(4)]

# --- the arithmetic ---------------------------------------------------------------------------------------------------

SHAPES, DTYPES = [(3,), (2, 2), (4,), (1,), (5,)], [torch.float32, torch.bfloat16, *[torch.float32] * 3]
POSITIONS = [[0, 3], [4], [1, 2]]


def clip(together, target, *scaler, positions=POSITIONS):
    """Each clipper clips the parameters at its positions."""
    return clip_together_([*zip(together, positions, strict=True)], target, *scaler)


def parameters():
    return [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape, dtype in zip(SHAPES, DTYPES, strict=True)]


def fill(parameters, step, factor=1.0):
    """Gradients of a step: the second group has none at every third one, and the first is zero at every fourth one."""
    generator = torch.Generator().manual_seed(step)
    for i, parameter in enumerate(parameters):
        gradient = torch.randn(parameter.shape, generator=generator).exp() * (i + 1) * factor
        gradient *= 0 if i in POSITIONS[0] and step % 4 == 1 else 1
        parameter.grad = None if i in POSITIONS[1] and step % 3 == 1 else gradient.to(parameter.dtype)


def clippers(algorithm="norm", policy=None, **kwargs):
    kwargs = {"gradient_clip_algorithm": algorithm, "window": 7, **kwargs}
    return [GradientClipper(policy or Percentile(30, 1.5), **kwargs) for _ in POSITIONS]


def figures(record):
    """The norms and thresholds of a record as floats that compare bit for bit, NaN included."""
    return None if record is None else repr([*map(float, record[:5])])


def gradients(parameters):
    return [None if parameter.grad is None else parameter.grad.tolist() for parameter in parameters]


@pytest.mark.parametrize(("algorithm", "every"), [("norm", 1), ("value", 1), ("value", 4)])
@pytest.mark.parametrize("fused", [False, True], ids=["ordinary", "fused"])
def test_each_group_is_bit_for_bit_what_a_clipper_of_its_parameters_alone_makes_of_it(form, algorithm, every, fused):
    together, alone = clippers(algorithm, warmup_steps=3), clippers(algorithm, warmup_steps=3)
    ours, theirs = parameters(), parameters()
    optimizer = SGD([{"params": ours[:2]}, {"params": ours[2:]}], lr=0.1, fused=fused)
    optimizers = [SGD([theirs[i] for i in at], lr=0.1, fused=fused) for at in POSITIONS]
    for clipper in together + alone:
        clipper.clipped_norm_every = every
    for step in range(30):
        fill(ours, step)
        fill(theirs, step)
        records = clip(together, optimizer)
        expected = [clipper.clip_(optimizer) for clipper, optimizer in zip(alone, optimizers, strict=True)]
        assert [*map(figures, records)] == [*map(figures, expected)]
        assert gradients(ours) == gradients(theirs)
        assert (records[1] is None) == (step % 3 == 1)
        for each in (optimizer, *optimizers):
            each.step()
    assert gradients(ours) == gradients(theirs)
    assert [repr(clipper.state_dict()) for clipper in together] == [repr(clipper.state_dict()) for clipper in alone]
    assert [len(clipper.history) for clipper in together] == [7, 7, 7]
    assert [clipper.history.count for clipper in together] == [22, 20, 30]


@pytest.mark.parametrize(
    ("bad", "fused", "scaled"),
    [(math.nan, False, False), (math.inf, True, False), (math.inf, False, True), (math.nan, True, True)],
    ids=["ordinary", "fused", "ordinary-scaled", "fused-scaled"],
)
def test_a_step_that_is_non_finite_in_one_group_moves_no_weight_and_enters_no_history(form, bad, fused, scaled):
    together, ours = clippers(), [parameter for i, parameter in enumerate(parameters()) if i != 1]
    optimizer, scaler = AdamW(ours, lr=0.1, fused=fused), GradScaler("cpu", init_scale=4.0, enabled=scaled)
    scaler.scale(torch.ones(()))
    before = None
    for step in (2, 3, 5):
        fill(ours, step)
        ours[3].grad *= bad if step == 3 else 1.0
        clip(together, optimizer, scaler, positions=[[0, 2], [3], [1]])
        scaler.step(optimizer)
        scaler.update()
        histories = [clipper.history.values.tolist() for clipper in together]
        after = [repr(weight.tolist()) for weight in ours], repr(optimizer.state_dict()), histories
        assert before is None or [one == other for one, other in zip(before, after, strict=True)] == [step == 3] * 3
        before = after
    assert [(clipper.steps, clipper.nonfinite_steps) for clipper in together] == [(3, 1)] * 3


def test_raise_names_the_parameters_of_any_group_and_ignore_clips_the_other_groups(form):
    ours = parameters()
    fill(ours, 0)
    ours[4].grad.fill_(math.nan)
    with pytest.raises(NonFiniteGradientError, match="of 1 of 5 parameters") as caught:
        clip(clippers(policy=Constant(0.5), nonfinite="raise"), ours)
    assert [parameter is ours[4] for parameter in caught.value.parameters] == [True]
    together = clippers(policy=Constant(0.5), nonfinite="ignore")
    for step in (0, 2):
        fill(ours, step)
        ours[4].grad *= math.nan if step else 1.0
        clip(together, ours)
    norms = [float(sum(ours[i].grad.double().square().sum() for i in at) ** 0.5) for at in POSITIONS]
    assert norms == pytest.approx([0.5, math.nan, 0.5], rel=1e-3, nan_ok=True)
    assert [len(clipper.history) for clipper in together] == [1, 1, 1]


@ALGORITHMS
@pytest.mark.parametrize(("nonfinite", "fused"), [("skip", True), ("ignore", False)])
def test_a_step_of_groups_on_an_accelerator_reads_nothing_back(algorithm, nonfinite, fused):
    ours, together = parameters(), clippers(algorithm, nonfinite=nonfinite, warmup_steps=2, max_threshold=9.0)
    optimizer = SGD(ours, lr=0.1, fused=fused)
    with in_form("accelerator form"):
        for step in range(6):
            fill(ours, step)
            with NoDispatchedReads(), NoReads():
                clip(together, optimizer)


# --- the callback -----------------------------------------------------------------------------------------------------


class Watch(Callback):
    """Holds the norm and the threshold of every group at every step."""

    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, *args):
        metrics = trainer.callback_metrics
        self.steps.append({k: float(v) for k, v in metrics.items() if k.endswith(("/grad_norm", "/threshold"))})


def autoclip(groups=LAYERS, percentile=30, **kwargs):
    return by_percentile(percentile, groups=groups, **{"window": 7, "verbose": False, **kwargs})


def fit(model, *callbacks, epochs=1, ckpt=None, scales=(1.0,), n=40, **kwargs):
    run = trainer(*callbacks, max_epochs=epochs, **{"log_every_n_steps": 1, **kwargs})
    run.fit(model, loader(n=n, scales=scales), ckpt_path=ckpt)
    return run


def histories(callback):
    """By the prefix of its keys, what each group holds."""
    pairs = zip(callback.logs, callback.clippers, strict=True)
    return {key: (c.history.values.tolist(), c.steps, c.nonfinite_steps) for key, c in pairs}


def steps(callback):
    return {key: steps for key, (_, steps, _) in histories(callback).items()}


def fused_sgd(parameters):
    """Its steps need not be read on an accelerator, once it has momentum."""
    return SGD(parameters, 0.1, 0.9, fused=True)


def in_param_groups(*names):
    """The network with an optimizer that has a group per layer; a name of `None` is none."""

    def optimizer(parameters):
        parameters = list(parameters)
        layers = zip((parameters[:2], parameters[2:]), names, strict=True)
        return fused_sgd([{"params": layer, **({"name": name} if name else {})} for layer, name in layers])

    return Net(optimizer)


def test_a_nan_in_one_layer_counts_in_every_group_and_raise_names_the_parameter():
    callback = autoclip()
    with pytest.warns(UserWarning, match="1 of 10 optimizer steps so far had non-finite gradients"):
        fit(NaNInLastBias(0, 3), callback, log_every_n_steps=10)
    assert {key: counts for key, (_, *counts) in histories(callback).items()} == {key: [10, 1] for key in KEYS}
    assert all(len(norms) == 7 for norms, *_ in histories(callback).values())
    (spike,) = (spike for spike in callback.spikes() if not math.isfinite(spike["norm"]))
    assert (spike["optimizer"], spike["step"], spike["parameters"]) == ("autoclip/rest", 3, "net.2.bias")
    with pytest.raises(NonFiniteGradientError, match=r"At optimizer step 3 .* They are: net\.2\.bias\."):
        fit(NaNInLastBias(0, 3), autoclip(nonfinite="raise"))


@pytest.mark.parametrize(("nonfinite", "algorithm"), [("skip", "norm"), ("ignore", "value")])
def test_a_step_that_is_non_finite_in_one_group_is_reported_by_all_of_them(form, tmp_path, nonfinite, algorithm):
    class Spoiled(Net):
        def on_after_backward(self):
            if self.trainer.global_step in (3, 4, 8):
                self.net[2].bias.grad.fill_(math.inf)

        def on_train_batch_end(self, *args):
            self.net[2].bias.data.nan_to_num_()  # of an infinity that is applied

    def run(epochs, *others, ckpt=None):
        callback = autoclip(nonfinite=nonfinite, gradient_clip_algorithm=algorithm)
        model = Spoiled(lambda parameters: SGD(parameters, lr=0.0, fused=True))
        fit(model, callback, *others, epochs=epochs, ckpt=ckpt, log_every_n_steps=50, enable_checkpointing=bool(others))
        return callback

    run(1, ModelCheckpoint(tmp_path, filename="end"))
    whole, resumed = run(2), run(2, ckpt=tmp_path / "end.ckpt")
    assert repr(resumed.report()) == repr(whole.report())
    for section in whole.report().sections:
        assert (section.figures.steps, section.figures.nonfinite) == (20, 3)
        evidence = next(each.evidence for each in section.diagnoses if each.name == "non-finite gradients")
        where = "other groups" if section.name == "autoclip/first" else "net.2.bias"
        assert re.search(rf"^3 of 20 steps had .* first at step 3 \(epoch 0, batch 3\) in {where}\.$", evidence)
    for log in whole.logs.values():
        assert [large.place.step for large in log.nonfinite] == [3, 4, 8]


@pytest.mark.parametrize(
    ("groups", "members"),
    [
        ({"a": ["*.bias", "net.2.*"]}, {"rest": FIRST[:1], "a": [FIRST[1], *SECOND]}),
        ({"a": "*.[!b]*t", "b": ["*.bias"]}, {"a": [FIRST[0], SECOND[0]], "b": [FIRST[1], SECOND[1]]}),
        ({np.str_("all"): (np.str_("*"),)}, {"all": FIRST + SECOND}),
        ("param_groups", {"pg1": FIRST, "late": SECOND}),
    ],
    ids=["list", "no-rest", "numpy-strings", "param-groups"],
)
def test_each_parameter_is_in_the_group_that_is_asked_for(groups, members, tmp_path):
    callback = autoclip(groups)
    fit(in_param_groups(None, "late"), callback).save_checkpoint(tmp_path / "a.ckpt")
    assert {key.split("/")[1]: log.names for key, log in callback.logs.items()} == members
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"]["AutoClip"]["settings"]["groups"]
    assert repr(callback).endswith(f", groups={saved!r})")


@pytest.mark.parametrize(
    ("groups", "error", "match"),
    [
        *((bad, TypeError, "to be 'param_groups', or a mapping") for bad in ("x", 5, ["net.*"])),
        *(({"a": bad}, TypeError, "to be a pattern or a list of them") for bad in (None, [], [1], {"x"}, b"x")),
        *(({bad: "*"}, ValueError, "words without a slash, a star") for bad in ("", "a/b", "\x1b[31m", "rest", 1)),
        ({}, ValueError, "at least one group"),
        ({"a+": "net.0.*", "a_2b_": "net.2.*"}, ValueError, "'a+' and 'a_2b_' would both be 'a_2b_'"),
    ],
    ids=repr,
)
def test_bad_groups_raise_at_construction(groups, error, match):
    with pytest.raises(error, match=re.escape(match)):
        by_percentile(groups=groups)


@pytest.mark.parametrize(
    ("groups", "names", "match"),
    [
        ({"a": ["net.0.*", "net.1.*"]}, (None, None), "'net.1.*' of 'a' matches none. The model's are named net.0."),
        ({"a": "net.*", "b": "*.bias"}, (None, None), "not to overlap, but 'net.0.bias' is in 'a' and in 'b'"),
        ("param_groups", ("pg2", None), "different names, but two are called 'pg2'"),
        ("param_groups", ("a+", "a_2b_"), "'a+' and 'a_2b_' would both be 'a_2b_'"),
        ("param_groups", ("a/b", "c"), "called by words without a slash, but got 'a/b'"),
        ("param_groups", ("step", "c"), "called by words without a slash, but got 'step'"),
    ],
    ids=["unmatched", "overlapping", "a-number-as-name", "same-key", "slash", "reserved"],
)
def test_groups_that_do_not_fit_the_model_raise_at_the_start_of_fit(groups, names, match):
    with pytest.raises(ValueError, match=re.escape(match)):
        fit(in_param_groups(*names), by_percentile(groups=groups))


def test_a_tied_parameter_is_known_by_each_of_its_names():
    model, callback = Net(), autoclip({"tied": "again.*"})
    model.again = model.net[0]
    fit(model, callback)
    assert list(callback.logs) == ["autoclip/tied/", "autoclip/rest/"]
    with pytest.raises(ValueError, match="not to overlap"):
        fit(model, autoclip({"one": "net.0.*", "two": "again.*"}))


class Gan(Net):
    """Manual optimization of two networks, the second at every other batch; notes the norms of the weights."""

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.automatic_optimization, self.norms = False, {}
        self.other = nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        x, y, scale = batch
        for i, (optimizer, net) in enumerate(zip(self.optimizers(), (self.net[0], self.other), strict=True)):
            if i and batch_idx % 2 == 0:
                continue
            self.zero_grad()
            other = ((self.other(x) - y).square().squeeze(1) * scale).mean()
            self.manual_backward(other if i else self.loss(batch))
            key = f"autoclip/SGD{'-1' if i else ''}/weights/"
            self.norms.setdefault(key, []).append(float(net.weight.grad.double().square().sum() ** 0.5))
            optimizer.step()

    def configure_optimizers(self):
        return [self.optimizer(net.parameters()) for net in (self.net, self.other)]


def test_patterns_reach_over_several_optimizers_each_of_which_has_its_own_groups():
    model, groups = Gan(fused_sgd), {"weights": ["net.0.weight", "other.weight"], "last": "net.2.*"}
    callback = autoclip(groups, window=None)
    fit(model, callback)
    expected = {"SGD/weights": 10, "SGD/rest": 10, "SGD/last": 10, "SGD-1/weights": 5, "SGD-1/rest": 5}
    assert {key[9:-1]: count for key, count in steps(callback).items()} == expected
    for key, norms in model.norms.items():
        assert histories(callback)[key][0] == pytest.approx(norms, rel=1e-6)
        assert callback.logs[key].bins[-1].threshold == pytest.approx(np.percentile(norms, 30), rel=1e-6)


# --- checkpoints and parameters that join -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "groups", "algorithm"),
    [
        (lambda: Net(fused_sgd), LAYERS, "norm"),
        (lambda: in_param_groups(None, "b"), "param_groups", "value"),
        (lambda: Gan(fused_sgd), LAYERS, "value"),
    ],
    ids=["one", "param-groups", "gan"],
)
def test_a_resumed_run_takes_the_same_steps_as_an_uninterrupted_one(form, make, groups, algorithm, tmp_path):
    def callback():
        return autoclip(groups, gradient_clip_algorithm=algorithm, warmup_steps=12)

    fit(make(), callback(), scales=SCALES).save_checkpoint(tmp_path / "a.ckpt")
    (expected, whole), (resumed, second) = (make(), callback()), (make(), callback())
    fit(expected, whole, epochs=3, scales=SCALES)
    fit(resumed, second, epochs=3, scales=SCALES, ckpt=tmp_path / "a.ckpt")
    assert torch.equal(weights(resumed), weights(expected))
    assert histories(second) == histories(whole)
    assert list(histories(second)) == list(histories(whole))
    assert str(second.report()) == str(whole.report())
    assert repr(second.spikes()) == repr(whole.spikes())


@pytest.mark.parametrize(
    ("then", "now"), [(None, LAYERS), (LAYERS, {"other": "net.0.*"}), ("param_groups", None)], ids=str
)
def test_resuming_with_other_groups_raises_with_a_way_out_that_works(then, now, tmp_path):
    fit(Net(), autoclip(then)).save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"recorded with groups=.*, but this run has groups=.*\. Resume with"):
        fit(Net(), autoclip(now), epochs=2, ckpt=tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    del checkpoint["callbacks"]["AutoClip"]
    torch.save(checkpoint, tmp_path / "b.ckpt")
    with pytest.warns(UserWarning, match="written without"):
        fit(Net(), autoclip(now), epochs=2, ckpt=tmp_path / "b.ckpt")


def test_other_patterns_of_the_same_groups_continue_with_a_warning_each_with_its_own_history(tmp_path):
    first, second = autoclip(window=None), autoclip({"first": "net.2.*"}, window=None)  # of which the rest comes first
    fit(Net(), first).save_checkpoint(tmp_path / "a.ckpt")
    with (
        pytest.warns(UserWarning, match=r"with other settings, .* groups .*'net\.0\.\*'.* → .*'net\.2\.\*'"),
        pytest.warns(UserWarning, match="history `autoclip/first/` was recorded for other parameters"),
        pytest.warns(UserWarning, match="history `autoclip/rest/` was recorded for other parameters"),
    ):
        fit(Net(), second, epochs=2, ckpt=tmp_path / "a.ckpt")
    before = histories(first)
    assert {key: norms[:10] for key, (norms, *_) in histories(second).items()} == {k: before[k][0] for k in KEYS}
    assert [list(histories(callback)) for callback in (first, second)] == [KEYS, KEYS[::-1]]
    assert steps(second) == dict.fromkeys(KEYS, 20)


def test_histories_of_groups_that_the_optimizer_does_not_have_raise():
    first, second = autoclip("param_groups"), autoclip("param_groups")
    fit(in_param_groups("x", "y"), first)
    second.load_state_dict(first.state_dict())  # by hand: a checkpoint's optimizer has the names that it was saved with
    with pytest.raises(MisconfigurationException, match="histories 'autoclip/x/', 'autoclip/y/', but this run needs"):
        fit(in_param_groups("x", "z"), second)


class Join(Callback):
    """The second layer joins the optimizer after the first epoch."""

    def on_fit_start(self, trainer, pl_module):
        self.late = trainer.optimizers[0].param_groups.pop()

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 0:
            trainer.optimizers[0].add_param_group(self.late)


@pytest.mark.parametrize(
    ("groups", "names", "algorithm"),
    [({"trunk": "net.2.*"}, ("rest", "trunk"), "norm"), ("param_groups", ("pg1", "pg2"), "value")],
    ids=["patterns", "param-groups"],
)
def test_a_group_that_joins_in_mid_fit_has_its_own_history_also_after_a_resume(
    form, groups, names, algorithm, tmp_path
):
    def run(epochs, *joining, ckpt=None):
        model, watch = in_param_groups(None, None), Watch()
        callback = autoclip(groups, gradient_clip_algorithm=algorithm, multiplier=1.0, window=None)
        return fit(model, *joining, callback, watch, epochs=epochs, ckpt=ckpt), model, callback, watch.steps

    first, joined = (f"autoclip/{name}/" for name in names)
    _, model, whole, figures = run(3, Join())
    assert steps(whole) == {first: 30, joined: 20}
    norms, key = histories(whole)[joined][0], f"{joined}threshold"
    seen = [step[key] for step in figures if key in step]
    assert seen == pytest.approx([np.percentile(norms[: i + 1], 30) for i in range(20)], rel=1e-6)
    assert whole.logs[joined].names == SECOND
    for epochs in (1, 2):  # after one, the group has made no step
        run(epochs, Join())[0].save_checkpoint(tmp_path / "a.ckpt")
        _, resumed, second, _ = run(3, ckpt=tmp_path / "a.ckpt")
        assert torch.equal(weights(resumed), weights(model))
        assert histories(second) == histories(whole)
        assert str(second.report()) == str(whole.report())


def test_parameters_that_change_places_during_the_fit_stay_in_their_groups():
    class Reverse(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                trainer.optimizers[0].param_groups.reverse()

    def fitted(*callbacks):
        callback, model = autoclip("param_groups"), in_param_groups("first", "second")
        fit(model, *callbacks, callback, epochs=2)
        return histories(callback), weights(model), [log.names for log in callback.logs.values()]

    straight, reversed_ = fitted(), fitted(Reverse())
    assert straight[0] == reversed_[0]
    assert torch.equal(straight[1], reversed_[1])
    assert reversed_[2] == [FIRST, SECOND]


# --- rows, reports and files ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """A run of sixty steps with a checkpoint and rows."""
    folder = tmp_path_factory.mktemp("logged")
    callback, logger = autoclip(log_layers=True, log_every_step=True), CSVLogger(folder, name="", version="run")
    fit(Net(), callback, logger=logger, log_every_n_steps=10, n=240).save_checkpoint(folder / "last.ckpt")
    return callback, folder


def test_rows_and_layers_of_each_group_stand_under_its_name(logged):
    rows = read_csv(logged[1] / "run" / "metrics.csv")
    keys = {key for row in rows for key in row if "autoclip" in key}
    layers = ("first/net.0", "rest/net.2")
    sections = ("autoclip_layers", "autoclip_layers_norm")
    assert {key for key in keys if "layers" in key} == {f"{each}/{layer}" for each in sections for layer in layers}
    of_steps = {f"{key}step/" for key in KEYS}
    assert {key.rpartition("/")[0] + "/" for key in keys if "layers" not in key} == {*KEYS, *of_steps}
    for key, log in logged[0].logs.items():
        assert sum(bool(row[f"{key}grad_norm"]) for row in rows) == 6
        norms = [float(row[f"{key}step/grad_norm"]) for row in rows if row[f"{key}step/grad_norm"]]
        assert norms == pytest.approx([row.norm for row in log.bins], rel=1e-6)


def test_the_report_of_a_checkpoint_has_a_section_per_group(logged, capsys):
    callback, folder = logged
    assert [section.name for section in callback.report().sections] == ["autoclip/first", "autoclip/rest"]
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"checkpoint {folder / 'last.ckpt'}\n{callback.report()}\n"
    assert main(["suggest", str(folder)]) == 0
    assert re.findall(r", (autoclip/\w+): 60 norms", capsys.readouterr().out) == ["autoclip/first", "autoclip/rest"]
    assert len(callback.plot().axes) == 4
