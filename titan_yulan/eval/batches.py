"""Rows of similar length side by side: little padding, and a bound on what is computed at a time."""

from __future__ import annotations

from collections.abc import Sequence


def batches_of(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Places in `lengths`, from long to short, in batches of at most `batch_tokens` tokens with padding.

    The first of a batch is its longest; a batch holds at least one row. Equal lengths keep their order.
    """
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    batches, start = [], 0
    while start < len(order):
        count = max(1, batch_tokens // max(1, lengths[order[start]]))
        batches.append(order[start : start + count])
        start += count
    return batches
