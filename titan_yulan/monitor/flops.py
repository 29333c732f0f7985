"""Floating-point operations of training by several counts, and the share of the device's peak that they use (MFU).

The same throughput has another MFU by every count, so a figure says which one it is: `FORMULAS`, by name. The trainer
prints and records the one of PaLM. With L layers, h hidden size, f intermediate size, V vocabulary, q and k the widths
of all query and of all key heads, s sequence length, per trained token, forward and backward:

    palm           6 (L (2 h q + 2 h k + 3 h f) + h V) + 12 L q s      matrices, and the whole square of attention
    causal         6 (L (2 h q + 2 h k + 3 h f) + h V) +  6 L q s      matrices, and the half that a causal mask leaves
    published      L (24 h h + 18 h f) + 6 h V + 16 L h s              YuLan-Mini's: key heads as wide as the queries,
                                                                       attention not halved and run once more
    published_gqa  L (12 h q + 12 h k + 18 h f) + 6 h V + 16 L q s     the same with the key heads as they are
    6n             6 x trained values                                  no attention

The head's product counts in all of them, tied or not, the embedding look-up in none but 6n of an untied model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from titan_yulan.config.model import ModelConfig, count_parameters

# Dense bfloat16 tensor-core peaks of the vendors' data sheets, FLOP/s; the first name that occurs in the device's name,
# so longer names come before those that they contain.
_PEAKS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
}

FORMULA = "6 x matrix weights + 12 x layers x heads x head size x sequence length per token (attention not halved)"


@dataclass(frozen=True)
class Formula:
    """A way to count: `per_token(model, sequence length)` FLOPs of one trained token, and in words what it counts."""

    meaning: str
    per_token: Callable[[ModelConfig, int], int]


def _widths(config: ModelConfig) -> tuple[int, int]:
    head_dim = config.attention_head_dim
    return config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim


def _matrices(config: ModelConfig) -> int:
    """6 per weight of every matrix product: 2 in forward, 4 in backward."""
    query, key = _widths(config)
    layer = config.hidden_size * (2 * query + 2 * key) + 3 * config.hidden_size * config.intermediate_size
    return 6 * (config.num_hidden_layers * layer + config.vocab_size * config.hidden_size)


def _attention(config: ModelConfig, sequence_length: int, passes: int) -> int:
    """Scores and their product with the values, 4 x width x sequence length a forward pass over the whole square."""
    return passes * 4 * config.num_hidden_layers * _widths(config)[0] * sequence_length


def flops_per_token(config: ModelConfig, sequence_length: int) -> int:
    """Model FLOPs of one trained token, forward and backward, without recomputation (PaLM, arXiv 2204.02311, B).

    6 per weight of every matrix product (the head counts, the embedding look-up does not), and for attention
    12 x layers x heads x head size x sequence length, the full square even when half of it is masked.
    """
    return _matrices(config) + _attention(config, sequence_length, passes=3)


def _causal(config: ModelConfig, sequence_length: int) -> int:
    return _matrices(config) + _attention(config, sequence_length, passes=3) // 2


def _published(config: ModelConfig, sequence_length: int) -> int:
    hidden, ffn, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    forward = layers * (8 * hidden**2 + 6 * hidden * ffn + 4 * sequence_length * hidden)
    recomputed = 4 * layers * sequence_length * hidden
    return 3 * forward + recomputed + 6 * hidden * config.vocab_size


def _published_gqa(config: ModelConfig, sequence_length: int) -> int:
    return _matrices(config) + _attention(config, sequence_length, passes=4)


def _parameters(config: ModelConfig, sequence_length: int) -> int:
    return 6 * count_parameters(config)


FORMULAS = {
    "published": Formula(
        "YuLan-Mini's script: key heads as wide as query heads, attention not halved, counted in forward, backward and "
        "once more",
        _published,
    ),
    "published_gqa": Formula("the same with the key heads as they are", _published_gqa),
    "palm": Formula(FORMULA, flops_per_token),
    "causal": Formula("as palm, with the half of attention that a causal mask leaves", _causal),
    "6n": Formula("6 x trained values, no attention", _parameters),
}


def flops_utilization(flops_per_token: float, tokens_per_second: float, peak: float) -> float:
    """MFU: the share of `peak` FLOP/s that so many tokens a second on one device use."""
    return flops_per_token * tokens_per_second / peak


def device_peak(name: str) -> float | None:
    """Peak bfloat16 FLOP/s of a device by name; None if unknown (then MFU is not available, never guessed)."""
    return next((peak for known, peak in _PEAKS.items() if known in name), None)
