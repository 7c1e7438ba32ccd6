"""The bound on the step relative to the weights: what it allows, where it holds, and what it leaves alone."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from helpers import Net, in_form, loader, norm_of, trainer, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import SGD, Adagrad, AdamW, RMSprop
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_autoclip import AutoClip, Constant, GradientClipper, GradientClipping, Percentile
from lightning_autoclip.clipping import _numbers
from lightning_autoclip.clipping.gradients import LEAST_ENTRY
from lightning_autoclip.clipping.step import StepRecord

RATIO = 0.05
BIG = Constant(1e30)  # leaves everything to the bound
ENTRIES = st.floats(-16, 16, width=32).filter(lambda x: x == 0 or abs(x) > 1e-3)


def parameter(values, gradient, **kwargs):
    made = nn.Parameter(torch.tensor(values, **kwargs))
    made.grad = torch.tensor(gradient, dtype=made.dtype)
    return made


def norm(tensors):
    return float(sum(tensor.detach().double().square().sum() for tensor in tensors) ** 0.5)


SGDS = {
    "plain": ({"lr": 0.2}, 0.2),
    "momentum": ({"lr": 0.2, "momentum": 0.9}, 2.0),
    "Nesterov": ({"lr": 0.2, "momentum": 0.75, "nesterov": True}, 0.8),
    "dampening": ({"lr": 0.2, "momentum": 0.9, "dampening": 0.5}, 1.0),
    "weight decay": ({"lr": 0.2, "weight_decay": 0.1}, 0.2),
    "maximize": ({"lr": 0.2, "maximize": True}, 0.2),
    "fused": ({"lr": 0.2, "momentum": 0.9, "fused": True}, 2.0),
    "rate as a tensor": ({"lr": torch.tensor(0.2), "momentum": 0.9, "fused": True}, 2.0),
    "momentum of 1": ({"lr": 0.2, "momentum": 1.0}, 200.0),
}


@pytest.mark.parametrize("nonfinite", ["skip", "ignore", "raise"])
@pytest.mark.parametrize("name", SGDS)
def test_the_bound_is_the_part_of_the_weights_that_a_lasting_gradient_would_carry_them(form, name, nonfinite):
    arguments, rate = SGDS[name]
    parameters = [parameter([[3.0, 4.0]], [[30.0, 40.0]]), parameter([[40.0]], [[30.0]]), parameter([0.1], [5.0])]
    record = GradientClipper(BIG, max_update_ratio=RATIO, nonfinite=nonfinite).clip_(SGD(parameters, **arguments))
    norm = math.sqrt(50**2 + 30**2 + 5**2)  # the first matrix would move by 10 times its norm, the second by 0.75
    assert float(record.max_norm) == pytest.approx(RATIO * 5.0 / rate * norm / 50.0, rel=1e-6)
    assert float(record.threshold) == float(record.max_norm) == float(record.clipped_norm)
    assert norm_of(parameters) == pytest.approx(float(record.max_norm), rel=1e-6)


def test_without_momentum_a_step_carries_the_weights_by_just_that_part(form):
    parameters = [parameter([3.0, 4.0], [30.0, 40.0])]
    optimizer = SGD(parameters, lr=0.7)
    GradientClipper(BIG, max_update_ratio=RATIO).clip_(optimizer)
    optimizer.step()
    assert norm([parameters[0] - torch.tensor([3.0, 4.0])]) == pytest.approx(RATIO * 5.0, rel=1e-5)


@settings(deadline=None)
@given(
    st.lists(st.tuples(ENTRIES, ENTRIES), min_size=1, max_size=6),
    st.lists(st.floats(1e-3, 10), min_size=6, max_size=6),
    st.sampled_from(["norm", "value"]),
    st.sampled_from(["cpu form", "accelerator form"]),
)
def test_no_step_of_groups_with_rates_of_their_own_goes_further(pairs, rates, algorithm, form):
    parameters = [parameter([weight], [gradient]) for weight, gradient in pairs]
    before = [each.detach().clone() for each in parameters]
    groups = [{"params": [each], "lr": rate} for each, rate in zip(parameters, rates, strict=False)]
    optimizer = SGD(groups, lr=1.0)
    policy = Percentile(50, 3.0)
    with in_form(form):
        record = GradientClipper(policy, gradient_clip_algorithm=algorithm, max_update_ratio=RATIO).clip_(optimizer)
    optimizer.step()
    ratios = [
        norm([each.detach() - start]) / max(norm([start]), LEAST_ENTRY)
        for each, start in zip(parameters, before, strict=True)
    ]
    assert max(ratios) <= RATIO * (1 + 1e-4)
    if float(record.norm) > float(record.max_norm) and algorithm == "norm":
        assert max(ratios) == pytest.approx(RATIO, rel=1e-3)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_what_is_within_the_bound_is_clipped_as_without_it(form, algorithm):
    clipped = []
    for ratio in (None, 0.9):
        own = parameter([30.0, 40.0], [3.0, -4.0])
        clipper = GradientClipper(Constant(2.0), gradient_clip_algorithm=algorithm, max_update_ratio=ratio)
        clipper.clip_(SGD([own], lr=0.1))
        clipped.append(own.grad.tolist())
    assert clipped[0] == clipped[1]


def test_by_value_entries_are_clamped_first_and_the_rest_is_shortened(form):
    own = parameter([3.0, 4.0], [3.0, -4.0])
    record = GradientClipper(Constant(2.0), gradient_clip_algorithm="value", max_update_ratio=0.1).clip_(
        SGD([own], lr=0.2)
    )
    assert float(record.max_norm) == pytest.approx(2.5)  # half of the norm before
    assert own.grad.tolist() == pytest.approx([1.0, -1.0])
    assert float(record.threshold) == 2.0
    assert float(record.clipped_norm) == pytest.approx(math.sqrt(2), rel=1e-6)


def test_the_scale_of_the_loss_does_not_matter(form):
    steps = []
    for scale in (1.0, 1024.0):
        torch.manual_seed(0)
        layer = nn.Linear(4, 3)
        optimizer = SGD(layer.parameters(), lr=0.5 / scale, momentum=0.9)
        clipper = GradientClipper(Percentile(50), max_update_ratio=RATIO)
        for _ in range(40):
            optimizer.zero_grad()
            (scale * layer(torch.randn(8, 4)).square().mean()).backward()
            clipper.clip_(optimizer)
            optimizer.step()
        steps.append(weights(layer))
    torch.testing.assert_close(*steps, rtol=1e-4, atol=1e-6)


class Schedules(Net):
    """A rate that rises from 0 and falls again."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: [0.0, 0.5, 1.0, 0.25][min(step, 3)])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rate, "interval": "step"}}


