"""GradientClipper in plain PyTorch: what is measured, decided and clipped."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import torch
from helpers import in_form, norm_of, with_gradient
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import SGD, AdamW
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_autoclip import (
    Constant,
    GradientClipper,
    NonFiniteGradientError,
    Percentile,
    Policy,
    RunningPercentile,
    ZScore,
)
from lightning_autoclip.clipping import _numbers
from lightning_autoclip.clipping.optimizers import must_be_read, parameters_of

GRADIENT = (2.0, -6.0, 8.0, -3.0, 5.0)
ENTRIES = st.floats(-(2**10), 2**10, width=32).filter(lambda x: x == 0 or abs(x) > 2**-10)


def clip(policy, *parameters, **kwargs):
    return GradientClipper(policy, **kwargs).clip_(parameters)


@pytest.mark.parametrize(
    ("algorithm", "threshold", "expected"),
    [("value", 4.0, (2, -4, 4, -3, 4)), ("norm", 6.0, (1.02, -3.06, 4.08, -1.53, 2.55))],
    ids=["value", "norm"],
)
def test_the_worked_examples(form, algorithm, threshold, expected):
    parameter = with_gradient(GRADIENT)
    record = clip(Constant(threshold), parameter, gradient_clip_algorithm=algorithm)
    assert parameter.grad.tolist() == pytest.approx(expected, abs=0.01)
    assert float(record.norm) == pytest.approx(11.75, abs=0.005)


@settings(deadline=None)
@given(st.lists(st.lists(ENTRIES, min_size=1, max_size=5), min_size=1, max_size=4), st.floats(0.125, 64, width=32))
def test_by_norm_the_norm_is_at_most_the_threshold_and_untouched_below(entries, threshold):
    parameters = [with_gradient(row) for row in entries]
    norm = norm_of(parameters)
    record = clip(Constant(threshold), *parameters)
    assert float(record.norm) == pytest.approx(norm, rel=1e-6)
    if record.norm <= record.threshold:
        assert [parameter.grad.tolist() for parameter in parameters] == entries
    else:
        assert norm_of(parameters) == pytest.approx(threshold, rel=1e-5)


@settings(deadline=None)
@given(st.lists(ENTRIES, min_size=1, max_size=8), st.floats(0.125, 64, width=32))
def test_by_value_every_entry_is_clamped_and_no_other_changes(entries, threshold):
    parameter = with_gradient(entries)
    clip(Constant(threshold), parameter, gradient_clip_algorithm="value")
    assert parameter.grad.tolist() == np.clip(entries, -threshold, threshold).tolist()


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("window", [5, None], ids=["window", "full"])
def test_thresholds_follow_numpys_percentile_of_the_raw_norms(form, algorithm, window):
    steps = np.random.default_rng(0).lognormal(0, 1, (30, 6)).astype(np.float32)
    clipper = GradientClipper(Percentile(30, 1.5), gradient_clip_algorithm=algorithm, window=window)
    history = []
    for step in steps:
        parameters = [with_gradient(step[:4]), with_gradient(step[4:])]
        record = clipper.clip_(parameters)
        norm = np.linalg.norm(step.astype(np.float64))
        history.append(norm if algorithm == "norm" else norm / math.sqrt(6))
        threshold = 1.5 * np.percentile(history if window is None else history[-window:], 30)
        assert float(record.statistic) == pytest.approx(history[-1], rel=1e-6)
        assert float(record.threshold) == pytest.approx(threshold, rel=1e-5)
        expected = step * min(1, threshold / norm) if algorithm == "norm" else step.clip(-threshold, threshold)
        np.testing.assert_allclose(torch.cat([p.grad for p in parameters]).numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("policy", [Percentile(25), ZScore(0.5)], ids=["percentile", "zscore"])
def test_a_loss_of_another_scale_is_clipped_alike(form, algorithm, policy):
    def clipped(scale: float) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        clipper = GradientClipper(policy, gradient_clip_algorithm=algorithm)
        parameters = [with_gradient(torch.randn(8, generator=generator) * scale) for _ in range(20)]
        for parameter in parameters:
            clipper.clip_([parameter])
        return torch.stack([parameter.grad for parameter in parameters])

    assert torch.equal(clipped(1.0) * 1024, clipped(1024.0))  # a power of two, so that scaling does not round


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_percentile_100_never_changes_a_bit(form, dtype):
    clipper = GradientClipper(Percentile(100))
    for i in range(20):
        parameter = with_gradient(torch.randn(50, generator=torch.Generator().manual_seed(i)), dtype)
        before = parameter.grad.clone()
        record = clipper.clip_([parameter])
        assert record.norm <= record.threshold
        assert torch.equal(parameter.grad, before)


def test_the_first_step_is_never_clipped(form):
    record = clip(Percentile(10), with_gradient(GRADIENT))
    assert record.norm == record.threshold


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_half_precision_gradients_are_measured_in_float32(form, dtype, scale):
    parameters = [with_gradient(torch.linspace(-scale, scale, 5000), dtype) for _ in range(3)]
    norm = norm_of(parameters)
    record = clip(Constant(norm / 2), *parameters)
    assert float(record.norm) == pytest.approx(norm, rel=1e-6)
    assert norm_of(parameters) == pytest.approx(norm / 2, rel=2e-3)


def test_gradients_of_several_dtypes_are_one_vector(form):
    parameters = [with_gradient([3.0], torch.float64), with_gradient([4.0], torch.bfloat16), with_gradient([12.0])]
    record = clip(Constant(1.3), *parameters)
    assert float(record.norm) == pytest.approx(13)
    assert [parameter.grad.item() for parameter in parameters] == pytest.approx([0.3, 0.4, 1.2], rel=1e-2)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_sparse_gradients_are_clipped_as_their_dense_form(form, algorithm):
    def embedding(sparse: bool) -> nn.Embedding:
        torch.manual_seed(0)
        layer = nn.Embedding(10, 3, sparse=sparse)
        (layer(torch.tensor([1, 1, 4])).square().sum() * 2).backward()
        return layer

    sparse, dense = embedding(True), embedding(False)
    for layer in (sparse, dense):
        clipper = GradientClipper(Constant(0.5), gradient_clip_algorithm=algorithm)
        layer.record = clipper.clip_(layer.parameters())
    torch.testing.assert_close(sparse.weight.grad.to_dense(), dense.weight.grad)
    torch.testing.assert_close(torch.tensor(sparse.record[:5]), torch.tensor(dense.record[:5]))


@pytest.mark.parametrize("shape", [(5_000_000,), (40, 125_000), (2048, 1, 50, 50)], ids=str)
@pytest.mark.parametrize("contiguous", [True, False])
def test_long_gradients_are_summed_to_1e_5(shape, contiguous):
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-3
    parameter = with_gradient(gradient if contiguous else gradient.transpose(0, -1))
    assert parameter.grad.is_contiguous() == (contiguous or len(shape) == 1)
    exact = parameter.grad.double().norm().item()
    record = clip(Percentile(100), parameter)
    assert float(record.norm) == pytest.approx(exact, rel=1e-5)
    if contiguous:  # what is to be improved on
        assert abs(torch.nn.utils.get_total_norm([parameter.grad]).item() / exact - 1) > 3e-5


def test_the_norm_of_mixed_scales_is_exact_to_1e_5():
    generator = torch.Generator().manual_seed(0)
    parameters = [with_gradient(torch.randn(500_000, generator=generator) * 10.0 ** (i % 9 - 6)) for i in range(20)]
    assert float(clip(Percentile(100), *parameters).norm) == pytest.approx(norm_of(parameters), rel=1e-5)


def test_by_value_the_norm_after_clipping_is_measured_as_often_as_asked(form):
    clipper = GradientClipper(Constant(2.0), gradient_clip_algorithm="value")
    clipper.clipped_norm_every = 3
    clipped = [float(clipper.clip_([with_gradient([3.0, 1.0])]).clipped_norm) for _ in range(5)]
    assert clipped == pytest.approx([5**0.5, math.nan, math.nan, 5**0.5, math.nan], nan_ok=True)


def test_complex_gradients_are_measured_by_their_magnitude(form):
    parameter = with_gradient([3 + 4j, 0j], torch.complex64)
    assert clip(Constant(1.0), parameter).norm == 5
    assert parameter.grad.tolist() == pytest.approx([0.6 + 0.8j, 0])


def test_only_the_optimizers_own_parameters_are_measured_and_clipped(form):
    mine, other, frozen = with_gradient([3.0]), with_gradient([100.0]), nn.Parameter(torch.zeros(1))
    optimizer = SGD([{"params": [mine]}, {"params": [frozen], "lr": 1.0}], lr=0.1)
    record = GradientClipper(Constant(1.5)).clip_(optimizer)
    assert (record.norm, mine.grad, other.grad, frozen.grad) == (3, 1.5, 100, None)


def test_nothing_is_recorded_where_there_is_no_gradient(form):
    clipper = GradientClipper(Percentile(10))
    assert clipper.clip_([nn.Parameter(torch.zeros(3))]) is None
    assert clipper.history.recorded.numel() == 0


def test_gradients_of_exactly_zero_do_not_pull_the_threshold_to_zero(form):
    clipper = GradientClipper(Percentile(10))
    for entry in [0.0] * 50 + [2.0, 4.0]:
        parameter = with_gradient([entry])
        record = clipper.clip_([parameter])
    assert float(record.threshold) == parameter.grad.item() == pytest.approx(2.2)
    assert clipper.history.recorded.tolist() == [2.0, 4.0]
    assert clipper.nonfinite_total == 0


def test_warmup_observes_without_clipping(form):
    clipper = GradientClipper(Constant(1.0), warmup_steps=3)
    parameters = [with_gradient([entry]) for entry in (5.0, math.nan, 6.0, 7.0)]
    thresholds = [float(clipper.clip_([parameter]).threshold) for parameter in parameters]
    assert thresholds == [math.inf, math.inf, math.inf, 1.0]
    assert [parameters[i].grad.item() for i in (0, 2, 3)] == pytest.approx([5.0, 6.0, 1.0])
    assert clipper.history.recorded.tolist() == [5.0, 6.0, 7.0]


def test_max_threshold_bounds_the_threshold_also_in_the_warmup(form):
    clipper = GradientClipper(Percentile(100), warmup_steps=1, max_threshold=2.0)
    assert [float(clipper.clip_([with_gradient([entry])]).threshold) for entry in (5.0, 1.0, 1.5)] == [2.0, 2.0, 2.0]


# --- gradients that are not finite ------------------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": lambda parameters: SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1),
    "fused sgd": lambda parameters: SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1, fused=True),
    "adamw": lambda parameters: AdamW(parameters, lr=0.1),
    "fused adamw": lambda parameters: AdamW(parameters, lr=0.1, fused=True),
}
BAD = [math.nan, math.inf, -math.inf]


def train(optimizer_name: str, entries: list[list[float]], **kwargs) -> tuple[nn.Parameter, GradientClipper]:
    weight = nn.Parameter(torch.ones(2))
    optimizer = OPTIMIZERS[optimizer_name]([weight])
    clipper = GradientClipper(Percentile(50), **kwargs)
    for entry in entries:
        weight.grad = torch.tensor(entry)
        clipper.clip_(optimizer)
        optimizer.step()
        assert not hasattr(optimizer, "found_inf")
    return weight, clipper


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("bad", BAD, ids=str)
@pytest.mark.parametrize("where", ["first", "in a row", "last"])
def test_a_skipped_step_leaves_weights_momentum_and_record_as_they_were(form, algorithm, name, bad, where):
    good = [[1.0, 2.0], [3.0, 1.0], [0.5, 0.1], [2.0, 2.0]]
    at = {"first": [0], "in a row": [2, 2, 2], "last": [4]}[where]
    entries = list(good)
    for index in at:
        entries.insert(index, [bad, 1.0])
    weight, clipper = train(name, entries, gradient_clip_algorithm=algorithm)
    expected, clean = train(name, good, gradient_clip_algorithm=algorithm)
    assert torch.equal(weight, expected)
    assert torch.equal(clipper.history.recorded, clean.history.recorded)
    assert (clipper.nonfinite_total, clean.nonfinite_total) == (len(at), 0)


def test_ignore_leaves_the_gradient_as_it_is(form):
    for algorithm in ("norm", "value"):
        parameter = with_gradient([math.inf, 5.0])
        clip(Constant(1.0), parameter, nonfinite="ignore", gradient_clip_algorithm=algorithm)
        assert parameter.grad.tolist() == [math.inf, 5.0]


def test_raise_names_the_parameters(form):
    fine, bad = with_gradient([1.0]), with_gradient([math.nan])
    with pytest.raises(NonFiniteGradientError, match=r"norm of the gradient is nan: .* of 1 of 2 parameters") as error:
        clip(Constant(1.0), fine, bad, nonfinite="raise")
    assert error.value.parameters == [bad]


# --- no host reads ----------------------------------------------------------------------------------------------------


class NoHostReads(TorchDispatchMode):
    """Fails at every operator that hands a tensor's content to the host."""

    forbidden = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in self.forbidden, f"{func} reads the host"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("policy", [Percentile(10), ZScore(), Constant(1.0)], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize(("nonfinite", "fused"), [("skip", True), ("ignore", False)])
@pytest.mark.parametrize("window", [4, None], ids=str)
def test_a_step_on_an_accelerator_reads_nothing_back(policy, algorithm, nonfinite, fused, window):
    parameters = [with_gradient([1.0, 2.0]), with_gradient([3.0], torch.bfloat16)]
    optimizer = SGD(parameters, lr=0.1, fused=fused)
    clipper = GradientClipper(
        policy, gradient_clip_algorithm=algorithm, nonfinite=nonfinite, window=window, warmup_steps=2, max_threshold=9.0
    )
    with in_form("accelerator form"), NoHostReads():
        for _ in range(6):
            clipper.clip_(optimizer)


@pytest.mark.parametrize("policy", [Percentile(10), ZScore(), Constant(1.0)], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("window", [4, None], ids=str)
def test_no_shape_depends_on_data(policy, algorithm, window, monkeypatch):
    """Tensors of the meta device have no content: reading it, or a shape that depends on it, is an error there."""
    monkeypatch.setattr("lightning_autoclip.clipping.record._FIRST_CAPACITY", 4)  # 1,024 steps would take seconds
    parameters = [nn.Parameter(torch.zeros(shape, device="meta")) for shape in ((3, 2), (5,))]
    clipper = GradientClipper(policy, gradient_clip_algorithm=algorithm, window=window, nonfinite="ignore")
    for _ in range(6):
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        record = clipper.clip_(parameters)
    assert {value.device.type for value in record} == {"meta"}
    ring = clipper.history._on_device.ring
    assert ring.device.type == "meta"
    assert ring.numel() - 1 == (window or 8)  # doubled by the host's count


def test_the_check_for_host_reads_can_fail():
    with NoHostReads(), pytest.raises(AssertionError, match="reads the host"):
        torch.ones(()).item()


def test_only_the_cpu_is_read_for_free():
    assert _numbers.reads_are_free(torch.device("cpu"))
    assert not any(_numbers.reads_are_free(torch.device(name)) for name in ("cuda", "mps", "xla", "xpu", "hpu"))


# --- one clipper, one optimizer ---------------------------------------------------------------------------------------


def test_a_second_optimizer_is_refused_until_the_first_is_released():
    first, second = (SGD([with_gradient([1.0])], lr=0.1) for _ in range(2))
    clipper = GradientClipper(Percentile(10))
    clipper.clip_(first)
    with pytest.raises(ValueError, match="Use one `GradientClipper` per optimizer"):
        clipper.clip_(second)
    clipper.release()
    clipper.clip_(second)
    assert clipper.history.recorded.tolist() == [1.0, 1.0]


def test_a_clipper_pickles_with_its_record():
    optimizer = SGD([with_gradient([2.0])], lr=0.1)
    clipper = GradientClipper(Percentile(10), window=None)
    clipper.clip_(optimizer)
    copy = pickle.loads(pickle.dumps(clipper))
    copy.clip_([with_gradient([3.0])])
    assert copy.history.recorded.tolist() == [2.0, 3.0]


# --- torch.amp.GradScaler in a plain loop -----------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("unscale", [True, False], ids=["unscaled first", "scaled"])
def test_with_a_scaler_a_step_is_the_one_without(form, algorithm, name, unscale):
    def run(scaler: torch.amp.GradScaler | None) -> tuple[torch.Tensor, GradientClipper]:
        torch.manual_seed(0)
        net = nn.Linear(4, 1)
        optimizer = OPTIMIZERS[name](net.parameters())
        clipper = GradientClipper(Percentile(50), gradient_clip_algorithm=algorithm)
        for factor in (math.inf, 1.0, 5.0, math.inf, 0.5, 7.0):
            optimizer.zero_grad()
            loss = net(torch.randn(8, 4)).square().mean() * factor
            if scaler is None:
                loss.backward()
                clipper.clip_(optimizer)
                optimizer.step()
            else:
                scaler.scale(loss).backward()
                if unscale:
                    scaler.unscale_(optimizer)
                clipper.clip_(optimizer, scaler)
                scaler.step(optimizer)
                scaler.update()
        return torch.cat([p.detach().flatten() for p in net.parameters()]), clipper

    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    (scaled, clipper), (plain, reference) = run(scaler), run(None)
    torch.testing.assert_close(scaled, plain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(clipper.history.recorded, reference.history.recorded)
    assert clipper.nonfinite_total == reference.nonfinite_total == 2
    assert scaler.get_scale() == 256.0  # it saw both overflows and backed off


def test_a_disabled_scaler_is_no_scaler():
    parameter = with_gradient([2.0])
    GradientClipper(Constant(1.0)).clip_(SGD([parameter], lr=0.1), torch.amp.GradScaler("cpu", enabled=False))
    assert parameter.grad == 1.0


def test_a_scaler_without_its_optimizer_is_refused():
    with pytest.raises(ValueError, match="Expected the optimizer beside `grad_scaler`"):
        GradientClipper(Constant(1.0)).clip_([with_gradient([2.0])], torch.amp.GradScaler("cpu"))


def test_raise_waits_until_the_scale_is_down_to_one():
    for scale, raises in ((2.0, False), (1.0, True)):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        weight = nn.Parameter(torch.ones(1))
        optimizer = SGD([weight], lr=0.1)
        scaler.scale(weight.sum() * math.inf).backward()
        scaler.unscale_(optimizer)
        clipper = GradientClipper(Constant(1.0), nonfinite="raise")
        if raises:
            with pytest.raises(NonFiniteGradientError):
                clipper.clip_(optimizer, scaler)
        else:
            clipper.clip_(optimizer, scaler)


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"policy": 10}, TypeError, "Expected `policy` to be a `Policy` such as `Percentile"),
        ({"gradient_clip_algorithm": "max"}, ValueError, "Expected `gradient_clip_algorithm` to be one of 'norm', 'v"),
        ({"nonfinite": "stop"}, ValueError, "Expected `nonfinite` to be one of 'skip', 'raise', 'ignore', but got 's"),
        ({"nonfinite": None}, ValueError, "Expected `nonfinite` to be one of"),
        ({"window": 0}, ValueError, "Expected `window` to be an integer of at least 1, or `None`"),
        ({"window": 1.5}, TypeError, "Expected `window` to be an integer of at least 1, or `None`"),
        ({"warmup_steps": -1}, ValueError, "Expected `warmup_steps` to be an integer of at least 0, but got -1"),
        ({"warmup_steps": 0.5}, TypeError, "Expected `warmup_steps` to be an integer of at least 0"),
        ({"max_threshold": 0}, ValueError, "Expected `max_threshold` to be a number above 0, but got 0"),
        ({"max_threshold": math.nan}, ValueError, "Expected `max_threshold` to be a number above 0"),
        ({"max_threshold": "1"}, TypeError, "Expected `max_threshold` to be a number above 0"),
        ({"max_threshold": 1e39}, ValueError, "Expected `max_threshold` to lie in the range of float32"),
        ({"window": 2**63}, ValueError, "Expected `window` to be an integer of at least 1"),
    ],
    ids=lambda value: repr(value) if isinstance(value, dict) else "",
)
def test_a_bad_argument_is_refused(arguments, error, message):
    with pytest.raises(error, match=message.replace("(", r"\(")):
        GradientClipper(**{"policy": Percentile(10), **arguments})


