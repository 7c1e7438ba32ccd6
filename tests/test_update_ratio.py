"""`max_update_ratio`: how far it lets a step move the weights, for which optimizers, and what it leaves as it is."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from helpers import Net, in_form, loader, norm_of, read_rows, trainer, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from models import OptimizerPerLayer
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import SGD, Adagrad, AdamW, RMSprop
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_autoclip import AutoClip, Constant, GradientClipper, GradientClipping, Percentile, gradients
from lightning_autoclip.clipper import clip_together_
from lightning_autoclip.gradients import LEAST_RMS

RATIO = 0.05
BIG = Constant(1e30)  # leaves everything to the limit
ELEMENTS = st.floats(-16, 16, width=32).filter(lambda x: x == 0 or abs(x) > 1e-3)


def limited_clipper(policy=BIG, ratio=RATIO, **kwargs):
    """A clipper whose steps the host need not read, so that an accelerator would not."""
    return GradientClipper(policy, max_update_ratio=ratio, **{"nonfinite": "ignore", **kwargs})


def parameter(values, gradient, **kwargs):
    made = nn.Parameter(torch.tensor(values, **kwargs))
    made.grad = torch.tensor(gradient, dtype=made.dtype)
    return made


def norm(tensors):
    return float(sum(tensor.detach().double().square().sum() for tensor in tensors) ** 0.5)


def limit_of(record):
    """The largest norm that the limit allows."""
    return float(record.norm) * RATIO / float(record.update_ratio)


def moves(optimizer, clipper, weight, gradient, steps=1):
    """By what part of its norm each step moves the matrix, in units of the limit."""
    found = []
    for _ in range(steps):
        weight.grad = torch.tensor(gradient)
        before = weight.detach().clone()
        clipper.clip_(optimizer)
        optimizer.step()
        found.append(norm([weight.detach() - before]) / norm([before]) / RATIO)
    return found


# --- how far a step may go --------------------------------------------------------------------------------------------

SGDS = {
    "plain": ({"lr": 0.2}, 0.2),
    "momentum": ({"lr": 0.2, "momentum": 0.9}, 2.0),
    "Nesterov": ({"lr": 0.2, "momentum": 0.75, "nesterov": True}, 0.8),
    "dampening": ({"lr": 0.2, "momentum": 0.9, "dampening": 0.5}, 1.0),
    "the first gradient is not dampened": ({"lr": 0.2, "momentum": 0.5, "dampening": 1.0}, 0.2),
    "weight decay": ({"lr": 0.2, "weight_decay": 0.1}, 0.2),
    "maximize": ({"lr": 0.2, "maximize": True}, 0.2),
    "fused": ({"lr": 0.2, "momentum": 0.9, "fused": True}, 2.0),
    "rate as a tensor": ({"lr": torch.tensor(0.2), "momentum": 0.9, "fused": True}, 2.0),
    "momentum of 1": ({"lr": 0.2, "momentum": 1.0}, 200.0),
}


@pytest.mark.parametrize("name", SGDS)
def test_the_limit_is_the_part_of_the_weights_by_which_a_lasting_gradient_would_move_them(form, name):
    arguments, rate = SGDS[name]
    parameters = [parameter([[3.0, 4.0]], [[30.0, 40.0]]), parameter([[40.0]], [[30.0]]), parameter([0.1], [5.0])]
    record = limited_clipper().clip_(SGD(parameters, **arguments))
    norm = math.sqrt(50**2 + 30**2 + 5**2)  # the first matrix would move by 10 times its norm, the second by 0.75
    assert float(record.update_ratio) == pytest.approx(rate * 50.0 / 5.0, rel=1e-6)
    assert limit_of(record) == pytest.approx(RATIO * 5.0 / rate * norm / 50.0, rel=1e-6)
    assert float(record.threshold) == pytest.approx(limit_of(record), rel=1e-6)
    assert norm_of(parameters) == pytest.approx(limit_of(record), rel=1e-6)


@settings(deadline=None)
@given(
    st.lists(st.tuples(ELEMENTS, ELEMENTS), min_size=1, max_size=6),
    st.lists(st.floats(1e-3, 10), min_size=6, max_size=6),
    st.sampled_from(["norm", "value"]),
    st.sampled_from(["cpu form", "accelerator form"]),
)
def test_no_step_of_param_groups_with_rates_of_their_own_goes_further(pairs, rates, algorithm, form):
    parameters = [parameter([weight], [gradient]) for weight, gradient in pairs]
    before = [each.detach().clone() for each in parameters]
    groups = [{"params": [each], "lr": rate} for each, rate in zip(parameters, rates, strict=False)]
    optimizer = SGD(groups, lr=1.0)
    with in_form(form):
        record = limited_clipper(Percentile(50, 3.0), gradient_clip_algorithm=algorithm).clip_(optimizer)
    optimizer.step()
    ratios = [
        norm([each.detach() - start]) / max(norm([start]), LEAST_RMS)
        for each, start in zip(parameters, before, strict=True)
    ]
    assert max(ratios) <= RATIO * (1 + 1e-4)
    if float(record.update_ratio) > RATIO and algorithm == "norm":
        assert max(ratios) == pytest.approx(RATIO, rel=1e-3)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_a_step_within_the_limit_is_clipped_as_without_it(form, algorithm):
    clipped = []
    for ratio in (None, 0.9):
        weight = parameter([30.0, 40.0], [3.0, -4.0])
        limited_clipper(Constant(2.0), ratio, gradient_clip_algorithm=algorithm).clip_(SGD([weight], lr=0.1))
        clipped.append(weight.grad.tolist())
    assert clipped[0] == clipped[1]


def test_by_value_elements_are_clamped_first_and_the_rest_is_shortened(form):
    weight = parameter([3.0, 4.0], [3.0, -4.0])
    clipper = limited_clipper(Constant(2.0), 0.1, gradient_clip_algorithm="value")
    record = clipper.clip_(SGD([weight], lr=0.2))
    assert float(record.update_ratio) == pytest.approx(0.2)  # twice the limit: half of what is left by clamping
    assert weight.grad.tolist() == pytest.approx([1.0, -1.0])
    assert float(record.threshold) == 2.0
    assert float(record.clipped_norm) == pytest.approx(math.sqrt(2), rel=1e-6)


def test_the_scale_of_the_loss_does_not_matter(form):
    steps = []
    for scale in (1.0, 1024.0):
        torch.manual_seed(0)
        layer = nn.Linear(4, 3)
        optimizer = SGD(layer.parameters(), lr=0.5 / scale, momentum=0.9)
        clipper = limited_clipper(Percentile(50))
        for _ in range(40):
            optimizer.zero_grad()
            (scale * layer(torch.randn(8, 4)).square().mean()).backward()
            clipper.clip_(optimizer)
            optimizer.step()
        steps.append(weights(layer))
    torch.testing.assert_close(*steps, rtol=1e-4, atol=1e-6)


def test_with_a_scaler_the_gradient_counts_at_its_true_scale(form):
    weight = parameter([3.0, 4.0], [0.0, 0.0])
    optimizer, scaler = SGD([weight], lr=1.0), GradScaler("cpu", init_scale=1024.0)
    scaler.scale((weight * torch.tensor([30.0, 40.0])).sum()).backward()
    record = limited_clipper(nonfinite="skip").clip_(optimizer, scaler)
    scaler.step(optimizer)
    assert float(record.norm) == pytest.approx(50.0)
    assert norm([weight - torch.tensor([3.0, 4.0])]) == pytest.approx(RATIO * 5.0, rel=1e-5)


def test_the_limit_holds_in_the_warm_up_and_beside_other_limits(form):
    for most, expected in ((None, 0.25), (0.1, 0.1)):
        weight = parameter([3.0, 4.0], [30.0, 40.0])
        clipper = limited_clipper(Percentile(50), warmup_steps=3, max_threshold=most)
        assert float(clipper.clip_(SGD([weight], lr=1.0)).threshold) == pytest.approx(expected)


def test_beside_non_finite_weights_the_threshold_of_the_policy_holds(form):
    weight = parameter([3.0, math.nan], [30.0, 40.0])
    record = limited_clipper(Constant(5.0)).clip_(SGD([weight], lr=1.0))
    assert float(record.threshold) == 5.0
    assert weight.grad.tolist() == pytest.approx([3.0, 4.0])


def test_a_negative_rate_counts_by_its_size(form):
    found = []
    for rate in (0.5, -0.5):
        optimizer = SGD([parameter([[3.0, 4.0]], [[3.0, 4.0]])], lr=1.0)
        optimizer.param_groups[0]["lr"] = rate
        found.append(limit_of(limited_clipper().clip_(optimizer)))
    assert found == pytest.approx([RATIO * 5.0 / 0.5] * 2)


@pytest.mark.parametrize("name", ["warm-up from 0", "warm restart"])
def test_a_momentum_of_a_small_rate_does_not_break_out_where_the_rate_rises(form, name):
    weight = parameter([[3.0, 4.0]], [[30.0, 40.0]])
    optimizer, clipper, found = SGD([weight], lr=1.0, momentum=0.9), limited_clipper(), []
    factors = [min(step / 10, 1) for step in range(30)]
    if name == "warm restart":
        factors = [1.0] * 9 + [0.0] * 9 + [1.0] * 9
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factors[step])
    for _ in range(len(factors) - 1):
        found += moves(optimizer, clipper, weight, [[-30.0, -40.0]])
        schedule.step()
    assert max(found) < (2 if name == "warm-up from 0" else 8)  # not hundreds: gradients of a tenth of the rate at most


# --- which weights count ----------------------------------------------------------------------------------------------


def frozen(*shape, value=0.0):
    return nn.Parameter(torch.full(shape, value), requires_grad=False)


def frozen_behind_its_gradient():
    weight = parameter([[3.0, 4.0]], [[30.0, 40.0]])
    return weight.requires_grad_(False)


ONE = ([3.0, 4.0], [30.0, 40.0])
COUNTED = {
    "what is not trained does not": (lambda: [frozen(4, 4), parameter(*ONE), nn.LazyLinear(2).weight], 5.0),
    "a vector, where all matrices are frozen": (lambda: [frozen(4, 4, value=1e6), parameter(*ONE)], 5.0),
    "a bias beside a matrix does not": (
        lambda: [parameter([[3.0, 4.0]], [[30.0, 40.0]]), parameter([0.0], [50.0])],
        5.0 * math.sqrt(2),
    ),
    "a bias alone, at least at an RMS": (lambda: [parameter([0.0], [50.0])], LEAST_RMS),
    "a scalar alone": (lambda: [parameter(5.0, 30.0)], 5.0),
    "an empty matrix does not": (lambda: [nn.Parameter(torch.empty(0, 3)), parameter([5.0], [30.0])], 5.0),
    "a matrix that was frozen behind its gradient": (lambda: [frozen_behind_its_gradient()], 5.0),
}


@pytest.mark.parametrize("name", COUNTED)
def test_which_weights_count(form, name):
    parameters, expected = COUNTED[name][0](), COUNTED[name][1]
    assert limit_of(limited_clipper().clip_(SGD(parameters, lr=1.0))) == pytest.approx(RATIO * expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.complex64], ids=str)
def test_weights_of_every_dtype_are_measured_in_float32_at_least(form, dtype):
    weight = nn.Parameter(torch.full((4096,), 300.0, dtype=dtype))
    weight.grad = torch.ones_like(weight)
    assert limit_of(limited_clipper().clip_(SGD([weight], lr=1.0))) == pytest.approx(RATIO * 300.0 * 64.0, rel=1e-5)


def test_a_model_that_starts_at_zero_moves():
    torch.manual_seed(0)
    layer = nn.Linear(8, 1)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    optimizer, clipper = SGD(layer.parameters(), lr=0.1), limited_clipper(Percentile(50))
    x, losses = torch.randn(256, 8), []
    for _ in range(200):
        optimizer.zero_grad()
        loss = (layer(x) - x.sum(1, keepdim=True)).square().mean()
        loss.backward()
        clipper.clip_(optimizer)
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 4
    assert losses[-1] < 0.1


def test_the_weights_are_measured_at_the_first_steps_and_then_at_one_of_sixteen(form):
    weight, empty, lazy = parameter(*ONE), nn.Parameter(torch.zeros(0, 2)), nn.LazyLinear(2).weight
    optimizer, clipper, found = SGD([weight, empty, lazy], lr=1.0), limited_clipper(), []
    for step in range(1, 81):
        weight.data = torch.tensor([3.0, 4.0]) * step
        weight.grad = torch.tensor([30.0, 40.0])
        found.append(round(limit_of(clipper.clip_(optimizer)) / (RATIO * 5.0)))
    assert found == [step if step < 16 else step // 16 * 16 for step in range(1, 81)]


def test_parameters_that_join_later_are_measured_at_once(form):
    clipper, weight = limited_clipper(), parameter(*ONE)
    optimizer = SGD([weight], lr=1.0)
    moves(optimizer, clipper, weight, [3e-6, 4e-6], steps=20)
    optimizer.add_param_group({"params": [parameter([0.6, 0.8], [30.0, 40.0])], "lr": 1.0})
    weight.grad = torch.tensor([30.0, 40.0])
    assert limit_of(clipper.clip_(optimizer)) == pytest.approx(RATIO * math.sqrt(2))


@pytest.mark.parametrize("is_resumed", [False, True])
def test_layers_that_are_unfrozen_late_count_at_once(form, is_resumed):
    body, head = nn.Parameter(torch.tensor([[0.3, 0.4]])), parameter([[3.0, 4.0]], [[0.03, 0.04]])
    body.requires_grad_(False)
    optimizer, clipper = SGD([body, head], lr=1.0), limited_clipper()
    for step in range(24):
        head.grad = torch.tensor([[0.03, 0.04]])
        if step == 20 and is_resumed:
            state, clipper = clipper.state_dict(), limited_clipper()
            clipper.load_state_dict(state)
        if step >= 20:
            body.requires_grad_(True)
            assert moves(optimizer, clipper, body, [[-3.0, -4.0]]) == [pytest.approx(1.0, rel=0.2)]
        else:
            clipper.clip_(optimizer)


def test_a_layer_that_is_unfrozen_where_its_group_has_no_gradient_counts_at_its_first_one(form):
    body, neck, head = (parameter([[0.3, 0.4]], [[0.03, 0.04]]) for _ in range(3))
    body.requires_grad_(False)
    optimizer, clippers = SGD([body, neck, head], lr=1.0), [limited_clipper(), limited_clipper()]
    for step in range(24):
        body.requires_grad_(step >= 20)
        body.grad = torch.tensor([[-3.0, -4.0]]) if step > 20 else None
        neck.grad = None if step == 20 else torch.tensor([[0.003, 0.004]])
        head.grad, before = torch.tensor([[0.003, 0.004]]), body.detach().clone()
        clip_together_([(clippers[0], [0, 1]), (clippers[1], [2])], optimizer)
        optimizer.step()
        assert norm([body.detach() - before]) <= 1.2 * RATIO * norm([before])


def test_a_clipper_that_is_released_forgets_the_weights_and_one_that_is_restored_keeps_them(form):
    clipper, old = limited_clipper(), parameter([[300.0, 400.0]], [[3.0, 4.0]])
    moves(SGD([old], lr=1.0), clipper, old, [[3.0, 4.0]], steps=20)
    state = clipper.state_dict()
    assert len(state["weight_norms"]) == 1
    clipper.release()
    new = parameter([[0.3, 0.4]], [[3.0, 4.0]])
    assert moves(SGD([new], lr=1.0), clipper, new, [[3.0, 4.0]]) == [pytest.approx(1.0, rel=1e-4)]
    restored = limited_clipper()
    restored.load_state_dict(state)
    restored.release()
    assert restored.state_dict()["weight_norms"] == state["weight_norms"]


# --- which optimizers -------------------------------------------------------------------------------------------------


class Sign(SGD):
    def step(self, closure=None):
        raise NotImplementedError


class Named(SGD):
    pass


@pytest.mark.parametrize("kind", [AdamW, RMSprop, Adagrad, Sign, Named])
def test_steps_are_limited_only_where_they_are_proportional_to_the_gradient(form, kind):
    weight = parameter(*ONE)
    record = limited_clipper(Constant(100.0), ratio=1e-6).clip_(kind([weight], lr=1.0))
    assert math.isnan(float(record.update_ratio)) == (kind is not Named)
    assert (weight.grad.tolist() == [30.0, 40.0]) == (kind is not Named)


class Plain:
    """Wraps an optimizer without being one."""

    def __init__(self, parameters):
        self.inner = SGD(parameters, lr=1.0, momentum=0.9)
        self.param_groups = self.inner.param_groups

    def step(self):
        self.inner.step()


class Reordering(torch.optim.Optimizer):
    """Wraps one with the parameters in another order, and has a rate of its own, which is not that of the steps."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 1e-3})
        self.inner = SGD(self.param_groups[0]["params"][::-1], lr=1.0, momentum=0.9)

    def step(self, closure=None):
        self.inner.step()


