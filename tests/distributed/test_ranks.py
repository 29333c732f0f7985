"""The helper itself: a failure comes back with its traceback instead of a hang."""

from __future__ import annotations

import os

import pytest
import torch.distributed as dist

from tests.distributed.ranks import run_ranks
from titan_yulan.parallel.process import World


def body(world: World, message: str) -> None:
    assert os.environ["OMP_NUM_THREADS"] == "1"
    if world.rank == 1:
        raise ValueError(message)
    dist.barrier()  # waits for the one that raised


def test_an_exception_comes_back_with_its_traceback() -> None:
    with pytest.raises(AssertionError, match=r"rank 1 of 2:\nTraceback[\s\S]*ValueError: on purpose"):
        run_ranks(body, 2, "on purpose")
