"""The models of the data-constrained study (arXiv 2507.15857), whose shapes are those of arXiv 2305.16264.

Pre-norm, SwiGLU, rotary positions, tied embeddings, no biases, no grouped heads, GPT-2's vocabulary padded to 128. A
name is that of the earlier study and not the size: `data_constrained_140m` has 144.8 million parameters. The head width
of the six largest is not published; it is hidden size over heads.
"""

from __future__ import annotations

import math

from titan_yulan.config.model import ModelConfig

PREFIX = "data_constrained_"
GPT2_VOCABULARY = 50257  # GPT-2's ids; the first id after them is the mask of masked diffusion
_VOCABULARY = 50304  # the next multiple of 128
_SEQUENCE_LENGTH = 2048

# name in millions: hidden, head width, heads, layers
_SHAPES = {
    7: (128, 32, 4, 3),
    14: (224, 32, 7, 4),
    20: (288, 32, 7, 5),
    35: (448, 32, 7, 6),
    44: (512, 64, 8, 8),
    57: (576, 64, 9, 9),
    74: (640, 64, 10, 10),
    90: (640, 64, 10, 13),
    106: (640, 64, 10, 16),
    117: (768, 64, 12, 12),
    140: (768, 64, 12, 15),
    163: (768, 64, 12, 18),
    175: (896, 64, 14, 14),
    196: (896, 64, 14, 16),
    217: (896, 64, 14, 18),
    251: (1024, 64, 16, 16),
    278: (1024, 64, 16, 18),
    306: (1024, 64, 16, 20),
    425: (1280, 128, 10, 18),
    489: (1280, 128, 10, 21),
    509: (1408, 128, 11, 18),
    552: (1280, 128, 10, 24),
    587: (1408, 128, 11, 21),
    632: (1536, 128, 12, 19),
    664: (1408, 128, 11, 24),
    724: (1536, 128, 12, 22),
    816: (1536, 128, 12, 25),
    893: (1792, 128, 14, 20),
    1018: (1792, 128, 14, 23),
    1143: (1792, 128, 14, 26),
    1266: (2048, 128, 16, 22),
    1424: (2176, 128, 17, 22),
    1429: (2048, 128, 16, 25),
    1593: (2048, 128, 16, 28),
    1609: (2176, 128, 17, 25),
    1731: (2304, 128, 18, 24),
    1794: (2176, 128, 17, 28),
    2007: (2304, 128, 18, 28),
    2283: (2304, 128, 18, 32),
    2298: (2560, 128, 20, 26),
    2639: (2560, 128, 20, 30),
    2980: (2560, 128, 20, 34),
    3530: (2688, 128, 21, 36),
    3802: (2816, 128, 22, 36),
    4084: (2944, 128, 23, 36),
    4516: (3072, 128, 24, 36),
    6796: (3584, 128, 28, 40),
    9293: (4096, 128, 32, 42),
    11452: (4352, 136, 32, 47),
    12295: (4608, 128, 36, 44),
    12569: (4608, 144, 32, 47),
    13735: (4864, 152, 32, 47),
    14940: (4992, 156, 32, 49),
    16183: (5120, 128, 40, 47),
}


def feed_forward_width(hidden: int) -> int:
    """Two thirds of 4 times the width, rounded down to a multiple of 64."""
    return 4 * hidden * 2 // 3 // 64 * 64


def formula_parameters(config: ModelConfig) -> int:
    """The size that the study reports: 4 L h^2 + 3 L h f + 6 L h + 50257 h. It counts full-width heads, norms with
    biases and no padding of the vocabulary; `count_parameters` counts what is trained."""
    layers, hidden, ffn = config.num_hidden_layers, config.hidden_size, config.intermediate_size
    return 4 * layers * hidden**2 + 3 * layers * hidden * ffn + 6 * layers * hidden + GPT2_VOCABULARY * hidden


def _member(hidden: int, head_width: int, heads: int, layers: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=_VOCABULARY,
        hidden_size=hidden,
        intermediate_size=feed_forward_width(hidden),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=head_width,
        max_position_embeddings=_SEQUENCE_LENGTH,
        rms_norm_eps=1e-5,
        attention_bias=False,
        embedding_scale=1.0,
        residual_scale=1.0,
        wesar=False,
        initializer_range=0.02,
        initialization="minicpm",  # the rule that takes a divisor for o and down
        output_init_divisor=math.sqrt(2 * layers),
        # the published runs had them: the code's defaults, which no script of theirs overrides
        attention_dropout=0.1,
        hidden_dropout=0.1,
    )


FAMILY: dict[str, ModelConfig] = {f"{PREFIX}{millions}m": _member(*shape) for millions, shape in _SHAPES.items()}