def test_one_parameter_is_clipped_like_a_list_of_one():
    parameter = with_gradient([3.0, 4.0])
    assert GradientClipper(Constant(1.0)).clip_(parameter).norm == 5
    assert norm_of([parameter]) == pytest.approx(1)


@pytest.mark.parametrize("target", [nn.Linear(1, 1), {"weight": 1}, 3], ids=["module", "mapping", "number"])
def test_what_is_no_parameter_is_refused(target):
    with pytest.raises(TypeError, match=r"Expected `target` to be an optimizer or parameters.*`model\.parameters\(\)`"):
        GradientClipper(Constant(1.0)).clip_(target)


class Returns(Policy):
    def __init__(self, result):
        self.result = result

    def __call__(self, history):
        return self.result


@pytest.mark.parametrize("result", ["0.5", None, torch.ones(2), torch.ones((), dtype=torch.complex64)], ids=str)
def test_a_policy_that_returns_no_single_number_is_refused(form, result):
    with pytest.raises(TypeError, match=r"Expected `policy` to return one number, but"):
        clip(Returns(result), with_gradient([1.0]))


@pytest.mark.parametrize("result", [1, 1.0, torch.ones(()), torch.ones(1), np.float32(1), np.int64(1)], ids=repr)
def test_a_policy_may_return_a_number_or_a_tensor(form, result):
    parameter = with_gradient([3.0, 4.0])
    assert float(clip(Returns(result), parameter).threshold) == 1
    assert norm_of([parameter]) == pytest.approx(1)


