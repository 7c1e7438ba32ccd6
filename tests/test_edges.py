"""Numbers at the edge of what can be measured: the same on every path, and reported as what they are."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from helpers import Net, loader, trainer, with_gradient
from torch import nn
from torch.optim import SGD

from lightning_autoclip import AutoClip, Constant, GradientClipper, History, NonFiniteGradientError, Percentile, ZScore
from lightning_autoclip.gradients import LARGEST_NORM

ALGORITHMS = pytest.mark.parametrize("algorithm", ["norm", "value"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)


def clipped(norm: float, dtype: torch.dtype, algorithm: str):
    """A step of three parameters of four elements, whose gradients have this norm together; and these gradients."""
    parameters = [nn.Parameter(torch.zeros(4, dtype=dtype)) for _ in range(3)]
    for parameter in parameters:
        parameter.grad = torch.full((4,), norm / math.sqrt(12), dtype=dtype)
    optimizer = SGD(parameters, lr=1.0)
    clipper = GradientClipper(Constant(1.0), gradient_clip_algorithm=algorithm, nonfinite="ignore")
    record = clipper.clip_(optimizer)
    optimizer.step()
    return record, torch.cat([parameter.grad for parameter in parameters]), clipper


@DTYPES
@ALGORITHMS
@pytest.mark.parametrize("norm", [1e-18, 1.0, 1.7e19, 2.1e19, 3e38])
def test_a_norm_is_measured_up_to_what_float32_can_square_and_infinite_above(form, dtype, algorithm, norm):
    record, gradient, clipper = clipped(norm, dtype, algorithm)
    if norm > LARGEST_NORM:
        assert float(record.norm) == math.inf
        assert (clipper.nonfinite_steps, len(clipper.history)) == (1, 0)
        assert torch.equal(gradient, torch.full((12,), norm / math.sqrt(12), dtype=dtype))  # no bit changes
        return
    assert float(record.norm) == pytest.approx(norm, rel=0.01)
    assert clipper.nonfinite_steps == 0
    assert float(clipper.history.values) == pytest.approx(float(record.statistic))
    measured = gradient.double().norm() if algorithm == "norm" else gradient.double().abs().max()
    assert 0 < float(measured) <= 1.01


@DTYPES
@ALGORITHMS
@pytest.mark.parametrize("norm", [0.0, 1e-24, 1e-40])
def test_a_norm_below_what_float32_can_square_is_zero_or_measured(form, dtype, algorithm, norm):
    record, gradient, clipper = clipped(norm, dtype, algorithm)
    assert float(record.norm) == 0.0 or (dtype == torch.float64 and float(record.norm) == pytest.approx(norm, rel=1e-4))
    assert clipper.nonfinite_steps == 0
    assert len(clipper.history) == (float(record.statistic) > 0)
    assert gradient.double().norm() == pytest.approx(norm, rel=0.01)  # nothing is clipped


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e25])
def test_an_error_names_no_nan_where_there_is_none(value):
    weight = with_gradient(1.0)
    weight.grad.fill_(value)
    with pytest.raises(NonFiniteGradientError) as caught:
        GradientClipper(Constant(1.0), nonfinite="raise").clip_(SGD([weight], lr=1.0))
    assert ("above 1.8e19" in str(caught.value)) == (not math.isnan(value))


def test_the_report_says_that_a_norm_may_be_beyond_float32():
    class Explodes(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (1e22 if batch_idx == 7 else 1.0)

    autoclip = AutoClip(50, verbose=False)
    with pytest.warns(match="NaN or"):
        trainer(autoclip).fit(Explodes(), loader(n=256))
    (diagnosis,) = [each for each in autoclip.report().diagnoses if each.name == "non-finite gradients"]
    assert "a norm above 1.8e19" in diagnosis.evidence
    assert "step 7" in diagnosis.evidence


@ALGORITHMS
def test_parameters_without_elements_and_of_one_element_are_clipped_with_the_others(form, algorithm):
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in [(0,), (), (3, 0), (2, 2)]]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 3.0)
    record = GradientClipper(Constant(1.0), gradient_clip_algorithm=algorithm).clip_(SGD(parameters, lr=1.0))
    assert float(record.norm) == pytest.approx(3 * math.sqrt(5))
    after = torch.cat([parameter.grad.flatten() for parameter in parameters])
    expected = 1 / math.sqrt(5) if algorithm == "norm" else 1.0
    torch.testing.assert_close(after, torch.full((5,), expected))


def test_a_run_of_zero_gradients_alone_is_reported_as_one(form):
    class Still(Net):
        def loss(self, batch):
            return super().loss(batch) * 0.0

    autoclip = AutoClip(50, verbose=False)
    trainer(autoclip).fit(Still(), loader(n=512))
    figures = autoclip.report().sections[0].figures
    assert (figures.steps, figures.nonfinite, figures.norm_max) == (128, 0, 0.0)
    assert "vanishing norms" in autoclip.report().summary
    autoclip.plot()


@ALGORITHMS
def test_ten_thousand_parameters_are_one_step(form, algorithm):
    parameters = [with_gradient([1.0]) for _ in range(10_000)]
    record = GradientClipper(Constant(0.5), gradient_clip_algorithm=algorithm).clip_(SGD(parameters, lr=1.0))
    assert float(record.norm) == pytest.approx(100.0)
    expected = 0.005 if algorithm == "norm" else 0.5
    torch.testing.assert_close(parameters[-1].grad, torch.tensor([expected]))


# --- arguments --------------------------------------------------------------------------------------------------------


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no")


HUGE = [10**400, -(10**400), 10**5000, Fraction(10**400)]  # no float holds them
ARRAYS = [np.array([1, 2]), torch.ones(2), torch.ones((), device="meta"), [1, 2], {}]
OTHERS = [Unprintable(), "x" * 10_000]
NUMBERS = ["multiplier", "window", "warmup_steps", "max_threshold", "max_update_ratio", "skip_above"]
NUMBERS += ["alert_above", "log_layers"]
WORDS = ["gradient_clip_algorithm", "nonfinite"]


@pytest.mark.parametrize("name", ["percentile", *NUMBERS, *WORDS, "groups", "verbose"])
def test_whatever_comes_the_error_is_short_and_names_the_argument(name):
    values = [*OTHERS, *(ARRAYS if name not in ("groups", "verbose") else [])]
    values += [*HUGE, Fraction(1, 10**400)] if name in NUMBERS else []
    for value in values:
        with pytest.raises((ValueError, TypeError), match=f"Expected `{name}` to ") as caught:
            AutoClip(**{name: value})
        assert len(str(caught.value)) < 400


@pytest.mark.parametrize("value", HUGE, ids=["1e400", "-1e400", "1e5000", "a large fraction"])
def test_numbers_that_no_float_holds_raise_in_policies_too(value):
    for make in (Percentile, AutoClip, Constant, ZScore, lambda window: History(window=window)):
        with pytest.raises((ValueError, TypeError), match=r"^Expected `"):
            make(value)