def test_the_bound_follows_the_schedule_down_to_a_tenth_of_its_rate(form):
    seen = []

    class Notes(AutoClip):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            lr = optimizer.param_groups[0]["lr"]
            whole, matrices = norm_of(pl_module.parameters()), [pl_module.net[0].weight, pl_module.net[2].weight]
            most = max(norm_of([each]) / norm([each]) for each in matrices)
            super().on_before_optimizer_step(trainer, pl_module, optimizer)
            _, numbers, _ = self._scopes.optimizers[0].scopes[""].recorder._on_device[-1]
            seen.append(
                (float(numbers[StepRecord._fields.index("max_norm")]), RATIO * whole / (10 * max(lr, 0.01) * most))
            )

    trainer(Notes(max_update_ratio=RATIO), max_steps=6).fit(Schedules(), loader())
    for found, expected in seen:
        assert found == pytest.approx(expected, rel=1e-5)


def test_what_is_not_trained_does_not_count(form):
    frozen = nn.Parameter(torch.zeros(4, 4), requires_grad=False)
    lazy = nn.LazyLinear(2).weight
    record = GradientClipper(BIG, max_update_ratio=RATIO).clip_(
        SGD([frozen, parameter([3.0, 4.0], [30.0, 40.0]), lazy], lr=1.0)
    )
    assert float(record.max_norm) == pytest.approx(RATIO * 5.0)


def test_where_all_matrices_are_frozen_what_is_trained_counts(form):
    frozen = nn.Parameter(torch.full((4, 4), 1e6), requires_grad=False)
    record = GradientClipper(BIG, max_update_ratio=RATIO).clip_(
        SGD([frozen, parameter([3.0, 4.0], [30.0, 40.0])], lr=1.0)
    )
    assert float(record.max_norm) == pytest.approx(RATIO * 5.0)