def test_a_threshold_below_zero_turns_no_gradient_around(form):
    parameter = with_gradient([3.0, 4.0])
    if form == "cpu form":
        with pytest.raises(
            ValueError, match=r"Expected `policy` to return a threshold of at least 0, but .* gave -1\.0"
        ):
            clip(Returns(-1.0), parameter)
        assert parameter.grad.tolist() == [3.0, 4.0]
    else:
        clip(Returns(torch.tensor(-1.0)), parameter)
        assert parameter.grad.tolist() == [0.0, 0.0]


def test_a_number_below_zero_is_refused_and_one_beyond_float64_is_no_bound(form):
    parameter = with_gradient([3.0, 4.0])
    with pytest.raises(ValueError, match=r"a threshold of at least 0, but .* gave -1"):
        clip(Returns(-1), parameter)
    assert float(clip(Returns(10**400), parameter).threshold) == math.inf
    assert parameter.grad.tolist() == [3.0, 4.0]


def test_lbfgs_is_refused():
    with pytest.raises(ValueError, match="`LBFGS` searches along them"):
        GradientClipper(Constant(1.0)).clip_(torch.optim.LBFGS([with_gradient([1.0])]))


def test_a_threshold_that_is_no_number_clips_at_the_upper_bound(form):
    parameter = with_gradient([3.0, 4.0])
    assert float(clip(Returns(torch.tensor(math.nan)), parameter, max_threshold=2.0).threshold) == 2
    assert norm_of([parameter]) == pytest.approx(2)


