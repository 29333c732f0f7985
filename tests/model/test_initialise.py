"""Initial values: the deviations of every rule, and that they depend on their arguments only."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from titan_yulan.config.model import ModelConfig
from titan_yulan.model.decoder import Decoder
from titan_yulan.model.initialise import initial_value, initialise

CONFIG = ModelConfig(
    vocab_size=600,
    hidden_size=256,
    intermediate_size=320,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    alpha_base_width=64,
)
UNTIED: dict[str, Any] = {"tie_word_embeddings": False, "embedding_scale": 1.0}
INPUTS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
OUTPUTS = ("o_proj", "down_proj")

# rule -> (options, deviation of the inputs, of the outputs, of the embedding, of an untied head), in units of
# initializer_range; m = 256 / 64 = 4, 2 * layers = 4.
RULES: dict[str, tuple[dict[str, Any], float, float, float, float | None]] = {
    "wesar": ({}, 1, 1, 1, None),
    "wesar untied": (UNTIED, 1, 1, 1 / 0.02, 1),
    "transformer": ({"wesar": False, **UNTIED}, 1, 1, 1, 1),
    "minicpm": ({"wesar": False, "initialization": "minicpm", "initialization_base_width": 64}, 0.5, 0.5, 1, None),
    "minicpm untied": (
        {"wesar": False, "initialization": "minicpm", "lm_head_base_width": 16, **UNTIED},
        1,
        1,
        1 / 0.02,
        0.25,
    ),
    "cerebras": ({"wesar": False, "initialization": "cerebras", "initialization_base_width": 64}, 0.5, 0.25, 1, None),
    "output divisor": ({"wesar": False, "initialization": "cerebras", "output_init_divisor": 8.0}, 1, 0.125, 1, None),
    "embedding": ({"embedding_initializer_range": 0.06}, 1, 1, 3, None),
}


@pytest.mark.parametrize("rule", RULES)
def test_deviations_of_each_rule(rule: str) -> None:
    options, inputs, outputs, embedding, head = RULES[rule]
    config = dataclasses.replace(CONFIG, initializer_range=0.02, **options)
    assert config.check() == []
    decoder = Decoder(config)
    initialise(decoder, 1)
    expected = dict.fromkeys(INPUTS, inputs) | dict.fromkeys(OUTPUTS, outputs)
    expected |= {"embed_tokens": embedding} | ({} if head is None else {"lm_head": head})
    seen = set()
    for name, parameter in decoder.named_parameters():
        if parameter.ndim == 2:
            module = name.split(".")[-2]
            seen.add(module)
            std = 0.02 * expected[module]
            # The sample deviation of n normal values strays by 1 / sqrt(2n) relative; 5 of them.
            assert parameter.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * parameter.numel())), name
            assert abs(parameter.mean().item()) < 5 * std / math.sqrt(parameter.numel()), name
    assert seen == expected.keys()


@pytest.mark.parametrize(("style", "gain"), [("llama", 1.0), ("gemma", 0.0)])
@pytest.mark.parametrize("embedding_norm", ["layer_norm", "rms_norm"])
def test_vectors_and_scalars_start_neutral(style: str, gain: float, embedding_norm: str) -> None:
    config = dataclasses.replace(CONFIG, rms_norm_style=style, embedding_norm=embedding_norm, qk_layer_norm=True)
    decoder = Decoder(config)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.fill_(7.0)
    initialise(decoder, 1)
    state = decoder.state_dict()
    assert (state["model.layers.1.self_attn.q_proj.bias"] == 0).all()
    for name in ("model.norm.weight", "model.layers.0.input_layernorm.weight"):
        assert (state[name] == gain).all()
    assert (state["model.embedding_layernorm.weight"] == (gain if embedding_norm == "rms_norm" else 1.0)).all()
    assert (state["model.layers.0.self_attn.k_layernorm.norms.1.weight"] == 1).all()
    for name, value in {
        "model.layers.0.self_attn.q_proj_alpha": 0.5,  # sqrt(64 / 256)
        "model.layers.1.gate_up_proj_alpha": 0.5,
        "model.layers.0.self_attn.o_proj_alpha": 0.25,  # and / sqrt(2 * 2 layers)
        "model.layers.1.down_proj_alpha": 0.25,
        "model.layers.0.input_layernorm_alpha": 1.0,
        "lm_head_alpha": 1.0,
    }.items():
        assert state[name].item() == value, name


def test_a_value_depends_on_its_arguments_only() -> None:
    name, shape = "model.layers.0.mlp.up_proj.weight", (320, 256)
    value = initial_value(name, shape, CONFIG, 5)
    assert value.dtype == torch.float32
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    assert torch.equal(initial_value(name, shape, CONFIG, 5), value)
    assert torch.equal(torch.random.get_rng_state(), before)
    for other in (
        initial_value(name, shape, CONFIG, 6),
        initial_value("model.layers.1.mlp.up_proj.weight", shape, CONFIG, 5),
        initial_value("model.layers.0.mlp.gate_proj.weight", shape, CONFIG, 5),
    ):
        correlation = torch.corrcoef(torch.stack((value.flatten(), other.flatten())))[0, 1].item()
        assert abs(correlation) < 5 / math.sqrt(value.numel())


def test_initialise_writes_the_values_into_every_type() -> None:
    decoder = Decoder(CONFIG).to(torch.bfloat16)
    initialise(decoder, 5)
    for name, parameter in decoder.named_parameters():
        assert torch.equal(parameter, initial_value(name, parameter.shape, CONFIG, 5).bfloat16()), name


def test_unknown_name_is_refused() -> None:
    with pytest.raises(KeyError, match="router"):
        initial_value("model.layers.0.mlp.router.weight", (4, 4), CONFIG, 0)