def test_biases_count_only_where_there_is_nothing_else(form):
    matrix, bias = parameter([[3.0, 4.0]], [[30.0, 40.0]]), parameter([0.0], [50.0])
    with_matrix = GradientClipper(BIG, max_update_ratio=RATIO).clip_(SGD([matrix, bias], lr=1.0))
    assert float(with_matrix.max_norm) == pytest.approx(RATIO * 5.0 * math.sqrt(2))
    bias.grad = torch.tensor([50.0])
    alone = GradientClipper(BIG, max_update_ratio=RATIO).clip_(SGD([bias], lr=1.0))
    assert float(alone.max_norm) == pytest.approx(RATIO * LEAST_ENTRY)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.complex64], ids=str)
def test_weights_of_every_dtype_are_measured_in_float32_at_least(form, dtype):
    own = nn.Parameter(torch.full((4096,), 300.0, dtype=dtype))
    own.grad = torch.ones_like(own)
    record = GradientClipper(BIG, max_update_ratio=RATIO).clip_(SGD([own], lr=1.0))
    assert float(record.max_norm) == pytest.approx(RATIO * 300.0 * 64.0, rel=1e-5)


def test_a_model_that_starts_at_zero_moves(form):
    torch.manual_seed(0)
    layer = nn.Linear(8, 1)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    optimizer = SGD(layer.parameters(), lr=0.1)
    clipper = GradientClipper(Percentile(50), max_update_ratio=RATIO)
    x = torch.randn(256, 8)
    y = x.sum(1, keepdim=True)
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = (layer(x) - y).square().mean()
        loss.backward()
        clipper.clip_(optimizer)
        optimizer.step()
        losses.append(float(loss))
    assert losses[0] > 4
    assert losses[-1] < 0.1


@pytest.mark.parametrize("optimizer", [AdamW, RMSprop, Adagrad])
def test_where_the_step_is_not_proportional_to_the_gradient_there_is_no_bound(form, optimizer):
    own = parameter([3.0, 4.0], [30.0, 40.0])
    record = GradientClipper(Constant(100.0), max_update_ratio=1e-6).clip_(optimizer([own], lr=1.0))
    assert math.isnan(float(record.max_norm))
    assert own.grad.tolist() == [30.0, 40.0]


def test_a_wrapper_is_what_it_wraps(form):
    class Wrapper:
        def __init__(self, inner):
            self.inner, self.param_groups = inner, inner.param_groups

    own = parameter([3.0, 4.0], [30.0, 40.0])
    record = GradientClipper(BIG, max_update_ratio=RATIO, nonfinite="ignore").clip_(Wrapper(SGD([own], lr=1.0)))
    assert float(record.max_norm) == pytest.approx(RATIO * 5.0)


def test_with_a_scaler_the_gradient_counts_at_its_true_scale(form):
    own = parameter([3.0, 4.0], [0.0, 0.0])
    optimizer, scaler = SGD([own], lr=1.0), GradScaler("cpu", init_scale=1024.0)
    scaler.scale((own * torch.tensor([30.0, 40.0])).sum()).backward()
    record = GradientClipper(BIG, max_update_ratio=RATIO).clip_(optimizer, scaler)
    scaler.step(optimizer)
    assert float(record.norm) == pytest.approx(50.0)
    assert norm([own - torch.tensor([3.0, 4.0])]) == pytest.approx(RATIO * 5.0, rel=1e-5)


@pytest.mark.parametrize("what", ["weights", "gradient"])
def test_what_is_not_finite_is_left_out_as_ever(form, what):
    own = parameter([3.0, math.nan if what == "weights" else 4.0], [30.0, math.nan if what == "gradient" else 40.0])
    clipper, optimizer = GradientClipper(Constant(5.0), max_update_ratio=RATIO), SGD([own], lr=1.0, fused=True)
    record = clipper.clip_(optimizer)
    if what == "weights":  # nothing can be said of them, and the policy's threshold holds
        assert float(record.threshold) == 5.0
        assert own.grad.tolist() == pytest.approx([3.0, 4.0])
    else:
        assert clipper.nonfinite_total == 1
        optimizer.step()
        assert own.tolist() == [3.0, 4.0]


def test_the_bound_holds_in_the_warm_up_and_beside_other_bounds(form):
    for limit, expected in ((None, 0.25), (0.1, 0.1)):
        own = parameter([3.0, 4.0], [30.0, 40.0])
        clipper = GradientClipper(Percentile(50), warmup_steps=3, max_threshold=limit, max_update_ratio=RATIO)
        assert float(clipper.clip_(SGD([own], lr=1.0)).threshold) == pytest.approx(expected)


