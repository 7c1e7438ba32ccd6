"""The callback with a model of anomalib that sets `gradient_clip_val`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from anomalib.data import Folder
from anomalib.data.utils import TestSplitMode, ValSplitMode
from anomalib.engine import Engine
from lightning.fabric.utilities.exceptions import MisconfigurationException
from packages_page import assert_goes_on, assert_logged
from torchvision.models import EfficientNet_B5_Weights, efficientnet_b5
from torchvision.transforms.functional import to_pil_image

from lightning_autoclip import AutoClip

SECTION = "anomalib"


@pytest.fixture(scope="module")
def datamodule(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    torch.manual_seed(0)
    for number in range(4):
        to_pil_image(torch.rand(3, 64, 64)).save(folder / f"{number}.png")
    return Folder(
        "noise",
        normal_dir=folder,
        train_batch_size=2,
        eval_batch_size=2,
        num_workers=0,
        test_split_mode=TestSplitMode.SYNTHETIC,
        val_split_mode=ValSplitMode.SAME_AS_TEST,
    )


@pytest.fixture(scope="module")
def page(run_page, datamodule, tmp_path_factory):
    """Pretrained weights would be downloaded: random ones lie where they are looked for."""
    hub = tmp_path_factory.mktemp("hub")
    file = hub / "hub" / "checkpoints" / Path(EfficientNet_B5_Weights.IMAGENET1K_V1.url).name
    file.parent.mkdir(parents=True)
    torch.save(efficientnet_b5().state_dict(), file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(hub))
        yield run_page(datamodule=datamodule)


def test_a_resumed_run_goes_on_with_the_record_and_logs_it(page):
    (clipper,) = page["autoclip"].clippers
    assert clipper.steps == page["whole"].trainer.global_step == 2 * page["half"].trainer.global_step
    assert_goes_on(clipper, page["first"].clippers[0])
    assert_logged(page["whole"].trainer.log_dir, clipper)


def test_a_model_that_sets_a_fixed_clipping_is_refused_with_the_way_out(page, datamodule):
    engine = Engine(max_epochs=1, gradient_clip_val=None, callbacks=[AutoClip()])
    with pytest.raises(MisconfigurationException, match=r"gradient_clip_val=1\)` and `AutoClip` would both clip"):
        engine.fit(page["model"], datamodule=datamodule)
