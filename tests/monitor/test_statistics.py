"""Statistics of a model's inside: hidden states and attention at every point against a second statement in float64."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.monitor.expected_statistics import expected_hidden
from titan_yulan.config.model import ModelConfig
from titan_yulan.model import Decoder
from titan_yulan.model.decoder import DecoderLayer
from titan_yulan.monitor import hidden_states
from titan_yulan.monitor.hidden_states import logsumexp_sums, observe
from titan_yulan.monitor.statistics import Summands, add_up, is_due, sampled_layers
from titan_yulan.objective.objective import Inputs

YULAN = ModelConfig(
    vocab_size=19,
    hidden_size=24,
    intermediate_size=20,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=2,
    norm_scale=1.7,
    logits_base_width=6,
)
MODELS: dict[str, ModelConfig] = {
    "YuLan-Mini": YULAN,
    "every option": dataclasses.replace(
        YULAN,
        qk_layer_norm=True,
        embedding_norm="layer_norm",
        embedding_gradient_scale=0.1,
        attention_base_width=1,
        rms_norm_style="gemma",
    ),
    "embedding RMSNorm": dataclasses.replace(YULAN, embedding_norm="rms_norm"),
    "Llama": dataclasses.replace(
        YULAN, wesar=False, attention_bias=False, tie_word_embeddings=False, embedding_scale=1.0, norm_scale=1.0
    ),
    "2 layers": dataclasses.replace(YULAN, num_hidden_layers=2),
}


def random_decoder(config: ModelConfig) -> Decoder:
    """In float64, every parameter drawn at random, so that none is neutral."""
    decoder, generator = Decoder(config).double(), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            noise = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(1 + noise if "norm" in name or name.endswith("_alpha") else noise)
    return decoder


def random_inputs(rows: int = 3, length: int = 9, documents: bool = False) -> Inputs:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(YULAN.vocab_size, (rows, length), generator=generator)
    places = torch.arange(length).expand(rows, length)
    return Inputs(
        input_ids=ids,
        targets=ids,
        weights=torch.ones(rows, length),
        counts=torch.ones(rows, length),
        position_ids=places % 4 if documents else None,
        document_ids=places // 4 if documents else None,
        visible=None,
        source=torch.zeros(rows, dtype=torch.int64),
        denominator=torch.tensor(1.0),
    )


def observed(decoder: Decoder, inputs: Inputs, real: Tensor, layers: tuple[int, ...]) -> dict[str, float]:
    found = add_up(observe(decoder, inputs, real, layers, causal=True), torch.device("cpu"))
    assert found.values.dtype == torch.float32
    return dict(zip(found.names, found.values.tolist(), strict=True))


def in_double(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().double() for name, tensor in state.items()}


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_every_point_is_what_its_formula_says(model: str, documents: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hidden_states, "_SCORES", 2 * 2 * 4 * 9)  # two queries at once
    config, inputs = MODELS[model], random_inputs(documents=documents)
    decoder, layers = random_decoder(config), sampled_layers(config.num_hidden_layers, 3)
    found = observed(decoder, inputs, torch.tensor([True, False, True]), layers)
    ids = inputs.input_ids[[0, 2]]
    document_ids, position_ids = (t if t is None else t[[0, 2]] for t in (inputs.document_ids, inputs.position_ids))
    wanted = expected_hidden(in_double(decoder.state_dict()), config, ids, layers, document_ids, position_ids)
    assert sorted(found) == sorted(wanted)
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=1e-6, abs=1e-7), name


@pytest.mark.parametrize("recomputed", [False, True])
def test_what_is_handed_on_between_blocks_is_seen_where_it_is_added(recomputed: bool) -> None:
    decoder, inputs = random_decoder(YULAN), random_inputs()
    for block in decoder.model.layers:
        cast(DecoderLayer, block).hands_on = not recomputed
    found = observed(decoder, inputs, torch.ones(3, dtype=torch.bool), (1, 4))
    wanted = expected_hidden(in_double(decoder.state_dict()), YULAN, inputs.input_ids, (1, 4))
    residuals = [name for name in wanted if "residual/" in name]
    assert len(residuals) == 2 * 2 * 3
    assert all(found[name] == pytest.approx(wanted[name], rel=1e-6) for name in residuals)


def test_the_observer_leaves_with_the_pass() -> None:
    decoder, inputs = random_decoder(YULAN), random_inputs()
    before, logits = decoder.model.observer, decoder(inputs.input_ids)
    observe(decoder, inputs, torch.ones(3, dtype=torch.bool), (0,), causal=True)
    assert decoder.model.observer is before
    assert torch.equal(decoder(inputs.input_ids), logits)
    assert all(parameter.grad is None for parameter in decoder.parameters())


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 3),
    queries=st.integers(1, 7),
    more_keys=st.integers(0, 5),
    groups=st.integers(1, 3),
    repeats=st.integers(1, 3),
    scores=st.integers(1, 500),
    seen=st.sampled_from(["all", "places", "mask"]),
)
def test_logsumexp_in_parts_is_that_of_all_scores(
    rows: int, queries: int, more_keys: int, groups: int, repeats: int, scores: int, seen: str
) -> None:
    generator = torch.Generator().manual_seed(rows * 100 + queries)
    options: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
    keys = queries + more_keys
    query = torch.randn(rows, queries, groups * repeats, 4, **options)
    key = torch.randn(rows, keys, groups, 4, **options)
    tokens = torch.rand(rows, queries, generator=generator) < 0.7
    mask = torch.rand(rows, 1, queries, keys, generator=generator) < 0.6
    mask[..., 0] = True
    places = torch.randperm(keys, generator=generator)[:queries]
    visible = {"all": torch.ones_like(mask), "mask": mask, "places": torch.arange(keys) <= places[:, None]}[seen]
    whole = torch.einsum("bqhd,bkhd->bhqk", query, key.repeat_interleave(repeats, 2)) * 0.3
    wanted = (whole.masked_fill(~visible, -torch.inf).logsumexp(-1) * tokens[:, None]).sum((0, 2))
    before, hidden_states._SCORES = hidden_states._SCORES, scores
    try:
        chosen = mask if seen == "mask" else None, places if seen == "places" else None
        found = logsumexp_sums(query, key, 0.3, *chosen, tokens)
    finally:
        hidden_states._SCORES = before
    torch.testing.assert_close(found, wanted)


class Largest(TorchDispatchMode):
    """Remembers the most elements that an operator's result had."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            self.elements = max(self.elements, made.numel())
        return made


