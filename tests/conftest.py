"""Settings of all tests. It imports little: with several workers, the process that runs none reads it first."""

from __future__ import annotations

import os
import re
import signal
from functools import cache
from importlib.util import find_spec

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

# `make test-deepspeed` and `make test-xla` have them, in environments of their own.
collect_ignore = [] if find_spec("deepspeed") else ["test_deepspeed.py"]
collect_ignore += [] if find_spec("torch_xla") else ["test_xla.py", "xla_ranks.py"]

# The groups that take longest begin first, so that the workers end together.
LONGEST = [
    "processes",
    "test_report",
    "test_wandb_online",
    "test_looking_back",
    "test_groups",
    "test_spikes",
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


@pytest.fixture(params=["cpu form", "accelerator form"])
def form(request):
    """Both forms of every shortcut: with reads by the host, which are free on the CPU, and without."""
    from helpers import in_form

    with in_form(request.param):
        yield request.param


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory):
    """The two processes that all test files share: to start them takes longer than most of what they do."""
    from ranks import TwoRanks

    ranks = TwoRanks(tmp_path_factory.mktemp("ranks"))
    yield ranks
    assert not any(ranks.close()), "a process ended with another code than 0"


def pytest_collection_modifyitems(config, items):
    """Leave out, by name, what needs a GPU where there is none; with several workers, begin with what takes longest."""
    import torch

    torch.set_num_threads(1)
    if not torch.cuda.is_available():
        needing = [item for item in items if item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=needing)
        items[:] = [item for item in items if item not in needing]
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: [*LONGEST, worker_group(item.path)].index(worker_group(item.path)))


@pytest.hookimpl(optionalhook=True)  # not in the environment of DeepSpeed
def pytest_xdist_make_scheduler(config, log):
    """With several workers, keep together what shares fixtures or processes, in the order of the tests."""
    if config.getvalue("dist") != "load":  # what `-n` alone means
        return None
    from xdist.scheduler import LoadScopeScheduling

    class GroupScheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return worker_group(config.rootpath / nodeid.split("::")[0])

    config.option.loadscopereorder = False
    return GroupScheduling(config, log)


@cache
def worker_group(path):
    """A file's fixtures serve all of its tests; all files with processes share one pair of ranks and one server."""
    starts_processes = re.search(r"\b(two_ranks|TwoRanks|SpawnedDDP|SERVER|run_program)\b", path.read_text())
    return "processes" if starts_processes else path.stem
