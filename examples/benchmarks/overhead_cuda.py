"""What clipping adds to a step on a CUDA device: `python examples/benchmarks/overhead_cuda.py`.

On gradients in the shapes of two GPTs, beside torch's `clip_grad_norm_` and `clip_grad_value_`, which Lightning calls:
the time of the device by CUDA events, and the time in which the host launches the work. If the host reads the device in
a step, the run fails.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from lightning_autoclip import Constant, GradientClipper, Percentile

SIZES = {"124M": (12, 768), "1B": (22, 1920)}  # layers, width


def parameters_of_transformer(layers: int, width: int, dtype: torch.dtype) -> list[nn.Parameter]:
    """Parameters in the shapes of a GPT with a gradient each."""
    block = [(3 * width, width), (3 * width,), (width, width), (width,), (4 * width, width), (4 * width,)]
    block += [(width, 4 * width), *[(width,)] * 5]
    shapes = [(50257, width), (1024, width), *block * layers, (width,), (width,)]
    parameters = [nn.Parameter(torch.zeros(shape, dtype=dtype, device="cuda")) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    return parameters


def milliseconds(call: Callable[[], object], repeat: int = 30) -> tuple[float, float]:
    """Median device time and median launch time of a call."""
    device, launch = [], []
    for step in range(repeat + 5):
        torch.cuda.synchronize()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(5_000_000)  # the host is ahead of the device, as in a training
        begin.record()
        start = time.perf_counter()
        if step >= 5:  # the first steps allocate
            torch.cuda.set_sync_debug_mode("error")
        call()
        torch.cuda.set_sync_debug_mode("default")
        launch.append((time.perf_counter() - start) * 1e3)
        end.record()
        torch.cuda.synchronize()
        device.append(begin.elapsed_time(end))
    return statistics.median(device[5:]), statistics.median(launch[5:])


def compare(size: str, dtype: torch.dtype) -> list[dict[str, object]]:
    parameters = parameters_of_transformer(*SIZES[size], dtype)
    fused = torch.optim.AdamW(parameters, lr=0.0, fused=True)
    fixed = GradientClipper(Constant(1.0), nonfinite="ignore")
    calls: dict[str, Callable[[], object]] = {
        "clip_grad_norm_": lambda: nn.utils.clip_grad_norm_(parameters, 1.0),
        "clip_grad_value_": lambda: nn.utils.clip_grad_value_(parameters, 1.0),
        "ours, norm, fixed at 1": lambda: fixed.clip_(parameters),
    }
    for algorithm in ("norm", "value"):
        clipper = GradientClipper(Percentile(10), gradient_clip_algorithm=algorithm)
        clipper.clipped_norm_every = 10  # as in the callback
        calls[f"ours, {algorithm}, p10, fused AdamW"] = lambda c=clipper: c.clip_(fused)
    rows = []
    for name, call in calls.items():
        device, launch = milliseconds(call)
        rows.append({"size": size, "dtype": str(dtype), "rule": name, "device_ms": device, "launch_ms": launch})
    for row in rows:
        base = rows["value" in str(row["rule"])]
        row["device_ratio"] = row["device_ms"] / base["device_ms"]
        row["launch_ratio"] = row["launch_ms"] / base["launch_ms"]
        print(
            f"{size:5s} {dtype!s:15s} {row['rule']:30s} device {row['device_ms']:7.3f} ms {row['device_ratio']:5.2f}"
            f"   launch {row['launch_ms']:7.3f} ms {row['launch_ratio']:5.2f}",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/overhead"), help="folder of the JSON file")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("This benchmark needs a CUDA device. `make bench` measures on the CPU.")
    rows = [row for size in SIZES for dtype in (torch.float32, torch.bfloat16) for row in compare(size, dtype)]
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "overhead_cuda.json"
    path.write_text(json.dumps({"device": torch.cuda.get_device_name(), "rows": rows}, indent=1) + "\n")
    print(f"\nAll figures: {path}")


if __name__ == "__main__":
    main()
