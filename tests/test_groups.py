"""Groups of parameters: each is clipped as if it were alone, but for steps that are not finite."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from helpers import Net, by_percentile, in_form, loader, read_csv, trainer, weights, with_gradient
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from models import NaNInLastBias
from test_clipper import NoHostReads
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import SGD, AdamW

from lightning_autoclip import AutoClip, Constant, GradientClipper, NonFiniteGradientError, Percentile
from lightning_autoclip.__main__ import main
from lightning_autoclip.clipping._numbers import on_device
from lightning_autoclip.clipping.clipper import clip_together_

ALGORITHMS = pytest.mark.parametrize("algorithm", ["norm", "value"])
LAYERS = {"first": "net.0.*"}  # and the rest: the second layer
KEYS = ["autoclip/first/", "autoclip/rest/"]
FIRST, SECOND = [[f"net.{i}.{name}" for name in ("weight", "bias")] for i in (0, 2)]
# The factor on the loss of each batch of four rows. Two of the ten steps of an epoch are not finite.
SCALES = [factor for factor in (1, 3, math.nan, 0.5, 20, 1, math.inf, 2, 1, 8) for _ in range(4)]

# --- the arithmetic ---------------------------------------------------------------------------------------------------

SHAPES, DTYPES = [(3,), (2, 2), (4,), (1,), (5,)], [torch.float32, torch.bfloat16, *[torch.float32] * 3]


def clip(together, target, places, *scaler):
    """Each clipper clips the parameters at its places."""
    return clip_together_([*zip(together, places, strict=True)], target, *scaler)


PLACES = [[0, 3], [4], [1, 2]]


def parameters():
    return [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape, dtype in zip(SHAPES, DTYPES, strict=True)]


def fill(parameters, step, factor=1.0):
    """Gradients of a step: the second group has none at every third one, and the first is zero at every fourth one."""
    generator = torch.Generator().manual_seed(step)
    for i, parameter in enumerate(parameters):
        gradient = torch.randn(parameter.shape, generator=generator).exp() * (i + 1) * factor
        gradient *= 0 if i in PLACES[0] and step % 4 == 1 else 1
        parameter.grad = None if i in PLACES[1] and step % 3 == 1 else gradient.to(parameter.dtype)


def clippers(algorithm="norm", policy=None, **kwargs):
    kwargs = {"gradient_clip_algorithm": algorithm, "window": 7, **kwargs}
    return [GradientClipper(policy or Percentile(30, 1.5), **kwargs) for _ in PLACES]


def figures(record):
    """A record as floats that compare to the bit, NaN included."""
    return None if record is None else repr([[*map(float, record[:5])], [*map(float, record.parameter_norms)]])


def gradients(parameters):
    return [None if parameter.grad is None else parameter.grad.tolist() for parameter in parameters]


@ALGORITHMS
@pytest.mark.parametrize("every", [1, 4], ids=["measuring", "measuring-now-and-then"])
@pytest.mark.parametrize("fused", [False, True], ids=["ordinary", "fused"])
def test_each_group_is_to_the_bit_what_a_clipper_of_its_parameters_alone_makes_of_it(form, algorithm, every, fused):
    together, alone = clippers(algorithm, warmup_steps=3), clippers(algorithm, warmup_steps=3)
    ours, theirs = parameters(), parameters()
    optimizer = SGD([{"params": ours[:2]}, {"params": ours[2:]}], lr=0.1, fused=fused)
    optimizers = [SGD([theirs[i] for i in at], lr=0.1, fused=fused) for at in PLACES]
    for clipper in together + alone:
        clipper.clipped_norm_every = every
    for step in range(30):
        fill(ours, step)
        fill(theirs, step)
        records = clip(together, optimizer, PLACES)
        expected = [clipper.clip_(optimizer) for clipper, optimizer in zip(alone, optimizers, strict=True)]
        assert [*map(figures, records)] == [*map(figures, expected)]
        assert gradients(ours) == gradients(theirs)
        assert (records[1] is None) == (step % 3 == 1)
    assert [len(clipper.history.recorded) for clipper in together] == [7, 7, 7]
    assert [clipper.history.count for clipper in together] == [22, 20, 30]


@ALGORITHMS
def test_the_thresholds_of_a_group_are_numpys_percentiles_of_its_own_norms(form, algorithm):
    together, ours, history = clippers(algorithm), parameters(), []
    for step in range(20):
        fill(ours, step)
        entries = np.concatenate([ours[i].grad.double().numpy().ravel() for i in PLACES[2]])
        norm = np.linalg.norm(entries)
        history.append(norm / math.sqrt(entries.size) if algorithm == "value" else norm)
        record = clip(together, ours, PLACES)[2]
        threshold = 1.5 * np.percentile(history[-7:], 30)
        assert float(record.norm) == pytest.approx(norm, rel=1e-6)
        assert float(record.threshold) == pytest.approx(threshold, rel=1e-5)
        by_value = entries.clip(-threshold, threshold)
        expected = by_value if algorithm == "value" else entries * min(1, threshold / norm)
        clipped = np.concatenate([ours[i].grad.double().numpy().ravel() for i in PLACES[2]])
        np.testing.assert_allclose(clipped, expected, rtol=1e-2)  # bfloat16
        np.testing.assert_allclose(clipped[4:], expected[4:], rtol=1e-5)


@ALGORITHMS
def test_scaled_gradients_of_a_fused_optimizer_are_clipped_at_their_true_scale(form, algorithm):
    together, alone, ours, theirs = clippers(algorithm), clippers(algorithm), parameters(), parameters()
    optimizer, scaler = SGD(ours, lr=0.1, fused=True), GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    for step in range(12):
        fill(ours, step, 1024.0)
        fill(theirs, step)
        records = clip(together, optimizer, PLACES, scaler)
        expected = [clipper.clip_([theirs[i] for i in at]) for clipper, at in zip(alone, PLACES, strict=True)]
        assert [r and repr([*map(float, r[:5])]) for r in records] == [
            r and repr([*map(float, r[:5])]) for r in expected
        ]
        for own, other in zip(ours, theirs, strict=True):
            assert own.grad is other.grad is None or torch.equal(own.grad, other.grad)  # they are unscaled now
        scaler.step(optimizer)
        scaler.update()


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("fused", [False, True], ids=["ordinary", "fused"])
@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
def test_a_step_that_is_not_finite_in_one_group_moves_no_weight_and_enters_no_record(form, bad, fused, scaled):
    together, ours = clippers(), [parameter for i, parameter in enumerate(parameters()) if i != 1]
    places = [[0, 2], [3], [1]]
    optimizer, scaler = AdamW(ours, lr=0.1, fused=fused), GradScaler("cpu", init_scale=4.0, enabled=scaled)
    scaler.scale(torch.ones(()))
    before = None
    for step in (2, 3, 5):
        fill(ours, step)
        ours[3].grad *= bad if step == 3 else 1.0
        clip(together, optimizer, places, scaler)
        scaler.step(optimizer)
        scaler.update()
        records = [clipper.history.recorded.tolist() for clipper in together]
        after = [repr(weight.tolist()) for weight in ours], repr(optimizer.state_dict()), records
        assert before is None or [one == other for one, other in zip(before, after, strict=True)] == [step == 3] * 3
        before = after
    assert [(c.steps, c.nonfinite_total) for c in together] == [(3, 1)] * 3


def test_with_raise_the_error_has_the_records_of_all_groups_and_with_ignore_the_other_groups_are_clipped(form):
    ours = parameters()
    fill(ours, 0)
    ours[4].grad.fill_(math.nan)
    with pytest.raises(NonFiniteGradientError, match="of 1 of 5 parameters") as caught:
        clip(clippers(policy=Constant(0.5), nonfinite="raise"), ours, PLACES)
    assert [math.isfinite(record.norm) for record in caught.value.records] == [True, False, True]
    assert [parameter is ours[4] for parameter in caught.value.parameters] == [True]
    together = clippers(policy=Constant(0.5), nonfinite="ignore")
    for step in (0, 2):
        fill(ours, step)
        ours[4].grad *= math.nan if step else 1.0
        clip(together, ours, PLACES)
    norms = [float(sum(ours[i].grad.double().square().sum() for i in at) ** 0.5) for at in PLACES]
    assert norms == pytest.approx([0.5, math.nan, 0.5], rel=1e-3, nan_ok=True)
    assert [clipper.history.recorded.numel() for clipper in together] == [1, 1, 1]


@ALGORITHMS
@pytest.mark.parametrize(("nonfinite", "fused"), [("skip", True), ("ignore", False)])
def test_a_step_of_groups_on_an_accelerator_reads_nothing_back(algorithm, nonfinite, fused):
    ours, together = parameters(), clippers(algorithm, nonfinite=nonfinite, warmup_steps=2, max_threshold=9.0)
    optimizer = SGD(ours, lr=0.1, fused=fused)
    with in_form("accelerator form"), NoHostReads():
        for step in range(6):
            fill(ours, step)
            clip(together, optimizer, PLACES)


def test_hundreds_of_groups_copy_to_an_accelerator_where_their_parameters_stand_once():
    ours = [with_gradient([1.0]) for _ in range(300)]
    together = [GradientClipper(Percentile(30)) for _ in ours]
    with in_form("accelerator form"):
        copies = []
        for _ in range(3):
            clip(together, ours, [[i] for i in range(300)])
            copies.append(on_device.cache_info().misses)
    assert copies[0] == copies[2]


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


def records(callback):
    """By the prefix of its keys, what each group holds."""
    pairs = zip(callback.traces, callback.clippers, strict=True)
    return {key: (c.history.recorded.tolist(), c.steps, c.nonfinite_total) for key, c in pairs}


def in_param_groups(*names):
    """The network with an optimizer that has a group per layer; a name of `None` is none."""

    def optimizer(parameters):
        parameters = list(parameters)
        layers = zip((parameters[:2], parameters[2:]), names, strict=True)
        return SGD([{"params": layer, **({"name": name} if name else {})} for layer, name in layers], 0.1, 0.9)

    return Net(optimizer)


@ALGORITHMS
@pytest.mark.parametrize("groups", [LAYERS, "param_groups"], ids=["patterns", "param-groups"])
def test_training_with_groups_is_to_the_bit_training_with_a_clipper_per_group(form, groups, algorithm):
    unread = {"gradient_clip_algorithm": algorithm, "nonfinite": "ignore"}  # neither has a step to leave out
    own = [GradientClipper(Percentile(30, 1.0), window=7, **unread) for _ in range(2)]

    class ByHand(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            for clipper, i in zip(own, (0, 2), strict=True):
                clipper.clip_(pl_module.net[i].parameters())

    ours, theirs = in_param_groups("first", "rest"), in_param_groups("first", "rest")
    callback = autoclip(groups, multiplier=1.0, **unread)
    fit(ours, callback, epochs=2, scales=[1.0, 8.0, 0.5])
    fit(theirs, ByHand(), epochs=2, scales=[1.0, 8.0, 0.5])
    assert torch.equal(weights(ours), weights(theirs))
    assert records(callback) == {k: (c.history.recorded.tolist(), 20, 0) for k, c in zip(KEYS, own, strict=True)}


def test_a_nan_in_one_layer_is_told_of_by_every_group_and_raise_names_the_parameter():
    callback = autoclip()
    fit(NaNInLastBias(0, 3), callback)
    assert {key: counts for key, (_, *counts) in records(callback).items()} == {key: [10, 1] for key in KEYS}
    assert all(len(norms) == 7 for norms, *_ in records(callback).values())
    (spike,) = (spike for spike in callback.spikes() if not math.isfinite(spike["norm"]))
    assert (spike["optimizer"], spike["step"], spike["parameters"]) == ("autoclip/rest", 3, "net.2.bias")
    with pytest.warns(UserWarning, match="1 of 10 optimizer steps so far had a NaN"):
        fit(NaNInLastBias(0, 3), autoclip(), log_every_n_steps=10)
    with pytest.raises(NonFiniteGradientError, match=r"At optimizer step 3 .* They are: net\.2\.bias\."):
        fit(NaNInLastBias(0, 3), autoclip(nonfinite="raise"))


@ALGORITHMS
@pytest.mark.parametrize("nonfinite", ["skip", "ignore"])
@pytest.mark.parametrize("every", [1, 50])
def test_a_step_that_one_group_spoils_is_reported_by_all_of_them_alike(form, tmp_path, algorithm, nonfinite, every):
    class Spoiled(Net):
        def on_after_backward(self):
            if self.trainer.global_step in (3, 4, 8):
                self.net[2].bias.grad.fill_(math.inf)

        def on_train_batch_end(self, *args):
            self.net[2].bias.data.nan_to_num_()  # of an infinity that is applied

    def fit_epochs(callback, until, *others, **kwargs):
        model = Spoiled(lambda parameters: SGD(parameters, lr=0.0))
        run = trainer(callback, *others, max_epochs=until, log_every_n_steps=every, enable_checkpointing=bool(others))
        run.fit(model, loader(n=40), **kwargs)

    settings = {"gradient_clip_algorithm": algorithm, "nonfinite": nonfinite, "verbose": False}
    whole, resumed = autoclip(**settings), autoclip(**settings)
    fit_epochs(autoclip(**settings), 1, ModelCheckpoint(tmp_path, filename="end"))
    fit_epochs(resumed, 2, ckpt_path=tmp_path / "end.ckpt")
    fit_epochs(whole, 2)
    assert repr(resumed.report()) == repr(whole.report())
    for section in whole.report().sections:
        assert (section.figures.steps, section.figures.nonfinite) == (20, 3)
        evidence = next(each.evidence for each in section.verdicts if each.name == "non-finite gradients")
        where = "other groups" if section.name == "autoclip/first" else "net.2.bias"
        assert re.search(rf"^3 of 20 steps had .* first at step 3 \(epoch 0, batch 3\) in {where}\.$", evidence)
    for trace in whole.traces.values():
        assert [spike.point.step for spike in trace.nonfinite] == [3, 4, 8]


@pytest.mark.parametrize(
    ("groups", "members"),
    [
        ({"a": "net.0.*"}, {"a": FIRST, "rest": SECOND}),
        ({"a": ["*.bias", "net.2.*"]}, {"rest": FIRST[:1], "a": [FIRST[1], *SECOND]}),
        ({"a": "*.[!b]*t", "b": ["*.bias"]}, {"a": [FIRST[0], SECOND[0]], "b": [FIRST[1], SECOND[1]]}),
        ({np.str_("all"): (np.str_("*"),)}, {"all": FIRST + SECOND}),
        ("param_groups", {"pg1": FIRST, "late": SECOND}),
    ],
    ids=["rest", "list", "no-rest", "numpy-strings", "param-groups"],
)
def test_each_parameter_is_in_the_group_that_is_asked_for(groups, members, tmp_path):
    callback = autoclip(groups)
    fit(in_param_groups(None, "late"), callback).save_checkpoint(tmp_path / "a.ckpt")
    assert {key.split("/")[1]: trace.names for key, trace in callback.traces.items()} == members
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"]["GradientClipping"]["settings"]["groups"]


@pytest.mark.parametrize(
    ("groups", "error", "match"),
    [
        *((bad, TypeError, "to be 'param_groups', or a mapping") for bad in ("x", 5, ["net.*"], True)),
        *(({"a": bad}, TypeError, "to be a pattern or a list of them") for bad in (5, None, [], [1], {"x"}, b"x")),
        *(
            ({bad: "*"}, ValueError, "words without a slash, a star or a control character, but")
            for bad in ("", "a/b", "a\nb", "\x1b[31m", "rest", "step", 1)
        ),
        ({}, ValueError, "at least one group"),
        ({"a+": "net.0.*", "a_2b_": "net.2.*"}, ValueError, "'a+' and 'a_2b_' would both be 'a_2b_'"),
        ({"ü": "net.0.*", "_fc_": "net.2.*"}, ValueError, "'ü' and '_fc_' would both be '_fc_'"),
    ],
    ids=repr,
)
def test_bad_groups_are_refused_at_construction(groups, error, match):
    with pytest.raises(error, match=re.escape(match)):
        by_percentile(groups=groups)


def test_a_callback_shows_its_groups():
    assert repr(AutoClip(groups=LAYERS)).endswith(", nonfinite='skip', groups={'first': ['net.0.*']})")


@pytest.mark.parametrize(
    ("groups", "names", "match"),
    [
        ({"a": ["net.0.*", "net.1.*"]}, (None, None), "'net.1.*' of 'a' matches none. The model's are named net.0."),
        ({"a": "net.*", "b": "*.bias"}, (None, None), "not to overlap, but 'net.0.bias' is in 'a' and in 'b'"),
        ("param_groups", ("x", "x"), "different names, but two are called 'x'"),
        ("param_groups", ("pg2", None), "different names, but two are called 'pg2'"),
        ("param_groups", ("a+", "a_2b_"), "'a+' and 'a_2b_' would both be 'a_2b_'"),
    ],
    ids=["unmatched", "overlapping", "same-name", "a-number-as-name", "same-key"],
)
def test_groups_that_do_not_fit_the_model_are_refused_at_the_start_of_fit(groups, names, match):
    with pytest.raises(ValueError, match=re.escape(match)):
        fit(in_param_groups(*names), by_percentile(groups=groups))


def test_names_are_those_that_the_user_wrote_where_a_layer_is_compiled():
    model, callback = Net(), autoclip()
    model.net[0] = torch.compile(model.net[0], backend="eager")
    fit(model, callback)
    assert [trace.names[0] for trace in callback.traces.values()] == ["net.0.weight", "net.2.weight"]


class Gan(Net):
    """Manual optimization of two networks, the second at every other batch; notes the norms of the weights."""

    def __init__(self):
        super().__init__()
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
        return [SGD(net.parameters(), 0.1, 0.9) for net in (self.net, self.other)]


def test_patterns_reach_over_several_optimizers_each_of_which_has_its_own_groups():
    model, callback = Gan(), autoclip({"weights": ["net.0.weight", "other.weight"], "last": "net.2.*"}, window=None)
    fit(model, callback)
    steps = {"SGD/weights": 10, "SGD/rest": 10, "SGD/last": 10, "SGD-1/weights": 5, "SGD-1/rest": 5}
    assert {key[9:-1]: counts[1] for key, counts in records(callback).items()} == steps
    for key, norms in model.norms.items():
        assert records(callback)[key][0] == pytest.approx(norms, rel=1e-6)
        assert callback.traces[key].bins[-1].threshold == pytest.approx(np.percentile(norms, 30), rel=1e-6)


# --- checkpoints and parameters that join -----------------------------------------------------------------------------


@ALGORITHMS
@pytest.mark.parametrize("make", [Net, lambda: in_param_groups(None, "b"), Gan], ids=["one", "param-groups", "gan"])
def test_a_resumed_run_takes_the_same_steps_as_an_uninterrupted_one(form, make, algorithm, tmp_path):
    def callback():
        groups = "param_groups" if make not in (Net, Gan) else LAYERS
        return autoclip(groups, gradient_clip_algorithm=algorithm, warmup_steps=12)

    fit(make(), callback(), scales=SCALES).save_checkpoint(tmp_path / "a.ckpt")
    (expected, whole), (resumed, second) = (make(), callback()), (make(), callback())
    fit(expected, whole, epochs=3, scales=SCALES)
    fit(resumed, second, epochs=3, scales=SCALES, ckpt=tmp_path / "a.ckpt")
    assert torch.equal(weights(resumed), weights(expected))
    assert records(second) == records(whole)
    assert list(records(second)) == list(records(whole))
    assert str(second.report()) == str(whole.report())
    assert repr(second.spikes()) == repr(whole.spikes())


OTHERS = [None, {"all": "*"}, LAYERS, {"other": "net.0.*"}, "param_groups"]


@pytest.mark.parametrize(("then", "now"), [(a, b) for a in OTHERS for b in OTHERS if a != b], ids=str)
def test_resuming_with_other_groups_is_refused_with_a_way_out_that_works(then, now, tmp_path):
    fit(Net(), autoclip(then)).save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(
        ValueError, match=r"made with groups=.*, but this run has groups=.*\. Resume with those groups, or"
    ):
        fit(Net(), autoclip(now), epochs=2, ckpt=tmp_path / "a.ckpt")  # before anything is warned of
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    del checkpoint["callbacks"]["GradientClipping"]
    torch.save(checkpoint, tmp_path / "b.ckpt")
    with pytest.warns(UserWarning, match="written without"):
        fit(Net(), autoclip(now), epochs=2, ckpt=tmp_path / "b.ckpt")


def test_other_patterns_of_the_same_groups_go_on_with_a_warning_each_with_its_own_record(tmp_path):
    first, second = autoclip(window=None), autoclip({"first": "net.2.*"}, window=None)  # of which the rest comes first
    fit(Net(), first).save_checkpoint(tmp_path / "a.ckpt")
    with pytest.warns(UserWarning, match=r"written with groups=.*'net\.0\.\*'.* goes on with groups=.*'net\.2\.\*'"):
        fit(Net(), second, epochs=2, ckpt=tmp_path / "a.ckpt")
    assert {key: norms[:10] for key, (norms, *_) in records(second).items()} == {
        k: r[0] for k, r in records(first).items()
    }
    assert [list(records(callback)) for callback in (first, second)] == [KEYS, KEYS[::-1]]
    assert [steps for _, steps, _ in records(second).values()] == [20, 20]


def test_records_of_groups_that_the_optimizer_does_not_have_are_refused():
    first, second = autoclip("param_groups"), autoclip("param_groups")
    fit(in_param_groups("x", "y"), first)
    second.load_state_dict(first.state_dict())  # by hand: a checkpoint's optimizer has the names that it was saved with
    with pytest.raises(MisconfigurationException, match="holds the records autoclip/x/, autoclip/y/, but this run"):
        fit(in_param_groups("x", "z"), second)


class Growing(Net):
    """A network on a backbone that is frozen at first."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Linear(4, 4)

    def loss(self, batch):
        return super().loss([self.backbone(batch[0]), *batch[1:]])

    def configure_optimizers(self):
        return SGD([p for p in self.parameters() if p.requires_grad], lr=0.05, momentum=0.9)


