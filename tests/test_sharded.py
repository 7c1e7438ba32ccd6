"""Strategies under which each rank holds a part of the gradient clip as one process would on the same batches."""

from __future__ import annotations

import math
import warnings
from contextlib import nullcontext
from functools import cache, partial

import pytest
import torch
from helpers import FACTORS, Batches, Net, assert_bit_equal, trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import FSDPPrecision
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import GradClipAlgorithmType
from models import Figures
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.optim import SGD

from lightning_autoclip import AutoClip, Constant, GradientClipper

pytestmark = pytest.mark.distributed


class FSDP2(Net):
    """Each layer and the rest sharded over all ranks. The last layer has one row: its shard on rank 1 is empty."""

    def configure_model(self):
        if not isinstance(self.net[0].weight, DTensor):
            for part in (self.net[0], self.net[2], self.net):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])


class TensorParallel(Net):
    """Columns of the first layer and rows of the second; the last bias is replicated."""

    def configure_model(self):
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        parallelize_module(self.net, self.device_mesh["tensor_parallel"], plan)


class TwoMeshes(Net):
    """The first layer on both meshes, the second on one of them."""

    def configure_model(self):
        parallelize_module(self.net[0], self.device_mesh["tensor_parallel"], ColwiseParallel())
        for part in (self.net[0], self.net[2]):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])


class Normed(Net):
    """Begins with a layer norm."""

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.net.insert(0, nn.LayerNorm(4))


class SequenceParallelNet(Normed):
    """The layer norm works on shards of the rows: the gradients of its replicated parameters are still to be summed."""

    reference = Normed

    def configure_model(self):
        mesh, rows = self.device_mesh["tensor_parallel"], (Shard(0),)
        parallelize_module(
            self.net,
            mesh,
            PrepareModuleInput(input_layouts=(Replicate(),), desired_input_layouts=rows, use_local_output=True),
        )
        plan = {"0": SequenceParallel(sequence_dim=0), "1": ColwiseParallel(input_layouts=Shard(0))}
        parallelize_module(self.net, mesh, plan | {"3": RowwiseParallel()})


class Mixed(Net):
    """The first layer sharded; nothing reduces the gradients of the second."""

    def configure_model(self):
        fully_shard(self.net[0], mesh=self.device_mesh["data_parallel"])


class MixedOptimizers(Mixed):
    """An optimizer for each layer; one rank's loss is NaN once, which no sharding spreads to the plain layer."""

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        self.zero_grad()
        spoiled = batch_idx == 3 and self.global_rank == 1
        self.manual_backward(self.loss(batch) * (math.nan if spoiled else 1.0))
        first.step()
        second.step()

    def configure_optimizers(self):
        return [sgd(self.net[i].parameters()) for i in (0, 2)]


class CPUFSDP(FSDPStrategy):
    """Lightning refuses its FSDP on the CPU, where torch's runs with gloo."""

    def __init__(self, sharding, use_orig_params):
        super().__init__(
            sharding_strategy=sharding,
            use_orig_params=use_orig_params,
            auto_wrap_policy={nn.Linear},
            state_dict_type="sharded",
        )

    @property
    def root_device(self):
        return torch.device("cpu")

    def _setup_model(self, model):
        hybrid = {"device_mesh": init_device_mesh("cpu", (1, 2))} if "HYBRID" in str(self.sharding_strategy) else {}
        return FullyShardedDataParallel(
            model,
            device_id=torch.device("cpu"),
            sharding_strategy=self.sharding_strategy,
            **self.kwargs,
            **hybrid,
        )


def model_parallel(data, tensor):
    return lambda: ModelParallelStrategy(data, tensor, save_distributed_checkpoint=False)


STRATEGIES = {
    "FSDP2": (FSDP2, model_parallel(2, 1)),
    "tensor parallel": (TensorParallel, model_parallel(1, 2)),
    "sequence parallel": (SequenceParallelNet, model_parallel(1, 2)),
    "two meshes": (TwoMeshes, model_parallel(2, 1)),
} | {
    f"FSDP1 {sharding} {params}": (Net, lambda s=sharding, p=params: CPUFSDP(ShardingStrategy[s], p == "original"))
    for sharding in ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD")
    for params in ("original", "flat")
}
ALGORITHMS = ("norm", "value")
RATIO = 0.25  # of the weights, per step: holds some of the steps
CASES = [(name, algorithm) for name in STRATEGIES for algorithm in ALGORITHMS]
RESUMED = ["FSDP2", "FSDP1 FULL_SHARD original", "FSDP1 FULL_SHARD flat"]
SPOILED = ["FSDP2", "FSDP1 FULL_SHARD original"]


