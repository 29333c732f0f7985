"""How a global batch is cut into ranks and micro-batches."""

from __future__ import annotations

import math


def rank_rows(batch_rows: int, rank: int, world: int) -> tuple[int, int]:
    """The rows [start, stop) of each global batch that a data-parallel rank reads; as `torch.tensor_split` cuts."""
    each, extra = divmod(batch_rows, world)
    start = rank * each + min(rank, extra)
    return start, start + each + (rank < extra)


def micro_batches(batch_rows: int, world: int, micro_batch_size: int) -> int:
    """Micro-batches of one step, the same on every rank: the largest share of rows decides."""
    most_rows = math.ceil(batch_rows / world)
    return math.ceil(most_rows / micro_batch_size)
