"""Two processes decide of each group what one process would on the same global batches, with one collective for all."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from helpers import FACTORS, Batches, Net, trainer
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy
from test_groups import KEYS, LAYERS, Watch, autoclip, histories
from test_sharded import FSDP2, STRATEGIES
from torch import distributed
from torch.optim import SGD

pytestmark = pytest.mark.distributed
BIASES = {"biases": "*.bias"}  # under FSDP1 the first rank holds none of them
FSDP1 = "FSDP1 FULL_SHARD original"
RUNS = {"DDP value": ("DDP", "value"), "FSDP2 norm": ("FSDP2", "norm"), "FSDP1 value": (FSDP1, "value")}
REDUCTIONS: list[str] = []  # of this process


class Frozen(FSDP2):
    """Its first layer does not learn."""

    def configure_model(self):
        super().configure_model()
        self.net[0].requires_grad_(False)


class Meter(Callback):
    """Notes how many reductions there have been at each step: one before and one after the clipping."""

    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, *args):
        self.seen.append(len(REDUCTIONS))


def train(net=Net, strategy="auto", algorithm="norm", groups=BIASES):
    torch.manual_seed(0)
    before, after, watch = Meter(), Meter(), Watch()
    callback = autoclip(groups, gradient_clip_algorithm=algorithm, multiplier=1.0)
    devices, options = 1 if strategy == "auto" else 2, {"log_every_n_steps": 1, "use_distributed_sampler": False}
    run = trainer(before, callback, after, watch, max_epochs=2, strategy=strategy, devices=devices, **options)
    run.fit(net(lambda parameters: SGD(parameters, lr=0.02, momentum=0.9)), datamodule=Batches(FACTORS))
    reductions = [after - before for before, after in zip(before.seen, after.seen, strict=True)]
    names = [log.names for log in callback.logs.values()]
    return {"steps": watch.steps, "histories": histories(callback), "names": names, "reductions": reductions}


def counting_reductions(*args, **kwargs):
    all_reduce = distributed.all_reduce

    def counted(*args, **kwargs):
        REDUCTIONS.append("all_reduce")
        return all_reduce(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "all_reduce", counted)
        return train(*args, **kwargs)


def on_two(run):
    """A run as one of two ranks."""
    name, algorithm = RUNS[run]
    net, strategy = (Net, DDPStrategy) if name == "DDP" else STRATEGIES[name]
    return counting_reductions(net, strategy(), algorithm)


def frozen():
    return counting_reductions(Frozen, STRATEGIES["FSDP2"][1](), groups=LAYERS)


@pytest.fixture(scope="module")
def ranks(two_ranks):
    """What the two ranks saw in a run."""
    return two_ranks.start({run: partial(on_two, run) for run in RUNS} | {"frozen": frozen})


@pytest.mark.parametrize("run", RUNS)
def test_two_processes_decide_alike_and_as_one_on_the_same_global_batches(run, ranks):
    (first, second), one = ranks(run), train(algorithm=RUNS[run][1])
    assert repr(first) == repr(second)
    assert first["names"] == one["names"] == [["net.0.weight", "net.2.weight"], ["net.0.bias", "net.2.bias"]]
    assert len(first["steps"]) == len(one["steps"]) == 20
    for two, alone in zip(first["steps"], one["steps"], strict=True):
        assert len(two) == 4
        assert two == pytest.approx(alone, rel=1e-5)
    assert any(step["autoclip/biases/grad_norm"] > step["autoclip/biases/threshold"] for step in first["steps"])


def test_one_collective_serves_all_groups_of_a_step_where_gradients_are_shared(ranks):
    assert [ranks(run)[0]["reductions"] for run in ("DDP value", "FSDP2 norm")] == [[0] * 20, [1] * 20]


def test_a_frozen_group_of_shared_gradients_makes_no_step(ranks):
    first, second = ranks("frozen")
    assert repr(first) == repr(second)
    assert [first["histories"][key][1:] for key in KEYS] == [(0, 0), (20, 0)]
    for step in first["steps"]:
        assert [key for key in step if math.isfinite(step[key])] == [f"{KEYS[1]}grad_norm", f"{KEYS[1]}threshold"]
