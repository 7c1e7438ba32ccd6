"""Two processes clip as one process would on the same global batches."""

from functools import partial

import pytest
import torch
from helpers import FACTORS, ONE_NAN, Batches, Net, assert_bit_equal, by_percentile, trainer, weights
from lightning.pytorch.strategies import DDPStrategy
from models import Figures
from ranks import SpawnedDDP
from torch import nn

from lightning_autoclip import NonFiniteGradientError

pytestmark = pytest.mark.distributed

BY_VALUE = {"gradient_clip_algorithm": "value"}


class Unused(Net):
    """Has a layer that no row uses, and one that every second row uses: those of the second rank."""

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.never, self.odd = nn.Linear(4, 1), nn.Linear(4, 1)

    def loss(self, batch):
        x, y, scale = batch
        odd = scale == 2
        prediction = self.net(x)
        if odd.any():
            prediction = prediction + self.odd(x) * odd[:, None]
        return ((prediction - y).square().squeeze(1) * scale).mean()


THREE_BATCHES_PER_STEP = {"accumulate_grad_batches": 3}
UNUSED = {"model": Unused, "factors": [1.0, 2.0]}
CASES = {
    "norm": {},
    "value": {"clip": BY_VALUE},
    "accumulation": {"trainer": THREE_BATCHES_PER_STEP},
    "unused": UNUSED,
    "unused-by-value": {**UNUSED, "clip": BY_VALUE},
    "nan": {"factors": ONE_NAN},
    "bounded": {"clip": {"max_update_ratio": 0.1}},
    "bounded-nan-by-value": {"factors": ONE_NAN, "clip": {"max_update_ratio": 0.1, **BY_VALUE}},
    "nan-by-value-accumulation": {"factors": ONE_NAN, "clip": BY_VALUE, "trainer": THREE_BATCHES_PER_STEP},
}
RESUMED = ("norm", "value", "nan", "bounded")


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.02, momentum=0.9)


def train(name, epochs=2, ckpt=None, save=None, nonfinite="skip", **kwargs):
    """Train a case and return what this process saw; on one process unless ``kwargs`` say otherwise."""
    case = CASES[name]
    watch, model = Figures("autoclip/grad_norm", "autoclip/threshold"), case.get("model", Net)(sgd)
    callback = by_percentile(30, window=7, nonfinite=nonfinite, **case.get("clip", {}))
    run = trainer(
        callback,
        watch,
        max_epochs=epochs,
        log_every_n_steps=1,
        use_distributed_sampler=False,
        **case.get("trainer", {}),
        **kwargs,
    )
    run.fit(model, datamodule=Batches(case.get("factors", FACTORS)), ckpt_path=ckpt)
    if save:
        run.save_checkpoint(save)
    records = [(c.history.recorded.tolist(), int(c.history.count), c.nonfinite_total) for c in callback.clippers]
    return {"steps": torch.tensor(list(watch.steps.values())), "weights": weights(model), "record": records}


def on_two(name, **kwargs):
    """Train a case as one of two ranks."""
    return train(name, strategy=DDPStrategy(find_unused_parameters="unused" in name), devices=2, **kwargs)


def interrupted(name, path):
    return [on_two(name, epochs=1, save=path), on_two(name, ckpt=path)]


def raising():
    with pytest.raises(NonFiniteGradientError) as error:
        on_two("nan", nonfinite="raise")
    return str(error.value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the runs save."""
    return tmp_path_factory.mktemp("ddp")


@pytest.fixture(scope="module")
def ranks(two_ranks, folder):
    """What the two ranks saw in a run."""
    runs = {name: partial(on_two, name) for name in CASES}
    runs |= {f"{name}-interrupted": partial(interrupted, name, folder / f"{name}.ckpt") for name in RESUMED}
    return two_ranks.start(runs | {"raise": raising})


def assert_alike(first, second):
    assert_bit_equal(first, second)
    assert torch.equal(first["weights"], second["weights"])


@pytest.mark.parametrize("case", CASES)
def test_both_ranks_measure_decide_and_step_alike(case, ranks):
    first, second = ranks(case)
    assert len(first["steps"]) == (8 if "accumulation" in case else 20)
    assert_alike(first, second)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_take_the_steps_of_one_on_the_same_global_batches(case, ranks):
    two, one = ranks(case)[0], train(case)
    torch.testing.assert_close(two["weights"], one["weights"], atol=1e-6, rtol=0)
    torch.testing.assert_close(two["steps"], one["steps"], atol=1e-5, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize(("case", "steps"), [("nan", 20), ("nan-by-value-accumulation", 8)])
def test_a_nan_on_one_rank_is_counted_once_and_skipped_by_both(case, steps, ranks):
    for seen in ranks(case):
        assert [counts for _, *counts in seen["record"]] == [[steps - 2, 2]]
        assert seen["weights"].isfinite().all()


def test_a_nan_on_one_rank_raises_on_both(ranks):
    first, second = ranks("raise")
    assert "At optimizer step 3 (epoch 0, batch 3)" in first
    assert first == second


@pytest.mark.parametrize("case", RESUMED)
def test_a_resumed_run_takes_the_same_steps_as_an_uninterrupted_one(case, ranks):
    for whole, (first, second) in zip(ranks(case), ranks(f"{case}-interrupted"), strict=True):
        second["steps"] = torch.cat((first["steps"], second["steps"]))
        assert_alike(second, whole)


def test_a_run_of_two_processes_resumes_on_one(folder, ranks):
    assert ranks("norm-interrupted")  # has saved
    resumed = train("norm", ckpt=folder / "norm.ckpt")
    torch.testing.assert_close(resumed["weights"], ranks("norm")[0]["weights"], atol=1e-6, rtol=0)


def test_the_callback_survives_being_pickled_by_ddp_spawn_and_says_that_the_main_process_has_no_record(tmp_path, ranks):
    with pytest.warns(UserWarning, match="has no record of `AutoClip`: this process saw no step"):
        seen = train("nan", strategy=SpawnedDDP(tmp_path), devices=2, save=tmp_path / "main.ckpt")
    assert seen["record"] == []
    assert torch.equal(seen["weights"], ranks("nan")[0]["weights"])