def test_groups_are_bounded_each_by_its_own_weights(form):
    autoclip = AutoClip(50, max_update_ratio=RATIO, groups={"first": "net.0.*", "second": "net.2.*"})
    seen = {}

    class Notes(Net):
        def on_before_optimizer_step(self, optimizer):  # after the clipping
            for name, layer in (("first", self.net[0]), ("second", self.net[2])):
                seen[name] = 20.0 * norm_of([layer.weight]) / norm([layer.weight]), norm_of(layer.parameters())

    trainer(autoclip, max_steps=1).fit(Notes(partial(SGD, lr=2.0, momentum=0.9)), loader(scales=[50.0]))
    thresholds = {prefix.split("/")[1]: trace.bins[0].threshold for prefix, trace in autoclip.traces.items()}
    assert {name: ratio for name, (ratio, _) in seen.items()} == pytest.approx(dict.fromkeys(seen, RATIO), rel=1e-5)
    assert thresholds == pytest.approx({name: clipped for name, (_, clipped) in seen.items()}, rel=1e-5)


@pytest.mark.parametrize("count", [1, 3], ids=["one rate", "several rates"])
@pytest.mark.parametrize("lr", [0.5, torch.tensor(0.5)], ids=["float", "tensor"])
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_nothing_is_read_in_a_step_on_an_accelerator(monkeypatch, algorithm, lr, count):
    class NoReads(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "is_nonzero")
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(_numbers, "reads_are_free", lambda device: False)
    parameters = [parameter([3.0, 4.0], [30.0, 40.0]) for _ in range(3)]
    rates = [lr * (i + 1) for i in range(count)]
    groups = [{"params": parameters[i::count], "lr": rate} for i, rate in enumerate(rates)]
    optimizer = SGD(groups, lr=1.0, fused=True)
    clipper = GradientClipper(Percentile(50), gradient_clip_algorithm=algorithm, max_update_ratio=RATIO)
    found = []
    for _ in range(20):
        for each in parameters:
            each.grad = torch.tensor([30.0, 40.0])
        with NoReads():
            record = clipper.clip_(optimizer)
        found.append(float(record.max_norm))
        optimizer.zero_grad()
    expected = RATIO * 5.0 / float(rates[-1]) * math.sqrt(3)  # the highest rate moves its matrices most
    assert found == pytest.approx([expected] * 20, rel=1e-5)


def test_a_rate_on_the_device_is_read_in_the_copy_that_reads_the_norms(monkeypatch):
    monkeypatch.setattr(_numbers, "reads_are_free", lambda device: False)
    reads = []
    tolist, item = torch.Tensor.tolist, torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append("tolist") or tolist(self))
    monkeypatch.setattr(torch.Tensor, "item", lambda self: reads.append("item") or item(self))
    monkeypatch.setattr(torch.Tensor, "__float__", lambda self: reads.append("float") or item(self))
    own = parameter([3.0, 4.0], [30.0, 40.0])
    record = GradientClipper(BIG, max_update_ratio=RATIO).clip_(SGD([own], lr=torch.tensor(0.5), foreach=True))
    assert reads == ["tolist"]
    assert record.max_norm == pytest.approx(RATIO * 5.0 / 0.5)