class Join(Callback):
    """The backbone joins the optimizer in the second epoch, or where a run is resumed that it has joined."""

    def __init__(self):
        self.joined = False

    def state_dict(self):
        return {"joined": self.joined}

    def load_state_dict(self, state):
        self.joined = state["joined"]

    def setup(self, trainer, pl_module, stage):
        pl_module.backbone.requires_grad_(False)

    def on_fit_start(self, trainer, pl_module):
        if self.joined:
            pl_module.backbone.requires_grad_(True)
            trainer.optimizers[0].add_param_group({"params": [*pl_module.backbone.parameters()], "lr": 0.01})

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1 and not self.joined:
            self.joined = True
            self.on_fit_start(trainer, pl_module)


@ALGORITHMS
@pytest.mark.parametrize("groups", [{"trunk": "backbone.*"}, "param_groups"], ids=["patterns", "param-groups"])
def test_a_group_that_joins_during_the_fit_has_its_own_record_also_after_a_resume(form, groups, algorithm, tmp_path):
    def run(epochs, join, ckpt=None):
        model, watch = Growing(), Watch()
        callback = autoclip(groups, gradient_clip_algorithm=algorithm, multiplier=1.0, window=None)
        return fit(model, join, callback, watch, epochs=epochs, ckpt=ckpt), model, callback, watch.steps

    first, joined = [
        f"autoclip/{name}/" for name in (("pg1", "pg2") if groups == "param_groups" else ("rest", "trunk"))
    ]
    _, model, whole, steps = run(3, Join())
    assert {key: count for key, (_, count, _) in records(whole).items()} == {first: 30, joined: 20}
    norms, seen = (
        records(whole)[joined][0],
        [step[f"{joined}threshold"] for step in steps if f"{joined}threshold" in step],
    )
    assert seen == pytest.approx([np.percentile(norms[: i + 1], 30) for i in range(20)], rel=1e-6)
    assert whole.traces[joined].names == ["backbone.weight", "backbone.bias"]
    run(2, Join())[0].save_checkpoint(tmp_path / "a.ckpt")
    _, resumed, second, _ = run(3, Join(), tmp_path / "a.ckpt")
    assert torch.equal(weights(resumed), weights(model))
    assert records(second) == records(whole)
    assert str(second.report()) == str(whole.report())

    fine = [BackboneFinetuning(1, backbone_initial_ratio_lr=0.5) for _ in range(2)]
    run(2, fine[0])[0].save_checkpoint(tmp_path / "b.ckpt")
    *_, callback, _ = run(3, fine[1], tmp_path / "b.ckpt")  # after a resume Lightning leaves the backbone frozen
    assert {key: count for key, (_, count, _) in records(callback).items()} == {first: 30, joined: 10}


