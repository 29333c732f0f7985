"""The seam between the decoder and the ranks that share its forward pass.

The decoder is written once, for activations that are plain tensors; where ranks must exchange them it asks a
`Sharding`. This one is of a decoder that no two ranks share, the identity; `parallel/sharding.py` has the other. Under
tensor parallelism the residual stream between the projections is cut along the sequence (Korthikanti et al.,
arXiv 2205.05198), under context parallelism all activations are.
"""

from __future__ import annotations

import math

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.nn import functional

from titan_yulan.model.attend import attend, document_mask


class Sharding:
    """How ranks share a forward pass: not at all.

    Attributes:
        tensor_rank: which of the tensor-parallel ranks this is.
        length_multiple: divides the length of every sequence.
    """

    tensor_rank = 0
    length_multiple = 1

    def embed(self, input_ids: Tensor, weight: Tensor) -> Tensor:
        """(batch, seq) ids, this rank's rows of the embedding -> (batch, this rank's part of seq, hidden)."""
        return functional.embedding(input_ids, weight)

    def gather_sequence(self, x: Tensor, length: int) -> Tensor:
        """(batch, this rank's part of seq, ...) -> (batch, length, ...) on every tensor-parallel rank."""
        return x

    def reduce_scatter_sequence(self, x: Tensor) -> Tensor:
        """(batch, seq, ...), of which every tensor-parallel rank has a summand -> this rank's part of the sum."""
        return x

    def gather_vocabulary(self, logits: Tensor) -> Tensor:
        """(..., this rank's part of the vocabulary) -> (..., vocabulary)."""
        return logits

    def slice_context(self, x: Tensor, dim: int = 1) -> Tensor:
        """What of a whole sequence along `dim` this context-parallel rank works on."""
        return x

    def join_context(self, x: Tensor) -> Tensor:
        """(batch, this context-parallel rank's part of seq, ...) -> (batch, seq, ...), the inverse of the above."""
        return x

    def document_mask(self, document_ids: Tensor | None, causal: bool) -> Tensor | None:
        """`model.attend.document_mask` of the whole sequence, the rows of the queries that this rank has."""
        return document_mask(document_ids, causal)

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
        """`model.attend.attend`, of this rank's queries to the keys of the whole sequence."""
        return attend(query, key, value, scale, mask, causal, dropout)


def local(weight: Tensor) -> Tensor:
    """This rank's part of a weight that tensor parallelism cuts; the weight itself where it does not."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def copies(weight: Tensor, ranks: int = 1) -> int:
    """How many ranks hold the same part of a weight; `ranks` do of one that is no DTensor. A mesh is of all ranks."""
    if not isinstance(weight, DTensor):
        return ranks
    mesh = weight.device_mesh
    return math.prod(mesh.size(dim) for dim, place in enumerate(weight.placements) if isinstance(place, Replicate))