def test_the_weights_are_read_at_the_first_steps_and_then_at_one_of_sixteen(form):
    own = parameter([3.0, 4.0], [30.0, 40.0])
    optimizer, clipper, found = SGD([own], lr=1.0), GradientClipper(BIG, max_update_ratio=RATIO), []
    for step in range(1, 81):
        own.data = torch.tensor([3.0, 4.0]) * step
        own.grad = torch.tensor([30.0, 40.0])
        found.append(round(float(clipper.clip_(optimizer).max_norm) / (RATIO * 5.0)))
    assert found == [step if step < 16 else step // 16 * 16 for step in range(1, 81)]


# --- in a Trainer -----------------------------------------------------------------------------------------------------


def fast(parameters):
    return SGD(parameters, lr=1.0, momentum=0.9)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_a_resumed_run_takes_the_steps_of_an_uninterrupted_one(form, tmp_path, algorithm):
    ends = []
    for stop in (None, 32):
        model, kwargs = Net(fast), {"enable_checkpointing": True, "max_epochs": 3}
        for ckpt in [None] if stop is None else [None, tmp_path / "last.ckpt"]:
            keep = ModelCheckpoint(tmp_path, "last", every_n_train_steps=32, enable_version_counter=False)
            autoclip = AutoClip(50, gradient_clip_algorithm=algorithm, max_update_ratio=RATIO, verbose=False)
            limit = {"max_steps": stop} if stop and ckpt is None else {}
            model = Net(fast)
            trainer(autoclip, keep, **kwargs, **limit).fit(model, loader(), ckpt_path=ckpt)
        ends.append((weights(model), autoclip.clippers[0].state_dict()["weight_norms"], autoclip.report().to_dict()))
    assert torch.equal(ends[0][0], ends[1][0])
    assert torch.equal(ends[0][1], ends[1][1])
    assert ends[0][2] == ends[1][2]
    assert 0 < ends[0][2]["sections"][0]["figures"]["bounded_fraction"] <= 1


@pytest.mark.parametrize(
    "weight_norms",
    [
        -torch.ones(1, dtype=torch.float64),
        torch.zeros(1, dtype=torch.float64),
        torch.full((1,), math.nan, dtype=torch.float64),
        torch.ones(1),
        torch.ones(1, 1, dtype=torch.float64),
        [5.0],
        None,
    ],
    ids=str,
)
def test_damaged_weight_norms_are_refused(weight_norms):
    clipper = GradientClipper(BIG, max_update_ratio=RATIO)
    clipper.clip_(SGD([parameter([3.0, 4.0], [30.0, 40.0])], lr=1.0))
    with pytest.raises(ValueError, match="damaged"):
        clipper.load_state_dict({**clipper.state_dict(), "weight_norms": weight_norms})


def test_weights_that_were_measured_of_other_parameters_are_measured_anew(form):
    clipper = GradientClipper(BIG, max_update_ratio=RATIO)
    own = parameter([3.0, 4.0], [30.0, 40.0])
    optimizer = SGD([own], lr=1.0)
    for _ in range(20):
        own.grad = torch.tensor([30.0, 40.0])
        clipper.clip_(optimizer)
    other = parameter([0.6, 0.8], [30.0, 40.0])
    optimizer.add_param_group({"params": [other], "lr": 1.0})
    own.grad = torch.tensor([30.0, 40.0])
    assert float(clipper.clip_(optimizer).max_norm) == pytest.approx(RATIO * 1.0 * math.sqrt(2))


def test_rows_and_report_say_how_much_of_the_run_leans_on_the_bound(form, tmp_path):
    autoclip = AutoClip(50, max_update_ratio=RATIO, verbose=False)
    logger = CSVLogger(tmp_path, "", "")
    trainer(autoclip, max_epochs=8, logger=logger, log_every_n_steps=16).fit(Net(fast), loader())
    figures = autoclip.report().sections[0].figures
    assert figures.bounded_fraction > 0.9
    (verdict,) = [each for each in autoclip.report().verdicts if each.name == "learning rate too high"]
    assert f"by {figures.bound_excess:.1f} or more" in verdict.advice
    assert figures.bound_excess >= 0.999 * figures.update_ratio / RATIO > 10
    assert f"{figures.bound_excess:.1f} times as much" in verdict.evidence
    rows = logger.experiment.metrics
    assert {row["autoclip/bounded_fraction"] for row in rows if "autoclip/bounded_fraction" in row} <= {
        n / 16 for n in range(17)
    }
    assert all(row["autoclip/update_ratio"] > RATIO for row in rows if "autoclip/update_ratio" in row)


def test_a_rate_that_is_fit_leans_on_nothing(form):
    autoclip = AutoClip(50, max_update_ratio=RATIO, verbose=False)
    trainer(autoclip, max_epochs=8).fit(Net(partial(SGD, lr=1e-4, momentum=0.9)), loader())
    report = autoclip.report()
    assert report.sections[0].figures.bounded_fraction == 0
    assert "learning rate too high" not in str(report)
    assert "bounded" not in str(report)


def test_the_report_says_that_there_is_no_bound_with_adam(form):
    autoclip = AutoClip(50, max_update_ratio=RATIO, verbose=False)
    trainer(autoclip, max_epochs=4).fit(Net(partial(AdamW, lr=1e-2)), loader())
    assert "no bound by the weights with this optimizer" in " ".join(str(autoclip.report()).split())
    assert not any("bounded" in key for key in autoclip._scopes.figures())


def test_an_optimizer_of_each_kind_has_its_own_keys():
    class Both(Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.zero_grad()
            self.manual_backward(self.loss(batch))
            for optimizer in self.optimizers():
                optimizer.step()

        def configure_optimizers(self):
            return [fast(self.net[0].parameters()), AdamW(self.net[2].parameters())]

    autoclip = AutoClip(50, max_update_ratio=RATIO, verbose=False)
    trainer(autoclip).fit(Both(), loader())
    assert [key for key in autoclip._scopes.figures() if "bounded" in key] == ["autoclip/SGD/bounded_fraction"]


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [partial(AutoClip), partial(GradientClipping, BIG), partial(GradientClipper, BIG)])
@pytest.mark.parametrize(
    ("value", "error"), [(0, ValueError), (-0.1, ValueError), (math.nan, ValueError), ("0.1", TypeError)]
)
def test_a_ratio_that_is_none_is_refused(cls, value, error):
    with pytest.raises(error, match=r"Expected `max_update_ratio` to be a number above 0"):
        cls(max_update_ratio=value)


def test_parameters_alone_have_no_learning_rate():
    with pytest.raises(ValueError, match="Pass the optimizer"):
        GradientClipper(BIG, max_update_ratio=RATIO).clip_([parameter([3.0, 4.0], [30.0, 40.0])])


# --- where a bound could be missed ------------------------------------------------------------------------------------


def moves(optimizer, clipper, own, gradient, rates):
    """By what part of its norm each step moves the matrix; the bound is at 1."""
    found = []
    for rate in rates:
        if rate is not None:
            optimizer.param_groups[0]["lr"] = rate
        own.grad = torch.tensor(gradient)
        before = own.detach().clone()
        clipper.clip_(optimizer)
        optimizer.step()
        found.append(norm([own.detach() - before]) / norm([before]) / RATIO)
    return found


@pytest.mark.parametrize("name", ["warm-up from 0", "warm restart"])
def test_a_momentum_of_a_small_rate_does_not_break_out_where_the_rate_rises(form, name):
    own = parameter([[3.0, 4.0]], [[30.0, 40.0]])
    optimizer = SGD([own], lr=1.0, momentum=0.9)
    factors = [min(step / 10, 1) for step in range(30)]
    if name == "warm restart":
        factors = [1.0] * 9 + [0.0] * 9 + [1.0] * 9
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factors[step])
    clipper, found = GradientClipper(BIG, max_update_ratio=RATIO), []
    for _ in range(len(factors) - 1):
        found += moves(optimizer, clipper, own, [[-30.0, -40.0]], [None])
        schedule.step()
    assert max(found) < (2 if name == "warm-up from 0" else 8)  # not hundreds: gradients of a tenth of the rate at most


