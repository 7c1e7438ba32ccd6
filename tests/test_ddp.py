"""Two processes clip and log as one process would on the same global batches."""

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


CASES = {
    "norm": {},
    "value": {"clip": BY_VALUE},
    "unused": {"model": Unused, "factors": [1.0, 2.0]},
    "nan": {"factors": ONE_NAN},
    "limited-nan-by-value": {"factors": ONE_NAN, "clip": {"max_update_ratio": 0.1, **BY_VALUE}},
    "nan-by-value-accumulation": {"factors": ONE_NAN, "clip": BY_VALUE, "trainer": {"accumulate_grad_batches": 3}},
}
RESUMED = ("norm", "limited-nan-by-value")


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.02, momentum=0.9)


def kept(autoclip):
    """What clipping saw and logged: of each optimizer, or group, its history and log."""
    clippers = [(c.history.values.tolist(), c.history.count, c.steps, c.nonfinite_steps) for c in autoclip.clippers]
    logs = [
        {
            "bins": [[*map(float, row)] for row in log.bins],
            "large": [(*large.place, *large[1:]) for large in (*log.nonfinite, *log.largest)],
            "shares": log.shares,
            "numels": log.numels,
        }
        for log in autoclip.logs.values()
    ]
    return {"history": clippers, "logs": logs}


def assert_close(two, one):
    """The logs of two processes and of one; their numbers of elements are left to the caller."""
    for ours, theirs in zip(two["logs"], one["logs"], strict=True):
        for row, expected in zip(ours["bins"], theirs["bins"], strict=True):
            assert row == close(expected)
        for (*numbers, parameters), (*others, expected) in zip(ours["large"], theirs["large"], strict=True):
            assert numbers[:4] == others[:4], "step, epoch, batches"
            assert numbers[4:] == close(others[4:])
            assert [name for name, _ in parameters] == [name for name, _ in expected]
            assert [share for _, share in parameters] == close([share for _, share in expected])
        assert ours["shares"] == close(theirs["shares"])
        assert list(ours["shares"]) == list(theirs["shares"])
        assert sum(ours["shares"].values()) == pytest.approx(1)


def close(expected):
    return pytest.approx(expected, rel=1e-5, abs=1e-5, nan_ok=True)


def assert_alike(first, second):
    assert_bit_equal(first, second)
    assert torch.equal(first["weights"], second["weights"])
    assert repr(first["logs"]) == repr(second["logs"])


def train(name, epochs=2, ckpt=None, save=None, nonfinite="skip", **kwargs):
    """Train a case and return what this process saw; on one process unless ``kwargs`` say otherwise."""
    case = CASES[name]
    watch, model = Figures("autoclip/grad_norm", "autoclip/threshold"), case.get("model", Net)(sgd)
    callback = by_percentile(30, window=7, nonfinite=nonfinite, verbose=False, **case.get("clip", {}))
    options = {"max_epochs": epochs, "log_every_n_steps": 1, "use_distributed_sampler": False}
    run = trainer(callback, watch, **options, **case.get("trainer", {}), **kwargs)
    run.fit(model, datamodule=Batches(case.get("factors", FACTORS)), ckpt_path=ckpt)
    if save:
        run.save_checkpoint(save)
    return {"steps": torch.tensor(list(watch.steps.values())), "weights": weights(model), **kept(callback)}


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


@pytest.mark.parametrize("case", CASES)
def test_two_processes_decide_alike_and_take_the_steps_of_one_on_the_same_global_batches(case, ranks):
    first, second = ranks(case)
    steps = 8 if "accumulation" in case else 20
    assert len(first["steps"]) == steps
    assert first["history"][0][2:] == (steps, 2 * ("nan" in case))
    assert_alike(first, second)
    one = train(case)
    torch.testing.assert_close(first["weights"], one["weights"], atol=1e-6, rtol=0)
    torch.testing.assert_close(first["steps"], one["steps"], atol=1e-5, rtol=1e-5, equal_nan=True)
    assert_close(first, one)
    assert first["logs"][0]["numels"] == one["logs"][0]["numels"]


def test_a_layer_that_nothing_uses_and_one_that_a_rank_does_not_use_have_their_shares(ranks):
    shares = ranks("unused")[0]["logs"][0]["shares"]
    assert (shares["never.weight"], shares["never.bias"]) == (0, 0)
    assert shares["odd.weight"] > 0


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


def test_the_callback_is_pickled_by_ddp_spawn_and_warns_that_the_main_process_has_no_history(tmp_path, ranks):
    with pytest.warns(UserWarning, match="has no norm history of `AutoClip`: this process saw no step"):
        seen = train("nan", strategy=SpawnedDDP(tmp_path), devices=2, save=tmp_path / "main.ckpt")
    assert seen["history"] == []
    assert torch.equal(seen["weights"], ranks("nan")[0]["weights"])
