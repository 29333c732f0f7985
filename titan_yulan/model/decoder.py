"""The decoder: a Llama with the scales of YuLan-Mini (arXiv 2412.17743).

With r the residual scale and every alpha a WeSaR scalar (1 where there is none):

    x   = E[ids] * embedding_scale                                        [norm of the embedding]
    x  += r * alpha_o * Attention(RMSNorm(x) * norm_scale * alpha_ln1)
    x  += r * alpha_down * W_down SwiGLU(RMSNorm(x) * norm_scale * alpha_ln2 * alpha_gate_up)      ... for each block
    h   = RMSNorm(x) * norm_scale * alpha_norm / logits_divisor * alpha_lm_head;  logits = h W_head^T

Module names are Hugging Face's Llama names, and the scalars' names are those of the published checkpoints, so a state
dict is already in the exchange format.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast, overload

import torch
from torch import Tensor, nn
from torch.nn import functional

from titan_yulan.config.model import ModelConfig
from titan_yulan.kernels.runtime import Kernels
from titan_yulan.kernels.swiglu import SwiGLU
from titan_yulan.model.attend import AttentionContext
from titan_yulan.model.attention import Attention
from titan_yulan.model.observer import Observer
from titan_yulan.model.projection import project
from titan_yulan.model.rotary import rotary_tables
from titan_yulan.model.scale import Alpha, RMSNorm, make_alpha, multiply
from titan_yulan.model.sharding import Sharding, local

T = TypeVar("T")


class MLP(nn.Module):
    """W_down (silu(W_gate x) * W_up x); the block applies the scalars."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.kernels = cast(Kernels, config.kernels)
        self.rounded = config.scalar_precision == "compute"
        self.activation = SwiGLU(packed=True, kernels=self.kernels)

    def forward(self, x: Tensor, output_factors: tuple[Alpha, ...], context: AttentionContext) -> Tensor:
        """(batch, this rank's part of seq, hidden) -> the same, times the output factors."""
        options = {"rounded": self.rounded, "kernels": self.kernels}
        whole = context.sharding.gather_sequence(x, context.length)
        gate_up = project(whole, (self.gate_proj, self.up_proj), ((), ()), **options)
        output = project(self.activation(gate_up), (self.down_proj,), (output_factors,), **options)
        return context.sharding.reduce_scatter_sequence(output)


class DecoderLayer(nn.Module):
    """One pre-norm block: attention and MLP, each added to the residual stream.

    A block hands its last output on beside the stream it belongs to, and the next norm adds it: one operation, across
    the boundary of blocks. A block whose activations are recomputed adds it itself (`hands_on` False), because what it
    hands on is what is kept of it.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm_scale = config.norm_scale
        # A trained scalar takes the constant factor along into the weights; without one, the addition applies it.
        self.output_factor = config.residual_factor if config.wesar else 1.0
        self.residual_factor = 1.0 if config.wesar else config.residual_factor
        self.hands_on = True
        self.draws_random_numbers = config.attention_dropout > 0 or config.hidden_dropout > 0
        self.input_layernorm = RMSNorm(config)
        self.self_attn = Attention(config, self.output_factor)
        self.post_attention_layernorm = RMSNorm(config)
        self.mlp = MLP(config)
        self.input_layernorm_alpha = make_alpha(config, "input_layernorm_alpha")
        self.post_attention_layernorm_alpha = make_alpha(config, "post_attention_layernorm_alpha")
        self.gate_up_proj_alpha = make_alpha(config, "gate_up_proj_alpha")
        self.down_proj_alpha = make_alpha(config, "down_proj_alpha")

    def forward(self, x: Tensor, output: Tensor | None, context: AttentionContext) -> tuple[Tensor, Tensor | None]:
        """One block.

        Args:
            x: (batch, seq, hidden), the residual stream.
            output: (batch, seq, hidden), what the block before has not added to it; None: nothing.
            context: what all blocks share.

        Returns:
            The two for the next block.
        """
        see = context.observer.see
        factors = (self.norm_scale, self.input_layernorm_alpha)
        normed, x = self.input_layernorm.add(x, output, self.residual_factor, *factors)
        see("stream", x)
        see("input_norm", normed)
        attended = context.drop(self.self_attn(normed, context))
        see("attention_output", attended, self.output_factor)
        factors = (self.norm_scale, self.post_attention_layernorm_alpha, self.gate_up_proj_alpha)
        normed, x = self.post_attention_layernorm.add(x, attended, self.residual_factor, *factors)
        see("attention_residual", x)
        see("post_norm", normed, self.gate_up_proj_alpha)
        transformed = context.drop(self.mlp(normed, (self.output_factor, self.down_proj_alpha), context))
        see("mlp_output", transformed, self.output_factor)
        return (x, transformed) if self.hands_on else (torch.add(x, transformed, alpha=self.residual_factor), None)


class Transformer(nn.Module):
    """Embedding, blocks and final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.rope_theta = config.rope_theta
        self.residual_factor = 1.0 if config.wesar else config.residual_factor
        self.sharding = Sharding()
        self.observer = Observer()
        self.rounded = config.scalar_precision == "compute"
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embedding_layernorm: nn.Module | None = None
        if config.embedding_norm == "layer_norm":
            self.embedding_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=False)
        elif config.embedding_norm == "rms_norm":
            self.embedding_layernorm = RMSNorm(config)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config, upcast=True)
        self.norm_alpha = make_alpha(config, "norm_alpha")

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        document_ids: Tensor | None,
        causal: bool,
        visible: Tensor | None,
        output_factors: tuple[Alpha, ...],
    ) -> Tensor:
        """(batch, seq) ids -> (batch, this rank's part of seq, hidden) final states, times the output factors.

        Dropout acts where a gradient is wanted, and nowhere else.
        """
        drops = torch.is_grad_enabled()
        embedded = self._embed(input_ids)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device) if position_ids is None else position_ids
        wide = torch.promote_types(embedded.dtype, torch.float32)
        table_type = embedded.dtype if self.rounded else wide
        cos, sin = rotary_tables(positions, self.config.attention_head_dim, self.rope_theta, table_type)
        mask = self.sharding.document_mask(document_ids, causal) if visible is None else visible
        context = AttentionContext(
            input_ids.shape[1],
            cos,
            sin,
            mask,
            causal,
            self.sharding,
            self.observer,
            self.config.attention_dropout if drops else 0.0,
            self.config.hidden_dropout if drops else 0.0,
        )
        x = context.drop(embedded)
        output = None
        for index, layer in enumerate(self.layers):
            self.observer.enter(index)
            x, output = layer(x, output, context)
        self.observer.enter(len(self.layers))
        factors = (self.config.norm_scale, self.norm_alpha, *output_factors)
        hidden, x = self.norm.add(x, output, self.residual_factor, *factors)
        self.observer.see("stream", x)
        self.observer.see("final_norm", hidden, *output_factors)
        return hidden

    def _embed(self, input_ids: Tensor) -> Tensor:
        """(batch, seq) ids -> (batch, this rank's part of seq, hidden) in the embedding's type."""
        embedded = self.sharding.embed(input_ids, local(self.embed_tokens.weight))
        x = multiply(embedded, self.config.embedding_scale, rounded=self.rounded)
        self.observer.see("embedding", x)
        if self.config.embedding_gradient_scale != 1:
            # Adds an exact zero that carries the scaled gradient, so the forward pass is unchanged to the bit.
            x = x.detach() + self.config.embedding_gradient_scale * (x - x.detach())
            self.observer.see("embedding_gradient_scale", x)
        if self.embedding_layernorm is not None:
            x = self._embedding_norm(x, self.embedding_layernorm)
            self.observer.see("embedding_norm", x)
        return x

    def _embedding_norm(self, x: Tensor, norm: nn.Module) -> Tensor:
        """(batch, this rank's part of seq, hidden) -> the same."""
        if isinstance(norm, RMSNorm):
            return norm(x, self.config.norm_scale)
        layer_norm, wide = cast(nn.LayerNorm, norm), torch.promote_types(x.dtype, torch.float32)
        weight = layer_norm.weight.to(wide)
        return functional.layer_norm(x.to(wide), x.shape[-1:], weight, None, layer_norm.eps).to(x.dtype)