@pytest.mark.parametrize("wrapper", [Plain, Reordering])
def test_of_a_wrapper_the_rates_are_those_of_the_optimizer_that_steps(form, wrapper):
    parameters = [parameter([[3.0, 4.0]], [[30.0, 40.0]]), parameter([[30.0]], [[0.0]])]
    record = limited_clipper().clip_(wrapper(parameters))
    assert limit_of(record) == pytest.approx(RATIO * 5.0 / 10)


@pytest.mark.parametrize("rates", [[0.5], [0.5, 1.0, 1.5]], ids=["one rate", "several rates"])
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_nothing_is_read_in_a_step_on_an_accelerator(monkeypatch, algorithm, rates):
    class NoReads(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "is_nonzero")
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(gradients, "can_read_later", lambda device: True)
    parameters = [parameter(*ONE) for _ in range(3)]
    groups = [{"params": parameters[i :: len(rates)], "lr": rate} for i, rate in enumerate(rates)]
    optimizer = SGD(groups, lr=1.0, fused=True)
    clipper = limited_clipper(Percentile(50), gradient_clip_algorithm=algorithm, nonfinite="skip")
    found = []
    for _ in range(20):
        for each in parameters:
            each.grad = torch.tensor([30.0, 40.0])
        with NoReads():
            record = clipper.clip_(optimizer)
        found.append(limit_of(record))
    expected = RATIO * 5.0 / rates[-1] * math.sqrt(3)  # the highest rate moves its matrices most
    assert found == pytest.approx([expected] * 20, rel=1e-5)


