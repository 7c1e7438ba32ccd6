"""What clipping adds to a step on a CUDA device: `python examples/benchmarks/overhead_cuda.py`.

On gradients in the shapes of some models, beside torch's `clip_grad_norm_` and `clip_grad_value_`, which Lightning
calls: the time of the device by CUDA events, the time in which the host launches the work, how many kernels that are,
and how often the host waits for the device.
"""

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.optim import SGD, AdamW
from torch.profiler import ProfilerActivity, profile

from lightning_autoclip import Constant, GradientClipper, Percentile

WARM, STEPS = 20, 32  # two of these measure the weights, as one of 16 does


def shapes_of_gpt(layers: int, width: int) -> list[tuple[int, ...]]:
    block = [(3 * width, width), (3 * width,), (width, width), (width,), (4 * width, width), (4 * width,)]
    block += [(width, 4 * width), *[(width,)] * 5]
    return [(50257, width), (1024, width), *block * layers, (width,), (width,)]


MODELS: dict[str, list[tuple[int, ...]]] = {
    "9k in 6": [(64, 64), (64,), (64, 64), (64,), (10, 64), (10,)],
    "1M in 1,000": [(32, 32)] * 1000,
    "124M in 148": shapes_of_gpt(12, 768),
    "1B in 268": shapes_of_gpt(22, 1920),
}


def milliseconds(call: Callable[[], object]) -> tuple[float, float]:
    """Mean device time and median launch time of a call."""
    device, launch = [], []
    for _ in range(WARM + STEPS):
        torch.cuda.synchronize()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(20_000_000)  # the host is ahead of the device, as in a training
        begin.record()
        start = time.perf_counter()
        call()
        launch.append((time.perf_counter() - start) * 1e3)
        end.record()
        torch.cuda.synchronize()
        device.append(begin.elapsed_time(end))
    return statistics.fmean(device[WARM:]), statistics.median(launch[WARM:])


def waits_of(call: Callable[[], object]) -> int:
    """How often the host waits for the device in a call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        call()
        torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(each.message) for each in caught)


def kernels_of(call: Callable[[], object]) -> int:
    """How many kernels and copies a call launches."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        call()
        torch.cuda.synchronize()
    return sum(each.device_type == DeviceType.CUDA for each in profiled.events())


def rules(parameters: list[nn.Parameter]) -> dict[str, Callable[[], object]]:
    """The calls that are compared, by name; those of torch first."""
    fused, plain = AdamW(parameters, lr=0.0, fused=True), SGD(parameters, lr=1e-9)
    calls: dict[str, Callable[[], object]] = {
        "torch, norm": lambda: nn.utils.clip_grad_norm_(parameters, 1.0),
        "torch, value": lambda: nn.utils.clip_grad_value_(parameters, 1.0),
    }
    optimizers: dict[str, Any] = {"fused": fused, "ordinary, one read": plain}
    for algorithm in ("norm", "value"):
        for name, optimizer in optimizers.items():
            clipper = GradientClipper(Percentile(50), gradient_clip_algorithm=algorithm)
            clipper.clipped_norm_every = 10  # as in the callback
            calls[f"ours, {algorithm}, {name}"] = lambda c=clipper, o=optimizer: c.clip_(o)
    fused_sgd = SGD(parameters, lr=1e-9, fused=True)
    for name, optimizer in {"fused": fused_sgd, "ordinary, one read": plain}.items():
        clipper = GradientClipper(Percentile(50), max_update_ratio=0.25)
        calls[f"ours, norm, {name}, max_update_ratio"] = lambda c=clipper, o=optimizer: c.clip_(o)
    full = GradientClipper(Percentile(50), window=None)
    calls["ours, norm, fused, full history"] = lambda: full.clip_(fused)
    fixed = GradientClipper(Constant(1.0), nonfinite="ignore")
    calls["ours, norm, fixed at 1"] = lambda: fixed.clip_(parameters)
    return calls


def scaled(parameters: list[nn.Parameter]) -> dict[str, Callable[[], object]]:
    """The same with a loss scaler, whose unscaling is part of it."""
    optimizer, scaler = AdamW(parameters, lr=0.0), torch.amp.GradScaler("cuda", init_scale=1.0)
    scaler.scale(torch.ones((), device="cuda"))  # makes its tensors
    clipper = GradientClipper(Percentile(50))

    def with_torch() -> None:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        scaler._per_optimizer_states.clear()

    def with_ours() -> None:
        clipper.clip_(optimizer, scaler)
        scaler._per_optimizer_states.clear()

    return {"torch, norm, scaler": with_torch, "ours, norm, scaler": with_ours}


def compare(model: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    parameters = [nn.Parameter(torch.zeros(shape, dtype=dtype, device="cuda")) for shape in MODELS[model]]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    rows: list[dict[str, Any]] = []
    calls = rules(parameters)
    if dtype == torch.float32:
        calls |= scaled(parameters)
    for name, call in calls.items():
        device, launch = milliseconds(call)
        row = {"model": model, "dtype": str(dtype).removeprefix("torch."), "rule": name}
        rows.append(row | {"device_ms": device, "launch_ms": launch, "waits": waits_of(call)})
        rows[-1]["kernels"] = kernels_of(call)
    by_name = {row["rule"]: row for row in rows}
    for row in rows:
        kind = ", ".join(row["rule"].split(", ")[1:2]) + (", scaler" if "scaler" in row["rule"] else "")
        base = by_name[f"torch, {kind}"]
        row["device_ratio"] = row["device_ms"] / base["device_ms"]
        print(
            f"{model:12s} {row['dtype']:9s} {row['rule']:45s} device {row['device_ms']:8.3f} ms"
            f" {row['device_ratio']:5.2f}  launch {row['launch_ms']:7.3f} ms  kernels {row['kernels']:5d}"
            f"  waits {row['waits']}",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/overhead"), help="folder of the JSON file")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("This benchmark needs a CUDA device. `make bench` measures on the CPU.")
    rows = [row for model in MODELS for dtype in (torch.float32, torch.bfloat16) for row in compare(model, dtype)]
    machine = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "overhead_cuda.json"
    path.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    print(f"\n{machine}\nAll figures: {path}")


if __name__ == "__main__":
    main()
