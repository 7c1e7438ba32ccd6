"""The callback with the losses, heads and transforms of lightly."""

from __future__ import annotations

import pytest
import torch
from lightly.transforms import SimCLRTransform
from packages_page import assert_goes_on, assert_logged
from torch.utils.data import DataLoader
from torchvision.datasets import FakeData

SECTION = "lightly"


@pytest.fixture(scope="module")
def page(run_page):
    torch.manual_seed(0)
    images = FakeData(32, (3, 32, 32), num_classes=2, transform=SimCLRTransform(input_size=16))
    return run_page(train_loader=DataLoader(images, batch_size=8))


def test_a_resumed_run_goes_on_with_the_record_and_logs_it(page):
    (clipper,) = page["autoclip"].clippers
    assert clipper.steps == page["trainer"].global_step == 4 * 4
    assert_goes_on(clipper, page["first"].clippers[0])
    assert_logged(page["trainer"].log_dir, clipper)
