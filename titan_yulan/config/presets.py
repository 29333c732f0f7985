"""Whole models by name: `[model] preset`."""

from __future__ import annotations

from titan_yulan.config.family import FAMILY
from titan_yulan.config.model import ModelConfig

_YULAN_MINI_2B = ModelConfig(
    vocab_size=99000,
    hidden_size=1920,
    intermediate_size=4800,
    num_hidden_layers=56,
    num_attention_heads=30,
    num_key_value_heads=6,
    max_position_embeddings=28723,
)

_LLAMA3_8B = ModelConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    attention_bias=False,
    tie_word_embeddings=False,
    embedding_scale=1.0,
    residual_scale=1.0,
    rms_norm_style="hugging_face",
    wesar=False,
    initializer_range=0.02,
    initialization="transformer",
)

# YuLan-Mini's shape at a size that trains on a laptop: width multiplier 3, 2 key-value heads, FFN ratio 2.67.
_DEBUG = ModelConfig(
    vocab_size=8192,
    hidden_size=192,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=1024,
    alpha_base_width=64,
)

PRESETS: dict[str, ModelConfig] = {"yulan_mini_2b": _YULAN_MINI_2B, "llama3_8b": _LLAMA3_8B, "debug": _DEBUG, **FAMILY}


def describe_presets() -> str:
    """All names, the family as a range."""
    family = list(FAMILY)
    names = [repr(name) for name in PRESETS if name not in FAMILY]
    return f"{', '.join(names)}, {family[0]!r} ... {family[-1]!r} (docs/data_constrained.md)"
