"""The decoder against Hugging Face's LlamaForCausalLM, for Llama models and for a folded WeSaR model.

Hugging Face computes its RMSNorm and rotary tables in float32 whatever the model's type, so as it stands it agrees to
float32 rounding only. The exact comparison widens those two to float64 and leaves the rest as published.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

from titan_yulan.config.model import ModelConfig
from titan_yulan.model.decoder import Decoder

RandomDecoder = Callable[..., Decoder]

LLAMA = ModelConfig(
    vocab_size=37,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    attention_bias=False,
    tie_word_embeddings=False,
    embedding_scale=1.0,
    residual_scale=1.0,
    wesar=False,
)
WESAR = ModelConfig(
    vocab_size=37,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    alpha_base_width=8,
    norm_scale=1.3,
    logits_base_width=8,
    attention_base_width=1,
)


def hugging_face(config: ModelConfig, state: dict[str, Tensor], tied: bool) -> LlamaForCausalLM:
    """A float64 LlamaForCausalLM holding `state`; no weight may be missing or left over."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.attention_head_dim,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            attention_bias=config.attention_bias,
            tie_word_embeddings=tied,
        )
    ).double()
    missing, unexpected = model.load_state_dict(state, strict=not tied)
    assert (missing, unexpected) == (["lm_head.weight"] if tied else [], [])
    return model.eval()


@pytest.fixture
def widened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hugging Face's two float32 islands computed in float64."""

    def norm(self: LlamaRMSNorm, x: Tensor) -> Tensor:
        return self.weight * x / (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).sqrt()

    def tables(self: LlamaRotaryEmbedding, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        values = self.config.to_dict()
        width, theta = values["head_dim"], values["rope_parameters"]["rope_theta"]
        frequencies = torch.tensor([theta ** (-2 * j / width) for j in range(width // 2)], dtype=torch.float64)
        angles = (position_ids[..., None].double() * frequencies).repeat(1, 1, 2)
        return angles.cos(), angles.sin()

    monkeypatch.setattr(LlamaRMSNorm, "forward", norm)
    monkeypatch.setattr(LlamaRotaryEmbedding, "forward", tables)


def token_ids() -> Tensor:
    return torch.randint(37, (2, 11), generator=torch.Generator().manual_seed(4))


LLAMA_OPTIONS: dict[str, dict[str, Any]] = {
    "llama3": {},
    "tied": {"tie_word_embeddings": True},
    "wide heads": {"head_dim": 10},
    "multi-head": {"num_key_value_heads": 4, "rope_theta": 10000.0},
}


@pytest.mark.parametrize("name", LLAMA_OPTIONS)
def test_llama_models_agree(name: str, random_decoder: RandomDecoder, widened: None) -> None:
    config = dataclasses.replace(LLAMA, **LLAMA_OPTIONS[name])
    decoder = random_decoder(config)
    peer = hugging_face(config, decoder.state_dict(), config.tie_word_embeddings)
    with torch.no_grad():
        torch.testing.assert_close(decoder(token_ids()), peer(token_ids()).logits, rtol=1e-12, atol=1e-12)


def test_llama_agrees_with_the_library_as_it_stands(random_decoder: RandomDecoder) -> None:
    """Float32 rounding (6e-8) of norms and tables, amplified by three blocks of random weights of order 1."""
    decoder = random_decoder(LLAMA)
    peer = hugging_face(LLAMA, decoder.state_dict(), False)
    with torch.no_grad():
        expected = peer(token_ids()).logits
        difference = (decoder(token_ids()) - expected).abs().max() / expected.abs().max()
    assert difference < 1e-5


def fold(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """A WeSaR model's weights as those of a stock Llama: every scale multiplied into the matrix or norm beside it."""
    residual = 1.4 / math.sqrt(config.num_hidden_layers)
    score = math.sqrt(config.attention_base_width or config.attention_head_dim) / math.sqrt(config.attention_head_dim)
    folded = {
        "model.embed_tokens.weight": config.embedding_scale * state["model.embed_tokens.weight"],
        "lm_head.weight": state["model.embed_tokens.weight"],
        "model.norm.weight": state["model.norm.weight"]
        * (state["model.norm_alpha"] * config.norm_scale * state["lm_head_alpha"] / config.logits_divisor),
    }
    for layer in range(config.num_hidden_layers):
        name = f"model.layers.{layer}."
        attention, mlp = name + "self_attn.", name + "mlp."
        folded[name + "input_layernorm.weight"] = (
            state[name + "input_layernorm.weight"] * state[name + "input_layernorm_alpha"] * config.norm_scale
        )
        folded[name + "post_attention_layernorm.weight"] = state[name + "post_attention_layernorm.weight"] * (
            state[name + "post_attention_layernorm_alpha"] * config.norm_scale * state[name + "gate_up_proj_alpha"]
        )
        for letter, factor in (("q", score), ("k", 1.0), ("v", 1.0)):
            for kind in ("weight", "bias"):
                key = f"{attention}{letter}_proj."
                folded[key + kind] = factor * state[f"{attention}{letter}_proj_alpha"] * state[key + kind]
        folded[attention + "o_proj.weight"] = (
            residual * state[attention + "o_proj_alpha"] * state[attention + "o_proj.weight"]
        )
        folded[attention + "o_proj.bias"] = torch.zeros(config.hidden_size, dtype=torch.float64)
        folded[mlp + "gate_proj.weight"] = state[mlp + "gate_proj.weight"]
        folded[mlp + "up_proj.weight"] = state[mlp + "up_proj.weight"]
        folded[mlp + "down_proj.weight"] = residual * state[name + "down_proj_alpha"] * state[mlp + "down_proj.weight"]
    return folded


def test_wesar_model_folded_into_a_llama_agrees(random_decoder: RandomDecoder, widened: None) -> None:
    decoder = random_decoder(WESAR)
    peer = hugging_face(WESAR, fold(decoder.state_dict(), WESAR), False)
    with torch.no_grad():
        torch.testing.assert_close(decoder(token_ids()), peer(token_ids()).logits, rtol=1e-12, atol=1e-12)