def test_layers_that_are_unfrozen_late_count_at_once(form):
    body, head = parameter([[0.3, 0.4]], [[0.0, 0.0]]), parameter([[3.0, 4.0]], [[0.03, 0.04]])
    body.requires_grad_(False)
    optimizer, clipper = SGD([body, head], lr=1.0), GradientClipper(BIG, max_update_ratio=RATIO)
    for step in range(24):
        head.grad = torch.tensor([[0.03, 0.04]])
        if step >= 20:
            body.requires_grad_(True)
            (found,) = moves(optimizer, clipper, body, [[-3.0, -4.0]], [None])
            assert found == pytest.approx(1.0, rel=0.2)
        else:
            clipper.clip_(optimizer)


def test_a_clipper_that_is_released_forgets_the_weights_and_one_that_is_restored_keeps_them(form):
    clipper, old = GradientClipper(BIG, max_update_ratio=RATIO), parameter([[300.0, 400.0]], [[3.0, 4.0]])
    moves(SGD([old], lr=1.0), clipper, old, [[3.0, 4.0]], [None] * 20)
    state = clipper.state_dict()
    clipper.release()
    new = parameter([[0.3, 0.4]], [[3.0, 4.0]])
    assert moves(SGD([new], lr=1.0), clipper, new, [[3.0, 4.0]], [None]) == [pytest.approx(1.0, rel=1e-4)]
    restored = GradientClipper(BIG, max_update_ratio=RATIO)
    restored.load_state_dict(state)
    restored.release()
    assert restored.state_dict()["weight_norms"].tolist() == state["weight_norms"].tolist()


