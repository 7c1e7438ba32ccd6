"""The callback with a task of torchgeo."""

from __future__ import annotations

import pytest
import torch
from packages_page import assert_goes_on, assert_logged
from torch.utils.data import DataLoader

SECTION = "torchgeo"


@pytest.fixture(scope="module")
def page(run_page):
    torch.manual_seed(0)
    samples = [{"image": torch.rand(3, 32, 32), "label": torch.tensor(number % 3)} for number in range(12)]
    loader = DataLoader(samples, batch_size=4)
    return run_page(train_loader=loader, val_loader=loader)


def test_a_resumed_run_goes_on_with_the_record_and_logs_it(page):
    (clipper,) = page["autoclip"].clippers
    assert clipper.steps == page["trainer"].global_step == 2 * 3
    assert_goes_on(clipper, page["first"].clippers[0])
    assert_logged(page["trainer"].log_dir, clipper)