class Spoil(Callback):
    """Spoils the gradient that one rank holds at one step."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == 4 and trainer.global_rank == 0:
            gradients = [p.grad for p in optimizer.param_groups[0]["params"] if p.grad is not None]
            for gradient in gradients:
                (gradient.to_local() if isinstance(gradient, DTensor) else gradient).fill_(math.nan)


class Watch(Figures):
    """Notes the norm, the threshold and the factor of every step, and the weights at the end."""

    def __init__(self, prefix):
        super().__init__(*(prefix + key for key in ("grad_norm", "threshold", "clip_coef_mean")))
        self.weights = {}

    def on_train_end(self, trainer, pl_module):  # at the teardown FSDP1 frees the weights
        self.weights = whole_weights(trainer.strategy.model)


def whole_weights(root):
    flat = isinstance(root, FullyShardedDataParallel)
    with FullyShardedDataParallel.summon_full_params(root, writeback=False) if flat else nullcontext():
        return {
            name.replace("_fsdp_wrapped_module.", ""): (p.full_tensor() if isinstance(p, DTensor) else p)
            .detach()
            .clone()
            for name, p in root.named_parameters()
        }


def sgd(parameters):
    return SGD(parameters, lr=0.02, momentum=0.9)


def train(net=Net, algorithm="norm", strategy="auto", epochs=2, ckpt=None, save=None, spoils=False, ratio=None):
    torch.manual_seed(0)
    model = net(sgd)
    autoclip = AutoClip(40, window=7, gradient_clip_algorithm=algorithm, max_update_ratio=ratio)
    watch = Watch("autoclip/SGD/" if net is MixedOptimizers else "autoclip/")
    devices = 1 if strategy == "auto" else 2
    options = {"max_epochs": epochs, "log_every_n_steps": 1, "use_distributed_sampler": False}
    callbacks = [*([Spoil()] if spoils else []), autoclip, watch]
    if save:
        callbacks.append(ModelCheckpoint(save.parent, save.stem, enable_version_counter=False))
        options["enable_checkpointing"] = True
    run = trainer(*callbacks, strategy=strategy, devices=devices, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(model, datamodule=Batches(FACTORS), ckpt_path=ckpt)
    clipper = autoclip.clippers[-1]  # the only one, or that of the plain layer
    record = clipper.history.recorded.tolist(), clipper.steps, clipper.nonfinite_total
    bounded = [autoclip.report().sections[-1].figures.bounded_fraction, clipper.state_dict()["weight_norms"]]
    drifting = [str(warning.message) for warning in caught if "the ranks drift apart" in str(warning.message)]
    return {
        "steps": torch.tensor(list(watch.steps.values())),
        "weights": watch.weights,
        "record": record,
        "bounded": bounded,
        "warnings": drifting,
    }


def one_shard_only():
    """A model of one entry: rank 1 holds nothing of it. Returns norm and clipped gradient of the whole."""
    layer = nn.Linear(1, 1, bias=False)
    nn.init.ones_(layer.weight)
    fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    seen = []
    for algorithm in ("norm", "value"):
        layer.zero_grad()
        layer(torch.tensor([[3.0]])).sum().backward()
        record = GradientClipper(Constant(1.5), gradient_clip_algorithm=algorithm).clip_(layer.parameters())
        seen.append([float(record.norm), layer.weight.grad.full_tensor().item()])
    return seen


def on_two(name, **kwargs):
    """Train under a strategy as one of two ranks."""
    net, strategy = STRATEGIES[name]
    return train(net, strategy=strategy(), **kwargs)


def interrupted(name, path):
    return [on_two(name, epochs=1, save=path), on_two(name, ckpt=path)]


def mixed(net):
    return train(net, strategy=model_parallel(2, 1)())


@pytest.fixture(scope="module")
def ranks(two_ranks, tmp_path_factory):
    """What the two ranks saw in a run."""
    folder = tmp_path_factory.mktemp("sharded")
    runs = {f"{name} {algorithm}": partial(on_two, name, algorithm=algorithm) for name, algorithm in CASES}
    runs |= {
        f"{name} {algorithm} bounded": partial(on_two, name, algorithm=algorithm, ratio=RATIO)
        for name, algorithm in CASES
    }
    runs |= {f"{name} interrupted": partial(interrupted, name, folder / f"{name}.ckpt") for name in RESUMED}
    runs |= {f"{name} spoiled": partial(on_two, name, spoils=True) for name in SPOILED}
    runs |= {"mixed": partial(mixed, Mixed), "mixed optimizers": partial(mixed, MixedOptimizers)}
    return two_ranks.start(runs | {"one shard only": one_shard_only})


@cache
def on_one(net, algorithm, ratio=None):
    return train(net, algorithm, ratio=ratio)


@pytest.mark.parametrize(("name", "algorithm"), CASES)
def test_sharded_training_takes_the_steps_of_one_process(name, algorithm, ranks):
    first, second = ranks(f"{name} {algorithm}")
    assert_bit_equal(first, second)
    assert not first["warnings"]
    one = on_one(getattr(STRATEGIES[name][0], "reference", Net), algorithm)
    torch.testing.assert_close(first["steps"], one["steps"], rtol=1e-5, atol=1e-6)
    assert (one["steps"][:, 2] < 0.9).sum() > 5
    torch.testing.assert_close(first["weights"], one["weights"], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("name", "algorithm"), CASES)
def test_sharded_weights_bound_the_steps_as_those_of_one_process(name, algorithm, ranks):
    first, second = ranks(f"{name} {algorithm} bounded")
    assert_bit_equal(first, second)
    assert first["bounded"][0] == second["bounded"][0]
    assert torch.equal(first["bounded"][1], second["bounded"][1])
    assert 0.2 < first["bounded"][0] < 1
    if name.endswith("flat"):
        return  # a flat parameter is bounded as one, with its bias, which is not what one process does
    one = on_one(getattr(STRATEGIES[name][0], "reference", Net), algorithm, RATIO)
    torch.testing.assert_close(first["steps"], one["steps"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(first["bounded"], one["bounded"], rtol=1e-5, atol=0)
    torch.testing.assert_close(first["weights"], one["weights"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_takes_the_same_steps_as_an_uninterrupted_one(name, ranks):
    for whole, (first, second) in zip(ranks(f"{name} norm"), ranks(f"{name} interrupted"), strict=True):
        second["steps"] = torch.cat((first["steps"], second["steps"]))
        assert_bit_equal(whole, second)
        for key, value in whole["weights"].items():
            assert torch.equal(value, second["weights"][key])


@pytest.mark.parametrize("name", SPOILED)
def test_a_nan_that_one_rank_holds_is_skipped_by_all(name, ranks):
    first, second = ranks(f"{name} spoiled")
    assert_bit_equal(first, second)
    assert first["record"][1:] == (20, 1)
    assert all(value.isfinite().all() for value in first["weights"].values())


def test_parameters_that_nothing_reduces_are_warned_of_and_clipped_alike(ranks):
    assert_bit_equal(*ranks("mixed"))
    assert ["Some parameters are no DTensors" in message for message in ranks("mixed")[0]["warnings"]] == [True]


def test_an_optimizer_of_plain_parameters_beside_a_sharded_one_decides_alike_on_all_ranks(ranks):
    first, second = ranks("mixed optimizers")
    assert first["record"] == second["record"]
    assert first["record"][1:] == (20, 2)


def test_a_rank_that_holds_nothing_joins_in(ranks):
    assert ranks("one shard only") == [[[3.0, 1.5], [3.0, 1.5]]] * 2


def test_lightnings_own_clipping_by_norm_is_refused_under_fsdp():
    with pytest.raises(MisconfigurationException, match="`gradient_clip_algorithm='norm'` is currently not supported"):
        FSDPPrecision("32-true").clip_gradients(SGD([nn.Parameter(torch.zeros(1))]), 1.0, GradClipAlgorithmType.NORM)
