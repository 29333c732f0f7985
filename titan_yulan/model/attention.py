"""Grouped-query self-attention with WeSaR scalars, optional QK LayerNorm, and the one function that attends."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from titan_yulan.config.model import ModelConfig
from titan_yulan.model.rotary import rotate
from titan_yulan.model.scale import make_alpha, multiply


class AttentionContext:
    """What every block shares in one forward pass.

    A plain class on purpose: FSDP2 casts the floating tensors that it finds in a block's arguments to its compute type,
    also inside tuples and dataclasses, and the rotary tables must keep theirs.
    """

    def __init__(self, cos: Tensor, sin: Tensor, mask: Tensor | None, causal: bool) -> None:
        """
        Args:
            cos, sin: rotary tables, (seq, 1, head_dim / 2) or (batch, seq, 1, head_dim / 2).
            mask: (batch, 1, seq, seq) bool, True where a query (third axis) may see a key (fourth); None: no mask.
            causal: without a mask, whether a query sees only keys up to its own place.
        """
        self.cos = cos
        self.sin = sin
        self.mask = mask
        self.causal = causal


def document_mask(document_ids: Tensor | None, causal: bool) -> Tensor | None:
    """Who may see whom: (batch, seq) document ids -> (batch, 1, seq, seq) bool; None when no mask is needed."""
    if document_ids is None:
        return None
    same = document_ids[:, None, :, None] == document_ids[:, None, None, :]
    return same.tril() if causal else same


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, context: AttentionContext) -> Tensor:
    """softmax(scale * query key^T) value, softmax in float32 or wider.

    Args:
        query: (batch, seq, heads, head_dim).
        key, value: (batch, seq, key-value heads, head_dim); heads is a multiple of key-value heads.
        scale: multiplier of the scores.
        context: its mask, or when there is none its causal flag, limits who sees whom.

    Returns:
        (batch, seq, heads, head_dim).
    """
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    grouped = query.shape[1] != key.shape[1]
    if context.mask is not None and grouped:
        # PyTorch's memory-efficient kernel, the only CUDA one that takes a mask, knows no grouped heads.
        repeats = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
        grouped = False
    attended = functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=context.mask,
        is_causal=context.causal and context.mask is None,
        scale=scale,
        enable_gqa=grouped,
    )
    return attended.transpose(1, 2)


class HeadLayerNorm(nn.Module):
    """A LayerNorm per head, each with its own weight and no bias (the published QK LayerNorm)."""

    def __init__(self, num_heads: int, head_dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.norms = nn.ModuleList(nn.LayerNorm(head_dim, eps=eps, bias=False) for _ in range(num_heads))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, seq, heads, head_dim) -> the same, computed in float32 or wider."""
        weights = torch.stack(list(self.parameters()))  # (heads, head_dim), one vector per norm
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (functional.layer_norm(wide, wide.shape[-1:], eps=self.eps) * weights).to(x.dtype)


class Attention(nn.Module):
    """q, k, v = alpha * (W x + b); [LayerNorm per head]; rotation; attention; W_o.

    The factor alpha_o * residual scale of the output is left to the block, which adds the output to the residual.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        heads, groups, head_dim = config.num_attention_heads, config.num_key_value_heads, config.attention_head_dim
        self.head_dim = head_dim
        self.softmax_scale = config.softmax_scale
        self.rounded = config.scalar_precision == "compute"
        self.q_proj = nn.Linear(config.hidden_size, heads * head_dim, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, groups * head_dim, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, groups * head_dim, bias=config.attention_bias)
        self.o_proj = nn.Linear(heads * head_dim, config.hidden_size, bias=False)
        self.q_proj_alpha = make_alpha(config, "q_proj_alpha")
        self.k_proj_alpha = make_alpha(config, "k_proj_alpha")
        self.v_proj_alpha = make_alpha(config, "v_proj_alpha")
        self.o_proj_alpha = make_alpha(config, "o_proj_alpha")
        self.q_layernorm: nn.Module | None = None
        self.k_layernorm: nn.Module | None = None
        if config.qk_layer_norm:
            self.q_layernorm = HeadLayerNorm(heads, head_dim, config.layer_norm_eps)
            self.k_layernorm = HeadLayerNorm(groups, head_dim, config.layer_norm_eps)

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        """(batch, seq, hidden) -> (batch, seq, hidden), without alpha_o."""
        query = self._heads(multiply(self.q_proj(x), self.q_proj_alpha, rounded=self.rounded))
        key = self._heads(multiply(self.k_proj(x), self.k_proj_alpha, rounded=self.rounded))
        value = self._heads(multiply(self.v_proj(x), self.v_proj_alpha, rounded=self.rounded))
        if self.q_layernorm is not None and self.k_layernorm is not None:
            query, key = self.q_layernorm(query), self.k_layernorm(key)
        query, key = rotate(query, context.cos, context.sin), rotate(key, context.cos, context.sin)
        return self.o_proj(attend(query, key, value, self.softmax_scale, context).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        # The number of heads is read off the projection: under tensor parallelism this rank holds a part of them.
        return x.view(*x.shape[:2], -1, self.head_dim)
