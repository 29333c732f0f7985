"""What the ranks of a mesh exchange in a decoder's forward pass; backward does the transpose.

Tensor-parallel ranks hold the residual stream cut along the sequence: gathered before the projections in, summed and
scattered after those out (arXiv 2205.05198, section 4.2.2). A sequence that the number of ranks does not divide (4096
over 3) is filled up with zeros there, which stay zeros between the projections and have no gradient.

Context-parallel ranks hold slices of every row, and gather keys and values (parallel/context.py).
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from titan_yulan.model.attend import document_mask
from titan_yulan.model.sharding import Sharding
from titan_yulan.parallel.collectives import gather_sequence, reduce_scatter_sequence
from titan_yulan.parallel.context import attend_context, join_sequence, slice_document_mask, slice_sequence
from titan_yulan.parallel.mesh import Mesh


class RankSharding(Sharding):
    """The exchanges of this rank in a mesh; where a degree is 1, none."""

    def __init__(self, mesh: Mesh, vocabulary_size: int) -> None:
        self.tensor_rank, self.tensor_size, self.tensor_group = mesh.tensor_rank, mesh.tensor_size, mesh.tensor_group
        self.context_rank, self.context_size = mesh.context_rank, mesh.context_size
        self.context_group = mesh.context_group
        self.vocabulary_size = vocabulary_size
        self.largest_part = -(-vocabulary_size // mesh.tensor_size)  # rows of the embedding, as torch.chunk cuts
        self.length_multiple = 2 * mesh.context_size if mesh.context_size > 1 else 1

    def embed(self, input_ids: Tensor, weight: Tensor) -> Tensor:
        if self.tensor_group is None:
            return functional.embedding(input_ids, weight)
        places = input_ids - self.tensor_rank * self.largest_part
        elsewhere = (places < 0) | (places >= weight.shape[0])
        embedded = functional.embedding(places.masked_fill(elsewhere, 0), weight)
        return self.reduce_scatter_sequence(embedded.masked_fill(elsewhere[..., None], 0))

    def gather_sequence(self, x: Tensor, length: int) -> Tensor:
        if self.tensor_group is None:
            return x
        gathered = gather_sequence(x, self.tensor_group, dim=1)
        return gathered if gathered.shape[1] == length else gathered[:, :length]

    def reduce_scatter_sequence(self, x: Tensor) -> Tensor:
        missing = -x.shape[1] % self.tensor_size
        padded = functional.pad(x, (0, 0, 0, missing)) if missing else x
        return reduce_scatter_sequence(padded, self.tensor_group, dim=1)

    def gather_vocabulary(self, logits: Tensor) -> Tensor:
        if self.tensor_group is None:
            return logits
        # all parts must have one size to be gathered; only the last ones can be smaller
        padded = functional.pad(logits, (0, self.largest_part - logits.shape[-1]))
        return gather_sequence(padded, self.tensor_group, dim=logits.ndim - 1)[..., : self.vocabulary_size]

    def slice_context(self, x: Tensor, dim: int = 1) -> Tensor:
        return slice_sequence(x, self.context_rank, self.context_size, dim)

    def join_context(self, x: Tensor) -> Tensor:
        gathered = gather_sequence(x[None], self.context_group, dim=0)
        return join_sequence(gathered.unbind(0), dim=1)

    def document_mask(self, document_ids: Tensor | None, causal: bool) -> Tensor | None:
        if document_ids is None or self.context_group is None:
            return document_mask(document_ids, causal)
        return slice_document_mask(document_ids, causal, self.context_rank, self.context_size)

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
        if self.context_group is None:
            return super().attend(query, key, value, scale, mask, causal, dropout)
        return attend_context(query, key, value, scale, self.context_group, causal=causal, mask=mask, dropout=dropout)
