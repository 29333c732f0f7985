"""Cross-entropy of rows whose columns, the vocabulary, are spread over the ranks of a process group.

Every rank reads its own columns of a row and finds loss, m and s as if they were all (kernels/cross_entropy.py). One
all-gather of these three numbers a row then gives every rank the row's true ones, from which it makes the gradient of
its own columns:

    M = max_r m_r        S = sum_r s_r * exp(m_r - M)
    loss = loss_k + (log(S) - log(s_k)) + (M - m_k)         on the rank k that has the target's column

Of large numbers only the maxima are subtracted, which carry no rounding of their own. Every rank combines the same
numbers in the order of the ranks: the results are equal bit by bit on all of them. In float32 a rank receives 12 bytes
a row from each other, with one collective; the usual three (Megatron-LM, arXiv 1909.08053, section 3: all-reduces of
the maximum, the sum and the target's logit) wait for the network three times to move no less where there are 2 ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from titan_yulan.kernels.cross_entropy import forward_rows, gradient_rows


@dataclass(frozen=True)
class Shard:
    """The columns of the logits, which are rows of the head, that this rank of a group has."""

    group: torch.distributed.ProcessGroup
    ranks: int
    columns: range
    largest: int  # columns of any rank


def largest_shard(vocabulary_size: int, ranks: int) -> int:
    """Rows of the head on each of the first ranks; the last ones may have fewer or none."""
    return (vocabulary_size + ranks - 1) // ranks


def shard_of(vocabulary_size: int, group_name: str, rows: int) -> Shard:
    """This rank's shard of a head that is cut as DTensor's Shard(0) and torch.chunk do.

    Raises:
        ValueError: this rank has another number of `rows` than such a shard.
    """
    from torch.distributed.distributed_c10d import _resolve_process_group

    group = _resolve_process_group(group_name)  # type: ignore[arg-type]  # a GroupName is a str
    rank, ranks = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
    largest = largest_shard(vocabulary_size, ranks)
    columns = range(min(rank * largest, vocabulary_size), min((rank + 1) * largest, vocabulary_size))
    if len(columns) != rows:
        raise ValueError(
            f"weight has {rows} rows on rank {rank} of the group; a vocabulary of {vocabulary_size} cut over {ranks} "
            f"ranks has {len(columns)} there (rows {columns.start} to {columns.stop})"
        )
    return Shard(group, ranks, columns, largest)


def sharded_rows(
    logits: Tensor,
    shard: Shard,
    targets: Tensor,
    factors: Tensor,
    z_weight: float,
    statistics: Tensor,
    need_gradient: bool,
    use_triton: bool,
) -> Tensor:
    """Fill `statistics` (3, rows) with those of whole rows; return the gradient of the shard's columns.

    `logits` is (rows, width) with width >= the shard's columns; Triton writes the gradient over it. `targets` count the
    columns of whole rows; one that no rank has makes the loss infinite. A gradient not needed has no columns. A
    collective call, also of an empty shard.
    """
    start, columns = shard.columns.start, len(shard.columns)
    here = (targets >= start) & (targets < shard.columns.stop)
    own = logits.new_empty(statistics.shape, dtype=statistics.dtype)
    if columns:
        # A target elsewhere becomes any column: its loss is not used.
        forward_rows(logits, columns, torch.where(here, targets - start, 0), factors, own, use_triton)
        own[0].masked_fill_(~here, torch.inf)
    else:
        own[0], own[1], own[2] = torch.inf, -torch.inf, 0
    parts = own.new_empty((shard.ranks, *own.shape))
    torch.distributed.all_gather(list(parts.unbind()), own, group=shard.group)
    statistics.copy_(combine(parts, factors == 0))
    if not need_gradient or not columns:
        return logits[:, :0]
    targets = torch.where(here, targets - start, -1)
    return gradient_rows(logits, columns, targets, factors, z_weight, statistics, use_triton)


def combine(parts: Tensor, dead: Tensor) -> Tensor:
    """Loss, m and s of whole rows, (3, rows), from those of each rank's columns, (ranks, 3, rows).

    A rank that does not have a row's target gives inf as its loss, one without columns inf, -inf and 0. Rows of which
    nothing counts, where `dead` (rows,) is true, get 0, 0 and 1.
    """
    losses, maxima, sums = parts.unbind(1)
    maximum = maxima.amax(0)
    total = (sums * (maxima - maximum).exp()).sum(0)
    loss = (losses + (total.log() - sums.log()) + (maximum - maxima)).amin(0)
    return torch.stack([loss.masked_fill(dead, 0), maximum.masked_fill(dead, 0), total.masked_fill(dead, 1)])
