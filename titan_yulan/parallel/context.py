"""Context parallelism: every rank of a context group holds a slice of each row's sequence.

The sequence is cut into 2c equal chunks for c ranks, and rank r holds chunks r and 2c - 1 - r, in this order. With
causal attention the two together see 2c + 1 chunks of keys whatever r is, so that all ranks do the same work. Inside
attention keys and values are gathered over the group, as in Llama 3 (arXiv 2407.21783, section 3.3.2): with grouped
heads they are small beside the queries, any mask stays possible, and no number of heads is excluded.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from titan_yulan.parallel.collectives import gather_sequence


def slice_sequence(whole: Tensor, rank: int, size: int, dim: int) -> Tensor:
    """What context rank `rank` of `size` holds of a tensor along its sequence dimension.

    Args:
        whole: natural order; 2 * size divides its length along `dim` (any length if size is 1).
    """
    if size == 1:
        return whole
    if whole.shape[dim] % (2 * size):
        raise ValueError(
            f"a sequence of {whole.shape[dim]} tokens cannot be cut over {size} ranks: {2 * size} must divide it"
        )
    chunks = whole.chunk(2 * size, dim)
    return torch.cat((chunks[rank], chunks[2 * size - 1 - rank]), dim)


def join_sequence(slices: Sequence[Tensor], dim: int) -> Tensor:
    """The whole in natural order from the slices of all context ranks; the inverse of `slice_sequence`."""
    if len(slices) == 1:
        return slices[0]
    halves = [part.chunk(2, dim) for part in slices]
    return torch.cat([first for first, _ in halves] + [second for _, second in reversed(halves)], dim)


def slice_positions(sequence_length: int, rank: int, size: int, device: torch.device | None = None) -> Tensor:
    """Where in the row the tokens of a context rank stand: (sequence_length / size,), int64."""
    return slice_sequence(torch.arange(sequence_length, device=device), rank, size, dim=0)


def slice_document_mask(document_ids: Tensor, causal: bool, rank: int, size: int) -> Tensor:
    """Which keys of the whole row a context rank's queries may see: their own document's, if causal up to themselves.

    Args:
        document_ids: (batch, seq) of the whole row.

    Returns:
        (batch, 1, seq / size, seq) bool: the rank's rows of the mask, made without the others.
    """
    own = slice_sequence(document_ids, rank, size, dim=1)
    mask = own[:, None, :, None] == document_ids[:, None, None, :]
    if causal:
        length = document_ids.shape[1]
        places = slice_positions(length, rank, size, document_ids.device)
        mask &= places[:, None] >= torch.arange(length, device=document_ids.device)
    return mask


def attend_context(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    group: dist.ProcessGroup,
    *,
    causal: bool,
    mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(scale * query key^T) value over the whole row, for this rank's queries.

    The gathered keys and values live until backward (2 * batch * seq * key-value heads * head_dim numbers a layer): to
    gather them again there would add a third collective to every layer, and where memory is short activation
    checkpointing does just that, as it runs the block's forward pass again.

    Args:
        query: (batch, local_seq, heads, head_dim), this rank's slice (`slice_sequence`), already rotated.
        key, value: (batch, local_seq, key-value heads, head_dim); heads is a multiple of key-value heads.
        scale: multiplier of the scores.
        group: the context group, of two or more ranks, in the order of their slices.
        causal: without a mask, whether a query sees only keys up to its own place.
        mask: (batch or 1, 1, local_seq, seq) bool, True where a query may see a key in natural order.
        dropout: share of the softmax that is dropped.

    Returns:
        (batch, local_seq, heads, head_dim).
    """
    rank, size = group.rank(), group.size()
    # one collective for both, along dimension 0, so that `join_sequence` makes the only copy of the whole
    gathered = gather_sequence(torch.stack((key, value)), group, dim=0).unflatten(0, (size, 2))
    key, value = join_sequence(gathered.unbind(0), dim=2).unbind(0)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # (batch, heads, seq, head_dim)
    if mask is not None or not causal:
        return _attend(query, key, value, mask, scale, dropout).transpose(1, 2)
    length = query.shape[2] // 2
    attended = []
    for part, chunk in zip(query.split(length, dim=2), (rank, 2 * size - 1 - rank), strict=True):
        end = (chunk + 1) * length
        attended.append(_attend_prefix(part, key[:, :, :end], value[:, :, :end], scale, dropout))
    return torch.cat(attended, dim=2).transpose(1, 2)


def _attend_prefix(query: Tensor, key: Tensor, value: Tensor, scale: float, dropout: float = 0.0) -> Tensor:
    """Causal attention of the queries at the end of a prefix: the last query sees the last key.

    `is_causal` of PyTorch's public function lets the first query see the first key instead, and `causal_lower_right`
    cannot be made inside a compiled graph (PyTorch 2.13). What the latter calls on a GPU can: the flash kernel, whose
    causal diagonal ends in the lower right corner. Elsewhere, and for float32, which that kernel does not know, the
    diagonal is a mask.
    """
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] % 8 == 0:
        return _flash_prefix(query, key, value, scale, dropout)
    shape = query.shape[2], key.shape[2]
    mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril(shape[1] - shape[0])
    return _attend(query, key, value, mask, scale, dropout)


def _flash_prefix(query: Tensor, key: Tensor, value: Tensor, scale: float, dropout: float = 0.0) -> Tensor:
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    return flash(query, key, value, dropout, is_causal=True, scale=scale)[0]


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, dropout: float = 0.0
) -> Tensor:
    """All of them (batch, heads or key-value heads, their own length, head_dim)."""
    grouped = query.shape[1] != key.shape[1]
    if grouped and mask is not None:
        # PyTorch's memory-efficient kernel, the only CUDA one that takes a mask, knows no grouped heads.
        repeats = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
        grouped = False
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale, enable_gqa=grouped
    )
