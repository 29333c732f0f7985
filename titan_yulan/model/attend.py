"""The one function that attends, and what every block shares in one forward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from titan_yulan.model.observer import Observer

if TYPE_CHECKING:
    from titan_yulan.model.sharding import Sharding


class AttentionContext:
    """What every block shares in one forward pass.

    A plain class on purpose: FSDP2 casts the floating tensors that it finds in a block's arguments to its compute type,
    also inside tuples and dataclasses, and the rotary tables must keep theirs.
    """

    def __init__(
        self,
        length: int,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        causal: bool,
        sharding: Sharding,
        observer: Observer,
        attention_dropout: float = 0.0,
        hidden_dropout: float = 0.0,
    ) -> None:
        """
        Args:
            length: of the sequence, of which tensor-parallel ranks hold parts between the projections.
            cos, sin: rotary tables, (seq, 1, head_dim / 2) or (batch, seq, 1, head_dim / 2).
            mask: (batch, 1, seq, seq) bool, True where a query (third axis) may see a key (fourth); None: no mask.
            causal: without a mask, whether a query sees only keys up to its own place.
            sharding: how ranks share the pass.
            observer: is shown what is computed.
            attention_dropout, hidden_dropout: shares that are dropped in this pass.
        """
        self.length = length
        self.cos = cos
        self.sin = sin
        self.mask = mask
        self.causal = causal
        self.sharding = sharding
        self.observer = observer
        self.attention_dropout = attention_dropout
        self.hidden_dropout = hidden_dropout

    def drop(self, x: Tensor) -> Tensor:
        """Dropout of hidden states."""
        return functional.dropout(x, self.hidden_dropout) if self.hidden_dropout else x


def document_mask(document_ids: Tensor | None, causal: bool) -> Tensor | None:
    """Who may see whom: (batch, seq) document ids -> (batch, 1, seq, seq) bool; None when no mask is needed."""
    if document_ids is None:
        return None
    same = document_ids[:, None, :, None] == document_ids[:, None, None, :]
    return same.tril() if causal else same


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    mask: Tensor | None,
    causal: bool,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(scale * query key^T) value, softmax in float32 or wider.

    Args:
        query: (batch, seq, heads, head_dim).
        key, value: (batch, seq, key-value heads, head_dim); heads is a multiple of key-value heads.
        scale: multiplier of the scores.
        mask: (batch, 1, seq, seq) bool, True where a query (third axis) may see a key; None: no mask.
        causal: without a mask, whether a query sees only keys up to its own place.
        dropout: share of the softmax that is dropped.

    Returns:
        (batch, seq, heads, head_dim).
    """
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    grouped = query.shape[1] != key.shape[1]
    if grouped and (mask is not None or (query.is_cuda and query.dtype not in (torch.bfloat16, torch.float16))):
        # PyTorch's memory-efficient kernel, the only CUDA one that takes a mask or float32, knows no grouped heads.
        repeats = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
        grouped = False
    attended = functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=causal and mask is None,
        scale=scale,
        enable_gqa=grouped,
    )
    return attended.transpose(1, 2)
