"""Another way to attend, for some forward passes of a decoder that no two ranks share.

The decoder is written once, for rows of one sequence; where it attends it asks a `Sharding`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from titan_yulan.model import Decoder
from titan_yulan.model.attend import attend
from titan_yulan.model.sharding import Sharding


class Branches(Sharding):
    """Rows of one beginning and several branches after it, which do not see one another."""

    def __init__(self, branches: Tensor) -> None:
        """`branches`: (rows, length); 0 marks the beginning, other numbers the branches."""
        same = branches[:, None, :, None] == branches[:, None, None, :]
        self._mask = (same | (branches == 0)[:, None, None, :]).tril()  # (rows, 1, length, length)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None, causal: bool
    ) -> Tensor:
        """`model.attend.attend` with the mask of the branches."""
        return attend(query, key, value, scale, self._mask, causal=False)


def is_whole(decoder: Decoder) -> bool:
    """Whether no two ranks share the decoder."""
    return type(decoder.model.sharding) is Sharding


@contextmanager
def attending(decoder: Decoder, by: Sharding) -> Iterator[None]:
    """Within this context the decoder attends by `by`."""
    before, decoder.model.sharding = decoder.model.sharding, by
    try:
        yield
    finally:
        decoder.model.sharding = before
