"""Two processes tell of the same spikes and shares, which are those of one process on the same global batches."""

from __future__ import annotations

import math
from dataclasses import astuple
from functools import partial
from typing import Any

import pytest
import torch
from helpers import FACTORS, ONE_NAN, Batches, Net, by_percentile, trainer
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from test_ddp import UNUSED, Unused
from test_sharded import STRATEGIES as SHARDED
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import SGD

pytestmark = pytest.mark.distributed

NAMES = ["net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias"]


def ddp(unused: bool = False) -> DDPStrategy:
    return DDPStrategy(find_unused_parameters=unused)


FSDP1 = "FSDP1 FULL_SHARD original"
RUNS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "DDP": (Net, ddp, {}),
    "DDP by value": (Net, ddp, {"algorithm": "value"}),
    "DDP accumulating": (Net, ddp, {"accumulate": 3}),
    "DDP nan": (Net, ddp, {"factors": ONE_NAN}),
    "DDP unused": (Unused, lambda: ddp(True), {"factors": UNUSED["factors"]}),
}
for name in ("FSDP2", "tensor parallel", FSDP1, "FSDP1 NO_SHARD original", "FSDP1 HYBRID_SHARD original"):
    RUNS[name] = (*SHARDED[name], {})
    RUNS[f"{name} by value"] = (*SHARDED[name], {"algorithm": "value"})
    RUNS[f"{name} nan"] = (*SHARDED[name], {"factors": ONE_NAN})
RESUMED = ("DDP", "FSDP2", FSDP1)
SPOILED = ("FSDP2", FSDP1)


class Spoil(Callback):
    """Spoils what the second rank holds of one parameter's gradient at one step."""

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if trainer.global_step == 4 and trainer.global_rank == 1:
            (gradient,) = (
                p.grad for name, p in pl_module.named_parameters() if ".0." in name and name.endswith(".bias")
            )
            (gradient.to_local() if isinstance(gradient, DTensor) else gradient).fill_(math.nan)


class Watch(Callback):
    """Holds the layers' figures in every row."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        metrics = trainer.callback_metrics.items()
        self.rows.append({key: float(value) for key, value in metrics if key.startswith("autoclip_layers")})


def sgd(parameters: Any) -> SGD:
    return SGD(parameters, lr=0.02, momentum=0.9)


def train(
    net: Any,
    strategy: Any = "auto",
    algorithm: str = "norm",
    accumulate: int = 1,
    factors: Any = FACTORS,
    epochs: int = 2,
    spoils: bool = False,
    ckpt: Any = None,
    save: Any = None,
) -> dict[str, Any]:
    """What this process has to tell of a run; on one process unless there is a strategy."""
    autoclip = by_percentile(40, window=7, gradient_clip_algorithm=algorithm, log_layers=2, verbose=False)
    watch, saving = Watch(), [] if save is None else [ModelCheckpoint(save.parent, save.stem)]
    run = trainer(
        *([Spoil()] if spoils else []),
        autoclip,
        watch,
        *saving,
        max_epochs=epochs,
        strategy=strategy,
        devices=1 if strategy == "auto" else 2,
        enable_checkpointing=bool(saving),
        log_every_n_steps=3,
        use_distributed_sampler=False,
        accumulate_grad_batches=accumulate,
    )
    run.fit(net(sgd), datamodule=Batches(factors), ckpt_path=ckpt)
    (trace,) = autoclip.traces.values()
    return {
        "spikes": autoclip.spikes(),
        "figures": [(*spike.point, *astuple(spike)[1:]) for spike in [*trace.nonfinite, *trace.largest]],
        "bins": [astuple(one) for one in trace.bins],
        "shares": trace.shares,
        "numels": trace.numels,
        "rows": watch.rows,
    }


def on_two(name: str, **kwargs: Any) -> dict[str, Any]:
    """A run as one of two ranks."""
    net, strategy, options = RUNS[name]
    return train(net, strategy(), **options, **kwargs)


def resumed(name: str, path: Any) -> dict[str, Any]:
    on_two(name, epochs=1, save=path)
    return on_two(name, ckpt=path)


@pytest.fixture(scope="module")
def ranks(two_ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the two ranks told of a run."""
    folder = tmp_path_factory.mktemp("layers")
    runs: dict[str, Any] = {name: partial(on_two, name) for name in RUNS}
    runs |= {f"{name} resumed": partial(resumed, name, folder / f"{name}.ckpt") for name in RESUMED}
    return two_ranks.start(runs | {f"{name} spoiled": partial(on_two, name, spoils=True) for name in SPOILED})


def close(expected: Any) -> Any:
    return pytest.approx(expected, rel=1e-5, abs=1e-5, nan_ok=True)


def assert_close(two: dict[str, Any], one: dict[str, Any]) -> None:
    assert [[*row[:4]] for row in two["figures"]] == [[*row[:4]] for row in one["figures"]], "step, epoch, batches"
    assert [row["batches"] for row in two["spikes"]] == [row["batches"] for row in one["spikes"]]
    for ours, expected in zip(two["figures"], one["figures"], strict=True):
        assert ours[4:-1] == close(expected[4:-1])
        assert [name for name, _ in ours[-1]] == [name for name, _ in expected[-1]]
        assert [share for _, share in ours[-1]] == close([share for _, share in expected[-1]])
    assert two["shares"] == close(one["shares"])
    assert list(two["shares"]) == list(one["shares"])
    for ours, expected in zip(two["bins"], one["bins"], strict=True):
        assert ours == close(expected)
    for ours, expected in zip(two["rows"], one["rows"], strict=True):
        assert ours == close(expected)


@pytest.mark.parametrize("name", RUNS)
def test_both_ranks_tell_the_same_to_the_bit(name: str, ranks: Any) -> None:
    first, second = ranks(name)
    assert len(first["spikes"]) == (8 if "accumulating" in name else 20)
    assert repr(first) == repr(second)


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_tell_what_one_does_on_the_same_global_batches(name: str, ranks: Any) -> None:
    net, _, options = RUNS[name]
    two, one = ranks(name)[0], train(net if net is Unused else Net, **options)
    assert_close(two, one)
    assert set(two["shares"]) >= set(NAMES), "names without what FSDP puts in between"
    assert sum(two["shares"].values()) == pytest.approx(1)
    assert two["numels"] == ([0] * 4 if name.startswith("FSDP1") else one["numels"])
    assert any(row for row in two["rows"])


def test_a_layer_that_nothing_uses_and_one_that_a_rank_does_not_use_have_their_shares(ranks: Any) -> None:
    shares = ranks("DDP unused")[0]["shares"]
    assert (shares["never.weight"], shares["never.bias"]) == (0, 0)
    assert shares["odd.weight"] > 0


@pytest.mark.parametrize("name", SPOILED)
def test_a_parameter_that_is_not_finite_on_one_rank_is_named_by_both(name: str, ranks: Any) -> None:
    for told in ranks(f"{name} spoiled"):
        (spike,) = (row for row in told["spikes"] if not math.isfinite(row["norm"]))
        assert (spike["step"], spike["batches"], spike["parameters"]) == (4, "4", "net.0.bias")
        assert all(math.isfinite(share) for share in told["shares"].values())


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_tells_the_same_as_an_uninterrupted_one(name: str, ranks: Any) -> None:
    for whole, gone_on in zip(ranks(name), ranks(f"{name} resumed"), strict=True):
        for key in ("spikes", "shares"):
            assert repr(gone_on[key]) == repr(whole[key])
        assert Tensor.equal(torch.tensor(gone_on["bins"]).nan_to_num(), torch.tensor(whole["bins"]).nan_to_num())
