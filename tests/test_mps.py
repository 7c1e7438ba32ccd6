"""A step on Apple's GPUs has only operations that torch has there, and no float64, which they have not."""

from __future__ import annotations

from collections.abc import Set
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torchgen
import yaml
from helpers import in_form
from torch import nn
from torch.optim import SGD, AdamW
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_autoclip import Constant, GradientClipper, Percentile, ZScore
from lightning_autoclip.clipping.clipper import clip_together_
from lightning_autoclip.monitoring.recorder import Recorder


@cache
def natives() -> dict[str, dict[str, Any]]:
    """What torch says of each of its operators, by name and overload: the file that its kernels are registered from."""
    path = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"
    entries = yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return {entry["func"].partition("(")[0]: entry for entry in entries}


def is_on_mps(name: str) -> bool:
    """Whether an operator has a kernel for MPS, or is made of others that are dispatched in turn."""
    entry = natives()[name]
    if "structured_delegate" in entry:
        return is_on_mps(entry["structured_delegate"])
    kinds = [
        kind.strip() for kinds in entry.get("dispatch", {"CompositeImplicitAutograd": 0}) for kind in kinds.split(",")
    ]
    return any(kind == "MPS" or kind.startswith("Composite") for kind in kinds)


class OnMPS(TorchDispatchMode):
    """Fails at what Apple's GPUs have not, but for what the host does for itself; notes what is asked for."""

    def __init__(self, hosts: Set[str] = frozenset()) -> None:
        super().__init__()
        self.hosts, self.names = hosts, set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::")
        if name in self.hosts:
            return func(*args, **(kwargs or {}))
        assert is_on_mps(name), f"{name} has no kernel for MPS"
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        assert not any(tensor.dtype == torch.float64 for tensor in made), f"{name} makes a tensor of float64"
        self.names.add(name)
        return result


def test_what_has_no_kernel_there_is_known():
    assert is_on_mps("linalg_vector_norm")
    assert is_on_mps("sort")
    assert not is_on_mps("linalg_eig")
    doubled = torch.ones(2)
    with pytest.raises(AssertionError, match="makes a tensor of float64"), OnMPS():
        doubled.double()


def step_of(clipper: GradientClipper, optimizer: Any, factor: float) -> Any:
    for group in optimizer.param_groups:
        for i, parameter in enumerate(group["params"]):
            parameter.grad = torch.full_like(parameter, factor * (1 + i % 3))
    return lambda: clipper.clip_(optimizer)


POLICIES = {"percentile": Percentile(40), "z-score": ZScore(2.0), "constant": Constant(1.0)}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("window", [5, None], ids=["window", "full history"])
@pytest.mark.parametrize("nonfinite", ["skip", "ignore", "raise"])
@pytest.mark.parametrize("optimizer", ["SGD", "SGD, fused", "AdamW"])
def test_a_step_has_only_operations_of_mps(policy, algorithm, window, nonfinite, optimizer):
    check(policy, algorithm, window, nonfinite, optimizer)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_step_of_16_bits_has_only_operations_of_mps(algorithm, dtype):
    check("percentile", algorithm, 5, "skip", "SGD, fused", dtype)


def check(
    policy: str, algorithm: Any, window: int | None, nonfinite: Any, optimizer: str, dtype: Any = torch.float32
) -> None:
    is_read = nonfinite == "raise" or (nonfinite == "skip" and "fused" not in optimizer)
    hosts = {"_to_copy", "std_mean.correction"} if policy == "z-score" and is_read else set()  # its moments, on the CPU
    parameters = [nn.Parameter(torch.ones(3, 2, dtype=dtype)) for _ in range(4)]
    made = AdamW(parameters) if optimizer == "AdamW" else SGD(parameters, lr=0.1, fused="fused" in optimizer)
    ratio = None if optimizer == "AdamW" else 0.25
    arguments = {"gradient_clip_algorithm": algorithm, "max_update_ratio": ratio, "window": window}
    arguments["skip_above"] = 5 if nonfinite == "skip" else None
    factors = [1.0 + i % 3 for i in range(25)] + [100.0, *([] if nonfinite == "raise" else [float("nan")]), 1.0]
    with in_form("accelerator form"):
        for mode in (nullcontext, lambda: OnMPS(hosts)):  # tables that the host makes are copied there once, before
            clipper, recorder = GradientClipper(POLICIES[policy], nonfinite=nonfinite, **arguments), Recorder("all/")
            recorder.follow([f"{i}" for i in range(4)], [6] * 4)
            for step, factor in enumerate(factors):
                call = step_of(clipper, made, factor)
                with mode() as seen:
                    record = call()
                recorder.add(record, step=step, epoch=0, first_batch=step, last_batch=step)
                made.step()
            assert len(recorder.flush()[1]) == len(factors)
            clipper.release()
    assert "_foreach_norm.Scalar" in seen.names


def test_a_step_of_groups_has_only_operations_of_mps():
    parameters = [nn.Parameter(torch.ones(3, 2)) for _ in range(4)]
    optimizer = SGD(parameters, lr=0.1, fused=True)
    with in_form("accelerator form"):
        for mode in (nullcontext, OnMPS):
            clippers = [(GradientClipper(Percentile(40), max_update_ratio=0.25), [i, i + 2]) for i in range(2)]
            for factor in (1.0, 2.0, float("inf"), 3.0):
                step_of(clippers[0][0], optimizer, factor)
                with mode():
                    clip_together_(clippers, optimizer)
                optimizer.step()
            assert [clipper.steps for clipper, _ in clippers] == [4, 4]
