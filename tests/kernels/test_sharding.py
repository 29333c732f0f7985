"""Norms and SwiGLU on two ranks: DTensors stay sharded through them, and FSDP2 gets the gradients of one process."""

from __future__ import annotations

from tests.distributed.ranks import run_ranks
from tests.kernels import sharded


def test_dtensor_and_fsdp() -> None:
    for on_dtensors, under_fsdp in run_ranks(sharded.body, 2):
        assert len(on_dtensors) == 7 * 3 + 4 and len(under_fsdp) == 5 * 2
        for name, difference in (on_dtensors | under_fsdp).items():
            assert difference < 1e-9, name
