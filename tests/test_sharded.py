"""Strategies under which each rank holds a part of the gradient clip as one process would on the same batches."""

from __future__ import annotations

import math
import warnings
from contextlib import nullcontext
from functools import cache, partial

import pytest
import torch
from helpers import FACTORS, ONE_NAN, Batches, Net, assert_bit_equal, by_percentile, trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import FSDPPrecision
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import GradClipAlgorithmType
from models import Figures
from test_ddp import assert_close, kept
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

from lightning_autoclip import Constant, GradientClipper

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
CASES = {f"{name} {algorithm}": (name, {"algorithm": algorithm}) for name in STRATEGIES for algorithm in ALGORITHMS}
SPOILED = ["FSDP2", "FSDP1 FULL_SHARD original"]
for name in (*SPOILED, "tensor parallel"):
    CASES[f"{name} nan"] = name, {"factors": ONE_NAN}
FLAT = "FSDP1 FULL_SHARD flat"
LIMITED = {f"{name} limited": (name, {"ratio": 0.25}) for name in STRATEGIES if not name.endswith("flat")}
LIMITED["FSDP2 limited by value"] = "FSDP2", {"ratio": 0.25, "algorithm": "value"}
RESUMED = [*SPOILED, FLAT]


class Spoil(Callback):
    """Spoils what one rank holds of one parameter's gradient at one step."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == 4 and trainer.global_rank == 1:
            (gradient,) = (
                p.grad for name, p in pl_module.named_parameters() if ".0." in name and name.endswith(".bias")
            )
            (gradient.to_local() if isinstance(gradient, DTensor) else gradient).fill_(math.nan)


class Watch(Figures):
    """Notes norm, threshold and clip coefficient of every step, the last row of the layers, the weights at the end."""

    def __init__(self, prefix):
        super().__init__(*(prefix + key for key in ("grad_norm", "threshold", "clip_coef_mean")))
        self.weights = {}

    def on_train_end(self, trainer, pl_module):  # at the teardown FSDP1 frees the weights
        self.weights = whole_weights(trainer.strategy.model)
        figures = trainer.callback_metrics.items()
        self.layers = {key: float(value) for key, value in figures if key.startswith("autoclip_layers")}


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


def train(
    net=Net, strategy="auto", algorithm="norm", factors=FACTORS, ratio=None, epochs=2, ckpt=None, save=None, spoils=()
):
    """Train and return what this process saw; on one process unless there is a strategy."""
    torch.manual_seed(0)
    settings = {"gradient_clip_algorithm": algorithm, "max_update_ratio": ratio, "log_layers": 2, "verbose": False}
    autoclip = by_percentile(40, window=7, **settings)
    watch = Watch("autoclip/SGD/" if net is MixedOptimizers else "autoclip/")
    saving = [ModelCheckpoint(save.parent, save.stem, enable_version_counter=False)] if save else []
    options = {"max_epochs": epochs, "log_every_n_steps": 1, "use_distributed_sampler": False}
    options |= {"devices": 1 if strategy == "auto" else 2, "enable_checkpointing": bool(saving)}
    run = trainer(*spoils, autoclip, watch, *saving, strategy=strategy, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(net(sgd), datamodule=Batches(factors), ckpt_path=ckpt)
    drifting = [str(warning.message) for warning in caught if "the ranks drift apart" in str(warning.message)]
    clipper = autoclip.clippers[-1]
    limited = [autoclip.report().sections[-1].figures.limited_fraction, *clipper.state_dict()["weight_norms"]]
    steps = torch.tensor(list(watch.steps.values()))
    found = {"steps": steps, "weights": watch.weights, "layers": watch.layers, "limited": limited}
    return found | {"warnings": drifting} | kept(autoclip)


def one_shard_only():
    """A model of one element: rank 1 holds nothing of it. Returns norm and clipped gradient of the whole."""
    layer = nn.Linear(1, 1, bias=False)
    nn.init.ones_(layer.weight)
    fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    seen = []
    for algorithm in ALGORITHMS:
        layer.zero_grad()
        layer(torch.tensor([[3.0]])).sum().backward()
        record = GradientClipper(Constant(1.5), gradient_clip_algorithm=algorithm).clip_(layer.parameters())
        seen.append([float(record.norm), layer.weight.grad.full_tensor().item()])
    return seen


def on_two(name, **kwargs):
    """Train under a strategy as one of two ranks."""
    net, strategy = STRATEGIES[name]
    return train(net, strategy(), **kwargs)


def interrupted(name, path):
    return [on_two(name, epochs=1, save=path), on_two(name, ckpt=path)]


def mixed(net):
    return train(net, model_parallel(2, 1)())


@pytest.fixture(scope="module")
def ranks(two_ranks, tmp_path_factory):
    """What the two ranks saw in a run."""
    folder = tmp_path_factory.mktemp("sharded")
    runs = {case: partial(on_two, name, **options) for case, (name, options) in (CASES | LIMITED).items()}
    runs |= {f"{name} interrupted": partial(interrupted, name, folder / f"{name}.ckpt") for name in RESUMED}
    runs |= {f"{name} spoiled": partial(on_two, name, spoils=[Spoil()]) for name in SPOILED}
    runs |= {"mixed": partial(mixed, Mixed), "mixed optimizers": partial(mixed, MixedOptimizers)}
    return two_ranks.start(runs | {"one shard only": one_shard_only})


@cache
def on_one(net, **kwargs):
    return train(net, factors=ONE_NAN if kwargs.pop("nan", False) else FACTORS, **kwargs)


def one_of(case):
    """What one process sees on the same global batches."""
    name, options = (CASES | LIMITED)[case]
    options = {key: value for key, value in options.items() if key != "factors"}
    return on_one(getattr(STRATEGIES[name][0], "reference", Net), nan=case.endswith("nan"), **options)


def assert_alike(first, second):
    assert_bit_equal(first, second)
    assert repr(first["logs"]) == repr(second["logs"])
    for key, value in first["weights"].items():
        assert torch.equal(value, second["weights"][key])


@pytest.mark.parametrize("case", CASES)
def test_sharded_training_takes_and_logs_the_steps_of_one_process(case, ranks):
    (first, second), one = ranks(case), one_of(case)
    assert_alike(first, second)
    assert not first["warnings"]
    torch.testing.assert_close(first["steps"], one["steps"], rtol=1e-5, atol=1e-6, equal_nan=True)
    assert (one["steps"][:, 2] < 0.9).sum() > 5
    torch.testing.assert_close(first["weights"], one["weights"], rtol=0, atol=1e-6)
    if case.split()[2:3] != ["flat"]:  # a flat parameter has a name and a share of its own
        assert_close(first, one)
        assert first["layers"] == pytest.approx(one["layers"], rel=1e-5, abs=1e-6)
        assert first["logs"][0]["numels"] == ([0] * 4 if case.startswith("FSDP1") else one["logs"][0]["numels"])


@pytest.mark.parametrize("case", LIMITED)
def test_sharded_weights_limit_the_steps_as_those_of_one_process(case, ranks):
    (first, second), one = ranks(case), one_of(case)
    assert_alike(first, second)
    assert first["limited"] == second["limited"]
    assert 0.2 < first["limited"][0] < 1
    torch.testing.assert_close(first["steps"], one["steps"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(first["limited"], one["limited"], rtol=1e-5, atol=0)
    torch.testing.assert_close(first["weights"], one["weights"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_takes_the_same_steps_as_an_uninterrupted_one(name, ranks):
    for whole, (first, second) in zip(ranks(f"{name} norm"), ranks(f"{name} interrupted"), strict=True):
        second["steps"] = torch.cat((first["steps"], second["steps"]))
        assert_alike(whole, second)


@pytest.mark.parametrize("name", SPOILED)
def test_a_nan_that_one_rank_holds_is_skipped_by_all_and_named(name, ranks):
    first, second = ranks(f"{name} spoiled")
    assert_alike(first, second)
    assert first["history"][0][2:] == (20, 1)
    assert all(value.isfinite().all() for value in first["weights"].values())
    (step, _, batch, *_, parameters), *_ = first["logs"][0]["large"]
    assert (step, batch, [parameter for parameter, _ in parameters]) == (4, 4, ["net.0.bias"])
    assert all(math.isfinite(share) for share in first["logs"][0]["shares"].values())


def test_parameters_that_nothing_reduces_are_warned_of_and_clipped_alike(ranks):
    assert_bit_equal(*ranks("mixed"))
    assert ["Some parameters are no DTensors" in message for message in ranks("mixed")[0]["warnings"]] == [True]


def test_an_optimizer_of_plain_parameters_beside_a_sharded_one_decides_alike_on_all_ranks(ranks):
    first, second = ranks("mixed optimizers")
    assert first["history"] == second["history"]
    assert first["history"][-1][2:] == (20, 2)  # of the plain layer


def test_a_rank_that_holds_nothing_joins_in(ranks):
    assert ranks("one shard only") == [[[3.0, 1.5], [3.0, 1.5]]] * 2


def test_lightnings_own_clipping_by_norm_raises_under_fsdp():
    with pytest.raises(MisconfigurationException, match="`gradient_clip_algorithm='norm'` is currently not supported"):
        FSDPPrecision("32-true").clip_gradients(SGD([nn.Parameter(torch.zeros(1))]), 1.0, GradClipAlgorithmType.NORM)
