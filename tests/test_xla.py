"""XLA, compiled and run by its client for the CPU, clips as the CPU does: `make test-xla`."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_xla
from helpers import Net, by_percentile, dataset, read_csv, trainer, weights
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import XLAPrecision
from lightning.pytorch.strategies import SingleDeviceXLAStrategy
from torch import nn
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader
from torch_xla.debug import metrics
from xla_ranks import RUNS as RUNS_ON_TWO
from xla_ranks import CPUClient, fit

from lightning_autoclip import GradientClipper, NonFiniteGradientError, Percentile

SCALES = [1.0 + 5.0 * (row // 4 % 7 == 3) + row % 3 for row in range(84)]  # for 21 batches of four rows
SPOILED = [math.nan if row == 33 else scale for row, scale in enumerate(SCALES)]  # the ninth batch
PER_ROW = 6  # copies to the host for 50 steps: 32 + 16 + 2 of them, numbers and norms


def on_xla() -> dict[str, Any]:
    return {"accelerator": CPUClient(), "strategy": SingleDeviceXLAStrategy(device=torch.device("xla", 0))}


def sgd(parameters):
    return SGD(parameters, lr=0.02, momentum=0.9, weight_decay=0.01)


def plain_sgd(parameters):
    return SGD(parameters, lr=0.05)


def adamw(parameters):
    return AdamW(parameters, lr=0.01)


def capturable(parameters):
    parameters = list(parameters)
    return AdamW(parameters, lr=0.01, capturable=parameters[0].device.type == "xla")  # which torch refuses on the CPU


def train(device: dict[str, Any], *callbacks: Any, optimizer=sgd, scales=SCALES, ckpt=None, options=None, **kwargs):
    """A run: its clippers, and its weights on the CPU."""
    autoclip, model = by_percentile(40, **{"window": 7, "verbose": False, **kwargs}), Net(optimizer)
    rows = DataLoader(dataset(len(scales), scales=scales), 4)
    run = trainer(autoclip, *callbacks, **{"log_every_n_steps": 50, **device, **(options or {})})
    run.fit(model, rows, ckpt_path=ckpt)
    return autoclip.clippers, weights(model).cpu()


def assert_alike(first: Any, second: Any, tolerance: float = 2e-6) -> None:
    for one, other in zip(first[0], second[0], strict=True):
        torch.testing.assert_close(one.history.recorded, other.history.recorded, rtol=tolerance, atol=tolerance)
        assert (one.steps, one.nonfinite_total) == (other.steps, other.nonfinite_total)
    torch.testing.assert_close(first[1], second[1], rtol=tolerance, atol=tolerance)


class Counts(Callback):
    """What the client has compiled and sent to the host, after each step."""

    def __init__(self) -> None:
        self.compiled: list[int] = []
        self.read: list[int] = []
        metrics.clear_all()

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        for seen, name in ((self.compiled, "CompileTime"), (self.read, "TransferFromDeviceTime")):
            seen.append((metrics.metric_data(name) or (0,))[0])


ROUNDED = {"AdamW": 1e-5, "AdamW on the device": 1e-5}  # which divides by what may be small
RUNS: dict[str, dict[str, Any]] = {
    "by norm": {},
    "by value": {"gradient_clip_algorithm": "value"},
    "by norm, bound": {"max_update_ratio": "auto"},
    "by value, bound": {"gradient_clip_algorithm": "value", "max_update_ratio": "auto"},
    "no momentum": {"optimizer": plain_sgd, "max_update_ratio": "auto"},
    "AdamW": {"optimizer": adamw},
    "AdamW on the device": {"optimizer": capturable},
    "full history": {"window": None},
    "groups": {"groups": {"first": "net.0.*"}, "max_update_ratio": "auto"},
    "accumulated": {"options": {"accumulate_grad_batches": 2}},
    "warm-up": {"warmup_steps": 5, "max_threshold": 2.0},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_takes_the_steps_of_the_cpu(name):
    assert_alike(train(on_xla(), **RUNS[name]), train({}, **RUNS[name]), ROUNDED.get(name, 2e-6))


@pytest.mark.parametrize("name", ["by norm, bound", "by value, bound", "no momentum", "AdamW", "AdamW on the device"])
def test_a_step_that_is_not_finite_changes_nothing(name):
    spoiled = train(on_xla(), scales=SPOILED, **RUNS[name])
    assert_alike(spoiled, train({}, scales=SPOILED, **RUNS[name]), ROUNDED.get(name, 2e-6))
    assert spoiled[0][0].nonfinite_total == 1
    assert spoiled[1].isfinite().all()


def test_raise_stops_at_the_step_and_names_the_parameters():
    with pytest.raises(NonFiniteGradientError, match=r"At optimizer step 8 .*of 4 of 4 parameters.*net\.0\.weight"):
        train(on_xla(), scales=SPOILED, nonfinite="raise")


WARM = ["by norm", "by value, bound", "by norm, bound", "no momentum", "AdamW on the device", "full history"]


@pytest.mark.parametrize(("name", "nonfinite"), [*((name, "skip") for name in WARM), ("by norm, bound", "ignore")])
def test_a_warm_run_compiles_nothing_and_reads_nothing_but_its_rows(name, nonfinite):
    counts = Counts()
    train(on_xla(), counts, scales=SCALES[:4] * 220, nonfinite=nonfinite, **RUNS[name])
    # The first step may be read, and of the first row the first step may be on the host, so that it stacks fewer. The
    # weights are measured at the first 16 steps, then at one of 16.
    assert counts.compiled[110] == counts.compiled[-1]
    for first, last in ((105, 148), (155, 198)):
        assert counts.read[first] == counts.read[last]
    assert counts.read[155] - counts.read[105] == PER_ROW


def test_an_optimizer_that_counts_its_steps_on_the_host_costs_one_read_per_step():
    counts = Counts()
    train(on_xla(), counts, scales=SCALES[:4] * 120, options={"log_every_n_steps": 1000}, **RUNS["AdamW"])
    assert counts.read[100] - counts.read[50] == 50
    assert counts.compiled[50] == counts.compiled[100]


def test_raise_costs_one_read_per_step():
    counts = Counts()
    train(on_xla(), counts, scales=SCALES[:4] * 120, nonfinite="raise", options={"log_every_n_steps": 1000})
    assert counts.read[100] - counts.read[50] == 50
    assert counts.compiled[50] == counts.compiled[100]


def test_the_full_history_is_compiled_anew_where_it_has_doubled_and_nowhere_else():
    device, compiled = torch_xla.device(), []
    weight = nn.Parameter(torch.ones(4, device=device))
    optimizer, clipper = SGD([weight], lr=0.0), GradientClipper(Percentile(50), window=None)
    clipper.history.extend(torch.linspace(1.0, 2.0, 1000))
    for step in range(100):
        weight.grad = torch.full((4,), 1.0 + step / 200).to(device)
        clipper.clip_(optimizer)
        optimizer.step()
        torch_xla.sync()
        compiled.append(metrics.metric_data("CompileTime")[0])
    grown_at = 1024 - 1000
    assert compiled[grown_at - 1] == compiled[18]
    assert compiled[grown_at + 1] > compiled[grown_at - 1]
    assert compiled[-1] == compiled[32]  # the first step of 16 that measures the weights, if they are measured


def test_rows_are_those_of_the_cpu():
    rows = []
    for folder, device in (("xla", on_xla()), ("cpu", {})):
        logger = CSVLogger(folder, name="", version="")
        train(
            device,
            scales=SCALES * 3,
            max_update_ratio="auto",
            log_layers=True,
            options={"logger": logger, "log_every_n_steps": 20},
        )
        rows.append([row for row in read_csv(Path(folder, "metrics.csv")) if row["autoclip/grad_norm"]])
    assert [row["step"] for row in rows[0]] == ["19", "39", "59", "62"]
    for one, other in zip(*rows, strict=True):
        assert one.keys() == other.keys()
        assert all(
            (float(one[key]), key) == (pytest.approx(float(other[key]), rel=1e-5, nan_ok=True), key)
            for key in one
            if key.startswith("autoclip")
        )


@pytest.mark.parametrize("second", ["xla", "cpu"])
def test_a_resumed_run_takes_the_same_steps_as_an_uninterrupted_one(second, tmp_path):
    kept = ModelCheckpoint(tmp_path, "half", every_n_epochs=1, save_top_k=-1, enable_version_counter=False)
    half = {"max_epochs": 1, "enable_checkpointing": True}
    options = {"max_update_ratio": "auto", "scales": SPOILED}
    train(on_xla(), kept, options=half, **options)
    whole = train(on_xla(), options={"max_epochs": 2}, **options)
    device = on_xla() if second == "xla" else {}
    resumed = train(device, options={"max_epochs": 2}, ckpt=tmp_path / "half.ckpt", **options)
    assert resumed[0][0].steps == 42
    assert_alike(resumed, whole)


class Scaled(XLAPrecision):
    """A plugin of somebody else that scales the loss."""

    scaler = torch.amp.GradScaler("cpu")


def test_a_loss_scaler_is_refused():
    strategy = SingleDeviceXLAStrategy(device=torch.device("xla", 0), precision_plugin=Scaled())
    with pytest.raises(MisconfigurationException, match=r"does not support the loss scaler of `Scaled`.*bf16-true"):
        train({"accelerator": CPUClient(), "strategy": strategy})


def test_shards_of_xla_are_refused():
    from torch_xla.distributed.fsdp import XlaFullyShardedDataParallel

    model = XlaFullyShardedDataParallel(nn.Linear(4, 2).to(torch_xla.device()))
    model(torch.ones(1, 4, device=torch_xla.device())).sum().backward()
    optimizer = sgd(model.parameters())
    with pytest.raises(ValueError, match=r"holds a part .* Use `XLAStrategy` instead of `XLAFSDPStrategy`"):
        GradientClipper(Percentile(50)).clip_(optimizer)


@pytest.fixture(scope="module")
def two_devices(tmp_path_factory):
    """Where a process of its own has left what its two ranks had in the end."""
    folder = tmp_path_factory.mktemp("ranks")
    program = Path(__file__).with_name("xla_ranks.py")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(program.parent), str(program.parents[1])])}
    subprocess.run([sys.executable, program, folder], env=environment, check=True, timeout=900)
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize("name", RUNS_ON_TWO)
def test_two_devices_take_the_steps_of_one_process(name, two_devices, tmp_path):
    """With the same batches: were the gradients measured before they are reduced, ranks and thresholds would differ."""
    first, second = (torch.load(two_devices / name / "ranks" / f"{rank}.pt") for rank in (0, 1))
    fit(tmp_path / "cpu", name, on_xla=False)
    one = torch.load(tmp_path / "cpu" / "0.pt")
    one.pop("own")
    assert not torch.isclose(first.pop("own"), second.pop("own"), rtol=0.01).any()
    assert first.pop("counts") == second.pop("counts") == one.pop("counts") == (20, 2 * ("NaN" in name))
    for key, expected in one.items():
        assert torch.equal(first[key], second[key])
        torch.testing.assert_close(first[key], expected, rtol=2e-6, atol=1e-6)
