"""The callback in scvi-tools."""

from __future__ import annotations

import pytest
import scvi
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger
from packages_page import assert_goes_on, assert_logged
from scvi.external import VELOVI

from lightning_autoclip import AutoClip

SECTION = "scvi-tools"


@pytest.fixture(scope="module")
def page(run_page):
    torch.manual_seed(0)
    return run_page(adata=scvi.data.synthetic_iid(batch_size=128, n_genes=20))


def test_every_step_is_recorded_and_a_record_that_is_carried_goes_on(page):
    (first,), (second,) = page["autoclip"].clippers, page["again"].clippers
    assert first.steps == page["vae"].trainer.global_step > 0
    assert_goes_on(second, first)
    assert second.steps == page["loaded"].trainer.global_step


def test_the_history_of_the_model_has_the_rows(page):
    (first,) = page["autoclip"].clippers
    assert page["vae"].history["autoclip/grad_norm"].iloc[-1].item() == pytest.approx(first.history.values[-1].item())


def test_another_logger_is_told_the_steps(page):
    callback, logger = AutoClip(verbose=False), CSVLogger(page["folder"] / "csv")
    page["vae"].train(max_epochs=1, callbacks=[callback], logger=logger, log_every_n_steps=1)
    assert_logged(logger.log_dir, callback.clippers[0])


def test_a_second_fit_of_one_callback_begins_a_new_record(page):
    callback = AutoClip(verbose=False)
    for _ in range(2):
        page["vae"].train(max_epochs=1, callbacks=[callback])
        assert callback.clippers[0].steps == page["vae"].trainer.global_step


def test_training_adds_to_the_list_of_callbacks_that_it_is_given(page):
    given = [AutoClip(verbose=False)]
    page["vae"].train(max_epochs=1, callbacks=given)
    assert len(given) > 1


def test_a_model_that_clips_by_itself_is_refused_until_it_is_told_not_to(page):
    adata, callback = page["adata"].copy(), AutoClip(verbose=False)
    adata.layers["spliced"] = adata.layers["unspliced"] = adata.X.astype("float32")
    VELOVI.setup_anndata(adata, spliced_layer="spliced", unspliced_layer="unspliced")
    velovi = VELOVI(adata, n_hidden=16)
    with pytest.raises(MisconfigurationException, match=r"gradient_clip_val=10\)` and `AutoClip` would both clip"):
        velovi.train(max_epochs=1, callbacks=[callback])
    velovi.train(max_epochs=2, gradient_clip_val=None, callbacks=[callback])
    assert callback.clippers[0].steps == velovi.trainer.global_step > 0
