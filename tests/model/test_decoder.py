"""Properties of the decoder that no formula shows: names, types, masks, construction, where gradients go."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_leaves

from titan_yulan.config.model import ModelConfig
from titan_yulan.config.presets import PRESETS
from titan_yulan.model.decoder import Decoder
from titan_yulan.model.initialise import initialise
from titan_yulan.model.scale import RMSNorm, combine, multiply

SMALL = ModelConfig(
    vocab_size=23,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    alpha_base_width=8,
    initializer_range=0.2,
)


def small_decoder(**options) -> Decoder:
    decoder = Decoder(dataclasses.replace(SMALL, **options))
    initialise(decoder, 0)
    return decoder


def gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def random_ids(batch: int, seq: int, seed: int = 0) -> Tensor:
    return torch.randint(SMALL.vocab_size, (batch, seq), generator=torch.Generator().manual_seed(seed))


def test_parameter_names_and_shapes_are_the_exchange_format() -> None:
    decoder = Decoder(dataclasses.replace(SMALL, num_hidden_layers=1, qk_layer_norm=True, embedding_norm="rms_norm"))
    attention = {f"{letter}_proj_alpha": (1,) for letter in "qkvo"}
    attention |= {"q_proj.weight": (32, 32), "q_proj.bias": (32,), "o_proj.weight": (32, 32)}
    attention |= {f"{letter}_proj.weight": (16, 32) for letter in "kv"}
    attention |= {f"{letter}_proj.bias": (16,) for letter in "kv"}
    attention |= {f"q_layernorm.norms.{head}.weight": (8,) for head in range(4)}
    attention |= {f"k_layernorm.norms.{head}.weight": (8,) for head in range(2)}
    block = {f"self_attn.{name}": shape for name, shape in attention.items()}
    block |= {"mlp.gate_proj.weight": (40, 32), "mlp.up_proj.weight": (40, 32), "mlp.down_proj.weight": (32, 40)}
    for norm in ("input_layernorm", "post_attention_layernorm"):
        block |= {f"{norm}.weight": (32,), f"{norm}_alpha": (1,)}
    block |= {"gate_up_proj_alpha": (1,), "down_proj_alpha": (1,)}
    expected = {f"model.layers.0.{name}": shape for name, shape in block.items()} | {
        "model.embed_tokens.weight": (23, 32),
        "model.embedding_layernorm.weight": (32,),
        "model.norm.weight": (32,),
        "model.norm_alpha": (1,),
        "lm_head_alpha": (1,),
    }
    assert {name: tuple(value.shape) for name, value in decoder.state_dict().items()} == expected


def test_untied_model_has_a_head_and_no_scalars_without_wesar() -> None:
    names = Decoder(dataclasses.replace(SMALL, tie_word_embeddings=False, wesar=False)).state_dict().keys()
    assert "lm_head.weight" in names
    assert not [name for name in names if name.endswith("_alpha")]


def test_head_runs_inside_forward_on_the_tied_weight() -> None:
    decoder, ids = small_decoder(), random_ids(2, 5)
    seen = {}

    def head(hidden: Tensor, weight: Tensor) -> str:
        seen.update(hidden=hidden, weight=weight)
        return "result"

    assert decoder(ids, head=head) == "result"
    assert seen["weight"] is decoder.model.embed_tokens.weight
    torch.testing.assert_close(seen["hidden"] @ seen["weight"].T, decoder(ids))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"embedding_norm": "layer_norm", "qk_layer_norm": True}, {"wesar": False}])
def test_activations_have_the_type_of_the_weights(dtype: torch.dtype, options: dict) -> None:
    decoder, types = small_decoder(**options).to(dtype), set()
    for module in decoder.modules():
        module.register_forward_hook(lambda module, args, output: types.update(x.dtype for x in tree_leaves(output)))
    logits = decoder(random_ids(2, 5), document_ids=torch.zeros(2, 5, dtype=torch.int64))
    assert logits.dtype == dtype
    assert types == {dtype}
    assert torch.isfinite(logits).all()


def as_mixed_precision(decoder: Decoder) -> Decoder:
    """Matrices and biases in bfloat16, scalars and norm weights in float32, as they arrive under FSDP2."""
    for module in decoder.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 2 or name == "bias":
                setattr(module, name, torch.nn.Parameter(parameter.detach().bfloat16()))
    return decoder


@pytest.mark.parametrize("options", [{}, {"rms_norm_style": "gemma"}, {"qk_layer_norm": True}])
def test_mixed_precision_stays_close_to_float64(options: dict) -> None:
    decoder, ids = as_mixed_precision(small_decoder(**options)), random_ids(2, 12)
    logits = decoder(ids)
    assert logits.dtype == torch.bfloat16
    logits.float().square().sum().backward()
    assert {gradient(parameter).dtype for parameter in decoder.parameters()} == {torch.bfloat16, torch.float32}
    exact = Decoder(decoder.config).double()
    exact.load_state_dict(decoder.state_dict())
    error = (logits.double() - exact(ids)).norm() / exact(ids).norm()
    assert 0 < error < 0.03  # a few bfloat16 roundings (2^-9 each) per block


@given(value=st.floats(1e-3, 10), seed=st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_scalars_meet_the_activation_unrounded(value: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(16, generator=generator).bfloat16()
    alpha = torch.nn.Parameter(torch.tensor([value]))
    exact = x.double() * alpha.double()
    # One rounding to bfloat16 of a float32 product: half a unit in the last of 8 bits is at most 2^-8.
    assert ((multiply(x, alpha, rounded=False).double() - exact).abs() <= exact.abs() * 2**-8 * 1.001).all()


def test_published_precision_rounds_the_scalar() -> None:
    alpha = torch.nn.Parameter(torch.tensor([0.03450327796711771]))
    assert float(combine((2.0, alpha.detach()), None)) == pytest.approx(2 * 0.03450327796711771, rel=1e-7)
    assert float(combine((2.0, alpha.detach()), torch.bfloat16)) == 2 * 0.034423828125
    ids = random_ids(2, 12)
    exact, published = (
        as_mixed_precision(small_decoder(scalar_precision=precision))(ids) for precision in ("float32", "compute")
    )
    assert not torch.equal(exact, published)
    assert ((exact - published).norm() / exact.norm()).item() < 0.03


def test_published_precision_rounds_the_norm_weight() -> None:
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact, published = (RMSNorm(dataclasses.replace(SMALL, scalar_precision=name)) for name in ("float32", "compute"))
    with torch.no_grad():
        for norm in (exact, published):
            norm.weight.copy_(torch.linspace(0.5, 1.5, 32))
        assert not torch.equal(published(x), exact(x))
        exact.weight.copy_(exact.weight.bfloat16())
        assert torch.equal(published(x), exact(x))


def test_only_the_final_gemma_norm_rounds_once() -> None:
    decoder = small_decoder(rms_norm_style="gemma")
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = torch.linspace(-0.5, 0.5, 32)
    expected = torch.nn.functional.rms_norm(x.double(), (32,), 1 + weight.double(), 1e-6)
    once = {}
    for name in ("norm", "layers.0.input_layernorm"):
        norm = decoder.model.get_submodule(name)
        with torch.no_grad():
            next(norm.parameters()).copy_(weight)
            once[name] = bool(((norm(x).double() - expected).abs() <= expected.abs() * 2**-8 * 1.001).all())
    assert once == {"norm": True, "layers.0.input_layernorm": False}


def test_gradient_of_a_scalar_keeps_its_precision() -> None:
    x, alpha = torch.full((1000,), 1.0 + 2**-7).bfloat16(), torch.nn.Parameter(torch.tensor([0.5]))
    multiply(x, alpha, rounded=False).float().sum().backward()
    assert alpha.grad is not None and alpha.grad.dtype == torch.float32
    assert alpha.grad.item() == pytest.approx(1000 * (1 + 2**-7), rel=1e-6)


@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": False, "embedding_scale": 1.0, "qk_layer_norm": True}])
def test_gradients_reach_every_parameter(options: dict) -> None:
    decoder = small_decoder(**options)
    logits = decoder(random_ids(4, 16))
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), random_ids(4, 16, seed=1).flatten()).backward()
    for name, parameter in decoder.named_parameters():
        assert gradient(parameter).abs().max() > 0, name


def test_embedding_gradient_scale_leaves_the_forward_pass_alone() -> None:
    ids = random_ids(2, 9)
    options = {"tie_word_embeddings": False, "embedding_scale": 1.0}
    whole, shrunk = small_decoder(**options), small_decoder(**options, embedding_gradient_scale=0.125)
    for decoder in (whole, shrunk):
        decoder(ids).square().sum().backward()
    assert torch.equal(whole(ids), shrunk(ids))
    torch.testing.assert_close(
        gradient(shrunk.model.embed_tokens.weight), 0.125 * gradient(whole.model.embed_tokens.weight), rtol=1e-6, atol=0
    )
    assert torch.equal(gradient(shrunk.lm_head.weight), gradient(whole.lm_head.weight))


@given(changed=st.integers(0, 8), seed=st.integers(0, 100))
@settings(max_examples=25, deadline=None)
def test_causality(changed: int, seed: int) -> None:
    decoder, ids = small_decoder().double(), random_ids(2, 9, seed)
    other = ids.clone()
    other[:, changed] = (ids[:, changed] + 1) % SMALL.vocab_size
    with torch.no_grad():
        difference = (decoder(ids) - decoder(other)).abs().amax(-1)
        both_ways = (decoder(ids, causal=False) - decoder(other, causal=False)).abs().amax(-1)
    assert (difference[:, :changed] == 0).all()
    assert (difference[:, changed:] > 1e-12).all()
    assert (both_ways > 1e-12).all()


@given(cuts=st.lists(st.integers(1, 11), max_size=3, unique=True).map(sorted), causal=st.booleans())
@settings(max_examples=25, deadline=None)
def test_document_mask_equals_separate_documents(cuts: list[int], causal: bool) -> None:
    decoder, ids = small_decoder().double(), random_ids(1, 12)
    positions = torch.arange(12)
    documents = torch.zeros(1, 12, dtype=torch.int32)
    for cut in cuts:
        documents[:, cut:] += 1
    with torch.no_grad():
        masked = decoder(ids, document_ids=documents, causal=causal)
        edges = [0, *cuts, 12]
        apart = [decoder(ids[:, a:b], positions[a:b], causal=causal) for a, b in itertools.pairwise(edges)]
    torch.testing.assert_close(masked, torch.cat(apart, dim=1), rtol=1e-12, atol=1e-12)


def test_meta_construction_gives_the_same_model() -> None:
    with torch.device("meta"):
        decoder = Decoder(SMALL)
    decoder.to_empty(device="cpu")
    initialise(decoder, 0)
    assert decoder.head_weight() is decoder.model.embed_tokens.weight
    ids = random_ids(2, 6)
    assert torch.equal(decoder(ids), small_decoder()(ids))
    assert not list(decoder.buffers())


def test_first_norm_of_the_production_initialisation_is_damped_by_eps() -> None:
    """10 * N(0, 5e-5): mean square 2.5e-7 beside eps 1e-6, so the first norm's output has rms sqrt(0.2), not 1."""
    config = dataclasses.replace(PRESETS["yulan_mini_2b"], vocab_size=500, num_hidden_layers=1)
    with torch.device("meta"):
        decoder = Decoder(config)
    decoder.to_empty(device="cpu")
    initialise(decoder, 3)
    outputs = []
    decoder.model.get_submodule("layers.0.input_layernorm").register_forward_hook(
        lambda m, args, output: outputs.append(output)
    )
    decoder(torch.arange(64)[None])
    assert outputs[0].square().mean().sqrt().item() == pytest.approx(0.2**0.5, rel=0.01)
