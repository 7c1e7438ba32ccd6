"""DeepSpeed's ZeRO on two CPU processes clips as one process would on the same batches: `make test-deepspeed`."""

from __future__ import annotations

import math
import os
import re
from functools import partial
from typing import Any

import pytest
import torch
from helpers import FACTORS, ONE_NAN, Batches, Net, assert_bit_equal, by_percentile, trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from models import Figures
from torch.optim import SGD

from lightning_autoclip import NonFiniteGradientError

pytestmark = pytest.mark.distributed
STAGES = (1, 2, 3)
RAISED = (2, 3)  # 1 and 2 measure alike
KEYS = [f"autoclip/{key}" for key in ("grad_norm", "threshold", "clip_coef_mean")]


class CPUDeepSpeed(DeepSpeedStrategy):
    """Lightning refuses DeepSpeed on the CPU, where it runs with gloo."""

    def __init__(self, stage: int, zero: dict[str, Any] | None = None, **config: Any) -> None:
        config |= {"zero_optimization": {"stage": stage, **(zero or {})}, "zero_allow_untested_optimizer": True}
        super().__init__(config=config, process_group_backend="gloo", cluster_environment=LightningEnvironment())

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", 0)  # DeepSpeed wants an index

    def setup_environment(self) -> None:
        DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:
        self.set_world_ranks()
        import deepspeed  # looks for its accelerator, which `on_two` has set

        # Sums in shared memory, for inference alone: to be compiled, under a lock that outlives a test that is killed.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self._init_deepspeed_distributed()


UNSUPPORTED = {
    "without ZeRO": (lambda: CPUDeepSpeed(0), {}),
    "ZeRO 1 with fp32 accumulation": (
        lambda: CPUDeepSpeed(1, data_types={"grad_accum_dtype": "fp32"}),
        {"precision": "bf16-true"},
    ),
    "clipping by config": (lambda: CPUDeepSpeed(1, gradient_clipping=0.01), {}),
    "without a norm": (lambda: CPUDeepSpeed(1, {"compute_grad_norm": False}), {}),
}


def sgd(parameters):
    return SGD(parameters, lr=0.02, momentum=0.9)


def train(strategy="auto", epochs=2, ckpt=None, save=None, factors=FACTORS, **kwargs):
    torch.manual_seed(0)
    nonfinite, watch = kwargs.pop("nonfinite", "skip"), Figures(*KEYS)
    autoclip = by_percentile(40, window=7, nonfinite=nonfinite, verbose=False)
    callbacks, options = [autoclip, watch], {"max_epochs": epochs, "log_every_n_steps": 1, **kwargs}
    if save:
        callbacks.append(ModelCheckpoint(save.parent, save.stem, enable_version_counter=False))
        options["enable_checkpointing"] = True
    devices = 1 if strategy == "auto" else 2
    run = trainer(*callbacks, strategy=strategy, devices=devices, use_distributed_sampler=False, **options)
    run.fit(Net(sgd), datamodule=Batches(factors), ckpt_path=ckpt)
    clipper = autoclip.clippers[0]
    history = clipper.history.values.tolist(), clipper.steps, clipper.nonfinite_steps
    return {"steps": torch.tensor(list(watch.steps.values())), "history": history}


def on_two(engine, *args, **kwargs):
    """Train under ZeRO as one of two ranks."""
    rank = os.environ["LOCAL_RANK"]
    os.environ |= {"NODE_RANK": "0", "DS_ACCELERATOR": "cpu", "RANK": rank, "WORLD_SIZE": "2"}
    return train(engine(), *args, **kwargs)


def interrupted(stage, path):
    """A run in two parts, and the threshold that the engine has in its second part if that is without the callback."""
    engine = partial(CPUDeepSpeed, stage)
    parts = [on_two(engine, epochs=1, save=path), on_two(engine, ckpt=path)]
    run = trainer(strategy=engine(), devices=2, max_epochs=2)
    run.fit(Net(sgd), datamodule=Batches(FACTORS), ckpt_path=path)
    return [*parts, run.optimizers[0].clip_grad]


def raising(stage):
    with pytest.raises(NonFiniteGradientError) as error:
        on_two(partial(CPUDeepSpeed, stage), factors=ONE_NAN, nonfinite="raise")
    return str(error.value)


def unsupported(name):
    engine, options = UNSUPPORTED[name]
    with pytest.raises(MisconfigurationException) as error:
        on_two(engine, **options)
    return str(error.value)


@pytest.fixture(scope="module")
def ranks(two_ranks, tmp_path_factory):
    """What the two ranks saw in a run."""
    folder, runs = tmp_path_factory.mktemp("deepspeed"), {}
    for stage in STAGES:
        run = partial(on_two, partial(CPUDeepSpeed, stage))
        runs |= {f"{stage}": run, f"{stage} accumulated": partial(run, accumulate_grad_batches=2)}
        runs[f"{stage} spoiled"] = partial(run, factors=ONE_NAN)
        runs[f"{stage} interrupted"] = partial(interrupted, stage, folder / f"{stage}.ckpt")
    runs |= {f"{stage} raised": partial(raising, stage) for stage in RAISED}
    return two_ranks.start(runs | {name: partial(unsupported, name) for name in UNSUPPORTED})


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_engine_takes_the_steps_of_one_process(stage, accumulate, ranks):
    first, second = ranks(f"{stage} accumulated" if accumulate == 2 else f"{stage}")
    assert_bit_equal(first, second)
    # Lightning and DeepSpeed both divide the loss by the number of batches that are accumulated.
    one = train(accumulate_grad_batches=accumulate, factors=[factor / accumulate for factor in FACTORS])
    assert first["history"][1] == (20 if accumulate == 1 else 10)
    # Every norm depends on the weights that the steps before have left, so this compares those too.
    torch.testing.assert_close(first["steps"], one["steps"], rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_takes_the_same_steps_and_without_the_callback_it_is_not_clipped(stage, ranks):
    for whole, (first, second, threshold) in zip(ranks(f"{stage}"), ranks(f"{stage} interrupted"), strict=True):
        second["steps"] = torch.cat((first["steps"], second["steps"]))
        assert_bit_equal(whole, second)
        assert threshold == 0.0


@pytest.mark.parametrize("stage", STAGES)
def test_a_nan_on_one_rank_is_skipped_by_both_and_counted_once(stage, ranks):
    first, second = ranks(f"{stage} spoiled")
    assert_bit_equal(first, second)
    assert first["history"][1:] == (20, 2)
    assert all(math.isfinite(norm) for norm in first["history"][0])


@pytest.mark.parametrize("stage", RAISED)
def test_raise_stops_both_ranks(stage, ranks):
    first, second = ranks(f"{stage} raised")
    assert first == second
    assert first.startswith("At optimizer step 3 (epoch 0, batch 3): The norm of the gradient is ")


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_an_engine_that_cannot_clip_at_our_threshold_raises(name, ranks):
    assert all(re.search(r"needs a ZeRO optimizer, but got|Remove both from the config", text) for text in ranks(name))
