"""Settings of all tests."""

from __future__ import annotations

import os
import signal
from importlib.util import find_spec

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from helpers import FORMS, in_form
from ranks import TwoRanks

torch.set_num_threads(1)
# `make test-deepspeed` and `make test-xla` have them, in environments of their own.
collect_ignore = [
    f"test_{name}.py" for name in ("deepspeed", "xla") if not find_spec({"xla": "torch_xla"}.get(name, name))
]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    """Nothing that a test writes lands in the checkout."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def wandb_offline(monkeypatch):
    """W&B's client writes to disk alone, and begins and ends without settings or runs of other tests."""
    import wandb  # not in the environment of DeepSpeed

    for name, value in {"MODE": "offline", "SILENT": "true", "CONSOLE": "off"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    handler = signal.getsignal(signal.SIGINT)
    wandb.teardown()  # the client keeps its settings from run to run
    yield
    wandb.finish()  # Lightning's logger would go on with a run that is open
    wandb.teardown()
    signal.signal(signal.SIGINT, handler)  # Lightning leaves it ignored after an interrupt


@pytest.fixture(params=FORMS)
def form(request):
    """Both forms of every shortcut: with reads by the host, which are free on the CPU, and without."""
    with in_form(request.param):
        yield request.param


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory):
    """The two processes that all test files share: to start them takes longer than most of what they do."""
    ranks = TwoRanks(tmp_path_factory.mktemp("ranks"))
    yield ranks
    assert not any(ranks.close()), "a process ended with another code than 0"


def pytest_collection_modifyitems(config, items):
    """Leave out, by name, what needs a GPU where there is none."""
    if not torch.cuda.is_available():
        needing = [item for item in items if item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=needing)
        items[:] = [item for item in items if item not in needing]
