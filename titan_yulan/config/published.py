"""The names that published config.json files use for the fields of `ModelConfig`: one table, read both ways.

Sources: `YuLanMiniConfig` of the YuLan-Mini release (github.com/RUC-GSAI/YuLan-Mini, arXiv 2412.17743) and
`LlamaConfig` of Hugging Face transformers. A published file may leave keys out; the class that it was written for
then supplies its own defaults, which is why the two model types have a column of defaults each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from titan_yulan.errors import UserError

if TYPE_CHECKING:
    from titan_yulan.config.model import ModelConfig

_REQUIRED: Any = object()
_ABSENT: Any = object()  # a key that this model type does not have

# field of ModelConfig: (published key, default of YuLanMiniConfig, default of LlamaConfig)
_TABLE: dict[str, tuple[str, Any, Any]] = {
    "vocab_size": ("vocab_size", _REQUIRED, _REQUIRED),
    "hidden_size": ("hidden_size", _REQUIRED, _REQUIRED),
    "intermediate_size": ("intermediate_size", _REQUIRED, _REQUIRED),
    "num_hidden_layers": ("num_hidden_layers", _REQUIRED, _REQUIRED),
    "num_attention_heads": ("num_attention_heads", _REQUIRED, _REQUIRED),
    "num_key_value_heads": ("num_key_value_heads", None, None),
    "head_dim": ("head_dim", None, None),
    "max_position_embeddings": ("max_position_embeddings", 4096, 2048),
    "rms_norm_eps": ("rms_norm_eps", 1e-6, 1e-6),
    "rope_theta": ("rope_theta", 10000.0, 10000.0),
    "attention_bias": ("attention_bias", True, False),
    "tie_word_embeddings": ("tie_word_embeddings", False, False),
    "initializer_range": ("initializer_range", 0.014434, 0.02),
    "layer_norm_eps": ("layer_norm_eps", 1e-6, _ABSENT),
    "embedding_scale": ("scale_emb", 1.0, _ABSENT),
    "embedding_gradient_scale": ("shrink_alpha", 1.0, _ABSENT),
    "norm_scale": ("ln_scale", 1.0, _ABSENT),
    "rms_norm_style": ("rms_type", "llama", _ABSENT),
    "qk_layer_norm": ("qk_layernorm", False, _ABSENT),
    "attention_base_width": ("dim_model_base_attn", None, _ABSENT),
    "logits_base_width": ("dim_model_base_logits", None, _ABSENT),
    "wesar": ("wesar_weights", True, _ABSENT),
    "norm_alphas": ("use_norm_alpha", True, _ABSENT),
    "q_proj_alpha": ("q_proj_alpha", 1.0, _ABSENT),
    "k_proj_alpha": ("k_proj_alpha", 1.0, _ABSENT),
    "v_proj_alpha": ("v_proj_alpha", 1.0, _ABSENT),
    "o_proj_alpha": ("o_proj_alpha", 1.0, _ABSENT),
    "gate_up_proj_alpha": ("gate_up_proj_alpha", 1.0, _ABSENT),
    "down_proj_alpha": ("down_proj_alpha", 1.0, _ABSENT),
    "input_layernorm_alpha": ("input_layernorm_alpha", 1.0, _ABSENT),
    "post_attention_layernorm_alpha": ("post_attention_layernorm_alpha", 1.0, _ABSENT),
    "norm_alpha": ("norm_alpha", 1.0, _ABSENT),
    "lm_head_alpha": ("lm_head_alpha", 1.0, _ABSENT),
    "initialization_base_width": ("dim_model_base_init", None, _ABSENT),
    "output_init_divisor": ("init_scale_o", 10.582218, _ABSENT),
    "lm_head_base_width": ("dim_model_base_lmh", 1, _ABSENT),
}

# The values that the released code knows for `rms_type`.
_RMS_TYPES = ("llama", "gemma")

# Keys that stand for a field in another form; `_read_yulan_mini` and `write` convert them.
_CONVERTED = ("hidden_states_shrink", "embedding_ln", "embedding_rmsln", "model_reproduce")

# Keys that would change the mathematics, with the values under which they change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "rope_scaling": (None,),
    "attention_dropout": (0, None),
    "use_sliding_window": (False,),
    "mlp_bias": (False,),
    "pretraining_tp": (1,),
}

# Keys that do not touch the model's mathematics: bookkeeping, tokens, speed, the optimiser's and the loss's settings,
# and keys that the released code stores and never uses in the forward pass.
_IGNORED = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _name_or_path architectures auto_map bos_token_id
    dim_ffn_base_init dim_model_base dim_model_base_lr dtype embed_tokens_alpha eos_token_id
    gradient_checkpointing_step is_decoder keys_to_ignore_at_inference model_type
    num_epochs_trained_before_this_epoch num_steps_trained_before_this_epoch pad_token_id return_dict
    shrink_alpha2 sliding_window torch_dtype transformers_version use_cache use_emb_alpha use_liger z_loss
    """.split()
)

# What a Llama model means by the keys that its config.json does not have. Its RMSNorm rounds before the weight, in
# Hugging Face's code (`LlamaRMSNorm`) as in Meta's (github.com/meta-llama/llama3), and was trained so.
_LLAMA_FIELDS: dict[str, Any] = {
    "embedding_scale": 1.0,
    "residual_scale": 1.0,
    "rms_norm_style": "hugging_face",
    "wesar": False,
    "initialization": "transformer",
}


