"""The decoder against a second statement of its formulas in float64, with every option switched.

The second statement shares nothing with the project's code: rotation by complex numbers, attention head by head, every
scale where the published description (arXiv 2412.17743) has it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from titan_yulan.config.model import ModelConfig
from titan_yulan.model.decoder import Decoder

RandomDecoder = Callable[..., Decoder]

SMALL = ModelConfig(
    vocab_size=19,
    hidden_size=24,
    intermediate_size=20,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    alpha_base_width=8,
)
TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}


def rms_norm(x: Tensor, weight: Tensor, config: ModelConfig) -> Tensor:
    gain = weight + 1 if config.rms_norm_style == "gemma" else weight
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + config.rms_norm_eps) * gain


def layer_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + eps) * weight


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """(batch, seq, head_dim) with positions (batch, seq)."""
    half = x.shape[-1] // 2
    frequencies = torch.tensor([theta ** (-2 * j / x.shape[-1]) for j in range(half)], dtype=torch.float64)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.exp(1j * positions.double()[..., None] * frequencies)
    return torch.cat((turned.real, turned.imag), dim=-1)


def expected_logits(
    state: dict[str, Tensor],
    config: ModelConfig,
    ids: Tensor,
    positions: Tensor | None = None,
    documents: Tensor | None = None,
    causal: bool = True,
    rope_theta: float | None = None,
) -> Tensor:
    """Logits (batch, seq, vocab) of the model whose state dict is `state`."""
    batch, seq = ids.shape
    if positions is None:
        positions = torch.arange(seq).expand(batch, seq)
    seen = torch.ones(batch, seq, seq, dtype=torch.bool)
    for query in range(seq):
        for key in range(seq):
            if causal and key > query:
                seen[:, query, key] = False
            if documents is not None:
                seen[:, query, key] &= documents[:, query] == documents[:, key]

    def alpha(name: str) -> Tensor | float:
        return state.get(name, torch.ones(1, dtype=torch.float64))

    x = state["model.embed_tokens.weight"][ids] * config.embedding_scale
    if config.wesar and 0 <= config.embedding_gradient_scale < 1:
        x = config.embedding_gradient_scale * x + (1 - config.embedding_gradient_scale) * x.detach()
    if config.embedding_norm == "layer_norm":
        x = layer_norm(x, state["model.embedding_layernorm.weight"], config.layer_norm_eps)
    if config.embedding_norm == "rms_norm":
        x = rms_norm(x, state["model.embedding_layernorm.weight"], config) * config.norm_scale
    residual = 1.4 / math.sqrt(config.num_hidden_layers) if config.residual_scale is None else config.residual_scale
    if not 0 <= residual < 1:
        residual = 1.0
    for index in range(config.num_hidden_layers):
        name = f"model.layers.{index}."
        a = rms_norm(x, state[name + "input_layernorm.weight"], config)
        a = a * config.norm_scale * alpha(name + "input_layernorm_alpha")
        o = _attention(state, name + "self_attn.", config, a, positions, seen, rope_theta or config.rope_theta)
        x = x + residual * (alpha(name + "self_attn.o_proj_alpha") * o)
        b = rms_norm(x, state[name + "post_attention_layernorm.weight"], config)
        b = b * config.norm_scale * alpha(name + "post_attention_layernorm_alpha") * alpha(name + "gate_up_proj_alpha")
        gate = b @ state[name + "mlp.gate_proj.weight"].T
        up = b @ state[name + "mlp.up_proj.weight"].T
        m = (gate / (1 + torch.exp(-gate)) * up) @ state[name + "mlp.down_proj.weight"].T
        x = x + residual * (alpha(name + "down_proj_alpha") * m)
    h = rms_norm(x, state["model.norm.weight"], config) * config.norm_scale * alpha("model.norm_alpha")
    if config.logits_base_width is not None and config.logits_base_width != config.hidden_size:
        h = h / (config.hidden_size / config.logits_base_width)
    h = h * alpha("lm_head_alpha")
    return h @ state["model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"].T


def _attention(
    state: dict[str, Tensor], name: str, config: ModelConfig, a: Tensor, positions: Tensor, seen: Tensor, theta: float
) -> Tensor:
    head_dim = config.head_dim or config.hidden_size // config.num_attention_heads

    def project(letter: str) -> Tensor:
        y = a @ state[f"{name}{letter}_proj.weight"].T
        if config.attention_bias:
            y = y + state[f"{name}{letter}_proj.bias"]
        return y * state.get(f"{name}{letter}_proj_alpha", torch.ones(1, dtype=torch.float64))

    q, k, v = (project(letter) for letter in "qkv")
    width = config.attention_base_width or head_dim
    outputs = []
    for head in range(config.num_attention_heads):
        group = head * config.num_key_value_heads // config.num_attention_heads
        qh = q[..., head * head_dim : (head + 1) * head_dim]
        kh = k[..., group * head_dim : (group + 1) * head_dim]
        vh = v[..., group * head_dim : (group + 1) * head_dim]
        if config.qk_layer_norm:
            qh = layer_norm(qh, state[f"{name}q_layernorm.norms.{head}.weight"], config.layer_norm_eps)
            kh = layer_norm(kh, state[f"{name}k_layernorm.norms.{group}.weight"], config.layer_norm_eps)
        qh, kh = rotate(qh, positions, theta), rotate(kh, positions, theta)
        scores = qh @ kh.transpose(1, 2) * math.sqrt(width) / head_dim
        outputs.append(torch.softmax(scores.masked_fill(~seen, -math.inf), dim=-1) @ vh)
    return torch.cat(outputs, dim=-1) @ state[f"{name}o_proj.weight"].T


def random_ids(batch: int = 2, seq: int = 7, seed: int = 1) -> Tensor:
    return torch.randint(SMALL.vocab_size, (batch, seq), generator=torch.Generator().manual_seed(seed))


OPTIONS: dict[str, dict[str, Any]] = {
    "production": {},
    "no wesar": {"wesar": False},
    "no norm alphas": {"norm_alphas": False},
    "untied": {"tie_word_embeddings": False, "embedding_scale": 1.0},
    "no bias": {"attention_bias": False},
    "one layer": {"num_hidden_layers": 1},
    "residual scale": {"residual_scale": 0.25},
    "no residual scale": {"residual_scale": 1.0},
    "norm scale": {"norm_scale": 1.7},
    "gemma": {"rms_norm_style": "gemma"},
    "embedding layer norm": {"embedding_norm": "layer_norm"},
    "embedding rms norm": {"embedding_norm": "rms_norm", "norm_scale": 1.7},
    "gradient scale": {"embedding_gradient_scale": 0.1},
    "gradient scale 0": {"embedding_gradient_scale": 0.0},
    "qk layer norm": {"qk_layer_norm": True},
    "1/head_dim attention": {"attention_base_width": 1},
    "logits scale": {"logits_base_width": 6},
    "head_dim": {"head_dim": 10},
    "multi-head": {"num_key_value_heads": 4},
    "multi-query": {"num_key_value_heads": 1},
    "theta": {"rope_theta": 490000.0},
    "eps": {"rms_norm_eps": 0.3, "layer_norm_eps": 0.2, "qk_layer_norm": True, "embedding_norm": "layer_norm"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_logits_and_gradients_of_each_option(name: str, random_decoder: RandomDecoder) -> None:
    config = dataclasses.replace(SMALL, **OPTIONS[name])
    decoder, ids = random_decoder(config), random_ids()
    state = {key: value.detach().clone().requires_grad_() for key, value in decoder.state_dict().items()}
    assert state.keys() == {key for key, _ in decoder.named_parameters()}
    expected = expected_logits(state, config, ids)
    actual = decoder(ids)
    torch.testing.assert_close(actual, expected, **TOLERANCE)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (expected * direction).sum().backward()
    (actual * direction).sum().backward()
    for key, parameter in decoder.named_parameters():
        scale = state[key].grad.abs().max().item()
        torch.testing.assert_close(parameter.grad, state[key].grad, rtol=0, atol=1e-12 * max(scale, 1.0), msg=key)


@given(
    options=st.fixed_dictionaries(
        {
            "wesar": st.booleans(),
            "norm_alphas": st.booleans(),
            "tie_word_embeddings": st.booleans(),
            "attention_bias": st.booleans(),
            "embedding_norm": st.sampled_from(["none", "layer_norm", "rms_norm"]),
            "embedding_scale": st.sampled_from([1.0, 10.0]),
            "residual_scale": st.sampled_from([None, 0.0, 0.5, 1.0]),
            "norm_scale": st.sampled_from([1.0, 0.6]),
            "rms_norm_style": st.sampled_from(["llama", "gemma"]),
            "scalar_precision": st.sampled_from(["float32", "compute"]),
            "qk_layer_norm": st.booleans(),
            "attention_base_width": st.sampled_from([None, 1, 24]),
            "logits_base_width": st.sampled_from([None, 6]),
            "head_dim": st.sampled_from([None, 2, 10]),
            "num_key_value_heads": st.sampled_from([1, 2, 4]),
        }
    ),
    causal=st.booleans(),
    positions=st.sampled_from(["default", "shared", "per row"]),
    documents=st.none() | st.lists(st.integers(0, 2), min_size=10, max_size=10),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_logits_of_options_together(
    options: dict, causal: bool, positions: str, documents: list[int] | None, seed: int, random_decoder: RandomDecoder
) -> None:
    config = dataclasses.replace(SMALL, **options)
    decoder, ids = random_decoder(config, seed), random_ids(seq=5, seed=seed)
    given_positions = {
        "default": None,
        "shared": torch.tensor([3, 4, 0, 1, 9]),
        "per row": torch.tensor([[0, 1, 2, 0, 1], [7, 3, 5, 5, 0]]),
    }[positions]
    document_ids = None if documents is None else torch.tensor(documents).view(2, 5)
    rows = None if given_positions is None else given_positions.expand(2, 5)
    with torch.no_grad():
        actual = decoder(ids, given_positions, document_ids, causal)
        expected = expected_logits(decoder.state_dict(), config, ids, rows, document_ids, causal)
    torch.testing.assert_close(actual, expected, **TOLERANCE)


def test_rope_theta_can_change_after_construction(random_decoder: RandomDecoder) -> None:
    decoder, ids = random_decoder(SMALL), random_ids()
    before = decoder(ids)
    decoder.set_rope_theta(490000)
    after = decoder(ids)
    torch.testing.assert_close(
        after, expected_logits(decoder.state_dict(), SMALL, ids, rope_theta=490000.0), **TOLERANCE
    )
    assert (after - before).abs().max() > 1e-3
