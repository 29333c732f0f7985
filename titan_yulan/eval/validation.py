"""Validation loss per source, over the first rows of each held-out part."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from titan_yulan.data.loader import Tapes, read_rows
from titan_yulan.data.partition import micro_batches, rank_rows
from titan_yulan.data.source import Source
from titan_yulan.data.tape import Tape
from titan_yulan.model import Decoder
from titan_yulan.objective.forward import forward
from titan_yulan.objective.objective import Objective
from titan_yulan.parallel.mesh import Mesh


def held_out_tape(path: str) -> Tape:
    """A held-out part; shuffled, or the first rows of one sorted by perplexity would be its easiest documents."""
    return Tape(Source.open(Path(path)), seed=0, shuffle=True)


class HeldOutRows:
    """The first `rows` rows of each held-out source, one source after the other, as the loader wants them."""

    steps, first_row = 1, 0

    def __init__(self, tapes: dict[int, Tape], rows: int, sequence_length: int) -> None:
        """`tapes`: held-out tape by source id. A source too short for `rows` rows gives what it has."""
        self.sequence_length = sequence_length
        counts = {source: min(rows, (tape.length - 1) // sequence_length) for source, tape in tapes.items()}
        self._source = np.repeat(list(counts), list(counts.values())).astype(np.int64)
        starts = [np.arange(n, dtype=np.int64) * sequence_length for n in counts.values()]
        self._start = np.concatenate(starts) if starts else np.zeros(0, dtype=np.int64)

    @property
    def batch_rows(self) -> int:
        return len(self._source)

    def rows(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        return self._source[start:stop], self._start[start:stop]


@torch.no_grad()
def validation_loss(
    decoder: Decoder,
    objective: Objective,
    held_out: HeldOutRows,
    tapes: Tapes,
    sources: int,
    micro_batch_size: int,
    mesh: Mesh,
    device: torch.device,
    between: Callable[[str], None],
) -> tuple[Tensor, Tensor]:
    """Sum of cross-entropy and number of tokens per source over all ranks: two tensors (sources,).

    Args:
        tapes: the held-out tapes, by source id.
        sources: number of sources.
        between: called before every micro-batch, on all ranks alike; may raise to end the evaluation.
    """
    start, stop = rank_rows(held_out.batch_rows, mesh.data_rank, mesh.data_size)
    numbers = np.arange(start, stop)
    sums = torch.zeros(2, sources, dtype=torch.float64, device=device)
    for i in range(micro_batches(held_out.batch_rows, mesh.data_size, micro_batch_size)):
        between("validation")
        part = numbers[i * micro_batch_size : (i + 1) * micro_batch_size]
        batch = read_rows(held_out, tapes, part, micro_batch_size).to(device)
        for sample in range(objective.validation_samples):
            loss = forward(decoder, objective, objective.validation_inputs(batch, sample))
            sums += torch.stack([loss.cross_entropy, loss.tokens])
    dist.all_reduce(sums, group=mesh.loss_group)
    return sums[0], sums[1]
