"""Another way to attend, for some forward passes of a decoder.

The decoder is written once, for rows of one sequence; where it attends it asks a `Sharding`. Those of this kind leave
to the decoder's own what tensor-parallel ranks exchange. Context-parallel ranks do not cut these rows: each computes
all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from titan_yulan.model import Decoder
from titan_yulan.model.attend import attend
from titan_yulan.model.sharding import Sharding


class WholeRows(Sharding):
    """Attends as a decoder does by itself, with rows that are not cut; `ranks`: the decoder's own sharding."""

    ranks = Sharding()

    def embed(self, input_ids: Tensor, weight: Tensor) -> Tensor:
        return self.ranks.embed(input_ids, weight)

    def gather_sequence(self, x: Tensor, length: int) -> Tensor:
        return self.ranks.gather_sequence(x, length)

    def reduce_scatter_sequence(self, x: Tensor) -> Tensor:
        return self.ranks.reduce_scatter_sequence(x)

    def gather_vocabulary(self, logits: Tensor) -> Tensor:
        return self.ranks.gather_vocabulary(logits)


class Branches(WholeRows):
    """Rows of one beginning and several branches after it, which do not see one another."""

    def __init__(self, branches: Tensor) -> None:
        """`branches`: (rows, length); 0 marks the beginning, other numbers the branches."""
        same = branches[:, None, :, None] == branches[:, None, None, :]
        self._mask = (same | (branches == 0)[:, None, None, :]).tril()  # (rows, 1, length, length)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        mask: Tensor | None,
        causal: bool,
        dropout: float = 0.0,
    ) -> Tensor:
        """`model.attend.attend` with the mask of the branches."""
        return attend(query, key, value, scale, self._mask, causal=False)


@contextmanager
def attending(decoder: Decoder, by: WholeRows) -> Iterator[None]:
    """Within this context the decoder attends by `by`."""
    own = decoder.model.sharding
    by.ranks, by.tensor_rank = own, own.tensor_rank
    decoder.model.sharding = by
    try:
        yield
    finally:
        decoder.model.sharding = own