# --- rows, reports and files ------------------------------------------------------------------------------------------


@pytest.fixture
def logged(tmp_path):
    """A run of sixty steps with a checkpoint and rows."""
    callback, logger = autoclip(log_layers=True, log_every_step=True), CSVLogger(tmp_path, name="", version="run")
    fit(Net(), callback, logger=logger, log_every_n_steps=10, n=240).save_checkpoint(tmp_path / "last.ckpt")
    return callback, tmp_path


def test_rows_and_layers_of_each_group_stand_under_its_name(logged):
    rows = read_csv(logged[1] / "run" / "metrics.csv")
    keys = {key for row in rows for key in row if "autoclip" in key}
    layers = ("first/net.0", "rest/net.2")
    sections = ("autoclip_layers", "autoclip_layers_norm")
    assert {key for key in keys if "layers" in key} == {f"{each}/{layer}" for each in sections for layer in layers}
    assert {key.rpartition("/")[0] + "/" for key in keys if "layers" not in key} == {
        *KEYS,
        *(f"{key}step/" for key in KEYS),
    }
    for key, trace in logged[0].traces.items():
        assert sum(bool(row[f"{key}grad_norm"]) for row in rows) == 6
        steps = [float(row[f"{key}step/grad_norm"]) for row in rows if row[f"{key}step/grad_norm"]]
        assert steps == pytest.approx([one.largest for one in trace.bins], rel=1e-6)


