"""Initial values of every parameter, each a pure function of (its name, its shape, the configuration, the seed).

No value depends on the order of creation or on how the model is sharded. The rules are those of YuLan-Mini's report
(arXiv 2412.17743, table 3) and released code:

    wesar        every matrix N(0, initializer_range^2); the alphas carry the differences between matrices
    transformer  the same without alphas
    minicpm      block matrices at initializer_range / sqrt(m), m = hidden_size / initialization_base_width
    cerebras     as minicpm, and o and down additionally / sqrt(2 * layers)

Biases start at 0, norms at the identity.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from titan_yulan.config.model import ModelConfig
from titan_yulan.data.hashing import key
from titan_yulan.model.decoder import Decoder

_OUTPUT_MATRICES = ("o_proj", "down_proj")
_INPUT_MATRICES = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_RMS_NORMS = ("input_layernorm", "post_attention_layernorm", "norm")


def initial_std(name: str, config: ModelConfig) -> float:
    """Standard deviation of a matrix's initial weights, by the parameter's name.

    Raises:
        KeyError: no rule knows the name.
    """
    module = name.split(".")[-2]
    std = config.initializer_range
    scaled = config.initialization_rule in ("minicpm", "cerebras")
    if module == "embed_tokens":
        return config.embedding_init_std
    if module == "lm_head":
        return std / math.sqrt(config.lm_head_base_width) if scaled else std
    if module not in _INPUT_MATRICES + _OUTPUT_MATRICES:
        raise KeyError(f"no initialisation rule for the parameter {name!r}")
    if not scaled:
        return std
    if config.initialization_base_width is None:
        return std / config.output_init_divisor if module in _OUTPUT_MATRICES else std
    variance_divisor = config.hidden_size / config.initialization_base_width
    if config.initialization_rule == "cerebras" and module in _OUTPUT_MATRICES:
        variance_divisor *= 2 * config.num_hidden_layers
    return std / math.sqrt(variance_divisor)


def initial_value(
    name: str, shape: Sequence[int], config: ModelConfig, seed: int, device: torch.device | str = "cpu"
) -> Tensor:
    """The whole initial tensor of one parameter, float32; the same for the same arguments, whoever calls.

    Args:
        name: the parameter's name in the state dict, such as `"model.layers.3.mlp.up_proj.weight"`.
        shape: its full (unsharded) shape.
        seed: seed of the run.
        device: where to draw; CPU and CUDA generators give different numbers.

    Raises:
        KeyError: no rule knows the name.
    """
    parts = name.split(".")
    if parts[-1].endswith("_alpha"):
        return torch.full(tuple(shape), config.initial_alpha(parts[-1]), device=device)
    if parts[-1] == "bias":
        return torch.zeros(tuple(shape), device=device)
    is_rms_norm = parts[-2] in _RMS_NORMS or (
        parts[-2] == "embedding_layernorm" and config.embedding_norm == "rms_norm"
    )
    if is_rms_norm:
        return torch.full(tuple(shape), 0.0 if config.rms_norm_style == "gemma" else 1.0, device=device)
    if parts[-2] == "embedding_layernorm" or "norms" in parts:
        return torch.ones(tuple(shape), device=device)
    generator = torch.Generator(device=device).manual_seed(key(seed, "init", name))
    return torch.empty(tuple(shape), device=device).normal_(0.0, initial_std(name, config), generator=generator)


@torch.no_grad()
def initialise(decoder: Decoder, seed: int) -> None:
    """Fill every parameter of an unsharded `Decoder` in place, cast to the parameter's type."""
    for name, parameter in decoder.named_parameters():
        parameter.copy_(initial_value(name, parameter.shape, decoder.config, seed, parameter.device))
