"""The global loader: the rows of each global batch, cut for one rank, read ahead in the background.

There is one order of rows for all ranks (`curriculum.plan`). A global batch of B rows goes to W ranks as
`tensor_split(B, W)`; every rank runs the same number of micro-batches, the missing rows filled with rows of zero
weight, so shapes are static. The loader has no state: it is built for a position, and a checkpoint stores that.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from titan_yulan.data import hashing
from titan_yulan.data.partition import micro_batches, rank_rows
from titan_yulan.data.tape import Tape
from titan_yulan.data.tensor_hashing import GOLDEN, POSITION, mix


class RowPlan(Protocol):
    """What the loader needs of a phase's plan."""

    @property
    def sequence_length(self) -> int: ...
    @property
    def batch_rows(self) -> int: ...
    @property
    def steps(self) -> int: ...
    @property
    def first_row(self) -> int: ...
    def rows(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]: ...


class Tapes(Protocol):
    """The tapes by source id; those of sources that no row reads may be missing."""

    def __getitem__(self, source: int, /) -> Tape: ...


@dataclass(frozen=True)
class Batch:
    """One micro-batch of rows; S is the sequence length.

    tokens        (rows, S + 1) int64
    document_ids  (rows, S + 1) int64, unique within a source's tape
    loss_mask     (rows, S + 1) bool, False where a token is not a target
    source        (rows,) int64, index into the plan's sources
    position      (rows,) int64, number of the row in the run
    weight        (rows,) float32, 0 for the rows that only fill up a micro-batch
    """

    tokens: Tensor
    document_ids: Tensor
    loss_mask: Tensor
    source: Tensor
    position: Tensor
    weight: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device, copied without blocking where the memory is pinned."""
        return Batch(**{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})

    def pin(self) -> Batch:
        return Batch(**{f.name: getattr(self, f.name).pin_memory() for f in fields(self)})


def read_rows(plan: RowPlan, tapes: Tapes, numbers: np.ndarray, size: int) -> Batch:
    """Read the rows `numbers` (consecutive, counted in the phase) and fill up with zero-weight rows to `size`."""
    length = plan.sequence_length + 1
    tokens, document_ids = np.empty((size, length), dtype=np.int64), np.empty((size, length), dtype=np.int64)
    tokens[len(numbers) :], document_ids[len(numbers) :] = 0, 0
    loss_mask = np.ones((size, length), dtype=np.bool_)
    source = np.zeros(size, dtype=np.int64)
    position = np.full(size, -1, dtype=np.int64)
    weight = np.zeros(size, dtype=np.float32)
    if len(numbers):
        ids, starts = plan.rows(int(numbers[0]), int(numbers[-1]) + 1)
        for rows, source_id, start in _stretches(ids, starts, plan.sequence_length):
            piece = tapes[source_id].read(start, len(rows) * plan.sequence_length + 1)
            for place, row in enumerate(rows):
                part = slice(place * plan.sequence_length, place * plan.sequence_length + length)
                tokens[row], document_ids[row] = piece.tokens[part], piece.document_ids[part]
                if piece.loss_mask is not None:
                    loss_mask[row] = piece.loss_mask[part]
        source[: len(numbers)] = ids
        position[: len(numbers)] = plan.first_row + numbers
        weight[: len(numbers)] = 1.0
    return Batch(*(torch.from_numpy(a) for a in (tokens, document_ids, loss_mask, source, position, weight)))


def _stretches(ids: np.ndarray, starts: np.ndarray, length: int) -> Iterator[tuple[list[int], int, int]]:
    """Rows that stand one behind the other on a tape, and so are read at once: (rows, source id, start of the first).
    Of each source a batch has mostly one such stretch."""
    rows: list[int] = []
    stretch = -1, -1
    for source, start, row in sorted(zip(ids.tolist(), starts.tolist(), range(len(ids)), strict=True)):
        if (source, start) != (stretch[0], stretch[1] + len(rows) * length):
            if rows:
                yield rows, stretch[0], stretch[1]
            rows, stretch = [], (source, start)
        rows.append(row)
    yield rows, stretch[0], stretch[1]


class Loader:
    """Iterates over the steps of a phase from `first_step` to `last_step` (None: its end); each item is this
    rank's micro-batches of one step, a list.

    `waited` is how many seconds the consumer waited for the last item. Close it (or use `with`) to end its thread.
    """

    def __init__(
        self,
        plan: RowPlan,
        tapes: Tapes,
        *,
        first_step: int,
        last_step: int | None = None,
        rank: int,
        world: int,
        micro_batch_size: int,
        prefetch: int,
        pin_memory: bool = False,
    ) -> None:
        self._plan, self._tapes, self._pin = plan, tapes, pin_memory
        self._micro_batch_size = micro_batch_size
        self._first_step = first_step
        self._last_step = plan.steps if last_step is None else last_step
        self._start, self._stop = rank_rows(plan.batch_rows, rank, world)
        self._micro_batches = micro_batches(plan.batch_rows, world, micro_batch_size)
        self.waited = 0.0
        self._steps = Prefetcher(self._read_steps(), prefetch)

    def _read_steps(self) -> Iterator[list[Batch]]:
        size = self._micro_batch_size
        for step in range(self._first_step, self._last_step):
            numbers = step * self._plan.batch_rows + np.arange(self._start, self._stop)
            batches = [
                read_rows(self._plan, self._tapes, numbers[i * size : (i + 1) * size], size)
                for i in range(self._micro_batches)
            ]
            yield [batch.pin() for batch in batches] if self._pin else batches

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        begin = time.perf_counter()
        try:
            return next(self._steps)
        finally:
            self.waited = time.perf_counter() - begin

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the background thread."""
        self._steps.close()


