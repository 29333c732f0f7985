"""Folders in Hugging Face's format for tests: written by transformers, or from a decoder of ours."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.curriculum.making import configuration, phase
from titan_yulan.config.model import ModelConfig
from titan_yulan.config.sections import RunConfig
from titan_yulan.model import Decoder

# Only the heads divide by 4, and little else by 2.
LLAMA = ModelConfig(
    vocab_size=37,
    hidden_size=30,
    intermediate_size=42,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=6,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    rms_norm_style="hugging_face",
    attention_bias=False,
    tie_word_embeddings=False,
    embedding_scale=1.0,
    residual_scale=1.0,
    wesar=False,
    initialization="transformer",
)
YULAN = ModelConfig(
    vocab_size=37,
    hidden_size=30,
    intermediate_size=42,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=6,
)
# Scalars that YuLan-Mini publishes with shape ().
_WITHOUT_DIMENSION = ("gate_up_proj_alpha", "down_proj_alpha", "norm_alpha", "layernorm_alpha", "lm_head_alpha")


def run_config(model: ModelConfig, rope_theta: float | None = None) -> RunConfig:
    section = phase("anneal", "2 steps", {"x": 1.0}, rope_theta=rope_theta, start_from="weights")
    return replace(configuration(section), model=model)


def write_llama(path: Path, model: ModelConfig, dtype: torch.dtype = torch.float32, shard: str = "1GB") -> Any:
    """A random model of transformers, saved by it; `shard` is the largest size of one file.

    Returns:
        The LlamaForCausalLM that transformers reads again, in float32.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_hidden_layers=model.num_hidden_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_key_value_heads,
        head_dim=model.attention_head_dim,
        rms_norm_eps=model.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        attention_bias=model.attention_bias,
        tie_word_embeddings=model.tie_word_embeddings,
    )
    peer = LlamaForCausalLM(config)
    nn.Module.to(peer, dtype)
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3 + ("norm" in name))
            if "o_proj.bias" in name:
                parameter.zero_()
    peer.save_pretrained(path, max_shard_size=shard)
    return LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def write_yulan(path: Path, model: ModelConfig) -> dict[str, Tensor]:
    """YuLan-Mini's training format; returns the tensors, random, as our decoder has them."""
    generator = torch.Generator().manual_seed(6)
    state = {
        name: (1.0 if name.endswith(("_alpha", "norm.weight")) else 0.0)
        + 0.3 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in Decoder(model).state_dict().items()
    }
    path.mkdir(parents=True)
    stored = {name: t.reshape(()) if name.endswith(_WITHOUT_DIMENSION) else t for name, t in state.items()}
    save_file(stored, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(model.to_published()))
    return state