class Decoder(nn.Module):
    """A causal (or bidirectional) language model, from token ids to logits or to whatever `head` makes of them.

    A tied model has no `lm_head` module at all: the head reads the embedding's weight, so nothing can untie them.
    Fill the weights with `model.initialise.initialise`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Transformer(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.lm_head_alpha = make_alpha(config, "lm_head_alpha")

    @overload
    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        causal: bool = True,
        visible: Tensor | None = None,
        head: None = None,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        causal: bool = True,
        visible: Tensor | None = None,
        *,
        head: Callable[[Tensor, Tensor], T],
    ) -> T: ...

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        causal: bool = True,
        visible: Tensor | None = None,
        head: Callable[[Tensor, Tensor], T] | None = None,
    ) -> Tensor | T:
        """Run the decoder.

        Args:
            input_ids: (batch, seq) token ids; under context parallelism this rank's part of them.
            position_ids: (seq,) or (batch, seq) rotary positions; None: 0 .. seq - 1.
            document_ids: (batch, seq) integers, of the whole sequence; a token sees only tokens with its own id. None:
                no such limit.
            causal: a token sees only itself and tokens before it.
            visible: (batch, 1, seq, seq) bool, True where a query (third axis; under context parallelism this rank's
                part) sees a key; instead of `document_ids` and `causal`. None: as those say.
            head: called with the scaled final hidden states (batch, seq, hidden) and the head's weight (vocab, hidden)
                inside this forward pass, where FSDP2 has the weight gathered; under tensor parallelism that is this
                rank's part of the weight. None gives the logits.

        Returns:
            (batch, seq, vocab) logits in the type of the weights, or what `head` returns.
        """
        # The head's factors join the final norm's, so that they are rounded together.
        factors = (1.0 / self.config.logits_divisor, self.lm_head_alpha)
        hidden = self.model(input_ids, position_ids, document_ids, causal, visible, factors)
        hidden = self.model.sharding.gather_sequence(hidden, input_ids.shape[1])
        weight = local(self.head_weight())
        if head is not None:
            return head(hidden, weight)
        return self.model.sharding.gather_vocabulary(functional.linear(hidden, weight))

    def head_weight(self) -> Tensor:
        """The output head's weight, (vocab, hidden); the embedding's own when tied."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def set_rope_theta(self, theta: float) -> None:
        """Change the base of the rotary frequencies from the next forward pass on (a switch of context length)."""
        self.model.rope_theta = float(theta)
