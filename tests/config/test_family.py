"""The models of the data-constrained study: shapes and sizes as published (arXiv 2305.16264, 2507.15857)."""

from __future__ import annotations

import pytest

from titan_yulan.config.family import FAMILY, formula_parameters
from titan_yulan.config.model import count_parameters
from titan_yulan.config.presets import PRESETS
from titan_yulan.model.initialise import initial_std

# millions in the name: hidden, head width, heads, layers, feed-forward width, size by the formula in millions
PUBLISHED = {
    7: (128, 32, 4, 3, 320, 7.00),
    14: (224, 32, 7, 4, 576, 13.61),
    20: (288, 32, 7, 5, 768, 19.46),
    35: (448, 32, 7, 6, 1152, 36.64),
    44: (512, 64, 8, 8, 1344, 50.66),
    57: (576, 64, 9, 9, 1536, 64.81),
    117: (768, 64, 12, 12, 2048, 123.59),
    140: (768, 64, 12, 15, 2048, 144.83),
    217: (896, 64, 14, 18, 2368, 217.50),
    425: (1280, 128, 10, 18, 3392, 416.89),
    724: (1536, 128, 12, 22, 4096, 700.25),
    1143: (1792, 128, 14, 26, 4736, 1086.29),
    2980: (2560, 128, 20, 34, 6784, 2791.91),
    9293: (4096, 128, 32, 42, 10880, 8640.58),
}


@pytest.mark.parametrize("millions", PUBLISHED)
def test_published_shapes_and_sizes(millions: int):
    config = PRESETS[f"data_constrained_{millions}m"]
    hidden, head_width, heads, layers, ffn, size = PUBLISHED[millions]
    assert (config.hidden_size, config.attention_head_dim, config.num_attention_heads) == (hidden, head_width, heads)
    assert (config.num_hidden_layers, config.intermediate_size) == (layers, ffn)
    assert round(formula_parameters(config) / 1e6, 2) == size
    # what is trained: norms without biases, the padded vocabulary, and heads narrower than the model in two of them
    narrow = 4 * layers * hidden * (hidden - heads * head_width)
    expected = formula_parameters(config) - 6 * layers * hidden + (2 * layers + 1) * hidden + 47 * hidden - narrow
    assert count_parameters(config) == expected
    if not narrow:
        assert abs(count_parameters(config) / formula_parameters(config) - 1) < 1e-3


@pytest.mark.parametrize("name", FAMILY)
def test_every_member_is_sound(name: str):
    config = FAMILY[name]
    assert config.check() == []
    assert (config.vocab_size, config.vocab_size % 128) == (50304, 0)
    assert (config.residual_factor, config.logits_divisor, config.embedding_init_std) == (1.0, 1.0, 0.02)
    assert config.softmax_scale == pytest.approx(config.attention_head_dim**-0.5)
    assert initial_std("model.layers.0.self_attn.q_proj.weight", config) == 0.02
    for output in ("self_attn.o_proj", "mlp.down_proj"):
        std = initial_std(f"model.layers.0.{output}.weight", config)
        assert std == pytest.approx(0.02 / (2 * config.num_hidden_layers) ** 0.5)
