"""A decoder with scales as a plain Llama, or as it was published: which tensor is which multiple of which.

With r the residual scale, every alpha 1 where the model has none, and c the scale of the attention scores times
sqrt(head_dim), which is 1 in production:

    input_layernorm               weight * norm_scale * alpha_ln1
    q_proj, with its bias         weight * alpha_q * c              (k_proj, v_proj: alpha_k, alpha_v)
    o_proj                        weight * alpha_o * r              (its bias, which Llama has beside those of q: zeros)
    post_attention_layernorm      weight * norm_scale * alpha_ln2 * alpha_gate_up
    down_proj                     weight * alpha_down * r
    norm                          weight * norm_scale * alpha_norm * alpha_lm_head / logits_divisor
    embed_tokens                  weight * embedding_scale          (if that is not 1, the head is untied)

A norm of the gemma style holds its weight minus 1, which is added first. Every product is taken in float64 and rounded
once. No torch here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from titan_yulan.checkpoint.hugging_face import EMBEDDING, HEAD, parameter_shapes
from titan_yulan.config.model import ModelConfig
from titan_yulan.errors import UserError

# Scalars that YuLan-Mini publishes with shape (); we hold them with shape (1,).
_WITHOUT_DIMENSION = ("gate_up_proj_alpha", "down_proj_alpha", "norm_alpha", "layernorm_alpha", "lm_head_alpha")


@dataclass(frozen=True)
class Target:
    """One tensor to write: `factor * (source + offset)`, in `shape`; a source of None stands for zeros."""

    source: str | None
    shape: tuple[int, ...]
    factor: float = 1.0
    offset: float = 0.0


def yulan_targets(model: ModelConfig) -> dict[str, Target]:
    """Every tensor as it is, the scalars in the shapes in which YuLan-Mini publishes them."""
    return {
        name: Target(name, () if name.endswith(_WITHOUT_DIMENSION) else shape)
        for name, shape in parameter_shapes(model).items()
    }


def scalar_names(model: ModelConfig) -> list[str]:
    """The trained scalars that `llama_targets` needs."""
    return [name for name in parameter_shapes(model) if name.endswith("_alpha")]


def llama_targets(model: ModelConfig, scalars: Mapping[str, float]) -> dict[str, Target]:
    """The tensors of a Llama that computes the same logits.

    Args:
        scalars: value of every `scalar_names(model)`.

    Raises:
        UserError: the model is no Llama under any weights; listing why.
    """
    _refuse_what_no_llama_has(model)
    targets: dict[str, Target] = {}
    for name, shape in parameter_shapes(model).items():
        if name in scalars:
            continue
        gemma_norm = name.endswith("norm.weight") and model.rms_norm_style == "gemma"
        targets[name] = Target(name, shape, math.prod(_factors(name, model, scalars)), float(gemma_norm))
        if name.endswith("o_proj.weight") and model.attention_bias:
            targets[name.replace("weight", "bias")] = Target(None, (model.hidden_size,))
    if model.tie_word_embeddings and not _stays_tied(model):
        targets[HEAD] = Target(EMBEDDING, targets[EMBEDDING].shape)
    return targets


def llama_config(model: ModelConfig) -> dict[str, Any]:
    """The config.json of the Llama, under the names that versions 4 and 5 of transformers read alike."""
    fields = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
        "max_position_embeddings rms_norm_eps rope_theta attention_bias initializer_range"
    )
    return {name: getattr(model, name) for name in fields.split()} | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "head_dim": model.attention_head_dim,
        "hidden_act": "silu",
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "rope_scaling": None,
        "tie_word_embeddings": _stays_tied(model),
    }


def _stays_tied(model: ModelConfig) -> bool:
    """Only the input side of the embedding has a scale; the head's are in the final norm."""
    return model.tie_word_embeddings and model.embedding_scale == 1.0


def _factors(name: str, model: ModelConfig, scalars: Mapping[str, float]) -> Iterator[float]:
    """What the tensor `name` is multiplied by."""
    parent, _, leaf = name.removesuffix(".weight").removesuffix(".bias").rpartition(".")

    def alpha(path: str) -> float:
        return scalars.get(path, 1.0)

    if name == EMBEDDING:
        yield model.embedding_scale
    elif name == "model.norm.weight":
        yield from (model.norm_scale, alpha("model.norm_alpha"), alpha("lm_head_alpha"), 1 / model.logits_divisor)
    elif leaf in ("input_layernorm", "post_attention_layernorm"):
        yield from (model.norm_scale, alpha(f"{parent}.{leaf}_alpha"))
        if leaf == "post_attention_layernorm":
            yield alpha(f"{parent}.gate_up_proj_alpha")
    elif leaf == "down_proj":
        yield from (model.residual_factor, alpha(f"{parent.removesuffix('.mlp')}.down_proj_alpha"))
    elif leaf in ("q_proj", "k_proj", "v_proj", "o_proj"):
        yield alpha(f"{parent}.{leaf}_alpha")
        if leaf == "o_proj":
            yield model.residual_factor
        elif leaf == "q_proj":
            yield math.sqrt((model.attention_base_width or model.attention_head_dim) / model.attention_head_dim)


def _refuse_what_no_llama_has(model: ModelConfig) -> None:
    reasons = {
        "model.qk_layer_norm = true: a LayerNorm of queries and keys depends on their values": model.qk_layer_norm,
        f"model.embedding_norm = {model.embedding_norm!r}: a norm of the embedding depends on its values, and the "
        "residual stream begins behind it": model.embedding_norm != "none",
    }
    if found := [reason for reason, applies in reasons.items() if applies]:
        raise UserError(
            "the model cannot be written as a Llama, which has no place for it: "
            + "; ".join(found)
            + ". Use --format yulan, which keeps it"
        )
