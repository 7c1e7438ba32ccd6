"""GradientClipper in plain PyTorch: what is measured, decided and clipped, and when a step counts."""

from __future__ import annotations

import math
import pickle
from contextlib import nullcontext

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
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_autoclip import Constant, GradientClipper, NonFiniteGradientError, Percentile, Policy, ZScore

GRADIENT = (2.0, -6.0, 8.0, -3.0, 5.0)
ELEMENTS = st.floats(-(2**10), 2**10, width=32).filter(lambda x: x == 0 or abs(x) > 2**-10)


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
@given(st.lists(st.lists(ELEMENTS, min_size=1, max_size=5), min_size=1, max_size=4), st.floats(0.125, 64, width=32))
def test_by_norm_the_norm_is_at_most_the_threshold_and_untouched_below(elements, threshold):
    parameters = [with_gradient(row) for row in elements]
    norm = norm_of(parameters)
    record = clip(Constant(threshold), *parameters)
    assert record.norm == pytest.approx(norm, rel=1e-6)
    if record.norm <= record.threshold:
        assert [parameter.grad.tolist() for parameter in parameters] == elements
    else:
        assert norm_of(parameters) == pytest.approx(threshold, rel=1e-5)


@settings(deadline=None)
@given(st.lists(ELEMENTS, min_size=1, max_size=8), st.floats(0.125, 64, width=32))
def test_by_value_every_element_is_clamped_and_no_other_changes(elements, threshold):
    parameter = with_gradient(elements)
    clip(Constant(threshold), parameter, gradient_clip_algorithm="value")
    assert parameter.grad.tolist() == np.clip(elements, -threshold, threshold).tolist()


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
def test_neither_percentile_100_nor_a_first_step_changes_a_bit(form, dtype):
    clipper = GradientClipper(Percentile(100))
    for i in range(20):
        parameter = with_gradient(torch.randn(50, generator=torch.Generator().manual_seed(i)), dtype)
        before = parameter.grad.clone()
        for each in (clipper, GradientClipper(Percentile(10))):
            record = each.clip_([parameter])
            assert record.norm <= record.threshold
            assert torch.equal(parameter.grad, before)


def test_at_the_threshold_nothing_is_clipped_though_float32_rounds_the_numbers(form):
    for number in (0.1, 1 / 3, 0.7, 1e-3, 12.3456789):
        parameter = with_gradient([number], torch.float64)
        for policy, most in ((Percentile(100), None), (Constant(number), None), (Percentile(100), number)):
            record = clip(policy, parameter, max_threshold=most)
            assert float(record.norm) == float(record.threshold)
            assert parameter.grad.item() == number


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_gradients_are_measured_in_float32(form, dtype):
    parameters = [with_gradient(torch.linspace(-1000.0, 1000.0, 5000), dtype) for _ in range(3)]
    norm = norm_of(parameters)
    record = clip(Constant(norm / 2), *parameters)
    assert float(record.norm) == pytest.approx(norm, rel=1e-6)
    assert norm_of(parameters) == pytest.approx(norm / 2, rel=2e-3)


def test_gradients_of_several_dtypes_are_one_vector(form):
    parameters = [with_gradient([3.0], torch.float64), with_gradient([4.0], torch.bfloat16), with_gradient([12.0])]
    record = clip(Constant(1.3), *parameters)
    assert float(record.norm) == pytest.approx(13)
    assert [parameter.grad.item() for parameter in parameters] == pytest.approx([0.3, 0.4, 1.2], rel=1e-2)


@pytest.mark.parametrize(
    ("shape", "is_contiguous"),
    [((5_000_000,), True), ((40, 125_000), False), ((2048, 1, 50, 50), False)],
    ids=["vector", "matrix", "image"],
)
def test_long_gradients_behind_short_ones_are_summed_to_1e_5(shape, is_contiguous):
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-3
    parameter = with_gradient(gradient if is_contiguous else gradient.transpose(0, -1))
    assert parameter.grad.is_contiguous() == is_contiguous
    exact = norm_of([parameter])
    if is_contiguous:  # what is to be improved on
        assert abs(torch.nn.utils.get_total_norm([parameter.grad]).item() / exact - 1) > 3e-5
    assert clip(Percentile(100), with_gradient([1e-6]), parameter).norm == pytest.approx(exact, rel=1e-5)


