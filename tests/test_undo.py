"""Where graphs are compiled, a step is taken back on the device. On the CPU, which then passes for such a device."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from helpers import in_form
from torch import nn
from torch.optim import ASGD, SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, RAdam, RMSprop, Rprop

from lightning_autoclip import GradientClipper, Percentile
from lightning_autoclip.clipping import _numbers
from lightning_autoclip.clipping.optimizers import must_be_read
from lightning_autoclip.clipping.undo import can_be_undone

OPTIMIZERS = {
    "SGD": partial(SGD, lr=0.1),
    "SGD with momentum": partial(SGD, lr=0.1, momentum=0.9, dampening=0.5, weight_decay=0.1),
    "Adam": partial(Adam, lr=0.1, amsgrad=True),
    **{each.__name__: partial(each, lr=0.1) for each in (AdamW, NAdam, RAdam, Adamax, Adadelta, Adagrad, RMSprop)},
    **{each.__name__: partial(each, lr=0.1) for each in (ASGD, Rprop)},
}
NORMS = [1.0, 2.0, math.nan, 3.0, math.inf, 0.5]


class SubclassOfSGD(SGD):
    def step(self, closure=None):
        self.steps = getattr(self, "steps", 0) + 1  # which nobody else can take back
        return super().step(closure)


@pytest.fixture
def compiling(monkeypatch):
    monkeypatch.setattr(_numbers, "compiles_graphs", lambda device: True)
    with in_form("accelerator form"):
        yield


def run(optimizer_of, norms, clips=True):
    """The weights and the optimizer's state after steps with these gradients."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.ones(3))
    optimizer, clipper = optimizer_of([weight]), GradientClipper(Percentile(100))
    for norm in norms:
        weight.grad = torch.full((3,), norm / 3**0.5)
        if clips:
            clipper.clip_(optimizer)
        optimizer.step()
    return weight.detach(), optimizer.state[weight]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_that_is_not_finite_leaves_weights_and_state_as_they_were(name, compiling):
    weight, state = run(OPTIMIZERS[name], NORMS)
    expected_weight, expected_state = run(OPTIMIZERS[name], filter(math.isfinite, NORMS), clips=False)
    assert torch.equal(weight, expected_weight)
    assert state.keys() == expected_state.keys()
    for key, value in expected_state.items():
        torch.testing.assert_close(state[key], value, rtol=0, atol=0)


def test_the_first_step_is_read_where_it_creates_the_state_and_no_other_is(compiling):
    for name, is_read in (("SGD", False), ("SGD with momentum", True), ("AdamW", True)):
        weight = nn.Parameter(torch.ones(3))
        weight.grad = torch.ones(3)
        optimizer = OPTIMIZERS[name]([weight])
        assert must_be_read("skip", optimizer, False, False) is is_read
        optimizer.step()
        assert not must_be_read("skip", optimizer, False, False)


def test_a_step_of_an_optimizer_that_keeps_something_elsewhere_is_read(compiling):
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    assert must_be_read("skip", SubclassOfSGD([weight], lr=0.1), False, False)


def test_a_step_that_was_announced_and_never_made_takes_nothing_back(compiling):
    weight = nn.Parameter(torch.ones(3))
    optimizer, clipper = SGD([weight], lr=1.0), GradientClipper(Percentile(100))
    weight.grad = torch.full((3,), math.nan)
    clipper.clip_(optimizer)
    weight.grad = torch.ones(3)
    clipper.clip_(optimizer)
    optimizer.step()
    assert torch.equal(weight, torch.zeros(3))


def test_on_any_other_device_nothing_is_copied():
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    assert not can_be_undone(SGD([weight], lr=0.1))


@pytest.mark.parametrize("loaded", [0, 3])
def test_steps_that_are_not_finite_are_counted_in_integers(loaded, compiling):
    """A float may have eight bits there, and stands still at 256."""
    weight = nn.Parameter(torch.ones(3))
    optimizer, clipper = SGD([weight], lr=0.1), GradientClipper(Percentile(100))
    clipper.load_state_dict({**clipper.state_dict(), "steps": loaded, "nonfinite_total": loaded})
    for count, norm in enumerate((math.nan, math.inf), loaded + 1):
        weight.grad = torch.full((3,), norm)
        record = clipper.clip_(optimizer)
        optimizer.step()
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
