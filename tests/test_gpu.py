"""What only a GPU can show: no wait in a step, few launches, and the CPU's results. Needs CUDA: `pytest -m gpu`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Net, loader, trainer, weights
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import FSDPPrecision, MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.optim import SGD, AdamW
from torch.profiler import ProfilerActivity, profile

from lightning_autoclip import AutoClip, Constant, GradientClipper, Percentile

pytestmark = pytest.mark.gpu

FUSED = pytest.mark.parametrize("fused", [False, True], ids=["ordinary", "fused"])
ALGORITHMS = pytest.mark.parametrize("algorithm", ["norm", "value"])


ONE_FAR_TOO_LARGE = [1.0] * 100 + [300.0] * 4 + [1.0] * 24  # step 25 of batches of four


class Waits(Callback):
    """Sets what becomes of the host's waits for the GPU from here on, in a hook; two of it go around the clipping."""

    def __init__(self, mode: str, hook: str = "on_before_optimizer_step") -> None:
        self.mode = mode
        setattr(self, hook, self.enter)

    def enter(self, trainer: Any, *others: Any) -> None:
        # Constants are copied there at the first step that is made, or after it if it had to be read; a scaler skips
        # some before it.
        if trainer.global_step > 5:
            torch.cuda.set_sync_debug_mode(self.mode)


@pytest.fixture(autouse=True)
def _waits_are_allowed_again() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


def factory(name: str, fused: bool) -> Any:
    if name == "sgd":
        return lambda parameters: SGD(parameters, lr=0.02, momentum=0.9, fused=fused)
    return lambda parameters: AdamW(parameters, lr=0.01, fused=fused)


def in_precision(precision: str, strategy: str = "auto") -> dict[str, Any]:
    """The Trainer's argument; a scaler begins so low that nothing overflows."""
    if precision != "16-mixed":
        return {"precision": precision}
    if strategy == "fsdp":
        plugin = FSDPPrecision(precision)
        plugin.scaler = ShardedGradScaler(init_scale=8.0)  # its own argument is refused (Lightning 2.6)
        return {"plugins": plugin}
    return {"plugins": MixedPrecision(precision, "cuda", torch.amp.GradScaler("cuda", init_scale=8.0))}


def gradients_of(optimizer: Any, factor: float) -> None:
    for group in optimizer.param_groups:
        for i, parameter in enumerate(group["params"]):
            parameter.grad = torch.full_like(parameter, factor * (1 + i % 3))


@contextmanager
def counted_waits() -> Iterator[list[str]]:
    """The waits of the block, by what torch says of each."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found += [str(each.message) for each in caught if "called a synchronizing" in str(each.message)]


def launched(call: Any) -> list[str]:
    """The kernels and copies that a call launches."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        call()
        torch.cuda.synchronize()
    return [each.name for each in profiled.events() if each.device_type == DeviceType.CUDA]


# --- waits and launches -----------------------------------------------------------------------------------------------


KINDS = [("sgd", "norm", 8, None), ("adamw", "value", None, None), ("adamw", "norm", None, {"bias": "*.bias"})]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "16-mixed", "16-true"])
@FUSED
@pytest.mark.parametrize(("optimizer", "algorithm", "window", "groups"), KINDS, ids=["SGD", "by value", "groups"])
def test_a_step_does_not_wait_for_the_gpu(precision, fused, optimizer, algorithm, window, groups):
    nonfinite = "skip" if fused or precision == "16-mixed" else "ignore"  # what the device can skip by itself
    settings = {"gradient_clip_algorithm": algorithm, "window": window, "nonfinite": nonfinite, "groups": groups}
    autoclip = AutoClip(40, verbose=False, **settings)
    around = Waits("error"), autoclip, Waits("default")
    model = Net(factory(optimizer, fused))
    trainer(*around, accelerator="gpu", precision=precision).fit(model, loader(n=96, scales=[1.0, 3.0, 0.5, 8.0]))
    assert {clipper.steps for clipper in autoclip.clippers} == {24}
    assert all(float(clipper.history.percentile(40)) > 0 for clipper in autoclip.clippers)


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])  # ordinary ones are read, also with a scaler
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@ALGORITHMS
def test_a_fused_step_that_is_skipped_as_an_outlier_does_not_wait_either(precision, optimizer, algorithm):
    autoclip = AutoClip(50, gradient_clip_algorithm=algorithm, skip_above=20.0, verbose=False)
    around = Waits("error"), autoclip, Waits("default")
    fitted = trainer(*around, accelerator="gpu", **in_precision(precision))
    fitted.fit(Net(factory(optimizer, fused=True)), loader(n=128, scales=ONE_FAR_TOO_LARGE))
    assert autoclip.clippers[0].steps == 32
    assert autoclip.report().sections[0].figures.skipped == 1