# --- corners that once were wrong -------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True], ids=["ordinary", "fused"])
@pytest.mark.parametrize("scaler", [None, 1024.0], ids=["no scaler", "scaler"])
def test_fabrics_wrapped_optimizer_steps_as_the_bare_one(form, fused, scaler):
    """A wrapper has another identity than the optimizer that the scaler and the step know."""
    plugin = scaler and MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scaler))
    fabric = Fabric(accelerator="cpu", devices=1, plugins=[plugin] if plugin else None)
    layer = nn.Linear(3, 1)
    nn.init.zeros_(layer.weight)
    model, optimizer = fabric.setup(layer, SGD(layer.parameters(), lr=0.1, momentum=0.9, fused=fused))
    clipper = GradientClipper(Constant(1.0))
    for factor in (1.0, math.nan, 1.0):
        optimizer.zero_grad()
        fabric.backward(model(torch.ones(2, 3)).sum() * factor)
        record = clipper.clip_(optimizer, plugin.scaler if plugin else None)
        assert factor != factor or float(record.norm) == pytest.approx(4.0, rel=1e-3)
        optimizer.step()
    assert layer.weight.detach().flatten().tolist() == pytest.approx([-0.1 * 0.5 * (1 + 1.9)] * 3, rel=1e-3)
    assert clipper.nonfinite_total == 1


