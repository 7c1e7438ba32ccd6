"""One callback in two Trainers, in other threads, and copied in the middle of a fit."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from chaos import kills
from helpers import trainer, weights
from lightning.pytorch import Callback
from torch.utils.data import DataLoader

from lightning_autoclip import AutoClip

STEPS = 30


def clip() -> AutoClip:
    return AutoClip(30, window=7, verbose=False)


def fit(callback: AutoClip, *others: Any, steps: int = STEPS, **options: Any) -> Any:
    model = kills.ByIndex(STEPS, 1)
    run = trainer(callback, *others, max_steps=steps, log_every_n_steps=5, **options)
    run.fit(model, DataLoader(range(STEPS)))
    return run


def assert_as_alone(callback: AutoClip, run: Any, steps: int = STEPS) -> None:
    """History and weights are those of a run of a callback of its own."""
    alone = fit(expected := clip(), steps=steps)
    kills.assert_same(callback.state_dict(), expected.state_dict(), "the state")
    assert torch.equal(weights(run.lightning_module), weights(alone.lightning_module))


class At(Callback):
    """Does something at a step, within it or after it."""

    def __init__(self, step: int, do: Callable[[], None], within: bool = False) -> None:
        self.step, self.do, self.within = step, do, within

    def on_before_optimizer_step(self, trainer: Any, *args: Any) -> None:
        if self.within and trainer.global_step == self.step:
            self.do()

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if not self.within and trainer.global_step == self.step:
            self.do()


def one_after_the_other(folder: Path, random: Random) -> str:
    """Each Trainer begins a history."""
    callback, first, second = clip(), random.randint(1, STEPS), random.randint(1, STEPS)
    assert_as_alone(callback, fit(callback, steps=first), first)
    assert_as_alone(callback, fit(callback, steps=second), second)
    return f"{first} and {second} steps"


def in_a_thread(do: Callable[[], Any]) -> Any:
    result: list[Any] = []

    def work() -> None:
        try:
            result.append(do())
        except BaseException as error:
            result.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    return result[0]


def copied_in_mid_fit(folder: Path, random: Random) -> str:
    """A copy has the history so far, continues by itself, and the fit does not notice."""
    step, copies = random.randint(1, STEPS - 1), []
    callback = clip()

    def copy_it() -> None:
        copies.extend([copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))])

    within = random.random() < 0.5
    run = fit(callback, At(step, copy_it, within))
    for each in copies:
        assert each.clippers[0].steps == step  # one that is being made is not in it
        str(each.report()), each.spikes()
        assert_as_alone(each, fit(each))  # another Trainer begins a history
    assert_as_alone(callback, run)
    return f"{'within' if within else 'after'} step {step}"


def outside_the_main_thread(folder: Path, random: Random) -> str:
    """A fit in a thread is as one in the main thread."""
    callback, run = in_a_thread(lambda: (each := clip(), fit(each)))
    assert_as_alone(callback, run)
    return "as in the main thread"