@ALGORITHMS
@pytest.mark.parametrize("ratio", [None, 0.25], ids=["", "max_update_ratio"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_where_nothing_there_can_skip_a_step_the_host_waits_once(optimizer, ratio, algorithm):
    parameters = [nn.Parameter(torch.ones(4, 4, device="cuda")) for _ in range(5)]
    plain = factory(optimizer, fused=False)(parameters)
    clipper = GradientClipper(Percentile(50), gradient_clip_algorithm=algorithm, max_update_ratio=ratio)
    clipper.clipped_norm_every = 10**9
    for step in range(20):
        gradients_of(plain, 1.0 + step % 3)
        with counted_waits() as waits:
            clipper.clip_(plain)
        assert len(waits) == 1 or step == 0  # constants are copied there at the first
        plain.step()


@FUSED
def test_a_rate_on_the_gpu_is_read_in_the_copy_that_reads_the_norms_or_not_at_all(fused):
    weight = nn.Parameter(torch.tensor([3.0, 4.0], device="cuda"))
    optimizer = SGD([weight], lr=torch.tensor(0.5, device="cuda"), fused=fused)
    clipper = GradientClipper(Constant(1e30), max_update_ratio=0.05)
    for step in range(20):
        weight.grad = torch.tensor([30.0, -40.0], device="cuda")
        with counted_waits() as waits:
            record = clipper.clip_(optimizer)
        assert len(waits) == (not fused) or step == 0
        assert float(record.update_ratio) == pytest.approx(0.5 * 50 / 5)
        assert float(record.threshold) == pytest.approx(0.05 * 5 / 0.5)
    with torch.no_grad():
        optimizer.param_groups[0]["lr"].mul_(-1)
    weight.grad = torch.tensor([30.0, -40.0], device="cuda")
    assert float(clipper.clip_(optimizer).update_ratio) == pytest.approx(0.5 * 50 / 5)  # it counts by its size


@ALGORITHMS
def test_a_row_waits_for_nothing_but_the_numbers_of_its_last_step(algorithm, tmp_path: Path):
    """For the event behind their copy, that is, which torch's debug mode does not count."""
    autoclip = AutoClip(40, gradient_clip_algorithm=algorithm, verbose=False)
    around = Waits("warn", "on_train_batch_end"), autoclip, Waits("default", "on_train_batch_end")
    logger = CSVLogger(tmp_path, name="", version="", flush_logs_every_n_steps=10**6)
    fitted = trainer(*around, accelerator="gpu", logger=logger, log_every_n_steps=10)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fitted.fit(Net(factory("sgd", fused=True)), loader(n=160))
    waits = [each for each in caught if "called a synchronizing" in str(each.message)]
    assert not [f"{each.filename}:{each.lineno}" for each in waits]


@FUSED
@ALGORITHMS
@pytest.mark.parametrize("ratio", [None, 0.25], ids=["", "max_update_ratio"])
def test_a_step_launches_no_more_kernels_than_operations_are_counted_on_the_cpu(fused, ratio, algorithm):
    parameters = [nn.Parameter(torch.ones(4, 4, device="cuda")) for _ in range(10)]
    optimizer = SGD(parameters, lr=1e-4, fused=fused)
    clipper = GradientClipper(Percentile(50), window=10, gradient_clip_algorithm=algorithm, max_update_ratio=ratio)
    clipper.clipped_norm_every = 10**9
    for step in range(17):
        gradients_of(optimizer, 1.0 + step % 3)
        clipper.clip_(optimizer)
        optimizer.step()
    gradients_of(optimizer, 9.0)
    kernels = launched(lambda: clipper.clip_(optimizer))
    most = {"norm": 22, "value": 28} if fused else {"norm": 6, "value": 8}  # a norm and a gathering are several kernels
    assert 0 < len(kernels) <= most[algorithm] + (12 if fused and ratio else 0), kernels


def test_a_step_within_the_capture_of_a_cuda_graph_raises():
    parameters = [nn.Parameter(torch.ones(4, 4, device="cuda")) for _ in range(3)]
    optimizer = SGD(parameters, lr=1e-4, fused=True)
    clipper = GradientClipper(Percentile(50))
    for _ in range(3):
        gradients_of(optimizer, 1.0)
        clipper.clip_(optimizer)
        optimizer.step()
    gradients_of(optimizer, 1.0)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="while a CUDA graph is captured"), torch.cuda.graph(graph):
        clipper.clip_(optimizer)
    assert clipper.steps == 3


# --- results ----------------------------------------------------------------------------------------------------------

SCALES = [1.0] * 4 + [3.0] * 4 + [float("nan")] * 4 + [8.0] * 4


class Sharded2(Net):
    def configure_model(self) -> None:
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


@FUSED
@ALGORITHMS
@pytest.mark.parametrize("strategy", ["auto", "ddp", "fsdp", "FSDP2"])
def test_the_gpu_takes_the_steps_of_the_cpu(fused, algorithm, strategy):
    def train(net: type[Net], **kwargs: Any) -> AutoClip:
        autoclip = AutoClip(40, gradient_clip_algorithm=algorithm)
        # Fused SGD has no sharding strategy for DTensors in torch 2.11.
        model = net(factory("adamw" if strategy == "FSDP2" else "sgd", fused))
        trainer(autoclip, use_distributed_sampler=False, **kwargs).fit(model, loader(scales=SCALES))
        autoclip.weights = weights(model).cpu() if strategy in ("auto", "ddp") else None
        return autoclip

    is_second = strategy == "FSDP2"
    gpu = train(
        Sharded2 if is_second else Net,
        accelerator="gpu",
        strategy=ModelParallelStrategy(1, 1) if is_second else strategy,
    )
    cpu = train(Net)
    torch.testing.assert_close(gpu.clippers[0].history.values, cpu.clippers[0].history.values, rtol=1e-4, atol=1e-6)
    assert gpu.clippers[0].nonfinite_steps == cpu.clippers[0].nonfinite_steps == 4
    if gpu.weights is not None:
        torch.testing.assert_close(gpu.weights, cpu.weights, rtol=1e-4, atol=1e-6)


@FUSED
@ALGORITHMS
@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
@pytest.mark.parametrize("strategy", ["auto", "ddp", "fsdp"])
def test_the_gpu_skips_the_outlier_that_the_cpu_skips(fused, algorithm, precision, strategy):
    def train(**kwargs: Any) -> tuple[AutoClip, Tensor]:
        autoclip = AutoClip(50, gradient_clip_algorithm=algorithm, skip_above=20.0, verbose=False)
        model = Net(factory("sgd", fused))
        fitted = trainer(autoclip, use_distributed_sampler=False, **kwargs)
        fitted.fit(model, loader(n=128, scales=ONE_FAR_TOO_LARGE))
        return autoclip, weights(model).cpu() if strategy != "fsdp" else None

    (cpu, expected), (gpu, found) = (
        train(),
        train(accelerator="gpu", strategy=strategy, **in_precision(precision, strategy)),
    )
    coarse = {"rtol": 1e-4, "atol": 1e-6} if precision == "32-true" else {"rtol": 0.05, "atol": 0.01}
    torch.testing.assert_close(gpu.clippers[0].history.values, cpu.clippers[0].history.values, **coarse)
    for each in (gpu, cpu):
        figures = each.report().sections[0].figures
        assert (figures.skipped, figures.nonfinite) == (1, 0)
    if found is not None:
        torch.testing.assert_close(found, expected, **coarse)


@pytest.mark.parametrize("percentile", [0, 10, 50, 90, 100])
@pytest.mark.parametrize("window", [7, 100, None])
def test_thresholds_on_the_gpu_are_numpys(percentile, window):
    norms = np.random.default_rng(0).lognormal(0, 1, 230).astype(np.float32)
    norms[[5, 60, 61]] = [math.nan, math.inf, 0.0]
    parameter = nn.Parameter(torch.zeros(1, device="cuda"))
    optimizer, clipper = SGD([parameter], lr=0.0, fused=True), GradientClipper(Percentile(percentile), window=window)
    seen, thresholds, expected = list[float](), list[Tensor](), list[float]()
    for norm in norms:
        parameter.grad = torch.full((1,), float(norm), device="cuda")
        threshold = clipper.clip_(optimizer).threshold
        optimizer.step()
        if 0 < norm < math.inf:  # what enters no history has no threshold that matters
            seen.append(float(norm))
            thresholds.append(threshold)
            expected.append(np.percentile(seen[-(window or len(seen)) :], percentile))
    np.testing.assert_allclose(torch.stack(thresholds).cpu(), expected, rtol=1e-6)
    assert clipper.history.values.tolist() == seen[-(window or len(seen)) :]
    assert clipper.nonfinite_steps == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_norm_of_a_large_gradient_is_that_of_float64(dtype):
    torch.manual_seed(0)
    gradient = (1000 * torch.randn(50_000_000, device="cuda")).to(dtype)  # its norm is beyond float16
    parameter = nn.Parameter(torch.zeros_like(gradient))
    parameter.grad = gradient.clone()
    exact = float(torch.linalg.vector_norm(gradient, dtype=torch.float64))
    record = GradientClipper(Constant(1000.0), nonfinite="ignore").clip_([parameter])
    assert float(record.norm) == pytest.approx(exact, rel=1e-6)
    after = float(torch.linalg.vector_norm(parameter.grad, dtype=torch.float64))
    coarse = {
        torch.float32: 1e-5,
        torch.float16: 1e-3,
        torch.bfloat16: 0.01,
    }  # bfloat16's coefficient is rounded
    assert 1000.0 * (1 - coarse[dtype]) <= after <= 1000.0 * (1 + min(coarse[dtype], 1e-3))


def test_a_step_of_several_dtypes_is_clipped_as_one_of_float32():
    values = [torch.randn(3, 5), torch.randn(7), torch.randn(2, 2), torch.randn(4)]
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.bfloat16]
    there = [value.to("cuda", dtype) for value, dtype in zip(values, dtypes, strict=True)]
    parameters = [nn.Parameter(torch.zeros_like(value)) for value in there]
    exact = torch.cat([value.double().flatten() for value in there]).norm()
    for parameter, value in zip(parameters, there, strict=True):
        parameter.grad = value.clone()
    record = GradientClipper(Constant(1.0), nonfinite="ignore").clip_(parameters)
    assert float(record.norm) == pytest.approx(float(exact), rel=1e-6)
    for parameter, value in zip(parameters, there, strict=True):
        torch.testing.assert_close(parameter.grad, (value.float() / exact.float()).to(value.dtype))  # 1.6 % of bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_16_bits_take_as_many_kernels_as_those_of_32(dtype):
    def kernels(dtype: torch.dtype) -> int:
        parameters = [nn.Parameter(torch.ones(4, 4, device="cuda", dtype=dtype)) for _ in range(50)]
        optimizer, clipper = AdamW(parameters, lr=1e-4, fused=True), GradientClipper(Percentile(50), window=10)
        for step in range(12):
            gradients_of(optimizer, 1.0 + step % 3)
            clipper.clip_(optimizer)
            optimizer.step()
        gradients_of(optimizer, 9.0)
        return len(launched(lambda: clipper.clip_(optimizer)))

    assert kernels(dtype) <= kernels(torch.float32) + 2