def test_scores_of_long_rows_never_exist_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hidden_states, "_SCORES", 2**14)
    query, key = torch.randn(1, 512, 4, 2), torch.randn(1, 512, 2, 2)
    with Largest() as largest:
        logsumexp_sums(query, key, 1.0, None, torch.arange(512), torch.ones(1, 512, dtype=torch.bool))
    assert 2**13 < largest.elements <= 2**14 < 512 * 512


def test_which_layers() -> None:
    assert sampled_layers(56, 6) == (0, 11, 22, 33, 44, 55)  # as published
    assert sampled_layers(5, 6) == (0, 1, 2, 3, 4)
    assert sampled_layers(1, 6) == (0,)
    assert sampled_layers(9, 1) == (8,)


@given(layers=st.integers(1, 200), wanted=st.integers(1, 20))
def test_layers_are_spread_evenly(layers: int, wanted: int) -> None:
    found = sampled_layers(layers, wanted)
    assert len(found) == min(layers, wanted) == len(set(found)) and found[-1] == layers - 1
    gaps = [after - before for before, after in pairwise(found)]
    assert not gaps or (found[0] == 0 and max(gaps) - min(gaps) <= 1)


def test_which_steps() -> None:
    assert [step for step in range(1, 70) if is_due(step, 23)] == [23, 46, 69]
    assert not any(is_due(step, 0) for step in range(1, 70))


def test_parts_become_one_in_order() -> None:
    halves = Summands(
        ("a", "b"), torch.tensor([[2.0, 4.0], [9.0, 3.0]], dtype=torch.float64), lambda s: s[:, 0] / s[:, 1]
    )
    root = Summands(("c",), torch.tensor([16.0], dtype=torch.float64), torch.sqrt)
    found = add_up([halves, root], torch.device("cpu"))
    assert found.names == ("a", "b", "c")
    assert found.values.tolist() == [0.5, 3.0, 4.0]
