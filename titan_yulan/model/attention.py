"""Grouped-query self-attention with WeSaR scalars and optional QK LayerNorm."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from titan_yulan.config.model import ModelConfig
from titan_yulan.kernels.runtime import Kernels
from titan_yulan.model.attend import AttentionContext
from titan_yulan.model.projection import project
from titan_yulan.model.rotary import rotate
from titan_yulan.model.scale import make_alpha


class HeadLayerNorm(nn.Module):
    """A LayerNorm per head, each with its own weight and no bias (the published QK LayerNorm)."""

    def __init__(self, num_heads: int, head_dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.norms = nn.ModuleList(nn.LayerNorm(head_dim, eps=eps, bias=False) for _ in range(num_heads))

    def forward(self, x: Tensor, tensor_rank: int = 0) -> Tensor:
        """(batch, seq, this rank's heads, head_dim) -> the same, computed in float32 or wider."""
        heads = x.shape[2]
        weights = torch.stack(list(self.parameters()))[tensor_rank * heads :][:heads]  # one vector per head
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (functional.layer_norm(wide, wide.shape[-1:], eps=self.eps) * weights).to(x.dtype)


class Attention(nn.Module):
    """q, k, v = alpha * (W x + b); [LayerNorm per head]; rotation; attention; factor * alpha_o * W_o."""

    def __init__(self, config: ModelConfig, output_factor: float) -> None:
        """`output_factor`: multiplier of the output, besides its trained scalar."""
        super().__init__()
        heads, groups, head_dim = config.num_attention_heads, config.num_key_value_heads, config.attention_head_dim
        self.head_dim = head_dim
        self.softmax_scale = config.softmax_scale
        self.output_factor = output_factor
        self.rounded = config.scalar_precision == "compute"
        self.kernels = cast(Kernels, config.kernels)
        self.q_proj = nn.Linear(config.hidden_size, heads * head_dim, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, groups * head_dim, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, groups * head_dim, bias=config.attention_bias)
        self.o_proj = nn.Linear(heads * head_dim, config.hidden_size, bias=False)
        self.q_proj_alpha = make_alpha(config, "q_proj_alpha")
        self.k_proj_alpha = make_alpha(config, "k_proj_alpha")
        self.v_proj_alpha = make_alpha(config, "v_proj_alpha")
        self.o_proj_alpha = make_alpha(config, "o_proj_alpha")
        self.q_layernorm: HeadLayerNorm | None = None
        self.k_layernorm: HeadLayerNorm | None = None
        if config.qk_layer_norm:
            self.q_layernorm = HeadLayerNorm(heads, head_dim, config.layer_norm_eps)
            self.k_layernorm = HeadLayerNorm(groups, head_dim, config.layer_norm_eps)

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        """(batch, this rank's part of seq, hidden) -> the same."""
        sharding = context.sharding
        packed = project(
            sharding.gather_sequence(x, context.length),
            (self.q_proj, self.k_proj, self.v_proj),
            ((self.q_proj_alpha,), (self.k_proj_alpha,), (self.v_proj_alpha,)),
            rounded=self.rounded,
            kernels=self.kernels,
        )
        query, key, value = (part.unflatten(-1, (-1, self.head_dim)) for part in self._split(packed))
        if self.q_layernorm is not None and self.k_layernorm is not None:
            query = self.q_layernorm(query, sharding.tensor_rank)
            key = self.k_layernorm(key, sharding.tensor_rank)
        query, key = rotate(query, context.cos, context.sin), rotate(key, context.cos, context.sin)
        context.observer.see_attention(query, key, self.softmax_scale, context)
        attended = sharding.attend(
            query, key, value, self.softmax_scale, context.mask, context.causal, context.attention_dropout
        )
        output = project(
            attended.flatten(2),
            (self.o_proj,),
            ((self.output_factor, self.o_proj_alpha),),
            rounded=self.rounded,
            kernels=self.kernels,
        )
        return sharding.reduce_scatter_sequence(output)

    def _split(self, packed: Tensor) -> tuple[Tensor, ...]:
        # In proportion: under tensor parallelism this rank holds a part of the heads.
        sizes = [projection.out_features for projection in (self.q_proj, self.k_proj, self.v_proj)]
        share = sum(sizes) // packed.shape[-1]
        return packed.split([size // share for size in sizes], dim=-1)
