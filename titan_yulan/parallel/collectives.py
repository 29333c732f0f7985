"""Gathering a sequence that is spread over a group of ranks, and its transpose, as differentiable functions.

Both call the operators below `torch.distributed._functional_collectives` directly and wait at once. The wrappers there
return an AsyncCollectiveTensor in eager mode, which `torch.compile` rejects in the backward pass when it is an input of
a compiled block (seen with PyTorch 2.13); here only plain tensors come out. The operators are traceable (fullgraph) and
visible to selective activation checkpointing as `torch.ops._c10d_functional.all_gather_into_tensor` and
`.reduce_scatter_tensor`; a checkpointed region runs them again in backward, on all ranks in the same order.

The collectives work on dimension 0. Along another one the whole sequence is copied once per call, except where all
dimensions before it have size 1 (one row per micro-batch), when it is a view. A (sequence, batch, hidden) layout would
save that copy at the price of an unusual layout everywhere else.

Sums are made in the tensors' own type: 16-bit reduce-scatters round at every addition, as in Megatron-LM. Over the few
ranks of a tensor- or context-parallel group that is the rounding of a few more 16-bit additions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather_sequence(x: Tensor, group: dist.ProcessGroup | None, dim: int) -> Tensor:
    """All ranks' parts, concatenated along `dim` in rank order; backward sums the gradients and keeps this rank's part.

    The operator g of Megatron-LM's sequence parallelism (arXiv 2205.05198, section 4.2.2).

    Args:
        x: of the same shape on every rank.
        group: None or a group of one rank: x itself comes back.
        dim: not negative.

    Returns:
        x's shape with `dim` times as long as the group is large.
    """
    if group is None or group.size() == 1:
        return x
    return _Gather.apply(x, dim, group.size(), group.group_name)


def reduce_scatter_sequence(x: Tensor, group: dist.ProcessGroup | None, dim: int) -> Tensor:
    """The sum of all ranks' tensors, of which each rank gets its part along `dim`; backward gathers.

    The transpose of `gather_sequence`, g-bar in the same paper.

    Args:
        x: of the same shape on every rank; the group's size divides its length along `dim`.
        group: None or a group of one rank: x itself comes back.
        dim: not negative.
    """
    if group is None or group.size() == 1:
        return x
    return _ReduceScatter.apply(x, dim, group.size(), group.group_name)


def _gather(x: Tensor, dim: int, size: int, group_name: str) -> Tensor:
    operators = torch.ops._c10d_functional
    gathered = operators.wait_tensor(operators.all_gather_into_tensor(x.contiguous(), size, group_name))
    if dim == 0:
        return gathered
    return gathered.unflatten(0, (size, x.shape[0])).movedim(0, dim).flatten(dim, dim + 1)


def _reduce_scatter(x: Tensor, dim: int, size: int, group_name: str) -> Tensor:
    operators = torch.ops._c10d_functional
    if x.shape[dim] % size:
        raise ValueError(f"dimension {dim} of {tuple(x.shape)} cannot be scattered over {size} ranks")
    if dim != 0:
        x = x.unflatten(dim, (size, x.shape[dim] // size)).movedim(dim, 0).flatten(0, 1)
    return operators.wait_tensor(operators.reduce_scatter_tensor(x.contiguous(), "sum", size, group_name))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, size: int, group_name: str) -> Tensor:
        ctx.arguments = dim, size, group_name
        return _gather(x, dim, size, group_name)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _reduce_scatter(gradients[0], *ctx.arguments), None, None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, size: int, group_name: str) -> Tensor:
        ctx.arguments = dim, size, group_name
        return _reduce_scatter(x, dim, size, group_name)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _gather(gradients[0], *ctx.arguments), None, None, None
