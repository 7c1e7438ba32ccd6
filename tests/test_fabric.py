"""`GradientClipper` in loops of Fabric and of plain PyTorch, against the formula by hand and against one process."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import weights
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision
from lightning.fabric.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import SGD, AdamW, Optimizer

from lightning_autoclip import GradientClipper, Percentile

STEPS = 12
ALGORITHMS = pytest.mark.parametrize("algorithm", ["norm", "value"])
FACTORS = [1.0, 8.0, 0.5, 3.0, 20.0]  # of the loss, in turn


def new_model() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def batch(step: int) -> Tensor:
    """Eight rows, the same at each call."""
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(step))


def loss_of(model: nn.Module, rows: Tensor, step: int) -> Tensor:
    return FACTORS[step % len(FACTORS)] * (model(rows) - rows.sum(1, keepdim=True).sin()).square().mean()


# --- plain PyTorch ----------------------------------------------------------------------------------------------------


def formula(algorithm: str) -> tuple[Tensor, list[float]]:
    """The weights and thresholds of the paper's method, of numpy and torch's own clipping."""
    model, measured, thresholds = new_model(), [], []
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, batch(step), step).backward()
        gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).double().numpy()
        measured.append(np.linalg.norm(gradient) / (math.sqrt(gradient.size) if algorithm == "value" else 1))
        thresholds.append(np.percentile(measured[-7:], 30) * (3 if algorithm == "value" else 1))
        clip = clip_grad_value_ if algorithm == "value" else clip_grad_norm_
        clip(model.parameters(), thresholds[-1])
        optimizer.step()
    return weights(model), thresholds


@ALGORITHMS
@pytest.mark.parametrize("target", ["optimizer", "generator", "scaler", "unscaled by the user"])
def test_a_bare_loop_takes_the_steps_of_numpys_percentile_and_torchs_own_clipping(algorithm, target):
    model, thresholds = new_model(), []
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled="scale" in target)
    clipper = GradientClipper(
        Percentile(30, 3 if algorithm == "value" else 1), gradient_clip_algorithm=algorithm, window=7
    )
    for step in range(STEPS):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, batch(step), step)).backward()
        if target == "unscaled by the user":
            scaler.unscale_(optimizer)
        record = clipper.clip_(*([model.parameters()] if target == "generator" else [optimizer, scaler]))
        scaler.step(optimizer)
        scaler.update()
        thresholds.append(record.threshold)
    expected, limits = formula(algorithm)
    np.testing.assert_allclose(thresholds, limits, rtol=1e-5)
    torch.testing.assert_close(weights(model), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("fused", "scaled"), [(False, False), (True, False), (True, True)])
def test_a_bare_loop_resumed_from_a_file_takes_the_steps_of_an_uninterrupted_one(fused, scaled, tmp_path):
    def train(start: int, stop: int, states: dict[str, Any] | None = None) -> tuple[dict[str, Any], Tensor]:
        model = new_model()
        optimizer = AdamW(model.parameters(), lr=0.01, fused=fused)
        scaler = torch.amp.GradScaler("cpu", enabled=scaled)
        parts = {"model": model, "optimizer": optimizer, "scaler": scaler, "clipper": GradientClipper(Percentile(30))}
        for name, state in (states or {}).items():
            parts[name].load_state_dict(state)
        for step in range(start, stop):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, batch(step), step) * (math.inf if step == 3 else 1)).backward()
            parts["clipper"].clip_(optimizer, scaler)
            scaler.step(optimizer)
            scaler.update()
        return {name: part.state_dict() for name, part in parts.items()}, weights(model)

    torch.save(train(0, 5)[0], tmp_path / "half.pt")
    resumed, resumed_weights = train(5, STEPS, torch.load(tmp_path / "half.pt", weights_only=True))
    whole, whole_weights = train(0, STEPS)
    assert (whole["clipper"]["steps"], whole["clipper"]["nonfinite_steps"]) == (STEPS, 1)
    assert torch.equal(resumed_weights, whole_weights)
    assert resumed["clipper"] == whole["clipper"]


# --- Fabric -----------------------------------------------------------------------------------------------------------


def shard(model: nn.Sequential, mesh: Any) -> nn.Sequential:
    """FSDP2. The last layer has one row: its shard on the second rank is empty."""
    for part in (model[0], model[2], model):
        fully_shard(part, mesh=mesh["data_parallel"])
    return model


class FSDP1(FSDPStrategy):
    """Fabric's FSDP1 with its module on the CPU, which it otherwise refuses."""

    def setup_module(self, module: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(module, device_id=torch.device("cpu"), use_orig_params=True)


STRATEGIES = {
    "DDP": lambda: DDPStrategy(),
    "FSDP2": lambda: ModelParallelStrategy(shard, data_parallel_size=2, tensor_parallel_size=1),
}
CASES = {  # further arguments of `train`
    "norm": {},
    "value": {"algorithm": "value"},
    "a NaN on one rank": {"bad": 4},
    "accumulation": {"accumulate": 3},
}


def train(
    fabric: Fabric,
    algorithm: str = "norm",
    start: int = 0,
    stop: int = STEPS,
    bad: int | None = None,
    accumulate: int = 1,
    save: Path | None = None,
    load: Path | None = None,
) -> dict[str, Any]:
    """Train as Fabric's guide does, this process on its share of the rows; return what it saw.

    The last row of batch ``bad``, which the last rank has, is a NaN.
    """
    model = fabric.setup(new_model())
    optimizer: Optimizer = fabric.setup_optimizers(SGD(model.parameters(), lr=0.05, momentum=0.9))
    scaler = getattr(fabric.strategy.precision, "scaler", None)
    clipper = GradientClipper(Percentile(30), gradient_clip_algorithm=algorithm, window=7)
    state, steps = {"model": model, "optimizer": optimizer}, []
    if load:
        rest = fabric.load(load, state)
        clipper.load_state_dict(rest["clipper"])
        if scaler:
            scaler.load_state_dict(rest["scaler"])
    for step in range(start, stop):
        rows = batch(step)
        if step == bad:
            rows[-1] = math.nan
        share = rows[fabric.global_rank :: fabric.world_size]
        ends = (step + 1) % accumulate == 0
        with fabric.no_backward_sync(model, enabled=not ends and fabric.world_size > 1):
            fabric.backward(loss_of(model, share, step) / accumulate)
        if ends:
            record = clipper.clip_(optimizer, scaler)
            optimizer.step()
            optimizer.zero_grad()
            steps.append([float(record.norm), float(record.threshold), clipper.nonfinite_steps])
    if save:
        rest = {"clipper": clipper.state_dict()} | ({"scaler": scaler.state_dict()} if scaler else {})
        fabric.save(save, state | rest)
    full = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return {"steps": torch.tensor(steps), "weights": torch.cat([p.detach().flatten() for p in full])}


def one_process(scaler: torch.amp.GradScaler | None = None) -> Fabric:
    # By itself Fabric takes precision="16-mixed" for bfloat16 on a CPU, without a scaler.
    return Fabric(
        accelerator="cpu", devices=1, plugins=scaler and [MixedPrecision("16-mixed", "cpu", scaler)], loggers=[]
    )


def assert_equal(first: dict[str, Any], second: dict[str, Any]) -> None:
    """Bit for bit."""
    assert torch.equal(first["steps"].nan_to_num(-1), second["steps"].nan_to_num(-1))
    assert torch.equal(first["weights"], second["weights"])


@pytest.mark.parametrize(("algorithm", "scaled"), [("value", False), ("norm", True)])
def test_a_resumed_fabric_run_takes_the_steps_of_an_uninterrupted_one(algorithm, scaled, tmp_path):
    def run(**kwargs: Any) -> dict[str, Any]:
        return train(one_process(torch.amp.GradScaler("cpu") if scaled else None), algorithm, **kwargs)

    whole, half = run(), run(stop=5, save=tmp_path / "half.ckpt")
    resumed = run(start=5, load=tmp_path / "half.ckpt")
    resumed["steps"] = torch.cat((half["steps"], resumed["steps"]))
    assert len(whole["steps"]) == STEPS
    overflows = whole["steps"][-1, -1]  # until the scale has come down to what float16 can hold
    assert 0 < overflows < 5 if scaled else overflows == 0
    assert_equal(resumed, whole)


def on_two(strategy: str, **kwargs: Any) -> dict[str, Any]:
    """Train as one of two ranks."""
    fabric = Fabric(accelerator="cpu", devices=2, strategy=(STRATEGIES | {"FSDP1": FSDP1})[strategy]())
    fabric.launch()
    return train(fabric, **kwargs)


def interrupted(strategy: str, path: Path) -> list[dict[str, Any]]:
    return [on_two(strategy, stop=5, save=path), on_two(strategy, start=5, load=path)]


def raising() -> str:
    with pytest.raises(ValueError, match="Shard with") as error:
        on_two("FSDP1")
    return str(error.value)


@pytest.fixture(scope="module")
def ranks(two_ranks, tmp_path_factory):
    """What the two ranks saw in a run."""
    folder = tmp_path_factory.mktemp("fabric")
    runs = {f"{name} {case}": partial(on_two, name, **CASES[case]) for name in STRATEGIES for case in CASES}
    runs |= {f"{name} interrupted": partial(interrupted, name, folder / f"{name}.ckpt") for name in STRATEGIES}
    return two_ranks.start(runs | {"FSDP1": raising})


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_of_fabric_decide_alike_and_as_one_on_the_joint_batches(strategy, case, ranks):
    first, second = ranks(f"{strategy} {case}")
    assert len(first["steps"]) == (4 if case == "accumulation" else STEPS)
    assert first["steps"][-1, -1] == (case == "a NaN on one rank")
    assert_equal(first, second)
    one = train(one_process(), **CASES[case])
    torch.testing.assert_close(first["steps"], one["steps"], rtol=1e-5, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(first["weights"], one["weights"], rtol=0, atol=1e-6)


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_resumed_processes_of_fabric_take_the_steps_of_uninterrupted_ones(strategy, ranks):
    for whole, (half, resumed) in zip(ranks(f"{strategy} norm"), ranks(f"{strategy} interrupted"), strict=True):
        resumed["steps"] = torch.cat((half["steps"], resumed["steps"]))
        assert_equal(resumed, whole)


@pytest.mark.distributed
def test_fsdp1_without_its_shards_raises_rather_than_being_clipped_at_two_thresholds(ranks):
    assert ["Shard with `fully_shard` (FSDP2)" in error for error in ranks("FSDP1")] == [True, True]