def test_by_value_the_norm_after_clipping_is_measured_as_often_as_asked(form):
    clipper = GradientClipper(Constant(2.0), gradient_clip_algorithm="value")
    clipper.clipped_norm_every = 3
    clipped = [float(clipper.clip_([with_gradient([3.0, 1.0])]).clipped_norm) for _ in range(5)]
    assert clipped == pytest.approx([5**0.5, math.nan, math.nan, 5**0.5, math.nan], nan_ok=True)


def test_only_the_optimizers_own_parameters_are_measured_and_clipped(form):
    mine, other, frozen = with_gradient([3.0]), with_gradient([100.0]), nn.Parameter(torch.zeros(1))
    optimizer = SGD([{"params": [mine]}, {"params": [frozen], "lr": 1.0}], lr=0.1)
    record = GradientClipper(Constant(1.5)).clip_(optimizer)
    assert (record.norm, mine.grad, other.grad, frozen.grad) == (3, 1.5, 100, None)


def test_without_gradients_there_is_no_step(form):
    for target in ([nn.Parameter(torch.zeros(3))], SGD([{"params": []}], lr=0.1)):
        clipper = GradientClipper(Percentile(10))
        assert clipper.clip_(target) is None
        assert (clipper.steps, len(clipper.history)) == (0, 0)


def test_an_iterator_that_is_used_up_warns():
    parameters = iter([with_gradient([1.0])])
    clipper = GradientClipper(Percentile(10))
    clipper.clip_(parameters)
    with pytest.warns(UserWarning, match="`clip_` got no parameters, so nothing was clipped"):
        assert clipper.clip_(parameters) is None


def test_gradients_of_exactly_zero_do_not_pull_the_threshold_to_zero(form):
    clipper = GradientClipper(Percentile(10))
    for element in [0.0] * 50 + [2.0, 4.0]:
        parameter = with_gradient([element])
        record = clipper.clip_([parameter])
    assert float(record.threshold) == pytest.approx(2.2)
    assert parameter.grad.item() == pytest.approx(2.2)
    assert clipper.history.values.tolist() == [2.0, 4.0]
    assert (clipper.steps, clipper.nonfinite_steps) == (52, 0)


def test_warmup_observes_without_clipping(form):
    clipper = GradientClipper(Constant(1.0), warmup_steps=3)
    parameters = [with_gradient([element]) for element in (5.0, math.nan, 6.0, 7.0)]
    thresholds = [float(clipper.clip_([parameter]).threshold) for parameter in parameters]
    assert thresholds == [math.inf, math.inf, math.inf, 1.0]
    assert [parameters[i].grad.item() for i in (0, 2, 3)] == pytest.approx([5.0, 6.0, 1.0])
    assert clipper.history.values.tolist() == [5.0, 6.0, 7.0]


def test_max_threshold_limits_the_threshold_also_in_the_warmup(form):
    clipper = GradientClipper(Percentile(100), warmup_steps=1, max_threshold=2.0)
    assert [float(clipper.clip_([with_gradient([x])]).threshold) for x in (5.0, 1.0, 1.5)] == [2.0, 2.0, 2.0]