@FUSED
@pytest.mark.parametrize("clips", [False, True], ids=["observed", "clipped"])
def test_a_step_of_16_bit_precision_with_non_finite_gradients_moves_nothing(fused, clips):
    parameters = [nn.Parameter(torch.ones(4, 4, device="cuda")) for _ in range(3)]
    optimizer = AdamW(parameters, lr=0.1, fused=fused)
    scaler, clipper = torch.amp.GradScaler("cuda", init_scale=1024.0), GradientClipper(Percentile(10 if clips else 100))
    for step in range(8):
        optimizer.zero_grad()
        loss = sum((parameter * (step % 4 + 1)).sum() for parameter in parameters)
        scaler.scale(loss * (math.inf if step == 5 else 1.0)).backward()
        before = [parameter.detach().clone() for parameter in parameters]
        record = clipper.clip_(optimizer, scaler)
        scaler.step(optimizer)
        scaler.update()
        moved = any(not torch.equal(old, new) for old, new in zip(before, parameters, strict=True))
        assert moved == (step != 5)
        if step != 5:
            assert float(record.norm) == pytest.approx(math.sqrt(48) * (step % 4 + 1))
    assert (clipper.nonfinite_steps, scaler.get_scale()) == (1, 512.0)


@ALGORITHMS
def test_one_optimizer_may_have_parameters_on_both_devices(algorithm):
    values = [torch.tensor([3.0, -4.0]), torch.tensor([12.0]), torch.tensor([0.5, 0.5, 0.5])]

    def clipped(devices: list[str]) -> tuple[float, list[Tensor]]:
        there = [value.to(device, copy=True) for value, device in zip(values, devices, strict=True)]
        parameters = [nn.Parameter(torch.zeros_like(value)) for value in there]
        for parameter, value in zip(parameters, there, strict=True):
            parameter.grad = value
        clipper = GradientClipper(Constant(2.0), gradient_clip_algorithm=algorithm)
        record = clipper.clip_(SGD(parameters, lr=1.0))
        return float(record.norm), [parameter.grad.cpu() for parameter in parameters]

    norm, expected = clipped(["cpu"] * 3)
    for devices in (["cuda", "cpu", "cuda"], ["cpu", "cuda", "cpu"]):
        mixed, gradients = clipped(devices)
        assert mixed == pytest.approx(norm)
        torch.testing.assert_close(gradients, expected)


