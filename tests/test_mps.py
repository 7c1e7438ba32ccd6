"""A step on Apple's GPUs has only operations that torch has there, and no float64, which they have not."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torchgen
import yaml
from helpers import in_form
from torch import nn
from torch.optim import SGD
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_autoclip import GradientClipper, Percentile
from lightning_autoclip.clip import clamp_, multiply_


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
    """Fails at what Apple's GPUs have not; notes what is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.names = set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::")
        assert is_on_mps(name), f"{name} has no kernel for MPS"
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        assert not any(tensor.dtype == torch.float64 for tensor in made), f"{name} makes a tensor of float64"
        self.names.add(name)
        return result


def test_what_has_no_kernel_there_is_known():
    assert is_on_mps("linalg_vector_norm")
    assert not is_on_mps("linalg_eig")
    doubled = torch.ones(2)
    with pytest.raises(AssertionError, match="makes a tensor of float64"), OnMPS():
        doubled.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_a_step_has_only_operations_of_mps(algorithm, dtype):
    """An ordinary optimizer's step that may be skipped is read at once, as every step is there."""
    parameters = [nn.Parameter(torch.ones(3, 2, dtype=dtype)) for _ in range(4)]
    optimizer = SGD(parameters, lr=0.1)
    how = {"gradient_clip_algorithm": algorithm, "max_update_ratio": 0.25, "skip_above": 5, "window": 5}
    clipper = GradientClipper(Percentile(40), **how)
    factors = [1.0 + i % 3 for i in range(25)] + [100.0, float("nan"), 1.0]
    with in_form("accelerator form"):
        for factor in factors:
            for i, parameter in enumerate(parameters):
                parameter.grad = torch.full_like(parameter, factor * (1 + i % 3))
            with OnMPS() as seen:
                record = clipper.clip_(optimizer)
            assert isinstance(record.norm, float)
            assert {"_foreach_norm.Scalar", "stack"} <= seen.names
            optimizer.step()
    assert (clipper.steps, clipper.nonfinite_steps) == (len(factors), 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_gradients_are_multiplied_and_clamped_by_operations_of_mps(dtype):
    """Tensors of the meta device take the way of an accelerator, which those of the CPU do not."""
    gradients = [torch.empty(3, 2, dtype=dtype, device="meta") for _ in range(2)]
    with OnMPS() as seen:
        multiply_(gradients, 0.5)
        clamp_(gradients, 1.0)
    assert seen.names == {"_foreach_mul_.Scalar", "_foreach_clamp_min_.Scalar", "_foreach_clamp_max_.Scalar"}