# --- when a step counts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("made_by", ["optimizer.step()", "scaler.step()", "commit()", "the next clip_()"])
def test_a_step_counts_once_it_was_made(form, made_by):
    optimizer, scaler = SGD([with_gradient([3.0, 4.0])], lr=0.1, fused=True), None
    if made_by == "scaler.step()":
        scaler = GradScaler("cpu", init_scale=1.0)
        scaler.scale(torch.ones(()))
    clipper = GradientClipper(Constant(1.0))
    clipper.clip_(optimizer, scaler)
    assert (clipper.steps, clipper.history.count, clipper.has_pending) == (0, 0, True)
    assert clipper.state_dict() == GradientClipper(Constant(1.0)).state_dict()
    assert (clipper.pending.norm, clipper.pending.clipped_norm) == (5.0, 1.0)
    if made_by == "optimizer.step()":
        optimizer.step()
    elif made_by == "scaler.step()":
        scaler.step(optimizer)
    elif made_by == "commit()":
        assert clipper.commit().norm == 5.0
    else:
        clipper.clip_(optimizer)
    assert (clipper.steps, clipper.history.values.tolist()) == (1, [5.0])
    assert clipper.has_pending == (made_by == "the next clip_()")


# --- non-finite gradients ---------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": lambda parameters: SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1),
    "fused sgd": lambda parameters: SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1, fused=True),
    "adamw": lambda parameters: AdamW(parameters, lr=0.1),
    "fused adamw": lambda parameters: AdamW(parameters, lr=0.1, fused=True),
}
NONFINITE = [[bad, 1.0] for bad in (math.nan, math.inf, -math.inf)]


def train(name: str, gradients: list[list[float]], **kwargs) -> tuple[nn.Parameter, GradientClipper]:
    weight = nn.Parameter(torch.ones(2))
    optimizer = OPTIMIZERS[name]([weight])
    clipper = GradientClipper(Percentile(50), **kwargs)
    for gradient in gradients:
        weight.grad = torch.tensor(gradient)
        clipper.clip_(optimizer)
        optimizer.step()
        assert not hasattr(optimizer, "found_inf")
    return weight, clipper


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("where", ["first", "in a row, and last"])
def test_a_skipped_step_leaves_weights_momentum_and_history_as_they_were(form, algorithm, name, where):
    good = [[1.0, 2.0], [3.0, 1.0], [0.5, 0.1], [2.0, 2.0]]
    gradients = [*NONFINITE, *good] if where == "first" else [*good[:2], *NONFINITE, *good[2:], NONFINITE[0]]
    weight, clipper = train(name, gradients, gradient_clip_algorithm=algorithm)
    expected, clean = train(name, good, gradient_clip_algorithm=algorithm)
    assert torch.equal(weight, expected)
    assert torch.equal(clipper.history.values, clean.history.values)
    assert (clipper.nonfinite_steps, clean.nonfinite_steps) == (len(gradients) - 4, 0)
    assert clipper.steps == len(gradients)


@pytest.mark.parametrize("is_compiled_first", [False, True], ids=["after clip_", "before clip_"])
def test_a_compiled_step_skips_non_finite_gradients_or_a_warning_says_that_it_did_not(is_compiled_first):
    weight = nn.Parameter(torch.ones(3))
    optimizer, clipper = AdamW([weight], lr=0.1), GradientClipper(Percentile(50))
    if not is_compiled_first:
        clipper.clip_(optimizer)
    step, moved = torch.compile(optimizer.step, backend="eager"), []
    for factor in (1.0, math.nan, 1.0):
        before, weight.grad = weight.detach().clone(), torch.full((3,), factor)
        is_told = is_compiled_first and math.isfinite(factor) and len(moved) == 2
        with pytest.warns(UserWarning, match="made a step that was to be skipped") if is_told else nullcontext():
            clipper.clip_(optimizer)
        step()
        moved.append(not torch.equal(weight, before))
    assert moved == [True, is_compiled_first, True]


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_ignore_leaves_the_gradient_as_it_is(form, algorithm):
    parameter = with_gradient([math.inf, 5.0])
    clip(Constant(1.0), parameter, nonfinite="ignore", gradient_clip_algorithm=algorithm)
    assert parameter.grad.tolist() == [math.inf, 5.0]


