"""Every parameter is in exactly one group, at the published multipliers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from titan_yulan.config.model import ModelConfig
from titan_yulan.config.presets import PRESETS
from titan_yulan.config.sections import OptimizerSection
from titan_yulan.model import Decoder
from titan_yulan.optimizer.groups import Group, assign, group_table

DEBUG = PRESETS["debug"]
VARIANTS = {
    **PRESETS,
    "untied": replace(DEBUG, tie_word_embeddings=False, embedding_scale=1.0),
    "gemma": replace(DEBUG, rms_norm_style="gemma", embedding_norm="rms_norm"),
    "all norms": replace(DEBUG, qk_layer_norm=True, embedding_norm="layer_norm"),
    "no norm alphas": replace(DEBUG, norm_alphas=False, attention_bias=False),
    "plain": replace(DEBUG, wesar=False),
}


def names_of(config: ModelConfig) -> list[str]:
    with torch.device("meta"):
        return [name for name, _ in Decoder(config).named_parameters()]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_is_in_exactly_one_group(variant: str) -> None:
    config = VARIANTS[variant]
    names = names_of(config)
    groups = assign(names, group_table(config, OptimizerSection(learning_rate=1)))
    assert sorted(name for members in groups.values() for name in members) == sorted(names)


def test_members_of_the_groups() -> None:
    config = VARIANTS["all norms"]
    groups = assign(names_of(config), group_table(config, OptimizerSection(learning_rate=1)))
    assert groups["embedding"] == ["model.embed_tokens.weight"]
    assert len(groups["matrices"]) == 7 * 4 and all("_proj.weight" in name for name in groups["matrices"])
    assert len(groups["biases"]) == 3 * 4
    assert all(name.endswith("_alpha") for name in groups["scalars"]) and len(groups["scalars"]) == 8 * 4 + 2
    assert "model.embedding_layernorm.weight" in groups["norms"] and "model.norm.weight" in groups["norms"]
    assert sum("k_layernorm.norms" in name for name in groups["norms"]) == 2 * 4


def test_mup_multiplier_of_yulan_mini() -> None:
    """Table 3 of arXiv 2412.17743: the matrices learn at eta / (1920 / 256)."""
    section = OptimizerSection(learning_rate=1e-2, base_width=256)
    multipliers = {group.name: group.learning_rate for group in group_table(PRESETS["yulan_mini_2b"], section)}
    assert multipliers == {"matrices": 256 / 1920, "embedding": 1, "norms": 1, "biases": 1, "scalars": 1}


def test_without_base_width_all_learn_alike() -> None:
    table = group_table(PRESETS["yulan_mini_2b"], OptimizerSection(learning_rate=1e-2))
    assert {group.learning_rate for group in table} == {1.0}


def test_an_untied_head_is_a_matrix() -> None:
    config = PRESETS["llama3_8b"]
    groups = assign(names_of(config), group_table(config, OptimizerSection(learning_rate=1, base_width=1024)))
    assert "lm_head.weight" in groups["matrices"]
    assert set(groups) == {"matrices", "embedding", "norms"}


def test_weight_decay_of_each_kind() -> None:
    section = OptimizerSection(
        learning_rate=1, weight_decay=0.1, weight_decay_norms=0.2, weight_decay_biases=0.0, weight_decay_scalars=0.3
    )
    decay = {group.name: group.weight_decay for group in group_table(DEBUG, section)}
    assert decay == {"matrices": 0.1, "embedding": 0.1, "norms": 0.2, "biases": 0.0, "scalars": 0.3}
    assert {group.weight_decay for group in group_table(DEBUG, OptimizerSection(learning_rate=1))} == {0.1}


def test_a_parameter_without_a_group_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"'model\.surprise' must be in exactly one optimizer group, but is in none"):
        assign(["a_proj.weight", "model.surprise"], [Group("matrices", r"_proj\.weight", 1, 0)])


def test_a_parameter_in_two_groups_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"'x_alpha' must be .* but is in \['one', 'two'\]"):
        assign(["x_alpha"], [Group("one", "alpha", 1, 0), Group("two", "^x", 1, 0)])


def test_a_group_without_parameters_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"group 'biases': its pattern .* matches no parameter"):
        assign(["x_alpha"], [Group("one", "alpha", 1, 0), Group("biases", r"\.bias$", 1, 0)])
