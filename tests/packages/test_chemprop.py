"""The callback in chemprop."""

from __future__ import annotations

import pytest
from chemprop import data
from packages_page import assert_goes_on, assert_logged

SECTION = "chemprop"


@pytest.fixture(scope="module")
def page(run_page):
    molecules = ["C" * length + end for length in range(1, 9) for end in ("O", "N", "Cl", "c1ccccc1")]
    points = [data.MoleculeDatapoint.from_smi(smiles, [float(len(smiles))]) for smiles in molecules]
    return run_page(train_loader=data.build_dataloader(data.MoleculeDataset(points), batch_size=4))


def test_a_resumed_run_goes_on_with_the_record_and_logs_it(page):
    (clipper,) = page["autoclip"].clippers
    assert clipper.steps == page["trainer"].global_step == 4 * 8
    assert_goes_on(clipper, page["first"].clippers[0])
    assert_logged(page["trainer"].log_dir, clipper)
