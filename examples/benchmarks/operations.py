"""Which operations a step dispatches on an accelerator: `python examples/benchmarks/operations.py [--names]`.

Where nothing waits for the device, its launches are what a step costs. They are counted on the CPU, in the form that a
step has on an accelerator, beside torch's `clip_grad_norm_` and `clip_grad_value_`. Views are no launches. `clone` is
what copies the numbers of a step to pinned memory there. Where the table says "one read", the copy for which the host
waits is no operation on the CPU: it comes on top.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_autoclip import GradientClipper, Percentile, clip, gradients, step
from lightning_autoclip.clipper import clip_together_

VIEWS = {"view", "slice", "select", "unbind", "detach", "alias", "as_strided", "expand", "unsqueeze", "t", "lift_fresh"}
WARM = 16  # steps before the one that is counted: the window is full, and the weights are no longer measured each time
# Name, algorithm, whether the optimizer is fused, what becomes of non-finite steps, `max_update_ratio`.
Rule = tuple[str, str, bool, str, float | None]
RULES: list[Rule] = [
    (f"{algorithm}, {name}{', max_update_ratio' if ratio else ''}", algorithm, fused, nonfinite, ratio)
    for algorithm in ("norm", "value")
    for name, fused, nonfinite, ratio in (
        ("skip, ordinary, one read", False, "skip", None),
        ("skip, fused", True, "skip", None),
        ("ignore", False, "ignore", None),
        ("raise, one read", False, "raise", None),
        ("skip, ordinary, one read", False, "skip", 0.05),
        ("skip, fused", True, "skip", 0.05),
    )
]


class Operations(TorchDispatchMode):
    """Counts the operations that are dispatched, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in VIEWS:
            self.names[name] += 1
        return func(*args, **(kwargs or {}))


class Elsewhere(list[Any]):
    """Tensors that are taken to be on a GPU: which device it is, is asked of the first one."""

    def __getitem__(self, index: Any) -> Any:
        return SimpleNamespace(device=SimpleNamespace(type="cuda"))


@contextmanager
def accelerator_form() -> Iterator[None]:
    """Steps take the form that they have on a GPU: numbers are read one step later, and clipping is by many at once."""
    names: dict[str, Any] = {
        "clamp_": lambda tensors, limit: clip.clamp_(Elsewhere(tensors), limit),
        "multiply_": lambda tensors, coef: clip.multiply_(Elsewhere(tensors), coef),
    }
    before = {name: getattr(step, name) for name in names}
    can_read_later, gradients.can_read_later = gradients.can_read_later, lambda device: True
    vars(step).update(names)
    try:
        yield
    finally:
        gradients.can_read_later = can_read_later
        vars(step).update(before)


def optimizer_of(count: int, fused: bool) -> Optimizer:
    parameters = [nn.Parameter(torch.zeros(4)) for _ in range(count)]
    return SGD(parameters, lr=1e-30, fused=fused)


def set_gradients(optimizer: Optimizer, factor: float) -> None:
    for i, parameter in enumerate(optimizer.param_groups[0]["params"]):
        parameter.grad = torch.full((4,), factor * (1 + i % 3))


def operations(optimizer: Optimizer, clip: Callable[[], object], factor: float = 5.0) -> Counter[str]:
    """What the step dispatches that follows on some smaller ones, and is clipped."""
    for number in range(WARM):
        set_gradients(optimizer, 1.0 + number % 3)
        clip()
        optimizer.step()
    set_gradients(optimizer, factor)
    with Operations() as counted:
        clip()
    return counted.names


def of_rule(rule: Rule, count: int, window: int | None = 10, factor: float = 5.0) -> Counter[str]:
    """The operations of one step of the library in the form that an accelerator takes."""
    _, algorithm, fused, nonfinite, ratio = rule
    optimizer = optimizer_of(count, fused)
    arguments: dict[str, Any] = {"gradient_clip_algorithm": algorithm, "nonfinite": nonfinite}
    clipper = GradientClipper(Percentile(50), window=window, max_update_ratio=ratio, **arguments)
    clipper.clipped_norm_every = 10**9  # by value: the step that is counted is one of the many without that measurement
    with accelerator_form():
        return operations(optimizer, lambda: clipper.clip_(optimizer), factor)


def of_groups(count: int, parameters: int = 100) -> Counter[str]:
    """The operations of one step of so many groups of a fused optimizer's parameters, by norm and without a read."""
    optimizer = optimizer_of(parameters, fused=True)
    positions: list[Sequence[int]] = [range(i, parameters, count) for i in range(count)]
    groups = [(GradientClipper(Percentile(50), window=10), own) for own in positions]
    with accelerator_form():
        return operations(optimizer, lambda: clip_together_(groups, optimizer))


def of_torch(algorithm: str, count: int) -> Counter[str]:
    """The operations of torch's own clipping, which Lightning calls."""
    optimizer = optimizer_of(count, False)
    parameters = optimizer.param_groups[0]["params"]
    calls = {"norm": nn.utils.clip_grad_norm_, "value": nn.utils.clip_grad_value_}
    return operations(optimizer, lambda: calls[algorithm](parameters, 1.0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--names", action="store_true", help="also print the names of the operations")
    parser.add_argument("--parameters", type=int, nargs="+", default=[6, 100, 1000])
    parsed = parser.parse_args()
    print("| operations per step |" + "".join(f" {count:,} parameters |" for count in parsed.parameters))
    print("|---|" + "---|" * len(parsed.parameters))
    rows: list[tuple[str, list[Counter[str]]]] = [
        (f"torch, {algorithm}", [of_torch(algorithm, count) for count in parsed.parameters])
        for algorithm in ("norm", "value")
    ]
    rows += [(f"ours, {rule[0]}", [of_rule(rule, count) for count in parsed.parameters]) for rule in RULES]
    for name, counts in rows:
        print(f"| {name} |" + "".join(f" {sum(counted.values()):,} |" for counted in counts))
        if parsed.names:
            print("  " + " ".join(f"{key}:{n}" if n > 1 else key for key, n in counts[0].items()))


if __name__ == "__main__":
    main()