@pytest.mark.parametrize(("first", "then"), [("gpu", "cpu"), ("cpu", "gpu"), ("gpu", "gpu")])
@FUSED
def test_a_run_resumes_on_the_other_device(first, then, fused, tmp_path: Path):
    def fit(accelerator: str, epochs: int, ckpt_path: Any = None) -> AutoClip:
        autoclip = AutoClip(40, window=12)
        saving = ModelCheckpoint(tmp_path, f"{accelerator}-{epochs}", save_last=False)
        run = trainer(autoclip, saving, accelerator=accelerator, max_epochs=epochs, enable_checkpointing=True)
        run.fit(Net(factory("sgd", fused)), loader(scales=SCALES), ckpt_path=ckpt_path)
        autoclip.path = saving.best_model_path
        return autoclip

    whole = fit("cpu", 2)
    resumed = fit(then, 2, fit(first, 1).path)
    ours, theirs = resumed.clippers[0], whole.clippers[0]
    torch.testing.assert_close(ours.history.values, theirs.history.values, rtol=1e-3, atol=1e-6)
    assert (ours.steps, ours.nonfinite_steps) == (theirs.steps, theirs.nonfinite_steps) == (32, 8)
    assert {spike["step"] for spike in resumed.spikes()} == {spike["step"] for spike in whole.spikes()}