def test_raise_names_the_parameters_and_the_step_does_not_count(form):
    fine, bad, large = with_gradient([1.0]), with_gradient([math.nan]), with_gradient([1e100], torch.float64)
    optimizer, clipper = SGD([fine, bad, large], lr=0.1), GradientClipper(Constant(1.0), nonfinite="raise")
    with pytest.raises(NonFiniteGradientError, match=r"norm of the gradient is nan: .* of 1 of 3 parameters") as error:
        clipper.clip_(optimizer)
    assert error.value.parameters == [bad]  # that with the large gradient is finite by itself
    assert (clipper.steps, clipper.nonfinite_steps, clipper.has_pending) == (0, 0, False)


def test_raise_waits_until_the_scale_is_down_to_one():
    for scale, raises in ((2.0, False), (1.0, True)):
        scaler = GradScaler("cpu", init_scale=scale)
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


@pytest.mark.parametrize("fused", [False, True], ids=["ordinary", "fused"])
@pytest.mark.parametrize("unscale", [False, True], ids=["scaled", "unscaled first"])
def test_a_norm_beyond_float32_is_skipped_though_every_element_is_finite(form, fused, unscale):
    weight = nn.Parameter(torch.ones(3))
    optimizer, scaler = AdamW([weight], lr=0.1, fused=fused), GradScaler("cpu", init_scale=2.0)
    scaler.scale((weight * 1e20).sum()).backward()
    if unscale:
        scaler.unscale_(optimizer)
    clipper = GradientClipper(Constant(1.0))
    clipper.clip_(optimizer, scaler)
    scaler.step(optimizer)
    scaler.update()
    assert weight.tolist() == [1.0] * 3
    assert clipper.nonfinite_steps == 1


def test_a_step_that_is_never_made_does_not_skip_a_later_one(form):
    parameter = with_gradient([math.nan])
    optimizer = AdamW([parameter], fused=True)
    GradientClipper(Constant(1.0)).clip_(optimizer)  # and no step
    parameter.grad = torch.ones(1)
    GradientClipper(Constant(1.0), nonfinite="ignore").clip_(optimizer)
    optimizer.step()
    assert parameter.item() != 0


@pytest.mark.parametrize("with_scaler", [False, True], ids=["no scaler", "scaler"])
def test_a_parameter_group_that_joins_late_is_skipped_without_harm(form, with_scaler):
    early, late = (nn.Parameter(torch.ones(5000)) for _ in range(2))
    optimizer = SGD([{"params": [early]}, {"params": [late]}], lr=0.1, momentum=0.9, fused=True)
    scaler = GradScaler("cpu", init_scale=4.0, enabled=with_scaler)
    clipper = GradientClipper(Percentile(10))
    for parameter, factor in ((early, 1.0), (late, math.nan), (late, 1.0)):
        optimizer.zero_grad()
        scaler.scale((parameter * factor).sum()).backward()
        clipper.clip_(optimizer, scaler)
        scaler.step(optimizer)
        scaler.update()
    assert torch.equal(late, early)
    assert clipper.nonfinite_steps == 1


# --- no host reads ----------------------------------------------------------------------------------------------------


class NoDispatchedReads(TorchDispatchMode):
    """Fails at every operator that hands a tensor's content to the host."""

    forbidden = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in self.forbidden, f"{func} reads the host"
        return func(*args, **(kwargs or {}))