@pytest.mark.parametrize("with_scaler", [False, True], ids=["no scaler", "scaler"])
def test_a_group_that_joins_late_is_skipped_without_harm(form, with_scaler):
    early, late = (nn.Parameter(torch.ones(5000)) for _ in range(2))
    optimizer = SGD([{"params": [early]}, {"params": [late]}], lr=0.1, momentum=0.9, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, enabled=with_scaler)
    clipper = GradientClipper(Percentile(10))
    for parameter, factor in ((early, 1.0), (late, math.nan), (late, 1.0)):
        optimizer.zero_grad()
        scaler.scale((parameter * factor).sum()).backward()
        clipper.clip_(optimizer, scaler)
        scaler.step(optimizer)
        scaler.update()
    assert torch.equal(late, early)
    assert clipper.nonfinite_total == 1


@pytest.mark.parametrize("fused", [False, True], ids=["ordinary", "fused"])
@pytest.mark.parametrize("unscale", [False, True], ids=["scaled", "unscaled first"])
def test_a_norm_beyond_float32_is_skipped_though_every_entry_is_finite(form, fused, unscale):
    weight = nn.Parameter(torch.ones(3))
    optimizer, scaler = AdamW([weight], lr=0.1, fused=fused), torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale((weight * 1e20).sum()).backward()
    if unscale:
        scaler.unscale_(optimizer)
    clipper = GradientClipper(Constant(1.0))
    clipper.clip_(optimizer, scaler)
    scaler.step(optimizer)
    scaler.update()
    assert weight.tolist() == [1.0] * 3
    assert clipper.nonfinite_total == 1


