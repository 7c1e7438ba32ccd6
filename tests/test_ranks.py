"""The two processes of the distributed tests: a run that fails fails its own test and no other."""

from __future__ import annotations

import os
from functools import partial

import pytest
import torch
from ranks import TwoRanks
from torch import distributed

pytestmark = pytest.mark.distributed


def rank_sum():
    """Of the numbers that the ranks have, 1 and 2."""
    number = torch.tensor(distributed.get_rank() + 1)
    distributed.all_reduce(number)
    return int(number)


def failing(how):
    """The second rank fails while the first one waits for it."""
    if distributed.get_rank() == 1:
        how()
    return rank_sum()


def test_a_run_that_raises_or_aborts_says_so_and_the_others_continue(tmp_path):
    ranks = TwoRanks(tmp_path)
    raising, aborting = partial(failing, partial(int, "no number")), partial(failing, os.abort)
    results = ranks.start({"sum": rank_sum, "raising": raising, "aborting": aborting, "sum again": rank_sum})
    assert results("sum again") == results("sum") == [3, 3]
    with pytest.raises(RuntimeError, match=r"(?s)'raising' failed.*Rank 1 raised\nTraceback.*'no number'"):
        results("raising")
    with pytest.raises(RuntimeError, match=r"(?s)'aborting' failed.*Rank 1 died with exit code -6"):
        results("aborting")
    assert ranks.close() == [0, 0]


def test_what_nobody_asks_for_is_not_waited_for(tmp_path):
    ranks = TwoRanks(tmp_path)
    results = ranks.start({"sum": rank_sum, "endless": partial(failing, partial(distributed.recv, torch.zeros(1)))})
    assert results("sum") == [3, 3]
    assert ranks.close() == []