class NoReads(TorchFunctionMode):
    """Fails at calls that do so without an operator, once the gradients are measured.

    Before, the host may read what the previous step has sent. Float64 is that of the history, which is on the host.
    """

    is_measured = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        self.is_measured |= name == "_foreach_norm"
        if name in ("tolist", "numpy") and args[0].dtype != torch.float64:
            assert not self.is_measured, f"{name} reads the host"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("policy", [Percentile(10), ZScore(), Constant(1.0)], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused and skip", "ordinary and ignore"])
def test_a_step_on_an_accelerator_reads_nothing_back(policy, algorithm, fused):
    parameters = [with_gradient([1.0, 2.0]), with_gradient([3.0], torch.bfloat16)]
    optimizer = SGD(parameters, lr=0.1, fused=fused)
    how = {"nonfinite": "skip", "skip_above": 5} if fused else {"nonfinite": "ignore"}
    how |= {"window": 4, "warmup_steps": 2, "max_threshold": 9.0, "max_update_ratio": 0.5}
    clipper = GradientClipper(policy, gradient_clip_algorithm=algorithm, **how)
    with in_form("accelerator form"):
        for _ in range(25):
            with NoDispatchedReads(), NoReads() as mode:
                clipper.clip_(optimizer)
            assert mode.is_measured
        assert clipper.history.count == 24


def test_the_checks_for_host_reads_can_fail():
    numbers = torch.ones(())
    with pytest.raises(AssertionError, match="reads the host"), NoDispatchedReads():
        numbers.item()
    with NoReads():
        torch._foreach_norm([numbers])
        with pytest.raises(AssertionError, match="reads the host"):
            numbers.tolist()


# --- one clipper, one optimizer ---------------------------------------------------------------------------------------


def test_a_second_optimizer_raises_until_the_first_is_released(form):
    first, second = (SGD([with_gradient([1.0])], lr=0.1) for _ in range(2))
    clipper = GradientClipper(Percentile(10))
    clipper.clip_(first)
    first.step()
    with pytest.raises(ValueError, match="Use one `GradientClipper` per optimizer"):
        clipper.clip_(second)
    clipper.release()
    clipper.clip_(second)
    second.step()
    assert clipper.history.values.tolist() == [1.0, 1.0]


def test_a_clipper_pickles_with_its_history(form):
    optimizer = SGD([with_gradient([2.0])], lr=0.1)
    clipper = GradientClipper(Percentile(10), window=None)
    clipper.clip_(optimizer)
    optimizer.step()
    copy = pickle.loads(pickle.dumps(clipper))
    copy.clip_([with_gradient([3.0])])
    assert copy.history.values.tolist() == [2.0, 3.0]


@pytest.mark.parametrize(("made", "loading"), [("norm", "value"), ("value", "norm")])
def test_a_history_of_the_other_algorithm_raises_and_nothing_of_it_is_loaded(made, loading):
    first, second = (GradientClipper(Percentile(50), gradient_clip_algorithm=each) for each in (made, loading))
    first.clip_([with_gradient([3.0, 4.0])])
    with pytest.raises(ValueError, match=rf"recorded with gradient_clip_algorithm='{made}', whose thresholds have"):
        second.load_state_dict(first.state_dict())
    assert (second.steps, len(second.history)) == (0, 0)


def test_a_clipper_shows_its_arguments():
    text = repr(GradientClipper(Percentile(50), window=7))
    assert text.startswith(
        "GradientClipper(Percentile(percentile=50.0, multiplier=1.0), gradient_clip_algorithm='norm'"
    )
    assert "window=7" in text


# --- torch.amp.GradScaler and wrapped optimizers in a plain loop ------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("unscale", [True, False], ids=["unscaled first", "scaled"])
def test_with_a_scaler_a_step_is_the_one_without(form, name, unscale):
    def run(scaler: GradScaler | None) -> tuple[torch.Tensor, GradientClipper]:
        torch.manual_seed(0)
        net = nn.Linear(4, 1)
        optimizer = OPTIMIZERS[name](net.parameters())
        clipper = GradientClipper(Percentile(50))
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

    scaler = GradScaler("cpu", init_scale=1024.0)
    (scaled, clipper), (plain, reference) = run(scaler), run(None)
    torch.testing.assert_close(scaled, plain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(clipper.history.values, reference.history.values, rtol=1e-6, atol=0)
    assert clipper.nonfinite_steps == reference.nonfinite_steps == 2
    assert scaler.get_scale() == 256.0  # it saw both overflows and backed off


def test_by_value_scaled_gradients_are_clamped_at_their_true_scale(form):
    parameter = with_gradient([30.0 * 8, 40.0 * 8])
    optimizer, scaler = SGD([parameter], lr=1.0), GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    record = GradientClipper(Constant(3.0), gradient_clip_algorithm="value").clip_(optimizer, scaler)
    assert float(record.clipped_norm) == pytest.approx(18**0.5)
    assert parameter.grad.tolist() == [3.0, 3.0]


def test_a_disabled_scaler_is_no_scaler():
    parameter = with_gradient([2.0])
    GradientClipper(Constant(1.0)).clip_(SGD([parameter], lr=0.1), GradScaler("cpu", enabled=False))
    assert parameter.grad == 1.0


def test_a_loss_scale_that_has_vanished_still_skips(form):
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


@pytest.mark.parametrize("fused", [False, True], ids=["ordinary", "fused"])
@pytest.mark.parametrize("scale", [None, 1024.0], ids=["no scaler", "scaler"])
def test_fabrics_wrapped_optimizer_steps_as_the_bare_one(form, fused, scale):
    """A wrapper has another identity than the optimizer that the scaler and the step know."""
    plugin = scale and MixedPrecision("16-mixed", "cpu", GradScaler("cpu", init_scale=scale))
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
    assert clipper.nonfinite_steps == 1


def test_an_optimizer_whose_groups_are_not_fused_after_all_is_clipped(form):
    parameter = with_gradient([3.0, 4.0])
    optimizer = AdamW([parameter], fused=True)
    optimizer.param_groups[0]["fused"] = None  # as when an unfused run's state is loaded
    GradientClipper(Constant(1.0)).clip_(optimizer)
    optimizer.step()
    assert norm_of([parameter]) == pytest.approx(1)


# --- arguments and policies -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"policy": 10}, TypeError, "Expected `policy` to be a `Policy` such as `Percentile"),
        ({"gradient_clip_algorithm": "max"}, ValueError, "Expected `gradient_clip_algorithm` to be one of 'norm', 'v"),
        ({"nonfinite": "stop"}, ValueError, "Expected `nonfinite` to be one of 'skip', 'raise', 'ignore', but got 's"),
        ({"window": 0}, ValueError, "Expected `window` to be an integer of at least 1, or `None`"),
        ({"window": 2**63}, ValueError, "Expected `window` to be an integer of at least 1"),
        ({"warmup_steps": -1}, ValueError, "Expected `warmup_steps` to be an integer of at least 0, but got -1"),
        ({"max_threshold": math.nan}, ValueError, "Expected `max_threshold` to be a number above 0"),
        ({"max_threshold": "1"}, TypeError, "Expected `max_threshold` to be a number above 0"),
        ({"max_threshold": 1e39}, ValueError, "Expected `max_threshold` to lie in the range of float32"),
    ],
    ids=lambda value: repr(value) if isinstance(value, dict) else "",
)
def test_a_bad_argument_raises(arguments, error, message):
    with pytest.raises(error, match=message.replace("(", r"\(")):
        GradientClipper(**{"policy": Percentile(10), **arguments})


