"""Gather and reduce-scatter along a sequence against their definition, eager, compiled and recomputed, on two ranks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tests.distributed.ranks import run_ranks
from titan_yulan.parallel.collectives import gather_sequence, reduce_scatter_sequence
from titan_yulan.parallel.process import World

SIZE = 2
SHAPES = {0: (3, 2, 4), 1: (2, 3, 4), 2: (2, 4, 3)}  # by dimension; 3 is odd on purpose: it is what one rank holds


def tensor_of(rank: int, shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * seed + rank)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def long(shape: tuple[int, ...], dim: int) -> tuple[int, ...]:
    return (*shape[:dim], SIZE * shape[dim], *shape[dim + 1 :])


def block(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Both collectives with products between them, as around a layer."""
    return reduce_scatter_sequence((gather_sequence(x.sin(), group, 1) * x.cos().mean()).tanh() * 3, group, 1).exp()


def keep_reductions(ctx: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = operator is torch.ops._c10d_functional.reduce_scatter_tensor.default
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def selective(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    contexts = partial(create_selective_checkpoint_contexts, keep_reductions)
    return checkpoint(block, x, group, use_reentrant=False, context_fn=contexts)


def wrapped(group: dist.ProcessGroup) -> dict[str, Callable[[Tensor], Tensor]]:
    def compiled(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return torch.compile(function, backend="aot_eager", fullgraph=True)

    def recomputed(x: Tensor) -> Tensor:
        return checkpoint(block, x, group, use_reentrant=False)

    return {
        "eager": lambda x: block(x, group),
        "compiled": compiled(lambda x: block(x, group)),
        "recomputed": recomputed,
        "compiled and recomputed": compiled(recomputed),
        "selectively recomputed": lambda x: selective(x, group),
        "compiled and selectively recomputed": compiled(lambda x: selective(x, group)),
        # the output of one is the input of the other graph: no wrapper around tensors may come out of the first
        "eager before compiled": lambda x: compiled(lambda y: block(y, group))(gather_sequence(x, group, 1)),
    }


def collect(world: World) -> dict[Any, Any]:
    group = dist.group.WORLD
    assert group is not None
    found: dict[Any, Any] = {}
    for dim, shape in SHAPES.items():
        x = tensor_of(world.rank, shape, 1).requires_grad_()
        y = gather_sequence(x, group, dim)
        y.backward(tensor_of(world.rank, long(shape, dim), 2))
        found["gather", dim] = y.detach(), x.grad
        x = tensor_of(world.rank, long(shape, dim), 3).requires_grad_()
        y = reduce_scatter_sequence(x, group, dim)
        y.backward(tensor_of(world.rank, shape, 4))
        found["scatter", dim] = y.detach(), x.grad
    for name, function in wrapped(group).items():
        x = tensor_of(world.rank, (2, 4, 4), 5).requires_grad_()
        y = function(x)
        y.square().sum().backward()
        found[name] = y.detach(), x.grad, type(y) is Tensor
    half = tensor_of(world.rank, (1, 2, 3), 6).bfloat16()
    found["bfloat16"] = gather_sequence(half, group, 1), reduce_scatter_sequence(half, group, 1)
    return found


@pytest.fixture(scope="module")
def found() -> list[dict[Any, Any]]:
    return run_ranks(collect, SIZE)


@pytest.mark.parametrize("dim", SHAPES)
def test_gather_concatenates_and_its_gradient_is_the_sum_of_this_part(found: list[dict[Any, Any]], dim: int) -> None:
    shape = SHAPES[dim]
    whole = torch.cat([tensor_of(rank, shape, 1) for rank in range(SIZE)], dim)
    summed = torch.stack([tensor_of(rank, long(shape, dim), 2) for rank in range(SIZE)]).sum(0)
    for rank in range(SIZE):
        value, gradient = found[rank]["gather", dim]
        torch.testing.assert_close(value, whole, rtol=0, atol=0)
        torch.testing.assert_close(gradient, summed.chunk(SIZE, dim)[rank], rtol=0, atol=1e-14)


@pytest.mark.parametrize("dim", SHAPES)
def test_reduce_scatter_is_the_transpose(found: list[dict[Any, Any]], dim: int) -> None:
    shape = SHAPES[dim]
    summed = torch.stack([tensor_of(rank, long(shape, dim), 3) for rank in range(SIZE)]).sum(0)
    whole = torch.cat([tensor_of(rank, shape, 4) for rank in range(SIZE)], dim)
    for rank in range(SIZE):
        value, gradient = found[rank]["scatter", dim]
        torch.testing.assert_close(value, summed.chunk(SIZE, dim)[rank], rtol=0, atol=1e-14)
        torch.testing.assert_close(gradient, whole, rtol=0, atol=0)


def simulated_block(parts: list[Tensor]) -> list[Tensor]:
    """`block` of all ranks in one process."""
    whole = torch.cat([x.sin() for x in parts], 1)
    summed = torch.stack([(whole * x.cos().mean()).tanh() * 3 for x in parts]).sum(0)
    return [part.exp() for part in summed.chunk(SIZE, 1)]


@pytest.mark.parametrize(
    "name",
    [
        "eager",
        "compiled",
        "recomputed",
        "compiled and recomputed",
        "selectively recomputed",
        "compiled and selectively recomputed",
    ],
)
def test_a_layer_between_them_is_the_same_however_it_runs(found: list[dict[Any, Any]], name: str) -> None:
    inputs = [tensor_of(rank, (2, 4, 4), 5).requires_grad_() for rank in range(SIZE)]
    outputs = simulated_block(inputs)
    torch.stack([y.square().sum() for y in outputs]).sum().backward()
    for rank in range(SIZE):
        value, gradient, plain = found[rank][name]
        assert plain
        torch.testing.assert_close(value, outputs[rank].detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradient, inputs[rank].grad, rtol=1e-12, atol=1e-12)


def test_a_compiled_block_takes_what_an_eager_collective_gives(found: list[dict[Any, Any]]) -> None:
    inputs = [tensor_of(rank, (2, 4, 4), 5).requires_grad_() for rank in range(SIZE)]
    whole = [torch.cat(inputs, 1) for _ in range(SIZE)]
    outputs = simulated_block(whole)
    torch.stack([y.square().sum() for y in outputs]).sum().backward()
    for rank in range(SIZE):
        value, gradient, plain = found[rank]["eager before compiled"]
        assert plain
        torch.testing.assert_close(value, outputs[rank].detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradient, inputs[rank].grad, rtol=1e-12, atol=1e-12)


def test_16_bit_tensors_stay_so(found: list[dict[Any, Any]]) -> None:
    parts = [tensor_of(rank, (1, 2, 3), 6).bfloat16() for rank in range(SIZE)]
    for rank in range(SIZE):
        gathered, reduced = found[rank]["bfloat16"]
        torch.testing.assert_close(gathered, torch.cat(parts, 1), rtol=0, atol=0)
        torch.testing.assert_close(reduced, (parts[0] + parts[1])[:, rank : rank + 1], rtol=0, atol=0)


def test_alone_nothing_happens() -> None:
    x = torch.ones(2, 3)
    assert gather_sequence(x, None, 1) is x and reduce_scatter_sequence(x, None, 1) is x
