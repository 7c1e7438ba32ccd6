"""What only a GPU can show: no synchronisation in a step, and the CPU's results. Needs CUDA: `pytest -m gpu`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import Net, loader, trainer, weights
from lightning.pytorch import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.optim import SGD, AdamW

from lightning_autoclip import AutoClip

pytestmark = pytest.mark.gpu


class NoSynchronisation(Callback):
    """Makes every wait of the host for the GPU an error while the callbacks' hooks run; goes around the clipping."""

    def __init__(self, mode: str) -> None:
        self.mode = mode

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_step:  # buffers are made at the first step
            torch.cuda.set_sync_debug_mode(self.mode)


def factory(name: str, fused: bool) -> Any:
    if name == "sgd":
        return lambda parameters: SGD(parameters, lr=0.02, momentum=0.9, fused=fused)
    return lambda parameters: AdamW(parameters, lr=0.01, fused=fused)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "16-mixed"])
@pytest.mark.parametrize("fused", [False, True], ids=["ordinary", "fused"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_a_step_does_not_wait_for_the_gpu(precision, fused, optimizer, algorithm):
    skips_by_itself = fused or precision == "16-mixed"
    autoclip = AutoClip(40, gradient_clip_algorithm=algorithm, nonfinite="skip" if skips_by_itself else "ignore")
    around = NoSynchronisation("error"), autoclip, NoSynchronisation("default")
    model = Net(factory(optimizer, fused))
    try:
        trainer(*around, accelerator="gpu", precision=precision).fit(model, loader(scales=[1.0, 3.0, 0.5, 8.0]))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert autoclip.clippers[0].history.percentile(40).is_cuda
    assert autoclip.clippers[0].steps == 16


@pytest.mark.parametrize("fused", [False, True], ids=["ordinary", "fused"])
@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("sharded", [False, True], ids=["single", "FSDP2"])
def test_the_gpu_takes_the_steps_of_the_cpu(fused, algorithm, sharded):
    class Sharded(Net):
        def configure_model(self) -> None:
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def train(net: type[Net], **kwargs: Any) -> AutoClip:
        autoclip = AutoClip(40, gradient_clip_algorithm=algorithm)
        model = net(factory("sgd", fused))
        trainer(autoclip, **kwargs).fit(model, loader(scales=[1.0] * 4 + [3.0] * 4 + [float("nan")] * 4 + [8.0] * 4))
        autoclip.weights = weights(model).cpu() if not sharded else None
        return autoclip

    on_gpu = {"accelerator": "gpu", "strategy": ModelParallelStrategy(1, 1) if sharded else "auto"}
    gpu, cpu = train(Sharded if sharded else Net, **on_gpu), train(Net)
    recorded = gpu.clippers[0].history.recorded.cpu()
    torch.testing.assert_close(recorded, cpu.clippers[0].history.recorded, rtol=1e-4, atol=1e-6)
    assert gpu.clippers[0].nonfinite_total == cpu.clippers[0].nonfinite_total == 4
    if not sharded:
        torch.testing.assert_close(gpu.weights, cpu.weights, rtol=1e-4, atol=1e-6)