def test_one_parameter_is_clipped_like_a_list_of_one_and_counts_once():
    for target in (lambda parameter: parameter, lambda parameter: [parameter, parameter]):
        parameter = with_gradient([3.0, 4.0])
        assert GradientClipper(Constant(1.0)).clip_(target(parameter)).norm == 5
        assert norm_of([parameter]) == pytest.approx(1)


@pytest.mark.parametrize(
    "target",
    [nn.Linear(1, 1), nn.Sequential(nn.Linear(1, 1)), {"weight": 1}, 3],
    ids=["module", "container", "mapping", "number"],
)
def test_what_is_no_parameter_raises(target):
    with pytest.raises(TypeError, match=r"Expected `target` to be an optimizer or parameters.*`model\.parameters\(\)`"):
        GradientClipper(Constant(1.0)).clip_(target)


def test_lbfgs_and_a_scaler_without_its_optimizer_raise():
    parameter = with_gradient([1.0])
    with pytest.raises(ValueError, match="`LBFGS` searches along them"):
        GradientClipper(Constant(1.0)).clip_(torch.optim.LBFGS([parameter]))
    with pytest.raises(ValueError, match="Expected the optimizer beside `grad_scaler`"):
        GradientClipper(Constant(1.0)).clip_([parameter], GradScaler("cpu"))


