"""What each mode of activation checkpointing keeps and recomputes, and that nothing else changes."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy

from tests.distributed.ranks import run_ranks
from tests.parallel.small_decoder import (
    CONFIG,
    LAYERS,
    compiled_kept_bytes,
    gradients,
    kept_bytes,
    make_decoder,
    make_ids,
)
from titan_yulan.config.model import ModelConfig
from titan_yulan.config.sections import ActivationCheckpointSection, CompileSection
from titan_yulan.model import Decoder
from titan_yulan.parallel.activation_checkpoint import OPERATOR_POLICY, apply_activation_checkpoint, is_recomputed
from titan_yulan.parallel.compile import compile_layers
from titan_yulan.parallel.process import World

NONE = ActivationCheckpointSection()
SELECTIVE = ActivationCheckpointSection(mode="selective")
EVERY_2 = ActivationCheckpointSection(mode="every", every=2)
FULL = ActivationCheckpointSection(mode="full")
SECTIONS = (NONE, SELECTIVE, EVERY_2, FULL)
SHARDED = ((EVERY_2, False), (SELECTIVE, False), (EVERY_2, True), (SELECTIVE, True))


def checkpointed(section: ActivationCheckpointSection, config: ModelConfig = CONFIG) -> Decoder:
    decoder = make_decoder(config=config)
    apply_activation_checkpoint(decoder.model.layers, section)
    return decoder


class Calls(TorchDispatchMode):
    """Counts the operators that are run."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


def calls_of_backward(section: ActivationCheckpointSection) -> Counter[str]:
    loss = checkpointed(section)(make_ids()).square().mean()
    with Calls() as calls:
        loss.backward()
    return calls.counts


