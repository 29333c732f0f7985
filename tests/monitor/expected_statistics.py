"""Statistics of hidden states and attention stated a second time, in float64, from the published description
(arXiv 2412.17743): head by head, with every scale where it belongs, sharing nothing with the project's code."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tests.model.test_decoder_formula import layer_norm, rms_norm, rotate
from titan_yulan.config.model import ModelConfig


def of_vectors(x: Tensor) -> dict[str, float]:
    """Each over the last dimension, then averaged."""
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).sum(-1) / (x.shape[-1] - 1)
    return {
        "variance": variance.mean().item(),
        "mean": mean.mean().item(),
        "rms": (x**2).mean(-1).sqrt().mean().item(),
    }


def expected_hidden(
    state: dict[str, Tensor],
    config: ModelConfig,
    ids: Tensor,
    layers: Sequence[int],
    documents: Tensor | None = None,
    positions: Tensor | None = None,
) -> dict[str, float]:
    """All tags of `monitor.hidden_states` for the model whose float64 state dict is `state`.

    Args:
        ids: (rows, seq).
        layers: the sampled ones.
        documents: (rows, seq), a token sees its own document only; None: no such limit.
        positions: (rows, seq); None: 0 .. seq - 1.
    """
    found: dict[str, float] = {}

    def note(name: str, x: Tensor, layer: int | None = None) -> None:
        if layer is None or layer in layers:
            tag = f"hidden/{name}" + ("" if layer is None else f"/layer_{layer:02d}")
            found.update({f"{tag}/{key}": value for key, value in of_vectors(x).items()})

    def alpha(name: str) -> Tensor | float:
        return state.get(name, 1.0)

    rows, seq = ids.shape
    seen = torch.ones(seq, seq, dtype=torch.bool).tril().expand(rows, seq, seq)
    if documents is not None:
        seen = seen & (documents[:, :, None] == documents[:, None, :])
    positions = torch.arange(seq).expand(rows, seq) if positions is None else positions
    x = state["model.embed_tokens.weight"][ids] * config.embedding_scale
    note("embedding", x)
    if config.embedding_gradient_scale != 1:
        note("embedding_gradient_scale", x)
    if config.embedding_norm == "layer_norm":
        x = layer_norm(x, state["model.embedding_layernorm.weight"], config.layer_norm_eps)
    if config.embedding_norm == "rms_norm":
        x = rms_norm(x, state["model.embedding_layernorm.weight"], config) * config.norm_scale
    if config.embedding_norm != "none":
        note("embedding_norm", x)
    residual = min(1.0, 1.4 / math.sqrt(config.num_hidden_layers))
    for layer in range(config.num_hidden_layers):
        name = f"model.layers.{layer}."
        a = rms_norm(x, state[name + "input_layernorm.weight"], config)
        a = a * config.norm_scale * alpha(name + "input_layernorm_alpha")
        note("input_norm", a, layer)
        query, key, attended, logsumexp = _attention(state, name + "self_attn.", config, a, positions, seen)
        note("query", query, layer)
        note("key", key, layer)
        if layer in layers:
            by_head = logsumexp.mean((0, 1))
            found[f"attention/logsumexp/layer_{layer:02d}"] = by_head.mean().item()
            found[f"attention/logsumexp_max/layer_{layer:02d}"] = by_head.max().item()
        o = attended * alpha(name + "self_attn.o_proj_alpha")
        note("attention_output", o, layer)
        x = x + residual * o
        note("attention_residual", x, layer)
        b = rms_norm(x, state[name + "post_attention_layernorm.weight"], config)
        b = b * config.norm_scale * alpha(name + "post_attention_layernorm_alpha")
        note("post_norm", b, layer)
        b = b * alpha(name + "gate_up_proj_alpha")
        gate = b @ state[name + "mlp.gate_proj.weight"].T
        inner = gate / (1 + torch.exp(-gate)) * (b @ state[name + "mlp.up_proj.weight"].T)
        m = alpha(name + "down_proj_alpha") * (inner @ state[name + "mlp.down_proj.weight"].T)
        note("mlp_output", m, layer)
        x = x + residual * m
        note("mlp_residual", x, layer)
    final = rms_norm(x, state["model.norm.weight"], config)
    note("final_norm", final * config.norm_scale * alpha("model.norm_alpha"))
    return found


def _attention(
    state: dict[str, Tensor], name: str, config: ModelConfig, a: Tensor, positions: Tensor, seen: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rotated queries and keys (rows, seq, their heads, head_dim), the output before alpha, and the log-sum-exp of the
    scores (rows, seq, heads)."""
    size = config.head_dim or config.hidden_size // config.num_attention_heads
    q, k, v = (
        (a @ state[f"{name}{letter}_proj.weight"].T + state.get(f"{name}{letter}_proj.bias", 0.0))
        * state.get(f"{name}{letter}_proj_alpha", 1.0)
        for letter in "qkv"
    )
    queries, keys, outputs, sums = [], {}, [], []
    for head in range(config.num_attention_heads):
        group = head * config.num_key_value_heads // config.num_attention_heads
        qh, kh = q[..., head * size : (head + 1) * size], k[..., group * size : (group + 1) * size]
        if config.qk_layer_norm:
            qh = layer_norm(qh, state[f"{name}q_layernorm.norms.{head}.weight"], config.layer_norm_eps)
            kh = layer_norm(kh, state[f"{name}k_layernorm.norms.{group}.weight"], config.layer_norm_eps)
        qh, kh = rotate(qh, positions, config.rope_theta), rotate(kh, positions, config.rope_theta)
        scores = qh @ kh.transpose(1, 2) * math.sqrt(config.attention_base_width or size) / size
        weights = torch.exp(scores) * seen
        total = weights.sum(-1, keepdim=True)
        outputs.append(weights / total @ v[..., group * size : (group + 1) * size])
        sums.append(total[..., 0].log())
        queries.append(qh)
        keys[group] = kh
    output = torch.cat(outputs, dim=-1) @ state[f"{name}o_proj.weight"].T
    return torch.stack(queries, 2), torch.stack(list(keys.values()), 2), output, torch.stack(sums, 2)
