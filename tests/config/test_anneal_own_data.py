"""The own-data annealing configuration, and the published models that docs/continual_training.md begins with.

The two dictionaries are the config.json files of huggingface.co/yulan-team/YuLan-Mini-Before-Annealing and
huggingface.co/yulan-team/YuLan-Mini, without the keys that say nothing about the model's mathematics.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from titan_yulan.checkpoint.hugging_face import (
    HuggingFaceFolder,
    StoredTensor,
    check_hugging_face,
    parameter_shapes,
)
from titan_yulan.config import load
from titan_yulan.config.model import ModelConfig
from titan_yulan.config.presets import PRESETS
from titan_yulan.config.sections import RunConfig
from titan_yulan.curriculum.plan import Plan
from titan_yulan.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
COMMON: dict[str, Any] = {
    "attention_bias": True,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 1920,
    "initializer_range": 5e-05,
    "intermediate_size": 4800,
    "max_position_embeddings": 28723,
    "num_attention_heads": 30,
    "num_hidden_layers": 56,
    "num_key_value_heads": 6,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 490000.0,
    "vocab_size": 99000,
}
BEFORE_ANNEALING = COMMON | {
    "model_type": "yulanmini",
    "dim_model_base_attn": 64,
    "dim_model_base_init": None,
    "dim_model_base_lmh": 1,
    "dim_model_base_logits": 1920.0,
    "q_proj_alpha": 0.3651483716701107,
    "k_proj_alpha": 0.3651483716701107,
    "gate_up_proj_alpha": 0.3651483716701107,
    "o_proj_alpha": 0.03450327796711771,
    "down_proj_alpha": 0.03450327796711771,
    "embedding_ln": False,
    "embedding_rmsln": False,
    "hidden_states_shrink": 0.18708286933869706,
    "init_scale_o": 1,
    "layer_norm_eps": 1e-06,
    "ln_scale": 1,
    "model_reproduce": "transformer",
    "qk_layernorm": False,
    "rms_type": "llama",
    "scale_emb": 10.0,
    "tie_word_embeddings": True,
    "wesar_weights": True,
}
FINAL = COMMON | {"model_type": "llama", "head_dim": 64, "tie_word_embeddings": False}


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return load(ROOT / "train_configs" / "yulan_mini" / "anneal_own_data.toml").config


def folder(published: dict[str, Any]) -> HuggingFaceFolder:
    model = ModelConfig.from_published(published)
    shapes = parameter_shapes(model)
    return HuggingFaceFolder(
        Path("nowhere"), model, {n: StoredTensor(Path("nowhere"), s, "BF16") for n, s in shapes.items()}
    )


def test_it_ramps_up_and_anneals_to_zero(config: RunConfig) -> None:
    plan = Plan(config)
    assert plan.end.step == 484 and plan.phases[0].batch_rows == 1008  # 2B tokens of 4,128,768 a step
    rates = [plan.learning_rate(step) for step in range(485)]
    assert rates[0] == 0.0 and max(rates) == pytest.approx(1e-2, rel=0.05) and rates[484] == pytest.approx(0, abs=1e-5)
    assert rates.index(max(rates)) in (24, 25)  # 5 % of the steps


def test_it_begins_with_the_weights_before_annealing(config: RunConfig) -> None:
    assert check_hugging_face(config, folder(BEFORE_ANNEALING)) == []
    undecided = replace(config, phases=(replace(config.phases[0], rope_theta=None),))
    with pytest.raises(UserError, match=r"  rope_theta = 490000\.0  # found 10000\.0\n"):
        check_hugging_face(undecided, folder(BEFORE_ANNEALING))


def test_the_final_weights_need_the_keys_that_the_page_lists(config: RunConfig) -> None:
    keys: dict[str, Any] = {
        "rope_theta": 490000.0,
        "tie_word_embeddings": False,
        "embedding_scale": 1.0,
        "residual_scale": 1.0,
        "rms_norm_style": "hugging_face",
        "wesar": False,
    }
    page = (ROOT / "docs" / "continual_training.md").read_text(encoding="utf-8")
    row = next(line for line in page.splitlines() if line.startswith("| [YuLan-Mini](https"))
    for key, value in keys.items():
        text = f'"{value}"' if isinstance(value, str) else str(value).lower()
        assert f"`{key} = {text}`" in row
    model = replace(PRESETS["yulan_mini_2b"], **keys)
    assert model.check() == []
    undecided = replace(config, model=model, phases=(replace(config.phases[0], rope_theta=None),))
    assert check_hugging_face(undecided, folder(FINAL)) == []
