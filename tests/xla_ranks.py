"""Fits on two devices of XLA's client for the CPU: `python xla_ranks.py FOLDER`, in a process that has used neither.

The two ranks are threads of one process, which this client does not quite serve. A collective meets only itself: where
both ranks compile a graph at once they get two, and wait for each other for ever. So the second rank compiles nothing
before the first one has. What Lightning has ranks say to each other goes from thread to thread, since the client's own
way of it is another graph on each rank. The gradients are reduced by XLA, as anywhere. The client gives up where a rank
comes 15 seconds late, as on a busy machine; such a fit is made again.
"""

from __future__ import annotations

import math
import os
import pickle
import sys
import threading
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

os.environ["PJRT_DEVICE"] = "CPU"
if __name__ == "__main__":
    # Before the client starts. Threads that wait for the other rank would fill its pool.
    os.environ |= {"CPU_NUM_DEVICES": "2", "PJRT_CPU_ASYNC_CLIENT": "0", "PJRT_NPROC": "16"}

import torch
import torch_xla
import torch_xla.core.xla_model as xm
from helpers import FACTORS, ONE_NAN, Batches, Net, by_percentile, trainer, weights
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.accelerators import XLAAccelerator
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import XLAStrategy
from models import Manual
from torch.optim import SGD, Optimizer
from torch_xla import runtime
from torch_xla.debug import metrics

from lightning_autoclip import AutoClip

TRIES, PATIENCE = 4, 60.0
RUNS: dict[str, dict[str, Any]] = {
    "norm": {},
    "limited": {"max_update_ratio": "auto"},
    "value, limited": {"gradient_clip_algorithm": "value", "max_update_ratio": "auto"},
    "a NaN on one rank": {"factors": ONE_NAN},
    "manual optimization": {"net": Manual},
    "resumed": {"max_update_ratio": "auto", "is_resumed": True},
}


class CPUClient(XLAAccelerator):
    """Lightning knows TPUs only."""

    parse_devices = staticmethod(lambda devices: devices)
    get_parallel_devices = staticmethod(lambda devices: [torch.device("xla", i) for i in range(devices)])
    auto_device_count = staticmethod(lambda: 1)
    is_available = staticmethod(lambda: True)
    name = staticmethod(lambda: "xla_cpu")


class OneAfterTheOther:
    """The client's step marker, which the second rank enters when the first one has compiled."""

    def __init__(self) -> None:
        self.mark = torch_xla._XLAC._xla_step_marker
        self.entered, self.left, self.before = 0, [0, 0], (0, 0)

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        rank = runtime.global_ordinal()
        end = time.monotonic() + PATIENCE
        while not (self._has_compiled() if rank else self.left[1] >= self.entered):
            assert time.monotonic() < end, "the other rank does not come"
            time.sleep(0.002)
        if rank == 0:
            self.before = self._graphs()
            self.entered += 1
        self.mark(*args, **kwargs)
        self.left[rank] += 1

    def _graphs(self) -> tuple[int, int]:
        return (metrics.metric_data("CompileTime") or (0,))[0], metrics.counter_value("CachedCompile") or 0

    def _has_compiled(self) -> bool:
        if self.left[0] > self.left[1]:
            return True
        if self.entered == self.left[1]:
            return False
        compiled, known = self._graphs()
        if compiled > self.before[0]:
            time.sleep(0.3)  # until the client knows it
        return compiled > self.before[0] or known > self.before[1]


_meeting, _said = threading.Barrier(2), [b"", b""]


def meet(payload: bytes = b"", ordinals: Any = None, tag: str | None = None) -> list[bytes]:
    """What every rank has to say, in place of `xla_rendezvous`."""
    torch_xla.sync()
    _said[runtime.global_ordinal()] = payload
    _meeting.wait(PATIENCE)
    said = list(_said)
    _meeting.wait(PATIENCE)
    return said


class TwoDevices(XLAStrategy):
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return pickle.loads(meet(pickle.dumps(obj))[src]) if self._launched else obj


class ReducesFirst(Callback):
    """Has the gradients reduced by a graph of its own at each step, since the callback then reads their norm."""

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        torch_xla.sync()


class Keeps(Callback):
    """Writes what a rank has at the end, and what norms its own batches gave, which are read then."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.own: list[torch.Tensor] = []

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        norms = [each.grad.norm() for each in pl_module.parameters() if each.grad is not None]
        self.own.append(torch.stack(norms).norm())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        autoclip = next(each for each in trainer.callbacks if isinstance(each, AutoClip))
        (clipper,), spikes = autoclip.clippers, [spike for spike in autoclip.spikes() if math.isfinite(spike["norm"])]
        kept = {
            "norms": clipper.history.values,
            "largest": torch.tensor([[spike["norm"], spike["threshold"]] for spike in spikes]),
            "weights": weights(pl_module).cpu(),
            "own": torch.stack(self.own).cpu(),
            "counts": (clipper.steps, clipper.nonfinite_steps),
        }
        torch.save(kept, self.folder / f"{trainer.global_rank}.pt")


def sgd(parameters: Any) -> SGD:
    return SGD(parameters, lr=0.02, momentum=0.9)


def fit(folder: Path, name: str, on_xla: bool = True) -> None:
    """Two epochs of ten batches, on two devices or on the CPU; maybe the second one from a checkpoint of the first."""
    folder.mkdir(parents=True)
    options = {"factors": FACTORS, "net": Net, "is_resumed": False, **RUNS[name]}
    saved = folder / "first.ckpt"
    is_resumed = options.pop("is_resumed")
    if is_resumed:
        _fit(dict(options), on_xla, ModelCheckpoint(folder, saved.stem, every_n_epochs=1), max_epochs=1)
    _fit(options, on_xla, Keeps(folder), saved if is_resumed else None, max_epochs=2)


def _fit(options: dict[str, Any], on_xla: bool, last: Callback, ckpt_path: Path | None = None, **kwargs: Any) -> None:
    batches, net = Batches(options.pop("factors")), options.pop("net")
    first: list[Callback] = []
    if on_xla:
        first.append(ReducesFirst())
        kwargs |= {"accelerator": CPUClient(), "devices": 2, "strategy": TwoDevices()}
    kwargs |= {"log_every_n_steps": 50, "use_distributed_sampler": False}
    autoclip = by_percentile(40, window=7, verbose=False, **options)
    run = trainer(*first, autoclip, last, enable_checkpointing=isinstance(last, ModelCheckpoint), **kwargs)
    run.fit(net(sgd), datamodule=batches, ckpt_path=ckpt_path)


def main(folder: Path) -> None:
    torch_xla._XLAC._xla_step_marker = OneAfterTheOther()
    xm.xla_rendezvous = meet
    for name in RUNS:
        for attempt in range(TRIES):
            try:
                fit(folder / name / f"{attempt}", name)
                break
            except BrokenProcessPool:
                if attempt == TRIES - 1:
                    raise
        (folder / name / f"{attempt}").rename(folder / name / "ranks")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