# --- in a Trainer -----------------------------------------------------------------------------------------------------


def fast(parameters):
    return SGD(parameters, lr=1.0, momentum=0.9)


class Schedules(Net):
    """A rate that rises from 0 and falls again."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: [0.0, 0.5, 1.0, 0.25][min(step, 3)])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rate, "interval": "step"}}


class Ratios(Callback):
    """Before the clipping: notes by what part of their norm momentum would carry the matrices, per unit of the rate."""

    def __init__(self):
        self.found = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        lr, matrices = optimizer.param_groups[0]["lr"], (pl_module.net[0].weight, pl_module.net[2].weight)
        self.found.append(10 * max(lr, 0.01) * max(norm_of([each]) / norm([each]) for each in matrices))


def test_the_limit_follows_the_schedule_down_to_a_tenth_of_its_rate(form):
    ratios, autoclip = Ratios(), AutoClip(max_update_ratio=RATIO, nonfinite="ignore", verbose=False)
    trainer(ratios, autoclip, max_steps=6).fit(Schedules(), loader())
    assert [row.update_ratio for row in autoclip.logs["autoclip/"].bins] == pytest.approx(ratios.found, rel=1e-5)


def test_groups_are_limited_each_by_its_own_weights(form):
    groups, seen = {"first": "net.0.*", "second": "net.2.*"}, {}
    autoclip = AutoClip(50, max_update_ratio=RATIO, groups=groups, nonfinite="ignore", verbose=False)

    class Notes(Net):
        def on_before_optimizer_step(self, optimizer):  # after the clipping
            for name, layer in (("first", self.net[0]), ("second", self.net[2])):
                seen[name] = 20.0 * norm_of([layer.weight]) / norm([layer.weight]), norm_of(layer.parameters())

    trainer(autoclip, max_steps=1).fit(Notes(partial(SGD, lr=2.0, momentum=0.9)), loader(scales=[50.0]))
    thresholds = {prefix.split("/")[1]: log.bins[0].threshold for prefix, log in autoclip.logs.items()}
    assert {name: ratio for name, (ratio, _) in seen.items()} == pytest.approx(dict.fromkeys(seen, RATIO), rel=1e-5)
    assert thresholds == pytest.approx({name: clipped for name, (_, clipped) in seen.items()}, rel=1e-5)


def test_a_resumed_run_takes_the_same_steps_as_an_uninterrupted_one(form, tmp_path):
    def fit(max_steps, ckpt=None):
        autoclip = AutoClip(50, max_update_ratio=RATIO, nonfinite="ignore", verbose=False)
        keep, model = ModelCheckpoint(tmp_path, f"of-{max_steps}", every_n_train_steps=32), Net(fast)
        run = trainer(autoclip, keep, max_epochs=3, max_steps=max_steps, enable_checkpointing=True)
        run.fit(model, loader(), ckpt_path=ckpt)
        return weights(model), autoclip.clippers[0].state_dict()["weight_norms"], autoclip.report().to_dict()

    whole, _, resumed = fit(-1), fit(32), fit(-1, tmp_path / "of-32.ckpt")
    assert torch.equal(whole[0], resumed[0])
    assert whole[1:] == resumed[1:]
    assert 0 < whole[2]["sections"][0]["figures"]["limited_fraction"] <= 1


def test_rows_and_report_say_how_much_of_the_run_the_limit_shortens(tmp_path):
    autoclip = AutoClip(50, max_update_ratio=RATIO, verbose=False)
    trainer(autoclip, max_epochs=8, logger=CSVLogger(tmp_path, "", ""), log_every_n_steps=16).fit(Net(fast), loader())
    figures = autoclip.report().sections[0].figures
    assert figures.limited_fraction > 0.9
    (diagnosis,) = [each for each in autoclip.report().diagnoses if each.name == "learning rate too high"]
    assert figures.limit_excess >= 0.999 * figures.update_ratio / RATIO > 10
    assert f"by {figures.limit_excess:.1f} times the limit" in diagnosis.evidence
    assert f"by {figures.limit_excess:.1f} or more" in diagnosis.advice
    rows = read_rows(tmp_path / "metrics.csv")
    assert len(rows) == 8
    assert {row["autoclip/limited_fraction"] for row in rows} <= {n / 16 for n in range(17)}
    assert all(row["autoclip/update_ratio"] > RATIO for row in rows)


def test_a_rate_that_fits_needs_no_limit():
    autoclip = AutoClip(50, max_update_ratio=RATIO, verbose=False)
    trainer(autoclip, max_epochs=8).fit(Net(partial(SGD, lr=1e-4, momentum=0.9)), loader())
    assert autoclip.report().sections[0].figures.limited_fraction == 0
    assert "learning rate too high" not in str(autoclip.report())
    assert "max_update_ratio" not in str(autoclip.report())


def test_an_optimizer_that_is_not_limited_has_no_such_keys():
    autoclip = AutoClip(50, max_update_ratio=RATIO, verbose=False)
    trainer(autoclip).fit(OptimizerPerLayer(fast, AdamW), loader())
    keys = [key for log in autoclip.logs.values() for key in log.keys]
    assert [key for key in keys if "limited" in key or "update_ratio" in key] == [
        "autoclip/SGD/limited_fraction",
        "autoclip/SGD/update_ratio",
    ]
    assert math.isnan(autoclip.report().sections[1].figures.limited_fraction)


def test_a_run_that_continues_without_the_limit_still_reports_its_rate(tmp_path):
    first, second = AutoClip(max_update_ratio=1e-3, verbose=False), AutoClip(max_update_ratio=None, verbose=False)
    run = trainer(first, max_epochs=4)
    run.fit(Net(fast), loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.warns(UserWarning, match="max_update_ratio"):
        trainer(second, max_epochs=5).fit(Net(fast), loader(), ckpt_path=tmp_path / "a.ckpt")
    assert "learning rate too high" in second.report().summary


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [AutoClip, partial(GradientClipping, BIG), partial(GradientClipper, BIG)])
@pytest.mark.parametrize(
    ("value", "error"), [(0, ValueError), (-0.1, ValueError), (math.nan, ValueError), ("0.1", TypeError)]
)
def test_a_value_that_is_no_ratio_raises(cls, value, error):
    with pytest.raises(error, match=r"Expected `max_update_ratio` to be a number above 0"):
        cls(max_update_ratio=value)


def test_parameters_alone_have_no_learning_rate():
    with pytest.raises(ValueError, match="Pass the optimizer"):
        limited_clipper().clip_([parameter(*ONE)])