class Returns(Policy):
    def __init__(self, result):
        self.result = result

    def __call__(self, history):
        return self.result


@pytest.mark.parametrize("result", ["0.5", None, torch.ones(2), torch.ones((), dtype=torch.complex64)], ids=str)
def test_a_policy_that_returns_no_single_number_raises(form, result):
    with pytest.raises(TypeError, match=r"Expected `policy` to return one number, but .* returned"):
        clip(Returns(result), with_gradient([1.0]))


@pytest.mark.parametrize("result", [1, 1.0, torch.ones(()), torch.ones(1), np.float32(1), np.int64(1)], ids=repr)
def test_a_policy_may_return_a_number_or_a_tensor(form, result):
    parameter = with_gradient([3.0, 4.0])
    assert float(clip(Returns(result), parameter).threshold) == 1
    assert norm_of([parameter]) == pytest.approx(1)


@pytest.mark.parametrize("result", [-1, -1.0, math.nan], ids=repr)
def test_a_threshold_below_zero_or_nan_raises(form, result):
    parameter = with_gradient([3.0, 4.0])
    with pytest.raises(ValueError, match=rf"return a threshold of at least 0, but .* returned {result}"):
        clip(Returns(result), parameter)
    assert parameter.grad.tolist() == [3.0, 4.0]


@pytest.mark.parametrize(("result", "norm"), [(-1.0, 0.0), (math.nan, 2.0)], ids=["below zero", "nan"])
def test_an_unread_threshold_reverses_no_gradient_and_lifts_no_upper_bound(result, norm):
    parameter = with_gradient([3.0, 4.0])
    with in_form("accelerator form"):
        clip(Returns(torch.tensor(result)), parameter, max_threshold=2.0)
    assert parameter.grad.tolist() == pytest.approx([0.6 * norm, 0.8 * norm])


def test_a_threshold_beyond_a_float_clips_nothing(form):
    parameter = with_gradient([3.0, 4.0])
    assert float(clip(Returns(10**400), parameter).threshold) == math.inf
    assert parameter.grad.tolist() == [3.0, 4.0]


def test_a_policy_is_not_asked_about_a_non_finite_norm():
    assert clip(Returns("no number"), with_gradient([math.nan])).threshold == math.inf


# --- layouts, sizes and dtypes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("rows", [[1], [1, 1], [0, 2]], ids=str)
def test_sparse_gradients_are_clipped_as_their_dense_form(form, algorithm, rows):
    table = nn.Embedding(3, 2, sparse=True)
    (4 * table(torch.tensor(rows)).sum()).backward()
    dense = table.weight.grad.to_dense()
    record = clip(Constant(2.0), table.weight, gradient_clip_algorithm=algorithm)
    assert float(record.norm) == pytest.approx(dense.norm().item())
    assert float(record.statistic) == pytest.approx(dense.norm().item() / (6**0.5 if algorithm == "value" else 1))
    expected = dense * min(1, 2 / dense.norm()) if algorithm == "norm" else dense.clamp(-2, 2)
    assert table.weight.grad.layout is torch.sparse_coo
    assert torch.allclose(table.weight.grad.to_dense(), expected)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_expanded_gradients_are_clipped(form, algorithm):
    parameter = nn.Parameter(torch.zeros(2, 3))
    (parameter.grad,) = torch.autograd.grad(4 * parameter.sum(), [parameter])
    assert parameter.grad.stride() == (0, 0)
    clip(Constant(2.0), parameter, gradient_clip_algorithm=algorithm)
    expected = {"norm": 2 / math.sqrt(6), "value": 2.0}[algorithm]
    assert parameter.grad.flatten().tolist() == pytest.approx([expected] * 6)


