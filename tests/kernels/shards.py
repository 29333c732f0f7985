"""All shards of a vocabulary in one process, without ranks: what each would hand the others is passed by hand."""

from __future__ import annotations

import itertools
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from titan_yulan.kernels.vocabulary_parallel import Shard, largest_shard, sharded_rows


def shards(vocab: int, ranks: int) -> list[Shard]:
    largest = largest_shard(vocab, ranks)
    starts = [min(rank * largest, vocab) for rank in range(ranks + 1)]
    group: Any = None
    return [Shard(group, ranks, range(*pair), largest) for pair in itertools.pairwise(starts)]


def padded(logits: Tensor, shard: Shard) -> Tensor:
    """This shard's columns in rows that begin 64 elements apart, with NaN behind them."""
    columns = len(shard.columns)
    buffer = logits.new_full((logits.shape[0], -(-columns // 64) * 64), torch.nan)
    buffer[:, :columns] = logits[:, shard.columns.start : shard.columns.stop]
    return buffer


def all_shards(
    logits: Tensor, ranks: int, targets: Tensor, factors: Tensor, z_weight: float, use_triton: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """`sharded_rows` of every rank: the (3, rows) statistics that each finds, and the gradients of their columns."""
    sent: list[Tensor] = []
    cut = shards(logits.shape[1], ranks)

    def record(parts: list[Tensor], own: Tensor, group: Any) -> None:
        sent.append(own.clone())
        torch._foreach_copy_(parts, [own] * ranks)

    def give(parts: list[Tensor], own: Tensor, group: Any) -> None:
        torch._foreach_copy_(parts, sent)

    statistics, gradients = [], []
    compute = torch.promote_types(logits.dtype, torch.float32)
    for answer in (record, give):
        statistics, gradients = [], []
        with mock.patch("torch.distributed.all_gather", answer):
            for shard in cut:
                whole = torch.full((3, logits.shape[0]), torch.nan, dtype=compute, device=logits.device)
                buffer = padded(logits.detach(), shard)
                rows = (targets, factors, z_weight, whole)
                gradient = sharded_rows(buffer, shard, *rows, need_gradient=answer is give, use_triton=use_triton)
                statistics.append(whole)
                gradients.append(gradient)
    assert len(sent) == ranks
    return statistics, gradients