class Prefetcher:
    """Runs an iterator in a thread, at most `depth` items ahead; an exception there is raised at the consumer's turn.

    A thread is enough: reading a row is a copy out of a memory map, done by numpy outside the interpreter lock.
    """

    _END = object()

    def __init__(self, items: Iterator, depth: int) -> None:
        # two queues without a limit, which are one lock each in C, are faster than one with a limit in Python
        self._items: queue.SimpleQueue = queue.SimpleQueue()
        self._room: queue.SimpleQueue[None] = queue.SimpleQueue()  # an entry for each item that may be put
        for _ in range(depth):
            self._room.put(None)
        self._stopped = False
        self._thread = threading.Thread(target=self._run, args=(items,), name="loader", daemon=True)
        self._thread.start()

    def _run(self, items: Iterator) -> None:
        try:
            for item in items:
                self._room.get()
                if self._stopped:
                    return
                self._items.put(item)
            self._items.put(self._END)
        except BaseException as error:
            self._items.put(error)

    def __next__(self):
        item = self._items.get()
        if item is self._END or isinstance(item, BaseException):
            self._items.put(item)  # every later call ends the same way
            if isinstance(item, BaseException):
                raise item
            raise StopIteration
        self._room.put(None)
        return item

    def __iter__(self):
        return self

    def close(self) -> None:
        self._stopped = True
        self._room.put(None)
        self._thread.join()
        self._items.put(self._END)  # a consumer that still waits is told that this was all


def fingerprint(tokens: Tensor) -> Tensor:
    """`data.hashing.fingerprint` of a tensor, where it is: (rows, length) int64 -> (rows,) int64, the same 64 bits."""
    if tokens.device.type == "cpu":
        return torch.from_numpy(hashing.fingerprint(tokens.numpy()).view(np.int64))
    return fingerprint_on_device(tokens)


def fingerprint_on_device(tokens: Tensor) -> Tensor:
    """`fingerprint` by PyTorch's operators, for any device."""
    places = (torch.arange(tokens.shape[-1], device=tokens.device) + 1) * POSITION
    return mix(mix((tokens + 1) * GOLDEN + places).sum(-1))
