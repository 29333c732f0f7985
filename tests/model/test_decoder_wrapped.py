"""The decoder under the wrappers that the trainer puts around it: FSDP2, compilation, activation checkpointing."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from titan_yulan.config.model import ModelConfig
from titan_yulan.model.attend import AttentionContext
from titan_yulan.model.decoder import Decoder
from titan_yulan.model.initialise import initialise

CONFIG = ModelConfig(
    vocab_size=40,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    alpha_base_width=8,
    initializer_range=0.2,
)
IDS = torch.arange(24).view(2, 12)


def make_decoder(**options) -> Decoder:
    decoder = Decoder(dataclasses.replace(CONFIG, **options))
    initialise(decoder, 0)
    return decoder


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_fsdp_gathers_the_tied_weight_and_leaves_the_rotary_tables_alone(one_rank: None) -> None:
    decoder, exact = make_decoder(), make_decoder()(IDS)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    contexts: list[AttentionContext] = []
    for layer in decoder.model.layers:
        fully_shard(layer, mp_policy=policy)
        layer.register_forward_pre_hook(lambda module, args: contexts.append(args[2]))
    fully_shard(decoder, mp_policy=policy)

    def head(hidden: Tensor, weight: Tensor) -> Tensor:
        assert weight.shape == (40, 32)
        assert hidden.dtype == weight.dtype == torch.bfloat16
        return hidden.float() @ weight.float().T

    logits = decoder(IDS, head=head)
    logits.square().sum().backward()
    assert len(contexts) == 2
    assert {context.cos.dtype for context in contexts} == {torch.float32}
    assert ((logits - exact).norm() / exact.norm()).item() < 0.03
    assert all(parameter.grad is not None for parameter in decoder.parameters())


@pytest.mark.parametrize("options", [{}, {"wesar": False}, {"qk_layer_norm": True, "rms_norm_style": "gemma"}])
def test_blocks_compile_to_one_graph_and_survive_a_change_of_theta(options: dict) -> None:
    decoder, compiled = make_decoder(**options), make_decoder(**options)
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    for layer in compiled.model.layers:
        layer.compile(fullgraph=True, backend=count)
    torch.testing.assert_close(compiled(IDS), decoder(IDS))
    found = len(graphs)
    for module in (decoder, compiled):
        module.set_rope_theta(490000.0)
    torch.testing.assert_close(compiled(IDS), decoder(IDS))
    assert len(graphs) == found > 0


def test_recomputed_blocks_give_the_same_gradients() -> None:
    plain, recomputed = make_decoder(), make_decoder()
    for index, layer in enumerate(recomputed.model.layers):
        recomputed.model.layers[index] = checkpoint_wrapper(layer)
    for decoder in (plain, recomputed):
        decoder(IDS, document_ids=IDS // 5).square().sum().backward()
    for (name, ours), theirs in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None, name
        assert torch.equal(ours.grad, theirs.grad), name
