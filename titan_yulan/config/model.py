"""`[model]`: the shape of the decoder and every scale of its forward pass and initialisation.

Field names are Hugging Face's Llama names where they exist. The defaults of the scales are YuLan-Mini's (technical
report, arXiv 2412.17743, and the published config.json); `presets.py` holds whole models. Nothing here imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from titan_yulan.config import published
from titan_yulan.config.setting import setting

# Depth constant of the residual scale 1.4 / sqrt(layers), from MiniCPM (arXiv 2404.06395), kept by YuLan-Mini.
_RESIDUAL_DEPTH = 1.4

# The scalars of WeSaR (arXiv 2410.05052): those on the attention module, on the block, and on the model.
ATTENTION_ALPHAS = ("q_proj_alpha", "k_proj_alpha", "v_proj_alpha", "o_proj_alpha")
MLP_ALPHAS = ("gate_up_proj_alpha", "down_proj_alpha")
BLOCK_NORM_ALPHAS = ("input_layernorm_alpha", "post_attention_layernorm_alpha")


@dataclass(frozen=True)
class ModelConfig:
    """`[model]`: a Llama-style decoder with the muP-like scales and the WeSaR scalars of YuLan-Mini.

    A value that follows from others is None in the file; the property named in its help gives it resolved.
    """

    vocab_size: int = setting(help="rows of the embedding", ge=1)
    hidden_size: int = setting(help="width of the residual stream", ge=1)
    intermediate_size: int = setting(help="width inside the MLP", ge=1)
    num_hidden_layers: int = setting(help="number of blocks", ge=1)
    num_attention_heads: int = setting(help="number of query heads", ge=1)
    num_key_value_heads: int = setting(help="number of key and value heads; divides num_attention_heads", ge=1)
    head_dim: int | None = setting(
        None, "width of one head; none: hidden_size / num_attention_heads (property attention_head_dim)", ge=2
    )
    max_position_embeddings: int = setting(4096, "longest row in tokens", ge=1)
    rms_norm_eps: float = setting(1e-6, "added to the mean square inside RMSNorm", gt=0)
    layer_norm_eps: float = setting(1e-6, "epsilon of the LayerNorms (embedding_norm, qk_layer_norm)", gt=0)
    rope_theta: float = setting(10000.0, "base of the rotary frequencies", gt=0)
    attention_bias: bool = setting(True, "biases on the q, k and v projections (o has none)")
    tie_word_embeddings: bool = setting(True, "the output head is the embedding")

    embedding_scale: float = setting(10.0, "multiplier of the embedding's output", gt=0)
    embedding_gradient_scale: float = setting(
        1.0, "the gradient into the embedding from the input side is multiplied by this (WeSaR only)", ge=0, le=1
    )
    embedding_norm: str = setting(
        "none", "normalisation of the scaled embedding", choices=("none", "layer_norm", "rms_norm")
    )
    residual_scale: float | None = setting(
        None,
        "multiplier of each block's two outputs; none: 1.4 / sqrt(num_hidden_layers), at most 1 "
        "(property residual_factor)",
        ge=0,
        le=1,
    )
    norm_scale: float = setting(1.0, "constant multiplier of every RMSNorm's output", gt=0)
    rms_norm_style: str = setting(
        "llama",
        "llama: weight from 1, applied in float32; hugging_face: as llama, but the normalised activation is first "
        "rounded to its own type (in float32 the same); gemma: weight stored minus 1, applied in the activation's "
        "precision",
        choices=("llama", "hugging_face", "gemma"),
    )
    qk_layer_norm: bool = setting(False, "a LayerNorm per head on queries and keys before the rotation")
    attention_base_width: int | None = setting(
        None, "scores are scaled by sqrt(this) / head_dim; none: head_dim, so 1 / sqrt(head_dim)", ge=1
    )
    logits_base_width: int | None = setting(
        None, "logits are divided by hidden_size / this; none: hidden_size, so no division", ge=1
    )

    wesar: bool = setting(True, "a trained scalar (alpha) on every matrix and on the output head")
    norm_alphas: bool = setting(True, "with wesar: a trained scalar on every RMSNorm of the blocks and the last one")
    scalar_precision: str = setting(
        "float32",
        "precision in which alphas and norm weights enter the forward pass; compute: rounded to the activation's type",
        choices=("float32", "compute"),
    )
    alpha_base_width: int = setting(
        256,
        "alphas of q, k, v, gate and up start at sqrt(this / hidden_size), of o and down 1/sqrt(2 layers) of it",
        ge=1,
    )
    q_proj_alpha: float | None = setting(None, "initial value; none: from alpha_base_width")
    k_proj_alpha: float | None = setting(None, "initial value; none: from alpha_base_width")
    v_proj_alpha: float | None = setting(None, "initial value; none: from alpha_base_width")
    o_proj_alpha: float | None = setting(None, "initial value; none: from alpha_base_width")
    gate_up_proj_alpha: float | None = setting(None, "initial value; none: from alpha_base_width")
    down_proj_alpha: float | None = setting(None, "initial value; none: from alpha_base_width")
    input_layernorm_alpha: float = setting(1.0, "initial value")
    post_attention_layernorm_alpha: float = setting(1.0, "initial value")
    norm_alpha: float = setting(1.0, "initial value")
    lm_head_alpha: float = setting(1.0, "initial value")

    attention_dropout: float = setting(0.0, "share of attention weights that training drops", ge=0, lt=1)
    hidden_dropout: float = setting(
        0.0, "share of numbers that training drops of the embedding's and of every block's two outputs", ge=0, lt=1
    )

    kernels: str = setting(
        "auto",
        "who computes norms, SwiGLU and the loss; auto: Triton where it runs, else plain PyTorch",
        choices=("auto", "triton", "reference"),
    )
    initializer_range: float = setting(5e-5, "standard deviation of the raw weights", gt=0)
    initialization: str | None = setting(
        None,
        "rule of the standard deviations; none: wesar with wesar, else transformer (property initialization_rule)",
        choices=("wesar", "transformer", "minicpm", "cerebras"),
    )
    initialization_base_width: int | None = setting(
        None, "minicpm, cerebras: variances are divided by hidden_size / this; none: they are not", ge=1
    )
    output_init_divisor: float = setting(
        1.0,
        "minicpm, cerebras without initialization_base_width: divisor of the standard deviation of o and down",
        gt=0,
    )
    lm_head_base_width: int = setting(
        1, "minicpm, cerebras, untied: the head's standard deviation is divided by sqrt(this)", ge=1
    )
    embedding_initializer_range: float | None = setting(
        None,
        "standard deviation of the embedding; none: initializer_range if tied or the rule is transformer, else 1 "
        "(property embedding_init_std)",
        gt=0,
    )

    @property
    def attention_head_dim(self) -> int:
        """Width of one attention head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def residual_factor(self) -> float:
        """Multiplier r of x <- x + r * block(x): 1.4 / sqrt(layers) unless set, never above 1."""
        if self.residual_scale is not None:
            return self.residual_scale
        return min(1.0, _RESIDUAL_DEPTH / math.sqrt(self.num_hidden_layers))

    @property
    def softmax_scale(self) -> float:
        """Multiplier of the attention scores."""
        return math.sqrt(self.attention_base_width or self.attention_head_dim) / self.attention_head_dim

    @property
    def logits_divisor(self) -> float:
        """The final hidden states are divided by this before the head (1 in production)."""
        return self.hidden_size / (self.logits_base_width or self.hidden_size)

    @property
    def initialization_rule(self) -> str:
        """The rule of the initial standard deviations, one of the choices of `initialization`."""
        return self.initialization or ("wesar" if self.wesar else "transformer")

    @property
    def embedding_init_std(self) -> float:
        """Standard deviation of the embedding's initial weights."""
        if self.embedding_initializer_range is not None:
            return self.embedding_initializer_range
        return self.initializer_range if self.tie_word_embeddings or self.initialization_rule == "transformer" else 1.0

    def initial_alpha(self, name: str) -> float:
        """Initial value of a WeSaR scalar by its field name, such as `"o_proj_alpha"` (arXiv 2412.17743, table 3)."""
        value = getattr(self, name)
        if value is not None:
            return float(value)
        width = math.sqrt(self.alpha_base_width / self.hidden_size)
        return width / math.sqrt(2 * self.num_hidden_layers) if name in ("o_proj_alpha", "down_proj_alpha") else width

    def check(self) -> list[tuple[str, str]]:
        """Combinations of keys that do not go together, as (key, message); empty when the model can be built."""
        problems = []

        def refuse(condition: bool, key: str, message: str) -> None:
            if condition:
                problems.append((key, message))

        heads, groups = self.num_attention_heads, self.num_key_value_heads
        refuse(heads % groups != 0, "num_key_value_heads", f"{groups} does not divide num_attention_heads = {heads}")
        refuse(
            self.head_dim is None and self.hidden_size % heads != 0,
            "num_attention_heads",
            f"{heads} does not divide hidden_size = {self.hidden_size}; change one of them or set head_dim",
        )
        refuse(
            self.attention_head_dim % 2 != 0,
            "head_dim",
            f"{self.attention_head_dim} is odd; the rotary embedding needs an even width",
        )
        refuse(
            self.wesar and not self.tie_word_embeddings and self.embedding_scale != 1,
            "embedding_scale",
            f"{self.embedding_scale} needs tie_word_embeddings = true; an untied WeSaR model takes embedding_scale = 1",
        )
        refuse(
            not self.wesar and self.embedding_gradient_scale != 1,
            "embedding_gradient_scale",
            f"{self.embedding_gradient_scale} needs wesar = true; set it to 1",
        )
        refuse(
            not self.wesar and self.initialization == "wesar",
            "initialization",
            "'wesar' needs wesar = true; choose 'transformer', 'minicpm' or 'cerebras'",
        )
        scaled_rule = self.initialization_rule in ("minicpm", "cerebras")
        for key, unused in (("initialization_base_width", None), ("output_init_divisor", 1), ("lm_head_base_width", 1)):
            value = getattr(self, key)
            refuse(
                not scaled_rule and value != unused,
                key,
                f"{value} has no effect with initialization = {self.initialization_rule!r}; remove it",
            )
        refuse(
            scaled_rule and self.initialization_base_width is not None and self.output_init_divisor != 1,
            "output_init_divisor",
            f"{self.output_init_divisor} must be 1 when initialization_base_width is set",
        )
        return problems

    @classmethod
    def from_published(cls, values: Mapping[str, Any]) -> ModelConfig:
        """The model of a published config.json (YuLan-Mini's training format, or a Llama model).

        Raises:
            UserError: a key is missing, or changes the mathematics in a way that is not supported; it is named.
        """
        return cls(**published.read(values))

    def to_published(self) -> dict[str, Any]:
        """The config.json of YuLan-Mini's training format, every derived value written out.

        Raises:
            UserError: `rms_norm_style` is "hugging_face", which that format cannot say.
        """
        return published.write(self)


def count_parameters(config: ModelConfig) -> int:
    """Number of trained values; tied weights count once."""
    hidden, ffn, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    queries = config.num_attention_heads * config.attention_head_dim
    keys = config.num_key_value_heads * config.attention_head_dim
    block = 2 * hidden * queries + 2 * hidden * keys + 3 * hidden * ffn + 2 * hidden
    block += (queries + 2 * keys) if config.attention_bias else 0
    block += (queries + keys) if config.qk_layer_norm else 0
    model = hidden * (1 + (config.embedding_norm != "none"))
    model += config.vocab_size * hidden * (1 if config.tie_word_embeddings else 2)
    if config.wesar:
        block += 6 + 2 * config.norm_alphas
        model += 1 + config.norm_alphas
    return layers * block + model
