"""How a global batch is cut."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from titan_yulan.data.partition import micro_batches, rank_rows

counts = st.integers(1, 70)


@given(counts, counts)
def test_rows_of_the_ranks_are_those_of_tensor_split(batch_rows: int, world: int) -> None:
    parts = torch.arange(batch_rows).tensor_split(world)
    for rank, part in enumerate(parts):
        assert list(range(*rank_rows(batch_rows, rank, world))) == part.tolist()


@given(counts, counts, counts)
def test_micro_batches_are_as_few_as_hold_the_largest_share(batch_rows: int, world: int, size: int) -> None:
    n = micro_batches(batch_rows, world, size)
    largest = max(stop - start for start, stop in (rank_rows(batch_rows, rank, world) for rank in range(world)))
    assert (n - 1) * size < largest <= n * size


def test_yulan_mini_batch_on_56_ranks() -> None:
    """1008 rows: 18 a rank, two micro-batches of 9."""
    assert {rank_rows(1008, rank, 56)[1] - rank_rows(1008, rank, 56)[0] for rank in range(56)} == {18}
    assert micro_batches(1008, 56, 9) == 2
    assert rank_rows(1008, 13, 64) == (208, 224) and rank_rows(1008, 63, 64) == (993, 1008)
