"""Rows of similar length side by side: little padding, and a bound on what is computed at a time."""

from __future__ import annotations

from collections.abc import Sequence


def batches_of(lengths: Sequence[int], batch_tokens: int, rooms: Sequence[int] | None = None) -> list[list[int]]:
    """Places in `lengths`, from long to short, in batches of at most `batch_tokens` tokens with padding.

    The first of a batch is its longest; a batch holds at least one row. Equal lengths keep their order.

    Args:
        rooms: what may be written behind each row; a batch has room for its largest behind its longest row. None:
            nothing.
    """
    rooms = rooms or [0] * len(lengths)
    batches: list[list[int]] = []
    length = room = 0  # the largest of the last batch
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place] - rooms[place]):
        length, room = max(length, lengths[place]), max(room, rooms[place])
        if not batches or (len(batches[-1]) + 1) * max(1, length + room) > batch_tokens:
            batches.append([])
            length, room = lengths[place], rooms[place]
        batches[-1].append(place)
    return batches
