"""The peer `reference`: a Llama of PyTorch's own operators, trained the way torchtitan trains one.

nn.Linear, F.rms_norm, F.scaled_dot_product_attention, and F.cross_entropy over all logits in float32. One torch.compile
for each block and one for the loss, FSDP2 around each block and the root with bfloat16 computation and float32
reduction, AdamW (fused or foreach), gradients clipped at 1. Same sizes, same biases and the same tied or untied head as
the model of ours, but plain: no scalars, no residual factor, no z-loss.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from titan_yulan.config.model import ModelConfig

_MAXIMAL_NORM = 1.0


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, self.head_dim = config.hidden_size, config.attention_head_dim
        query, key = (n * self.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(hidden, query, bias=config.attention_bias)
        self.k_proj = nn.Linear(hidden, key, bias=config.attention_bias)
        self.v_proj = nn.Linear(hidden, key, bias=config.attention_bias)
        self.o_proj = nn.Linear(query, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        query, key, value = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = functional.scaled_dot_product_attention(
            _rotate(query, cos, sin), _rotate(key, cos, sin), value, is_causal=True, enable_gqa=True
        )
        return self.o_proj(attended.transpose(1, 2).flatten(2))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).type_as(x)


class Block(nn.Module):
    """x + attention(norm(x)), then x + down(silu(gate) * up) of the second norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, ffn = config.hidden_size, config.intermediate_size
        self.attention_norm = nn.RMSNorm(hidden, eps=config.rms_norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(hidden, eps=config.rms_norm_eps)
        self.gate_proj = nn.Linear(hidden, ffn, bias=False)
        self.up_proj = nn.Linear(hidden, ffn, bias=False)
        self.down_proj = nn.Linear(ffn, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        normed = self.mlp_norm(x)
        return x + self.down_proj(functional.silu(self.gate_proj(normed)) * self.up_proj(normed))


class Llama(nn.Module):
    """(batch, seq) ids -> (batch, seq, vocab) logits."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        width = self.config.attention_head_dim
        exponents = torch.arange(0, width, 2, device=ids.device) / width
        angles = torch.outer(torch.arange(ids.shape[1], device=ids.device), self.config.rope_theta**-exponents)
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.head(self.norm(x))


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """() float32 sum over all targets."""
    return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")


def _selective_contexts() -> tuple[Any, Any]:
    """Attention and every second matrix product of a block are kept, the rest is computed again."""
    seen = {False: 0, True: 0}

    def policy(context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
        name = operator.name()
        if name in ("aten::mm", "aten::addmm"):
            seen[context.is_recompute] += 1
            save = seen[context.is_recompute] % 2 == 1
        else:
            save = "scaled_dot_product" in name
        return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def _recompute(block: nn.Module, selective: bool) -> None:
    contexts: dict[str, Any] = {"context_fn": _selective_contexts} if selective else {}

    def forward(self: nn.Module, *inputs: Tensor) -> Tensor:
        return checkpoint(
            functools.partial(type(self).forward, self),
            *inputs,
            use_reentrant=False,
            preserve_rng_state=False,
            **contexts,
        )

    block.forward = MethodType(forward, block)


class PlainTraining:
    """Model, optimizer and the step of the peer on one rank."""

    def __init__(
        self,
        config: ModelConfig,
        mesh: DeviceMesh,
        dtype: torch.dtype,
        recompute: str,
        compiled: bool,
        fused: bool,
        device: torch.device,
    ) -> None:
        """
        Args:
            dtype: of products; weights, gradients and moments are float32.
            recompute: "none", "full" or "selective".
            compiled: whether blocks and loss go through torch.compile.
            fused: AdamW's fused implementation; False: foreach.
        """
        with torch.device(device):
            model = Llama(config)
        for block in model.blocks:
            if recompute != "none":
                _recompute(block, recompute == "selective")
            if compiled:
                block.compile(fullgraph=True, dynamic=False)
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        for block in model.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.02)
        self.model = model
        loss = torch.compile(cross_entropy, fullgraph=True, dynamic=False) if compiled else cross_entropy
        self._loss = cast(Callable[[Tensor, Tensor], Tensor], loss)
        options: dict[str, Any] = {"fused": True} if fused else {"foreach": True}
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, **options)

    def step(self, batches: list[Tensor]) -> Tensor:
        """Forward, backward and update for micro-batches of (rows, seq + 1) ids; returns the () mean loss."""
        targets = sum(batch[:, 1:].numel() for batch in batches)
        total = torch.zeros((), device=batches[0].device)
        for batch in batches:
            loss = self._loss(self.model(batch[:, :-1]), batch[:, 1:]) / targets
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(self.model.parameters(), _MAXIMAL_NORM, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total