def read(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `ModelConfig` from a published config.json.

    `model_type` decides which class's defaults stand for keys left out: `"llama"`, or `"yulanmini"` when the key is
    absent and WeSaR's keys are there.

    Raises:
        UserError: a key is missing, unknown, or has a value that changes the mathematics.
    """
    values = dict(values)
    is_llama = values.get("model_type", "yulanmini" if "wesar_weights" in values else "llama") == "llama"
    _flatten_rope_parameters(values)
    _refuse_unsupported(values, is_llama)
    fields: dict[str, Any] = {}
    for field, (name, yulan_default, llama_default) in _TABLE.items():
        default = llama_default if is_llama else yulan_default
        if default is _ABSENT:
            continue
        value = values.get(name, default)
        if value is _REQUIRED:
            raise UserError(f"the published config has no {name!r}; it is not a config.json of a Llama-style model")
        fields[field] = value
    if fields["num_key_value_heads"] is None:
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    fields["rope_theta"] = float(fields["rope_theta"])
    return fields | (_LLAMA_FIELDS if is_llama else _read_yulan_mini(values, fields))


def _flatten_rope_parameters(values: dict[str, Any]) -> None:
    """transformers 5 writes `rope_theta` into a table `rope_parameters`; take it out again."""
    rope = values.pop("rope_parameters", None)
    if rope is None:
        return
    unsupported = sorted(set(rope) - {"rope_type", "rope_theta"})
    if rope.get("rope_type", "default") != "default" or unsupported:
        raise UserError(f"published key 'rope_parameters' = {rope}: only rope_type 'default' is supported")
    values.setdefault("rope_theta", rope.get("rope_theta", 10000.0))


def _refuse_unsupported(values: Mapping[str, Any], is_llama: bool) -> None:
    defaults = {name: llama for name, _, llama in _TABLE.values()}
    known = {name for name, default in defaults.items() if not (is_llama and default is _ABSENT)}
    known |= set() if is_llama else set(_CONVERTED)
    unknown = sorted(set(values) - known - set(_NEUTRAL) - _IGNORED)
    if unknown:
        raise UserError(
            f"published config keys {unknown} are not known and may change the model's mathematics; "
            "remove them if they do not"
        )
    for name, neutral in _NEUTRAL.items():
        if name in values and values[name] not in neutral:
            raise UserError(f"published key {name!r} = {values[name]!r} is not supported; only {neutral[0]!r} is")


def _read_yulan_mini(values: Mapping[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """The fields that YuLanMiniConfig writes in another form, or that its code leaves unused in some modes."""
    shrink = values.get("hidden_states_shrink", 1)
    if shrink == "muparam":
        shrink = 1 / math.sqrt(fields["num_hidden_layers"])
    if values.get("embedding_ln") and values.get("embedding_rmsln"):
        raise UserError("published keys 'embedding_ln' and 'embedding_rmsln' are both true; only one can be")
    if fields["rms_norm_style"] not in _RMS_TYPES:
        raise UserError(f"published key 'rms_type' = {fields['rms_norm_style']!r}: not one of {', '.join(_RMS_TYPES)}")
    rule = values.get("model_reproduce") or "transformer"
    if rule not in ("transformer", "minicpm", "cerebras"):
        raise UserError(f"published key 'model_reproduce' = {rule!r}: not one of transformer, minicpm, cerebras")
    # The released code applies the residual scale only inside [0, 1), and gives an untied embedding deviation 1.
    converted: dict[str, Any] = {
        "residual_scale": shrink if 0 <= shrink < 1 else 1.0,
        "embedding_norm": "layer_norm" if values.get("embedding_ln") else "none",
        "initialization": "wesar" if fields["wesar"] and rule == "transformer" else rule,
        "embedding_initializer_range": None if fields["tie_word_embeddings"] else 1.0,
    }
    if values.get("embedding_rmsln"):
        converted["embedding_norm"] = "rms_norm"
    if rule == "transformer":
        converted |= {"initialization_base_width": None, "output_init_divisor": 1.0, "lm_head_base_width": 1}
    if not fields["wesar"]:
        converted["embedding_gradient_scale"] = 1.0
    return converted


def write(config: ModelConfig) -> dict[str, Any]:
    """The config.json of YuLan-Mini's training format for `config`, every derived value written out.

    Raises:
        UserError: the norm's rounding has no name in that format.
    """
    if config.rms_norm_style not in _RMS_TYPES:
        raise UserError(
            f"model.rms_norm_style = {config.rms_norm_style!r} has no value of the published key 'rms_type' "
            f"({', '.join(_RMS_TYPES)}); 'llama' differs from it by one rounding in 16-bit types, in float32 not at all"
        )
    values = {name: getattr(config, field) for field, (name, _, _) in _TABLE.items()}
    if config.attention_head_dim * config.num_attention_heads == config.hidden_size:
        del values["head_dim"]  # the released code has no such key: it divides
    values |= {field: config.initial_alpha(field) for field in _TABLE if field.endswith("_proj_alpha")}
    rule = config.initialization_rule
    return values | {
        "model_type": "yulanmini",
        "hidden_act": "silu",
        "rope_scaling": None,
        "dim_model_base_attn": config.attention_base_width or config.attention_head_dim,
        "dim_model_base_logits": config.logits_base_width or config.hidden_size,
        "hidden_states_shrink": config.residual_factor,
        "embedding_ln": config.embedding_norm == "layer_norm",
        "embedding_rmsln": config.embedding_norm == "rms_norm",
        "model_reproduce": "transformer" if rule == "wesar" else rule,
    }
