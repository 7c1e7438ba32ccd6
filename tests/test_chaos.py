"""Faults that are put into runs: a short form, with fixed seeds, of what `make chaos` tries for up to an hour.

Most of it trains in processes of `SERVER`, which are killed or have files that cannot grow.
"""

from __future__ import annotations

from random import Random

import pytest
from chaos.scenarios import SCENARIOS

SHORT = {
    "kill -9, CSV": {"kill_times": 1, "steps": 30},
    "kill -9, two ranks": {"kill_times": 1, "steps": 20},
    "Ctrl-C": {"times": 1},
    "SIGTERM": {"times": 1},
    "files that cannot grow": {},
    "a folder below a file": {},
    "a logger that fails, beside another": {},
    "a single logger that fails": {},
    "damaged checkpoints": {"tries": 30},
    "one callback, two Trainers in turn": {},
    "copies in mid-fit": {},
    "a fit in a thread": {},
}


@pytest.mark.distributed
@pytest.mark.parametrize("name", SHORT)
def test_a_fault_changes_nothing_but_what_it_must(name, tmp_path):
    SCENARIOS[name](tmp_path, Random(1), **SHORT[name])