def test_scalars_count_where_there_is_nothing_else_and_empty_matrices_never(form):
    beside_an_empty_one = [nn.Parameter(torch.empty(0, 3)), nn.Parameter(torch.tensor([5.0]))]
    for parameters in ([nn.Parameter(torch.tensor(5.0))], beside_an_empty_one):
        parameters[-1].grad = torch.full_like(parameters[-1], 30.0)
        record = GradientClipper(BIG, max_update_ratio=RATIO).clip_(SGD(parameters, lr=1.0))
        assert float(record.max_norm) == pytest.approx(RATIO * 5.0)


@pytest.mark.parametrize("dampening", [0.99, 1.0])
def test_the_first_gradient_that_is_not_dampened_is_bounded_too(form, dampening):
    own = parameter([[3.0, 4.0]], [[30.0, 40.0]])
    optimizer = SGD([own], lr=1.0, momentum=0.5, dampening=dampening)
    found = moves(optimizer, GradientClipper(BIG, max_update_ratio=RATIO), own, [[30.0, 40.0]], [None])
    assert found == [pytest.approx(1.0, rel=1e-4)]


def test_a_negative_rate_on_the_device_counts_by_its_size(monkeypatch):
    monkeypatch.setattr(_numbers, "reads_are_free", lambda device: False)
    own = parameter([[3.0, 4.0]], [[3.0, 4.0]])
    clipper = GradientClipper(Constant(100.0), max_update_ratio=RATIO, nonfinite="ignore")
    record = clipper.clip_(SGD([own], lr=torch.tensor(1e-9)))
    own.grad = torch.tensor([[3.0, 4.0]])
    optimizer = SGD([own], lr=1.0)
    optimizer.param_groups[0]["lr"] = torch.tensor(-1e-9)
    clipper.release()
    assert float(clipper.clip_(optimizer).max_norm) == float(record.max_norm) > 0
    assert own.grad.tolist() == [[3.0, 4.0]]


def test_of_a_wrapper_the_rates_are_those_of_the_optimizer_that_steps(form):
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, parameters):
            super().__init__(parameters, {"lr": 1e-3})
            self.inner = SGD(self.param_groups[0]["params"][::-1], lr=1.0, momentum=0.9)

        def step(self, closure=None):
            self.inner.step()

    own = parameter([[3.0, 4.0]], [[30.0, 40.0]])
    record = GradientClipper(BIG, max_update_ratio=RATIO, nonfinite="ignore").clip_(Wrapper([own]))
    assert float(record.max_norm) == pytest.approx(RATIO * 5.0 / 10)


def test_a_subclass_of_sgd_with_a_step_of_its_own_has_no_bound(form):
    class Sign(SGD):
        def step(self, closure=None):
            with torch.no_grad():
                for each in self.param_groups[0]["params"]:
                    each -= self.param_groups[0]["lr"] * each.grad.sign()

    class Named(SGD):
        pass

    for kind, bounded in ((Sign, False), (Named, True), (Named, True)):
        own = parameter([[3.0, 4.0]], [[30.0, 40.0]])
        record = GradientClipper(BIG, max_update_ratio=RATIO).clip_(kind([own], lr=1.0))
        assert math.isnan(float(record.max_norm)) != bounded


def test_a_run_that_goes_on_without_the_bound_is_not_called_healthy(tmp_path):
    first, second = AutoClip(max_update_ratio=1e-3, verbose=False), AutoClip(max_update_ratio=None, verbose=False)
    run = trainer(first, max_epochs=4)
    run.fit(Net(fast), loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.warns(UserWarning, match="max_update_ratio"):
        trainer(second, max_epochs=5).fit(Net(fast), loader(), ckpt_path=tmp_path / "a.ckpt")
    assert "learning rate too high" in second.report().summary


def test_weights_that_were_frozen_behind_their_gradient_are_bounded_too(form):
    weight = nn.Parameter(torch.full((2, 2), 0.5))
    optimizer = SGD([weight], lr=1.0)
    clipper = GradientClipper(Percentile(100), max_update_ratio=0.25)
    weight.grad = torch.full((2, 2), 50.0)
    weight.requires_grad_(False)
    clipper.clip_(optimizer)
    before = weight.clone()
    optimizer.step()
    assert float((weight - before).norm() / before.norm()) == pytest.approx(0.25)
