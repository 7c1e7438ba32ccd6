"""XLA, compiled and run by its client for the CPU, clips as the CPU does: `make test-xla`."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

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
from models import OneBackward
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from torch_xla.debug import metrics
from xla_ranks import RUNS as RUNS_ON_TWO
from xla_ranks import CPUClient, fit

from lightning_autoclip import GradientClipper, NonFiniteGradientError, Percentile

SCALES = [1.0 + 5.0 * (row // 4 % 7 == 3) + row % 3 for row in range(84)]  # for 21 batches of four rows
FAR = [100.0 if row // 4 in (25, 40, 95) else 1.0 + row % 3 for row in range(480)]  # three batches of 120
SPOILED = [math.nan if row == 33 else scale for row, scale in enumerate(SCALES)]  # the ninth batch
EVERY = 10  # steps, at one of which clipping by value reads the norm after clipping too


@pytest.fixture(scope="module", autouse=True)
def _xla_is_there_before_the_first_backward_pass():
    """Autograd counts the devices once (torch 2.9), and a run on the CPU may come first."""
    torch_xla.device()


def on_xla(precision: XLAPrecision | None = None) -> dict[str, Any]:
    strategy = SingleDeviceXLAStrategy(device=torch.device("xla", 0), precision_plugin=precision)
    return {"accelerator": CPUClient(), "strategy": strategy}


def sgd(parameters):
    return SGD(parameters, lr=0.02, momentum=0.9, weight_decay=0.01)


def plain_sgd(parameters):
    return SGD(parameters, lr=0.05)


def capturable(parameters):
    parameters = list(parameters)
    return AdamW(parameters, lr=0.01, capturable=parameters[0].device.type == "xla")  # which torch refuses on the CPU


def scheduled(parameters, made=sgd):
    optimizer = made(parameters)
    schedule = LambdaLR(optimizer, lambda step: 1 / (1 + step / 100))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Alternating(Net):
    """Manual optimization: the two layers have an optimizer each, of which the second steps at each second batch."""

    def __init__(self, classes):
        super().__init__()
        self.automatic_optimization, self.classes = False, classes

    training_step = OneBackward.training_step
    configure_optimizers = OneBackward.configure_optimizers


class InBFloat16(Net):
    """Weights, gradients and what the optimizer keeps are of bfloat16."""

    def __init__(self, optimizer=None):
        super().__init__(optimizer)
        self.to(torch.bfloat16)

    def loss(self, batch):
        x, y, scale = batch
        return super().loss((x.to(torch.bfloat16), y, scale))


class Mixed(Net):
    """What `precision="bf16-mixed"`, which Lightning does not offer on XLA, does elsewhere."""

    def loss(self, batch):
        with torch.autocast(self.device.type, torch.bfloat16):
            return super().loss(batch)


class Run(NamedTuple):
    """What is left of a run: its clippers, its weights on the CPU, and how many steps were skipped as outliers."""

    clippers: list[GradientClipper]
    weights: torch.Tensor
    skipped: int


def train(
    device: dict[str, Any], *callbacks: Any, net=Net, optimizer=sgd, scales=SCALES, ckpt=None, options=None, **kwargs
) -> Run:
    autoclip, model = by_percentile(40, **{"window": 7, "verbose": False, **kwargs}), net(optimizer)
    rows = DataLoader(dataset(len(scales), scales=scales), 4)
    run = trainer(autoclip, *callbacks, **{"log_every_n_steps": 50, **device, **(options or {})})
    run.fit(model, rows, ckpt_path=ckpt)
    skipped = sum(section.figures.skipped for section in autoclip.report().sections)
    return Run(autoclip.clippers, weights(model).cpu(), skipped)


def assert_alike(first: Run, second: Run, tolerance: float = 2e-6) -> None:
    for one, other in zip(first.clippers, second.clippers, strict=True):
        torch.testing.assert_close(one.history.values, other.history.values, rtol=tolerance, atol=tolerance)
        assert (one.steps, one.nonfinite_steps) == (other.steps, other.nonfinite_steps)
    torch.testing.assert_close(first.weights, second.weights, rtol=tolerance, atol=tolerance)
    assert first.skipped == second.skipped


ROUNDED = dict.fromkeys(("AdamW on the device", "two optimizers"), 1e-5)  # Adam divides by what may be small
RUNS: dict[str, dict[str, Any]] = {
    "by norm": {},
    "by norm, limited": {"max_update_ratio": 0.003},
    "by value, limited": {"gradient_clip_algorithm": "value", "max_update_ratio": "auto"},
    "no momentum": {"optimizer": plain_sgd, "max_update_ratio": "auto"},
    "AdamW on the device": {"optimizer": capturable},
    "groups": {"groups": {"first": "net.0.*"}, "max_update_ratio": "auto"},
    "accumulated": {"options": {"accumulate_grad_batches": 2}},
    "warm-up": {"warmup_steps": 5, "max_threshold": 2.0},
    "a rate that changes": {"optimizer": scheduled, "max_update_ratio": 0.003},
    "two optimizers": {"net": Alternating, "optimizer": (sgd, capturable)},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_takes_the_steps_of_the_cpu(name):
    assert_alike(train(on_xla(), **RUNS[name]), train({}, **RUNS[name]), ROUNDED.get(name, 2e-6))


@pytest.mark.parametrize("name", ["by norm, limited", "by value, limited", "AdamW on the device"])
def test_a_non_finite_step_and_outliers_are_skipped(name):
    scales = [math.nan if row == 33 else factor for row, factor in enumerate(FAR[:200])]
    run = train(on_xla(), scales=scales, skip_above=8, **RUNS[name])
    assert_alike(run, train({}, scales=scales, skip_above=8, **RUNS[name]), ROUNDED.get(name, 2e-6))
    assert run.clippers[0].nonfinite_steps == 1
    assert run.skipped == 2
    assert run.weights.isfinite().all()


BFLOAT16: dict[str, dict[str, Any]] = {
    "by value": {"net": InBFloat16, "gradient_clip_algorithm": "value"},
    "limited": {"net": InBFloat16, "max_update_ratio": 0.003, "optimizer": plain_sgd},
    "mixed": {"net": Mixed},
}


@pytest.mark.parametrize("name", BFLOAT16)
def test_a_run_in_bfloat16_takes_the_steps_of_the_cpu(name):
    run = train(on_xla(), scales=SPOILED, **BFLOAT16[name])
    assert_alike(run, train({}, scales=SPOILED, **BFLOAT16[name]), 0.03)  # both round at each operation, not alike


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_gradients_of_bfloat16_are_measured_in_float32_and_rounded_once_when_clipped(algorithm):
    draw, clipper = torch.Generator().manual_seed(0), GradientClipper(Percentile(40), gradient_clip_algorithm=algorithm)
    weight = nn.Parameter(torch.ones(300, 7, device=torch_xla.device(), dtype=torch.bfloat16))
    for step in range(10):
        gradient = (torch.randn(300, 7, generator=draw) * (1 + step % 3)).bfloat16()
        weight.grad = gradient.to(weight.device)
        record, exact = clipper.clip_([weight]), gradient.double()
        assert record.norm == pytest.approx(float(exact.norm()), rel=1e-6)
        clamped = exact.clamp(-record.threshold, record.threshold)
        expected = clamped if algorithm == "value" else exact * min(1.0, record.threshold / record.norm)
        torch.testing.assert_close(weight.grad.cpu().double(), expected, rtol=2**-8, atol=0)


def train_in_true_bfloat16(runs):
    """In a process of its own, whose client reads once whether a float32 is of bfloat16: what is left of each run."""
    return [left_of(train(on_xla(XLAPrecision("bf16-true")), **options)) for options in runs]


def left_of(run):
    (clipper,) = run.clippers
    return clipper.history.values, run.weights.float(), clipper.steps, clipper.nonfinite_steps


def test_true_bfloat16_is_that_of_the_cpu():
    runs = [{"scales": SPOILED}, {"gradient_clip_algorithm": "value", "max_update_ratio": 0.003}]
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        found = process.submit(train_in_true_bfloat16, runs).result(timeout=300)
    for one, options in zip(found, runs, strict=True):
        other = left_of(train({}, options={"precision": "bf16-true"}, **options))
        assert one[2:] == other[2:]
        torch.testing.assert_close(one[:2], other[:2], rtol=0.03, atol=0.03)
    assert torch.equal(found[0][1], found[0][1].bfloat16().float())  # or it has trained in float32


def test_raise_stops_at_the_step_and_names_the_parameters():
    with pytest.raises(NonFiniteGradientError, match=r"At optimizer step 8 .*of 4 of 4 parameters.*net\.0\.weight"):
        train(on_xla(), scales=SPOILED, nonfinite="raise")


class Counts(Callback):
    """What the client has compiled and sent to the host, after each step."""

    def __init__(self) -> None:
        self.compiled: list[int] = []
        self.read: list[int] = []
        metrics.clear_all()

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        for seen, name in ((self.compiled, "CompileTime"), (self.read, "TransferFromDeviceTime")):
            seen.append((metrics.metric_data(name) or (0,))[0])


WARM: dict[str, dict[str, Any]] = {
    **{name: RUNS[name] for name in ("by norm", "by norm, limited", "by value, limited", "AdamW on the device")},
    "ignore": {"nonfinite": "ignore"},
    "raise": {"nonfinite": "raise", "optimizer": plain_sgd},
    "outliers": {"scales": FAR, "skip_above": 8},
    "a rate that changes": RUNS["a rate that changes"],
    "a rate of AdamW that changes": {"optimizer": partial(scheduled, made=capturable)},
    "accumulated": {"options": {"accumulate_grad_batches": 2}},
    "bfloat16": BFLOAT16["limited"],
    "mixed": BFLOAT16["mixed"],
}


@pytest.mark.parametrize("name", WARM)
def test_a_warm_step_compiles_nothing_and_is_read_once(name):
    """Warm: whether it is clipped, limited, measures the weights and so on are graphs of their own, compiled once."""
    counts = Counts()
    train(on_xla(), counts, **{"scales": SCALES[:4] * 150, **WARM[name]})
    assert counts.compiled[90] == counts.compiled[-2]
    steps = 50 // (2 if name == "accumulated" else 1)
    assert counts.read[110] - counts.read[60] == steps + (50 // EVERY if "value" in name else 0)


def test_a_warm_step_of_two_optimizers_compiles_nothing_and_is_read_once_by_each():
    counts = Counts()
    train(on_xla(), counts, scales=SCALES[:4] * 150, **RUNS["two optimizers"])
    assert counts.compiled[90] == counts.compiled[-2]
    assert counts.read[110] - counts.read[60] == 50 + 25


def test_rows_are_those_of_the_cpu():
    rows = []
    for folder, device in (("xla", on_xla()), ("cpu", {})):
        options = {"logger": CSVLogger(folder, name="", version=""), "log_every_n_steps": 20}
        train(device, scales=SCALES * 3, max_update_ratio="auto", log_layers=True, options=options)
        rows.append([row for row in read_csv(Path(folder, "metrics.csv")) if row["autoclip/grad_norm"]])
    assert [row["step"] for row in rows[0]] == ["19", "39", "59", "62"]
    for one, other in zip(*rows, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            if key.startswith("autoclip"):
                assert float(one[key]) == pytest.approx(float(other[key]), rel=1e-5, nan_ok=True), key


@pytest.mark.parametrize("second", ["xla", "cpu"])
def test_a_resumed_run_takes_the_same_steps_as_an_uninterrupted_one(second, tmp_path):
    kept = ModelCheckpoint(tmp_path, "half", every_n_epochs=1, save_top_k=-1, enable_version_counter=False)
    half = {"max_epochs": 1, "enable_checkpointing": True}
    options = {"max_update_ratio": "auto", "skip_above": 3, "scales": SPOILED}
    train(on_xla(), kept, options=half, **options)
    whole = train(on_xla(), options={"max_epochs": 2}, **options)
    device = on_xla() if second == "xla" else {}
    resumed = train(device, options={"max_epochs": 2}, ckpt=tmp_path / "half.ckpt", **options)
    assert resumed.clippers[0].steps == 42
    assert whole.skipped > 0
    assert_alike(resumed, whole)


class Scaled(XLAPrecision):
    """A plugin of somebody else that scales the loss."""

    scaler = torch.amp.GradScaler("cpu")


def test_a_loss_scaler_raises():
    with pytest.raises(MisconfigurationException, match=r"does not support the loss scaler of `Scaled`.*bf16-true"):
        train(on_xla(Scaled()))


def test_shards_of_xla_raise():
    from torch_xla.distributed.fsdp import XlaFullyShardedDataParallel

    model = XlaFullyShardedDataParallel(nn.Linear(4, 2).to(torch_xla.device()))
    model(torch.ones(1, 4, device=torch_xla.device())).sum().backward()
    with pytest.raises(ValueError, match=r"holds a part .* Use `XLAStrategy` instead of `XLAFSDPStrategy`"):
        GradientClipper(Percentile(50)).clip_(sgd(model.parameters()))


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


@pytest.mark.distributed
def test_a_resumed_run_on_two_devices_equals_an_uninterrupted_one(two_devices):
    for rank in (0, 1):
        whole, resumed = (torch.load(two_devices / name / "ranks" / f"{rank}.pt") for name in ("limited", "resumed"))
        assert len(resumed.pop("own")) == len(whole.pop("own")) / 2
        assert resumed.pop("counts") == whole.pop("counts") == (20, 0)
        for key, expected in whole.items():
            assert torch.equal(resumed[key], expected)
