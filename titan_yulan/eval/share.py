"""The work of an evaluation over the ranks.

The batches are made before they are shared out, batch i to rank i mod ranks: what is computed in one batch, and so
every result to the last bit, is the same for any number of ranks. All ranks run equally many batches (the last ones
may be thrown away), so that they can share the model too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """One rank's part.

    group: of all ranks, for messages between hosts; None: there is one. It has more than `size` ranks where some hold
        parts of one model: they have the same number here, do the same batches and get the same results.
    together: the ranks hold parts of one model, and so must run equally many forward passes.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    together: bool = False

    def run(self, batches: Sequence[T], work: Callable[[T], dict[int, Any]]) -> dict[int, Any]:
        """The results of all batches, by whatever number `work` gives them; on all ranks."""
        mine: dict[int, Any] = {}
        for first in range(0, len(batches), self.size):
            place = first + self.rank
            results = work(batches[min(place, len(batches) - 1)])
            if place < len(batches):
                mine |= results
        return self.merge(mine)

    def merge(self, mine: dict[Any, Any]) -> dict[Any, Any]:
        """The parts of all ranks together."""
        if self.group is None:
            return mine
        parts: list[dict[Any, Any]] = [{} for _ in range(self.group.size())]
        dist.all_gather_object(parts, mine, group=self.group)
        return {key: value for part in parts for key, value in part.items()}

    def goes_on(self, here: bool) -> bool:
        """Whether there must be one more forward pass: for this rank, or for another that it holds the model with."""
        if self.group is None or not self.together:
            return here
        anywhere = torch.tensor(int(here))
        dist.all_reduce(anywhere, dist.ReduceOp.MAX, group=self.group)
        return bool(anywhere)