def test_an_optimizer_whose_groups_are_not_fused_after_all_is_clipped(form):
    parameter = with_gradient([3.0, 4.0])
    optimizer = AdamW([parameter], fused=True)
    optimizer.param_groups[0]["fused"] = None  # as when an unfused run's state is loaded
    GradientClipper(Constant(1.0)).clip_(optimizer)
    optimizer.step()
    assert norm_of([parameter]) == pytest.approx(1)


def test_a_step_that_is_given_up_does_not_skip_a_later_one(form):
    parameter = with_gradient([math.nan])
    optimizer = AdamW([parameter], fused=True)
    GradientClipper(Constant(1.0)).clip_(optimizer)  # and no step
    parameter.grad = torch.ones(1)
    GradientClipper(Constant(1.0), nonfinite="ignore").clip_(optimizer)
    optimizer.step()
    assert parameter.item() != 0


@pytest.mark.parametrize("factor", [1.0, math.nan], ids=["finite", "not finite"])
def test_by_value_gradients_of_all_sizes_and_layouts_are_clamped(form, factor):
    random = torch.Generator().manual_seed(0)
    shapes = [*([(3,)] * 1500), (), (0, 3), (7, 5), (2, 3, 4, 5), (70_000,), (2, 0)]
    parameters = [with_gradient(torch.randn(shape, generator=random)) for shape in shapes]
    parameters[-2].grad = torch.randn(70_000, 2, generator=random)[:, 0]
    parameters += [with_gradient(torch.randn(6, generator=random).bfloat16(), torch.bfloat16) for _ in range(5)]
    image = with_gradient(torch.randn(2, 3, 4, 5, generator=random).contiguous(memory_format=torch.channels_last))
    parameters += [image, with_gradient(torch.randn(4, generator=random) * factor)]
    before = [(each.grad, each.grad.clone(), each.grad.stride()) for each in parameters]
    clip(Constant(0.5), *parameters, gradient_clip_algorithm="value")
    for gradient, entries, stride in before:
        expected = entries.clamp(-0.5, 0.5) if factor == 1 else entries
        assert torch.equal(gradient.nan_to_num(7.0), expected.nan_to_num(7.0))
        assert gradient.stride() == stride


def test_float16_gradients_are_clamped_at_what_float16_can_hold(form):
    parameter = with_gradient([6e4, -6e4], torch.float16)
    clip(Constant(1e5), parameter, gradient_clip_algorithm="value")
    assert parameter.grad.tolist() == [6e4, -6e4]


def test_lazily_conjugated_gradients_are_clipped(form):
    weight = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    weight.grad = torch.tensor([3 + 4j, 0j]).conj()
    negative = nn.Parameter(torch.ones(2))
    negative.grad = torch.tensor([12j, 0j]).conj().imag
    assert clip(Constant(1.3), weight, negative).norm == 13
    assert weight.grad.tolist() == pytest.approx([0.3 - 0.4j, 0])
    assert negative.grad.tolist() == pytest.approx([-1.2, 0])


def test_a_parameter_that_is_given_twice_counts_once():
    parameter = with_gradient([3.0, 4.0])
    assert clip(Constant(1.0), parameter, parameter).norm == 5
    assert norm_of([parameter]) == pytest.approx(1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_default_dtype_does_not_reach_the_record(dtype):
    torch.set_default_dtype(dtype)
    try:
        clipper = GradientClipper(Percentile(50))
        clipper.clip_([with_gradient([1.2345678])])
        other = GradientClipper(Percentile(50))
        other.load_state_dict(clipper.state_dict())
    finally:
        torch.set_default_dtype(torch.float32)
    assert other.history.recorded.tolist() == clipper.history.recorded.tolist() == [pytest.approx(1.2345678, rel=1e-7)]


def test_a_step_without_any_entry_leaves_no_trace_in_the_record(form):
    optimizer = AdamW([nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(0))], fused=True)
    clipper, (parameter, empty) = (
        GradientClipper(Percentile(50), gradient_clip_algorithm="value"),
        parameters_of(optimizer),
    )
    for entry in (1.0, 10.0, None, 4.0):
        parameter.grad = None if entry is None else torch.full((2,), entry)
        empty.grad = torch.ones(0)
        threshold = float(clipper.clip_(optimizer).threshold)
    assert clipper.history.recorded.tolist() == pytest.approx([1.0, 10.0, 4.0])
    assert threshold == pytest.approx(4.0)
    GradientClipper(Percentile(50), gradient_clip_algorithm="value").load_state_dict(clipper.state_dict())


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_expanded_gradients_are_clipped(form, algorithm):
    parameter = nn.Parameter(torch.zeros(2, 3))
    (parameter.grad,) = torch.autograd.grad(4 * parameter.sum(), [parameter])
    assert parameter.grad.stride() == (0, 0)
    clip(Constant(2.0), parameter, gradient_clip_algorithm=algorithm)
    expected = {"norm": 2 / math.sqrt(6), "value": 2.0}[algorithm]
    assert parameter.grad.flatten().tolist() == pytest.approx([expected] * 6)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("rows", [[1], [1, 1], [0, 2]], ids=str)