class TwoOptimizers(LightningModule):
    """Two optimizers in manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.nets = nn.ModuleList(nn.Linear(4, 1) for _ in range(2))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y, scale = batch
        for net, optimizer in zip(self.nets, self.optimizers(), strict=True):
            optimizer.zero_grad()
            self.manual_backward(((net(x) - y).square().squeeze(1) * scale).mean())
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [SGD(self.nets[0].parameters(), lr=0.01), AdamW(self.nets[1].parameters(), lr=0.01, fused=True)]


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_several_optimizers_and_groups_take_the_steps_of_the_cpu(precision):
    def train(accelerator: str, precision: str) -> AutoClip:
        scaler = torch.amp.GradScaler("cuda", init_scale=64.0)  # the usual one overflows in the first steps
        plugin = MixedPrecision("16-mixed", "cuda", scaler) if precision == "16-mixed" else None
        autoclip = AutoClip(40, groups={"bias": "*.bias"}, log_layers=True, verbose=False)
        run = trainer(autoclip, accelerator=accelerator, plugins=plugin)
        run.fit(TwoOptimizers(), loader(scales=[1.0, 3.0]))
        return autoclip

    gpu, cpu = train("gpu", precision), train("cpu", "32-true")
    assert gpu.logs.keys() == cpu.logs.keys()
    for ours, theirs in zip(gpu.clippers, cpu.clippers, strict=True):
        assert (ours.steps, ours.nonfinite_steps) == (theirs.steps, theirs.nonfinite_steps)
        tolerance = 1e-4 if precision == "32-true" else 0.05
        torch.testing.assert_close(ours.history.values, theirs.history.values, rtol=tolerance, atol=1e-3)