@pytest.mark.parametrize(
    ("section", "recomputed"),
    [
        (NONE, []),
        (FULL, [0, 1, 2, 3, 4, 5, 6, 7]),
        (SELECTIVE, [0, 1, 2, 3, 4, 5, 6, 7]),
        # as published: layers 0, k, 2k, ... keep their activations, so 1 recomputes nothing and 56 all but layer 0
        (ActivationCheckpointSection(mode="every", every=1), []),
        (ActivationCheckpointSection(mode="every", every=3), [1, 2, 4, 5, 7]),
        (ActivationCheckpointSection(mode="every", every=56), [1, 2, 3, 4, 5, 6, 7]),
    ],
    ids=lambda value: f"{value.mode} {value.every}" if isinstance(value, ActivationCheckpointSection) else "",
)
def test_which_blocks_are_recomputed(section: ActivationCheckpointSection, recomputed: list[int]) -> None:
    assert [index for index in range(8) if is_recomputed(index, section)] == recomputed


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.mode)
def test_names_and_gradients_stay(section: ActivationCheckpointSection) -> None:
    plain, decoder = make_decoder(), checkpointed(section)
    assert [name for name, _ in decoder.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert list(decoder.state_dict()) == list(plain.state_dict())
    wanted, found = gradients(plain, make_ids()), gradients(decoder, make_ids())
    assert wanted.keys() == found.keys() == dict(plain.named_parameters()).keys()
    for name, gradient in wanted.items():
        assert torch.equal(found[name], gradient), name


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_what_is_computed_again_drops_the_same(compiled: bool) -> None:
    torch._dynamo.reset()
    config = dataclasses.replace(CONFIG, attention_dropout=0.2, hidden_dropout=0.1)

    def found(section: ActivationCheckpointSection, seed: int = 3) -> dict[str, Tensor]:
        decoder = checkpointed(section, config)
        compile_layers(decoder.model.layers, CompileSection(enabled=compiled, backend="aot_eager"))
        torch.manual_seed(seed)
        return gradients(decoder, make_ids())

    wanted, others, again, once_more = found(NONE), found(NONE, seed=4), found(SELECTIVE), found(FULL)
    for name, gradient in wanted.items():
        assert torch.equal(again[name], gradient), name
        assert torch.allclose(once_more[name], gradient, rtol=1e-5, atol=1e-7), name
        assert not torch.equal(others[name], gradient), name


def test_each_mode_keeps_less_than_the_one_before() -> None:
    kept = [kept_bytes(checkpointed(section), make_ids()) for section in SECTIONS]
    assert kept == sorted(kept, reverse=True) and len(set(kept)) == len(kept)
    assert kept[3] < 0.15 * kept[0]  # a block's input instead of some fifteen tensors of its size
    # Half the blocks keep all, and the others their input.
    assert kept[2] == pytest.approx((kept[0] + kept[3]) / 2, rel=0.02)


def test_compiled_blocks_keep_as_little() -> None:
    torch._dynamo.reset()
    for section in (SELECTIVE, FULL):
        decoder = checkpointed(section)
        compile_layers(decoder.model.layers, CompileSection(enabled=True, backend="aot_eager"))
        eager = kept_bytes(checkpointed(section), make_ids())
        assert compiled_kept_bytes(decoder, make_ids()) == pytest.approx(eager, rel=0.05)


def test_selective_recomputes_what_is_cheap_and_nothing_else() -> None:
    plain, selective, full = (calls_of_backward(section) for section in (NONE, SELECTIVE, FULL))
    again, everything = set(selective - plain), set(full - plain)
    saved = {name for name, policy in OPERATOR_POLICY.items() if policy is CheckpointPolicy.MUST_SAVE}
    kernels = {name for name in everything if re.fullmatch("titan_yulan::.*_forward", name)} - saved
    assert kernels and kernels <= again
    assert any("linear" in name or "mm" in name for name in everything & saved)
    assert [full[name] - plain[name] for name in everything & saved if "attention" in name] == [LAYERS]
    assert not again & saved


def test_the_policy_names_operators_that_exist() -> None:
    # Found by name at run time, so a misspelt one would silently be recomputed.
    for name in OPERATOR_POLICY:
        namespace, _, operator = name.partition("::")
        assert hasattr(getattr(torch.ops, namespace), operator), name


def test_validation_and_copies() -> None:
    for section in (SELECTIVE, FULL):
        decoder = checkpointed(section)
        with torch.no_grad():
            wanted = make_decoder()(make_ids())
            assert torch.equal(decoder(make_ids()), wanted)
            other = copy.deepcopy(decoder)
            for parameter in decoder.parameters():
                parameter.zero_()
            assert torch.equal(other(make_ids()), wanted)


def shard_and_differentiate(world: World) -> list[tuple[str, bool, dict[str, Tensor]]]:
    """(mode, compiled, full gradients) of the decoder under FSDP2, which swaps the blocks' classes and swaps gathered
    weights in and out around them."""
    found = []
    mesh = init_device_mesh("cpu", (world.size,))
    for section, compiled in SHARDED:
        decoder = checkpointed(section)
        compile_layers(decoder.model.layers, CompileSection(enabled=compiled, backend="aot_eager"))
        scalars = {p for name, p in decoder.named_parameters() if "norm" in name or name.endswith("_alpha")}
        for block in decoder.model.layers:
            fully_shard(block, mesh=mesh, ignored_params=scalars)
        fully_shard(decoder, mesh=mesh, ignored_params=scalars)
        grads = gradients(decoder, make_ids())
        full = {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in grads.items()}
        found.append((section.mode, compiled, full))
    return found


def test_recomputation_finds_the_weights_that_fsdp_gathers() -> None:
    # All ranks see the same rows, so FSDP2's mean over the ranks is the gradient of one process.
    wanted = gradients(make_decoder(), make_ids())
    for rank in run_ranks(shard_and_differentiate, 2):
        assert len(rank) == len(SHARDED)
        for mode, compiled, found in rank:
            assert found.keys() == wanted.keys()
            for name, gradient in wanted.items():
                torch.testing.assert_close(
                    found[name], gradient, rtol=1e-10, atol=1e-12, msg=f"{mode} {compiled} {name}"
                )