def test_expanded_values_of_sparse_gradients_are_clipped(form, algorithm, rows):
    table = nn.Embedding(3, 2, sparse=True)
    (4 * table(torch.tensor(rows)).sum()).backward()
    dense = table.weight.grad.to_dense()
    clip(Constant(2.0), table.weight, gradient_clip_algorithm=algorithm)
    expected = dense * min(1, 2 / dense.norm()) if algorithm == "norm" else dense.clamp(-2, 2)
    assert table.weight.grad.layout is torch.sparse_coo
    assert torch.allclose(table.weight.grad.to_dense(), expected)


def test_an_optimizer_without_parameters_has_nothing_to_clip(form):
    optimizer = SGD([{"params": []}], lr=0.1)
    assert GradientClipper(Percentile(50)).clip_(optimizer) is None


# --- the plain numbers of the CPU -------------------------------------------------------------------------------------


def test_a_subclass_of_percentile_that_overrides_call_is_heard(form):
    class Half(Percentile):
        def __call__(self, history):
            return super().__call__(history) / 2

    assert float(clip(Half(50), with_gradient([3.0, 4.0])).threshold) == 2.5


def test_a_policy_is_not_asked_about_an_empty_record():
    class Never(Policy):
        def __call__(self, history):
            raise AssertionError("there is nothing to decide from")

    assert clip(Never(), with_gradient([math.nan])).threshold == math.inf
    assert clip(Never(), with_gradient([0.0])).threshold == math.inf


def test_numbers_that_float32_rounds_are_equal_to_themselves(form):
    """0.1, 1/3 and their like: at the threshold nothing is clipped, whichever way the number came."""
    for number in (0.1, 1 / 3, 0.7, 1e-3, 12.3456789):
        parameter = with_gradient([number], torch.float64)
        for policy, bound in ((Percentile(100), None), (Constant(number), None), (Percentile(100), number)):
            record = clip(policy, parameter, max_threshold=bound)
            assert float(record.clipped_norm) == float(record.norm) == float(record.threshold)
    clipper = GradientClipper(Percentile(30), gradient_clip_algorithm="value")
    for number in (0.1, 0.3, 0.7, 1.1):
        record = clipper.clip_([with_gradient([number] * 3)])
        assert all(float(x) == torch.tensor(float(x), dtype=torch.float32).item() for x in record[:5])


def test_by_value_no_entries_are_no_division_by_zero(form):
    record = clip(Percentile(50), with_gradient([]), gradient_clip_algorithm="value")
    assert float(record.norm) == 0


def test_a_loss_scale_that_has_vanished_skips_on(form):
    parameter, clipper = with_gradient([math.nan]), GradientClipper(Percentile(50))
    optimizer, scaler = SGD([parameter], lr=1.0), GradScaler("cpu", init_scale=1e-38, growth_interval=10**6)
    for _ in range(40):
        parameter.grad = torch.tensor([math.nan])
        scaler.scale(torch.ones(()))
        clipper.clip_(optimizer, scaler)
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 0
    assert parameter.item() == 0


def test_a_norm_beyond_float32_blames_no_finite_parameter(form):
    fine, bad = with_gradient([1e100], torch.float64), with_gradient([math.nan])
    with pytest.raises(NonFiniteGradientError, match="1 of 2 parameters") as error:
        clip(Percentile(50), fine, bad, nonfinite="raise")
    assert error.value.parameters == [bad]


def test_by_value_an_infinity_is_left_for_a_scaler_to_find(form):
    parameter = with_gradient([math.inf, 1.0, 9.0])
    clip(Constant(2.0), parameter, gradient_clip_algorithm="value", nonfinite="ignore")
    assert parameter.grad.tolist() == [math.inf, 1.0, 9.0]


def test_by_value_the_norm_after_clipping_is_at_its_true_scale(form):
    parameter = with_gradient([30.0, 40.0])
    optimizer, scaler = SGD([parameter], lr=1.0), GradScaler("cpu", init_scale=8.0)
    parameter.grad = torch.tensor([30.0, 40.0]) * 8
    scaler.scale(torch.ones(()))
    record = GradientClipper(Constant(3.0), gradient_clip_algorithm="value").clip_(optimizer, scaler)
    assert float(record.clipped_norm) == pytest.approx(18**0.5)


def test_one_long_gradient_behind_short_ones_is_summed_in_parts():
    short, long = (
        with_gradient([1.0]),
        with_gradient(torch.randn(4_000_000, generator=torch.Generator().manual_seed(0))),
    )
    assert float(clip(Percentile(100), short, long).norm) == pytest.approx(norm_of([short, long]), rel=1e-5)