def test_the_report_of_a_checkpoint_has_a_section_per_group(logged, capsys):
    callback, folder = logged
    assert [section.name for section in callback.report().sections] == ["autoclip/first", "autoclip/rest"]
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"checkpoint {folder / 'last.ckpt'}\n{callback.report()}\n"
    assert main(["suggest", str(folder)]) == 0
    assert re.findall(r", (autoclip/\w+): 60 norms", capsys.readouterr().out) == ["autoclip/first", "autoclip/rest"]
    assert len(callback.plot().axes) == 4


class TwoParamGroups(Net):
    def configure_optimizers(self):
        first, second = ([*self.net[i].parameters()] for i in (0, 2))
        return SGD([{"params": first, "name": "first"}, {"params": second, "name": "second"}], lr=0.01)


def test_parameters_that_change_places_during_the_fit_stay_in_their_groups():
    class Reverse(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                trainer.optimizers[0].param_groups.reverse()

    def fitted(*callbacks):
        torch.manual_seed(0)
        autoclip, model = by_percentile(50, groups="param_groups"), TwoParamGroups()
        trainer(*callbacks, autoclip, max_epochs=2).fit(model, loader())
        return [clipper.history.recorded.tolist() for clipper in autoclip.clippers], weights(model), autoclip.traces

    straight, reversed_ = fitted(), fitted(Reverse())
    assert straight[0] == reversed_[0]
    assert torch.equal(straight[1], reversed_[1])
    assert [trace.names for trace in reversed_[2].values()] == [FIRST, SECOND]


def test_a_group_that_joined_after_the_last_step_of_a_checkpoint_starts_empty(tmp_path):
    class Joins(TwoParamGroups):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            self.late = optimizer.param_groups.pop() if self.trainer.ckpt_path is None else None
            return optimizer

        def on_train_epoch_end(self):
            if self.late is not None:
                self.trainer.optimizers[0].add_param_group(self.late)

    run = trainer(by_percentile(groups="param_groups"), max_epochs=1)
    run.fit(Joins(), loader())
    run.save_checkpoint(tmp_path / "joined.ckpt")
    resumed = by_percentile(groups="param_groups")
    trainer(resumed, max_epochs=2).fit(TwoParamGroups(), loader(), ckpt_path=tmp_path / "joined.ckpt")
    assert [clipper.steps for clipper in resumed.clippers] == [32, 16]


def test_a_tied_parameter_is_known_by_each_of_its_names():
    class Tied(Net):
        def __init__(self):
            super().__init__()
            self.again = self.net[0]

    autoclip = by_percentile(groups={"tied": "again.*"})
    trainer(autoclip).fit(Tied(), loader())
    assert list(autoclip.traces) == ["autoclip/tied/", "autoclip/rest/"]
    with pytest.raises(ValueError, match="not to overlap"):
        trainer(by_percentile(groups={"one": "net.0.*", "two": "again.*"})).fit(Tied(), loader())


@pytest.mark.parametrize("name", ["a/b", "step", "enc*", "..", " "])
def test_a_param_group_with_a_name_that_no_logger_takes_is_refused(name):
    class Named(Net):
        def configure_optimizers(self):
            return SGD([{"params": [*self.parameters()], "name": name}], lr=0.1)

    with pytest.raises(ValueError, match="called by words"):
        trainer(by_percentile(groups="param_groups")).fit(Named(), loader())
