"""Context-parallel attention on 2, 3 and 4 ranks against attention over the whole row, forward and backward."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.distributed.ranks import run_ranks
from titan_yulan.parallel.context import (
    _flash_prefix,
    attend_context,
    join_sequence,
    slice_document_mask,
    slice_positions,
    slice_sequence,
)
from titan_yulan.parallel.process import World

SIZES = (2, 3, 4)
BATCH, LENGTH, HEADS, GROUPS, WIDTH = 2, 24, 6, 2, 4
SCALE = 0.7  # not 1 / sqrt(WIDTH)
KINDS = ("causal", "bidirectional", "causal documents", "bidirectional documents")


def inputs() -> tuple[Tensor, ...]:
    """Query, key, value of the whole row, and the gradient of the output."""
    generator = torch.Generator().manual_seed(7)
    shapes = [(BATCH, LENGTH, heads, WIDTH) for heads in (HEADS, GROUPS, GROUPS, HEADS)]
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


def document_ids() -> Tensor:
    """Documents that begin inside chunks and at their borders, and one of a single token."""
    lengths = ((5, 1, 6, 12), (24,))
    return torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths])


def allowed(kind: str) -> Tensor:
    """(batch, 1, seq, seq): who may see whom, by definition."""
    ids, places = document_ids(), torch.arange(LENGTH)
    seen = torch.ones(BATCH, 1, LENGTH, LENGTH, dtype=torch.bool)
    if "documents" in kind:
        seen &= (ids[:, :, None] == ids[:, None, :])[:, None]
    if "causal" in kind:
        seen &= places[:, None] >= places
    return seen


def whole_attention(query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
    key, value = (x.repeat_interleave(HEADS // GROUPS, dim=2) for x in (key, value))
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * SCALE
    weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, value)


def one_rank(group: dist.ProcessGroup, kind: str, how: str) -> list[Tensor]:
    """This rank's slices of the output and of the three gradients."""
    rank, size = group.rank(), group.size()
    query, key, value, gradient = (slice_sequence(x, rank, size, dim=1) for x in inputs())
    leaves = [x.requires_grad_() for x in (query, key, value)]
    mask = slice_document_mask(document_ids(), "causal" in kind, rank, size) if "documents" in kind else None

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend_context(query, key, value, SCALE, group, causal="causal" in kind, mask=mask)

    if how == "compiled":
        output = torch.compile(attend, backend="aot_eager", fullgraph=True)(*leaves)
    elif how == "recomputed":
        output = checkpoint(attend, *leaves, use_reentrant=False)
    else:
        output = attend(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, gradient)]


def attend_everywhere(world: World) -> dict[Any, list[Tensor]]:
    found = {}
    for size in SIZES:
        group = dist.new_group(range(size))
        if not isinstance(group, dist.ProcessGroup) or world.rank >= size:
            continue
        for kind in KINDS:
            found[size, kind, "eager"] = one_rank(group, kind, "eager")
        for how in ("compiled", "recomputed"):
            if size == 2:
                found[size, "causal", how] = one_rank(group, "causal", how)
                found[size, "causal documents", how] = one_rank(group, "causal documents", how)
    return found


@pytest.fixture(scope="module")
def found() -> list[dict[Any, list[Tensor]]]:
    return run_ranks(attend_everywhere, max(SIZES))


CASES = [(size, kind, "eager") for size in SIZES for kind in KINDS]
CASES += [(2, kind, how) for kind in ("causal", "causal documents") for how in ("compiled", "recomputed")]


@pytest.mark.parametrize(("size", "kind", "how"), CASES)
def test_equal_to_attention_over_the_whole_row(found: list[Any], size: int, kind: str, how: str) -> None:
    query, key, value, gradient = inputs()
    leaves = [x.requires_grad_() for x in (query, key, value)]
    output = whole_attention(query, key, value, allowed(kind))
    expected = [output.detach(), *torch.autograd.grad(output, leaves, gradient)]
    for i, (name, tensor) in enumerate(zip(("output", "query", "key", "value"), expected, strict=True)):
        joined = join_sequence([found[rank][size, kind, how][i] for rank in range(size)], dim=1)
        torch.testing.assert_close(
            joined, tensor, rtol=1e-12, atol=1e-13, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_every_rank_holds_a_chunk_from_the_start_and_its_mirror_from_the_end() -> None:
    assert [slice_positions(12, rank, 3).tolist() for rank in range(3)] == [[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]]
    assert slice_positions(5, 0, 1).tolist() == [0, 1, 2, 3, 4]


@given(size=st.integers(1, 9), length=st.integers(1, 4), dim=st.integers(0, 2))
def test_slices_join_to_the_whole_and_causal_work_is_equal(size: int, length: int, dim: int) -> None:
    total = 2 * size * length
    shape = [2, 3]
    shape.insert(dim, total)
    whole = torch.arange(6 * total).view(shape)
    slices = [slice_sequence(whole, rank, size, dim) for rank in range(size)]
    assert torch.equal(join_sequence(slices, dim), whole)
    work = {int((slice_positions(total, rank, size) + 1).sum()) for rank in range(size)}
    assert len(work) == 1


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("size", (1, *SIZES))
def test_document_mask_is_the_own_rows_of_the_whole_mask(size: int, causal: bool) -> None:
    whole = allowed("causal documents" if causal else "bidirectional documents")
    for rank in range(size):
        own = slice_document_mask(document_ids(), causal, rank, size)
        assert torch.equal(own, slice_sequence(whole, rank, size, dim=2))


def test_the_gpu_kernel_takes_a_longer_prefix_and_grouped_heads() -> None:
    """Shapes only: the operator is not public, and this shows a PyTorch in which its signature has changed."""
    shapes = [(BATCH, heads, length, 8) for heads, length in ((HEADS, 4), (GROUPS, 12), (GROUPS, 12))]
    leaves = [torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True) for shape in shapes]
    output = _flash_prefix(*leaves, scale=SCALE)
    assert output.shape == shapes[0]
    assert [x.shape for x in torch.autograd.grad(output.sum(), leaves)] == shapes
