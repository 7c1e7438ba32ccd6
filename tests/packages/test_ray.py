"""The callback in Ray Train: two workers, and a run that goes on."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from helpers import Net, loader
from packages_page import ROOT
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from torch.optim import Adam

from lightning_autoclip.checkpoint import RecordedRun, read_run

SECTION = "ray"
STEPS = 8  # of a worker in an epoch: 64 rows in batches of 4 on two workers


@pytest.fixture(scope="module")
def page(run_page, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folders = (ROOT, ROOT / "tests", Path(__file__).parent)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, folders)))  # for the workers
        ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False)
        try:
            storage = tmp_path_factory.mktemp("ray")
            yield run_page(model=Net(partial(Adam, lr=0.01)), train_loader=loader(), storage=str(storage))
        finally:
            ray.shutdown()


def saved(checkpoint: Any) -> RecordedRun:
    """What the callback has left in a checkpoint of Ray's."""
    with checkpoint.as_directory() as folder:
        return read_run(Path(folder, "checkpoint.ckpt"))


def test_a_run_of_the_same_name_goes_on_with_the_record(page):
    metrics = page["result"].metrics
    assert metrics["step"] == 4 * STEPS
    (norms,) = saved(page["result"].checkpoint).norms.values()
    (before,) = saved(page["first"].checkpoint).norms.values()
    assert (len(before), len(norms)) == (2 * STEPS, 4 * STEPS)
    assert norms[: len(before)] == before


def test_the_reported_metrics_have_the_thresholds(page):
    (norms,) = saved(page["result"].checkpoint).norms.values()
    assert page["result"].metrics["autoclip/grad_norm"] == pytest.approx(norms[-1])
    assert page["result"].metrics["autoclip/threshold"] == pytest.approx(np.percentile(norms, 50))


def failing(train: Any, marker: str, config: dict[str, Any]) -> None:
    """Train to the end of the first epoch and fail, the first time."""
    if not Path(marker).exists():
        train({"epochs": 1})
        Path(marker).touch()
        raise RuntimeError("a worker is lost")
    train(config)


def test_a_run_that_ray_starts_anew_after_a_failure_goes_on_with_the_record(page, tmp_path):
    result = TorchTrainer(
        partial(failing, page["train"], str(tmp_path / "failed")),
        train_loop_config={"epochs": 2},
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(name="failing", storage_path=str(tmp_path), failure_config=FailureConfig(max_failures=1)),
    ).fit()
    assert (tmp_path / "failed").exists()
    (norms,) = saved(result.checkpoint).norms.values()
    assert len(norms) == result.metrics["step"] == 2 * STEPS
