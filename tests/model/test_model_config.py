"""The model's configuration: derived values, checks, counts, and the table to the published names."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from titan_yulan.config.model import ModelConfig, count_parameters
from titan_yulan.config.presets import PRESETS
from titan_yulan.errors import UserError
from titan_yulan.model.decoder import Decoder

YULAN = PRESETS["yulan_mini_2b"]
SIZES = dict(vocab_size=50, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4)
TINY = ModelConfig(**SIZES, num_key_value_heads=2)

# YuLan-Mini's production values (arXiv 2412.17743) under the names of its released configuration class.
PUBLISHED = {
    "architectures": ["YuLanMiniForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "dim_model_base": 1920,
    "dim_model_base_attn": 64,
    "dim_model_base_init": None,
    "dim_model_base_lmh": 1,
    "dim_model_base_logits": 1920,
    "dim_model_base_lr": 256,
    "down_proj_alpha": 0.03450327796711771,
    "embed_tokens_alpha": 1,
    "embedding_ln": False,
    "embedding_rmsln": False,
    "eos_token_id": 2,
    "gate_up_proj_alpha": 0.3651483716701107,
    "gradient_checkpointing_step": 56,
    "hidden_act": "silu",
    "hidden_size": 1920,
    "hidden_states_shrink": 0.18708286933869706,
    "init_scale_o": 1,
    "initializer_range": 5e-05,
    "input_layernorm_alpha": 1.0,
    "intermediate_size": 4800,
    "k_proj_alpha": 0.3651483716701107,
    "layer_norm_eps": 1e-06,
    "lm_head_alpha": 1.0,
    "ln_scale": 1.0,
    "max_position_embeddings": 28723,
    "model_reproduce": "transformer",
    "model_type": "yulanmini",
    "norm_alpha": 1.0,
    "num_attention_heads": 30,
    "num_hidden_layers": 56,
    "num_key_value_heads": 6,
    "o_proj_alpha": 0.03450327796711771,
    "post_attention_layernorm_alpha": 1.0,
    "q_proj_alpha": 0.3651483716701107,
    "qk_layernorm": False,
    "rms_norm_eps": 1e-06,
    "rms_type": "llama",
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "scale_emb": 10.0,
    "shrink_alpha": 1,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_norm_alpha": True,
    "use_sliding_window": False,
    "v_proj_alpha": 0.3651483716701107,
    "vocab_size": 99000,
    "wesar_weights": True,
    "z_loss": 0.0001,
}


def test_production_values_follow_from_the_sizes() -> None:
    assert YULAN.residual_factor == pytest.approx(0.18708286933869706, rel=1e-15)
    assert YULAN.initial_alpha("q_proj_alpha") == pytest.approx(0.3651483716701107, rel=1e-15)
    assert YULAN.initial_alpha("down_proj_alpha") == pytest.approx(0.03450327796711771, rel=1e-15)
    assert YULAN.softmax_scale == 0.125
    assert YULAN.logits_divisor == 1.0
    assert YULAN.embedding_init_std == 5e-5
    assert YULAN.initialization_rule == "wesar"


def test_residual_scale_is_never_above_one() -> None:
    assert dataclasses.replace(TINY, num_hidden_layers=1).residual_factor == 1.0
    assert TINY.residual_factor == pytest.approx(1.4 / math.sqrt(2))


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (YULAN, 2_234_188_098),
        (dataclasses.replace(YULAN, wesar=False), 2_234_187_648),
        (dataclasses.replace(YULAN, wesar=False, tie_word_embeddings=False), 2_424_267_648),
        (PRESETS["llama3_8b"], 8_030_261_248),
    ],
    ids=["tied-wesar", "tied", "untied", "llama3_8b"],
)
def test_parameter_counts_of_published_models(config: ModelConfig, count: int) -> None:
    assert count_parameters(config) == count
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in Decoder(config).parameters()) == count


@given(
    wesar=st.booleans(),
    norm_alphas=st.booleans(),
    tie_word_embeddings=st.booleans(),
    attention_bias=st.booleans(),
    qk_layer_norm=st.booleans(),
    embedding_norm=st.sampled_from(["none", "layer_norm", "rms_norm"]),
    head_dim=st.sampled_from([None, 4, 10]),
)
@settings(max_examples=30, deadline=None)
def test_counted_parameters_are_those_of_the_module(**options) -> None:
    config = dataclasses.replace(TINY, **options)
    with torch.device("meta"):
        module = Decoder(config)
    assert sum(parameter.numel() for parameter in module.parameters()) == count_parameters(config)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_pass_their_own_check(name: str) -> None:
    assert PRESETS[name].check() == []


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"hidden_size": 25}, "num_attention_heads"),
        ({"head_dim": 5}, "head_dim"),
        ({"tie_word_embeddings": False}, "embedding_scale"),
        ({"wesar": False, "embedding_gradient_scale": 0.1}, "embedding_gradient_scale"),
        ({"wesar": False, "initialization": "wesar"}, "initialization"),
        ({"initialization_base_width": 8}, "initialization_base_width"),
        ({"output_init_divisor": 2.0}, "output_init_divisor"),
        ({"lm_head_base_width": 8}, "lm_head_base_width"),
        (
            {"initialization": "minicpm", "initialization_base_width": 8, "output_init_divisor": 2.0},
            "output_init_divisor",
        ),
    ],
)
def test_combinations_that_do_not_go_together_are_named(change: dict, key: str) -> None:
    assert [found for found, _ in dataclasses.replace(TINY, **change).check()] == [key]


def test_published_production_config_is_the_preset() -> None:
    config = ModelConfig.from_published(PUBLISHED)
    ours, theirs = YULAN.to_published(), config.to_published()
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert theirs[key] == (pytest.approx(value, rel=1e-15) if isinstance(value, float) else value), key
    assert theirs == {key: PUBLISHED[key] for key in theirs}
    assert count_parameters(config) == 2_234_188_098


_SCALE = st.floats(0.01, 20.0)


@st.composite
def published_configs(draw: st.DrawFn) -> dict:
    """Published training configurations in the form that `to_published` writes."""
    tied, wesar = draw(st.booleans()), draw(st.booleans())
    rule = draw(st.sampled_from(["transformer", "minicpm", "cerebras"]))
    base = draw(st.sampled_from([None, 8])) if rule != "transformer" else None
    norm = draw(st.sampled_from(["embedding_ln", "embedding_rmsln", ""]))
    values = TINY.to_published() | {
        name: draw(_SCALE) for name in PUBLISHED if name.endswith("_alpha") and name in TINY.to_published()
    }
    return values | {
        "tie_word_embeddings": tied,
        "scale_emb": draw(_SCALE) if tied else 1.0,
        "wesar_weights": wesar,
        "use_norm_alpha": draw(st.booleans()),
        "shrink_alpha": draw(st.floats(0, 1)) if wesar else 1.0,
        "hidden_states_shrink": draw(st.floats(0, 1)),
        "ln_scale": draw(_SCALE),
        "rms_type": draw(st.sampled_from(["llama", "gemma"])),
        "qk_layernorm": draw(st.booleans()),
        "attention_bias": draw(st.booleans()),
        "dim_model_base_attn": draw(st.integers(1, 64)),
        "dim_model_base_logits": draw(st.integers(1, 64)),
        "rope_theta": draw(st.sampled_from([10000.0, 490000.0])),
        "embedding_ln": norm == "embedding_ln",
        "embedding_rmsln": norm == "embedding_rmsln",
        "model_reproduce": rule,
        "dim_model_base_init": base,
        "init_scale_o": draw(_SCALE) if rule != "transformer" and base is None else 1.0,
        "dim_model_base_lmh": draw(st.integers(1, 64)) if rule != "transformer" else 1,
    }


@given(published_configs())
@settings(max_examples=100, deadline=None)
def test_published_configs_survive_the_round_trip(values: dict) -> None:
    config = ModelConfig.from_published(values)
    assert config.check() == []
    assert config.to_published() == values


def test_published_residual_scale_forms() -> None:
    values = TINY.to_published()
    assert ModelConfig.from_published(values | {"hidden_states_shrink": "muparam"}).residual_factor == 1 / math.sqrt(2)
    # The released code leaves the residual unscaled outside [0, 1).
    assert ModelConfig.from_published(values | {"hidden_states_shrink": 1.4}).residual_factor == 1.0


def test_published_untied_embedding_starts_with_unit_deviation() -> None:
    values = TINY.to_published() | {"tie_word_embeddings": False, "scale_emb": 1.0, "wesar_weights": False}
    assert ModelConfig.from_published(values).embedding_init_std == 1.0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"sliding_window_pattern": 6}, "sliding_window_pattern"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_parameters"),
        ({"model_reproduce": "bert"}, "model_reproduce"),
        ({"embedding_ln": True, "embedding_rmsln": True}, "embedding_rmsln"),
        ({"rms_type": "hugging_face"}, "rms_type"),
    ],
)
def test_published_keys_that_change_the_mathematics_are_refused(change: dict, named: str) -> None:
    with pytest.raises(UserError, match=named):
        ModelConfig.from_published(TINY.to_published() | change)


def test_published_size_that_is_missing_is_named() -> None:
    with pytest.raises(UserError, match="hidden_size"):
        ModelConfig.from_published({"model_type": "llama", "vocab_size": 10})


def test_published_llama_config() -> None:
    values = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    }
    assert ModelConfig.from_published(values) == PRESETS["llama3_8b"]
    assert PRESETS["llama3_8b"].rms_norm_style == "hugging_face"
    with pytest.raises(UserError, match="scale_emb"):
        ModelConfig.from_published(values | {"scale_emb": 12})


def test_the_rounding_of_llama_cannot_be_published_in_the_format_of_yulan_mini() -> None:
    with pytest.raises(UserError, match=r"model\.rms_norm_style = 'hugging_face' .*'rms_type' \(llama, gemma\)"):
        dataclasses.replace(TINY, rms_norm_style="hugging_face").to_published()