def test_complex_and_lazily_conjugated_gradients_are_measured_by_their_magnitude(form):
    plain = with_gradient([84j], torch.complex64)
    weight = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    weight.grad = torch.tensor([3 + 4j, 0j]).conj()
    negative = nn.Parameter(torch.ones(2))
    negative.grad = torch.tensor([12j, 0j]).conj().imag
    assert float(clip(Constant(8.5), plain, weight, negative).norm) == pytest.approx(85)
    assert plain.grad.tolist() == pytest.approx([8.4j])
    assert weight.grad.tolist() == pytest.approx([0.3 - 0.4j, 0])
    assert negative.grad.tolist() == pytest.approx([-1.2, 0])


@pytest.mark.parametrize("factor", [1.0, math.nan], ids=["finite", "non-finite"])
def test_by_value_gradients_of_all_sizes_and_layouts_are_clamped(form, factor):
    random = torch.Generator().manual_seed(0)
    shapes = [*([(3,)] * 1500), (), (0, 3), (7, 5), (2, 3, 4, 5), (70_000,), (2, 0)]
    parameters = [with_gradient(torch.randn(shape, generator=random)) for shape in shapes]
    parameters[-2].grad = torch.randn(70_000, 2, generator=random)[:, 0]
    parameters += [with_gradient(torch.randn(6, generator=random).bfloat16(), torch.bfloat16) for _ in range(5)]
    image = with_gradient(torch.randn(2, 3, 4, 5, generator=random).contiguous(memory_format=torch.channels_last))
    parameters += [image, with_gradient(torch.randn(4, generator=random) * factor)]
    before = [(each.grad, each.grad.clone(), each.grad.stride()) for each in parameters]
    clip(Constant(0.5), *parameters, gradient_clip_algorithm="value", nonfinite="ignore")
    for gradient, elements, stride in before:
        expected = elements.clamp(-0.5, 0.5) if factor == 1 else elements
        assert torch.equal(gradient.nan_to_num(7.0), expected.nan_to_num(7.0))
        assert gradient.stride() == stride


def test_by_value_float16_gradients_are_clamped_at_what_float16_can_hold(form):
    parameter = with_gradient([6e4, -6e4], torch.float16)
    clip(Constant(1e5), parameter, gradient_clip_algorithm="value")
    assert parameter.grad.tolist() == [6e4, -6e4]


def test_a_step_without_any_element_does_not_enter_the_history(form):
    parameter, empty = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(0))
    optimizer = AdamW([parameter, empty], fused=True)
    clipper = GradientClipper(Percentile(50), gradient_clip_algorithm="value")
    for element in (1.0, 10.0, None, 4.0):
        parameter.grad = None if element is None else torch.full((2,), element)
        empty.grad = torch.ones(0)
        record = clipper.clip_(optimizer)
        optimizer.step()
        assert float(record.norm) == pytest.approx((element or 0.0) * 2**0.5)
    assert clipper.history.values.tolist() == pytest.approx([1.0, 10.0, 4.0])
    assert float(record.threshold) == pytest.approx(4.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_default_dtype_does_not_reach_the_history(form, dtype):
    torch.set_default_dtype(dtype)
    try:
        clipper, other = GradientClipper(ZScore()), GradientClipper(ZScore())
        record = clipper.clip_([with_gradient([1.2345678])])
        other.load_state_dict(clipper.state_dict())
        other.clip_([with_gradient([1.2345678])])
    finally:
        torch.set_default_dtype(torch.float32)
    assert float(record.threshold) == pytest.approx(1.2345678, rel=1e-6)
    assert other.history.values.tolist() == pytest.approx([1.2345678] * 2, rel=1e-6)