def test_a_recorded_norm_is_seen_by_the_next_compute():
    clipper = GradientClipper(Percentile(50))
    for entry in (2.0, 4.0):
        clipper.clip_([with_gradient([entry])])
    assert clipper.history.percentile(50) == 3
    clipper.clip_([with_gradient([1.0])])
    assert clipper.history.percentile(50) == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_percentile_is_float32_whatever_torchs_default(form, dtype):
    metric = RunningPercentile(50)
    metric.update(1.2345678)
    torch.set_default_dtype(dtype)
    try:
        assert metric.compute().dtype == torch.float32
        assert clip(ZScore(), with_gradient([3.0, 4.0], torch.float32)).threshold == 5
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_step_that_raise_stops_at_comes_with_its_record(form):
    for measure in (
        lambda clipper: clipper.clip_([with_gradient([math.inf])]),
        lambda clipper: clipper.record_(torch.tensor(math.inf)),
    ):
        with pytest.raises(NonFiniteGradientError) as error:
            measure(GradientClipper(Percentile(50), nonfinite="raise"))
        assert float(error.value.records[0].norm) == math.inf
        assert float(error.value.records[0].nonfinite_total) == 1


@pytest.mark.parametrize(("made", "loading"), [("norm", "value"), ("value", "norm")])
def test_a_record_of_the_other_algorithm_is_refused_and_nothing_of_it_loaded(made, loading):
    first, second = (GradientClipper(Percentile(50), gradient_clip_algorithm=each) for each in (made, loading))
    first.clip_([with_gradient([3.0, 4.0])])
    with pytest.raises(ValueError, match=rf"made with gradient_clip_algorithm='{made}', whose thresholds have another"):
        second.load_state_dict(first.state_dict())
    assert (second.steps, len(second.history)) == (0, 0)


def test_a_clipper_shows_its_arguments():
    shown = repr(GradientClipper(Percentile(50), window=7))
    assert shown.startswith(
        "GradientClipper(Percentile(percentile=50.0, multiplier=1.0), gradient_clip_algorithm='norm'"
    )
    assert "window=7" in shown


def test_a_compiled_step_leaves_out_what_is_not_finite():
    weight = nn.Parameter(torch.ones(3))
    optimizer, clipper = AdamW([weight], lr=0.1), GradientClipper(Percentile(50))
    step, moved = torch.compile(optimizer.step, backend="eager"), []
    for factor in (math.nan, 1.0, math.nan, 1.0):
        before, weight.grad = weight.detach().clone(), torch.full((3,), factor)
        clipper.clip_(optimizer)
        step()
        moved.append(not torch.equal(weight, before))
    assert moved == [False, True, False, True]


# --- where graphs are compiled: on the CPU, which then passes for such a device ---------------------------------------


@pytest.fixture
def compiling(monkeypatch):
    monkeypatch.setattr(_numbers, "compiles_graphs", lambda device: True)
    with in_form("accelerator form"):
        yield


def test_an_ordinary_optimizer_is_read_and_no_step_is_copied(compiling):
    weight = with_gradient([3.0, 4.0])
    optimizer, clipper = SGD([weight], lr=1.0, momentum=0.9), GradientClipper(Percentile(100))
    assert must_be_read("skip", optimizer, False, False)
    assert type(clipper.clip_(optimizer).norm) is float
    weight.grad.fill_(math.nan)
    clipper.clip_(optimizer)
    optimizer.step()
    assert torch.equal(weight.detach(), torch.zeros(2))
    assert not optimizer.state[weight]


@pytest.mark.parametrize("loaded", [0, 3])
def test_steps_that_are_not_finite_are_counted_in_integers(loaded, compiling):
    """A float may have eight bits there, and stands still at 256."""
    weight, clipper = with_gradient([1.0, 1.0, 1.0]), GradientClipper(Percentile(100))
    clipper.load_state_dict({**clipper.state_dict(), "steps": loaded, "nonfinite_total": loaded})
    for count, norm in enumerate((math.nan, math.inf), loaded + 1):
        weight.grad.fill_(norm)
        record = clipper.clip_([weight])
        weight.grad = torch.empty(3)
        assert (clipper._nonfinite.dtype, clipper.nonfinite_total) == (torch.int64, count)
        assert (record.nonfinite_total.dtype, record.nonfinite_total.item()) == (torch.float32, count)


@pytest.mark.parametrize("count", [1, 2, 49, 50, 64])
def test_rows_come_to_the_host_as_they_are(count, compiling):
    rows = list(torch.arange(3.0 * count).reshape(count, 3))
    assert torch.equal(_numbers.on_host(rows), torch.stack(rows))


@pytest.mark.parametrize("first", [1.0, 2.0, math.inf, math.nan])
@pytest.mark.parametrize("second", [1.0, 2.0, math.inf, math.nan])
def test_the_smaller_of_two_numbers_is_that_of_torch(first, second, compiling):
    pair = torch.tensor(first), torch.tensor(second)
    assert torch.equal(_numbers.smaller(*pair).nan_to_num(-1), torch.fmin(*pair).nan_to_num(-1))
