"""Floating-point operations of training, and the share of the device's peak that they use (MFU)."""

from __future__ import annotations

from titan_yulan.config.model import ModelConfig

# dense bfloat16 tensor-core peaks of the vendors' data sheets, FLOP/s; the first name that occurs in the device's name
_PEAKS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "A800": 312e12, "B200": 2250e12}

FORMULA = "6 x matrix weights + 12 x layers x heads x head size x sequence length per token (attention not halved)"


def flops_per_token(config: ModelConfig, sequence_length: int) -> int:
    """Model FLOPs of one trained token, forward and backward, without recomputation (PaLM, arXiv 2204.02311, B).

    6 per weight of every matrix product (the head counts, the embedding look-up does not), and for attention
    12 x layers x heads x head size x sequence length, the full square even when half of it is masked.
    """
    query = config.num_attention_heads * config.attention_head_dim
    key_value = config.num_key_value_heads * config.attention_head_dim
    layer = config.hidden_size * (2 * query + 2 * key_value) + 3 * config.hidden_size * config.intermediate_size
    matrices = config.num_hidden_layers * layer + config.vocab_size * config.hidden_size
    return 6 * matrices + 12 * config.num_hidden_layers * query * sequence_length


def device_peak(name: str) -> float | None:
    """Peak bfloat16 FLOP/s of a device by name; None if unknown (then MFU is not available, never guessed)."""
    return next((peak for known, peak in _PEAKS.items() if known in name), None)
