"""The loader against `datasets` and a torchdata StatefulDataLoader: the same tokens, rows and batches, in one run.

    python benchmarks/loader.py                        rows of 4,096 and of 28,672 tokens: about two minutes
    python benchmarks/loader.py --rounds 2 --tokens 8000000 --seconds 3

Three made-up sources (50, 30 and 20 % of the tokens, documents of 700, 1,500 and 300 tokens in the mean, vocabulary
99,000, shards of up to 10 million tokens) are written in our format. All rows of a pass over them, in the global order
of the mixture, are written once more as an Arrow table of lists (int32, 1,000 rows a batch), as `datasets` would hold
them after packing and mixing offline. All sides then read every row once a round, in batches, in turn. Ours mixes the
sources as it reads, gives every token the number of its document, and computes every row's fingerprint; theirs give
tokens alone, except in the lines of "the same work": there the numbers of the documents are a column, and the rows'
fingerprints are computed by our function. "First pass" is a new reader, which compares every shard's SHA-256 before it
uses it, as a run does; "later passes" has done so. Peers have no thread, and where batches are taken as fast as they
come, two threads of Python get into each other's way: so ours is also shown without. Peers read random rows, as a
sampler that shuffles asks for them, one at a time and stacked, or a batch at a time; and in stored order, where
nothing is left to mix and rows only have to be copied. The arrow format gives tables; where it says so they are made
into the int64 tensor that a model wants.

Then a consumer takes our batches at the pace of eight H100s with 28,700 tokens/s each, all rows in one process, and
sleeps in between; data wait is the share of the time that `Loader.waited` sums up, from the second step on.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measuring import Timing, best, head, in_turn, median, table
from titan_yulan.curriculum.mixture import Mixture
from titan_yulan.data import hashing
from titan_yulan.data.loader import Loader, fingerprint, read_rows
from titan_yulan.data.source import Source, describe_shard, write_description, write_shard
from titan_yulan.data.tape import Tape

VOCABULARY = 99_000
SHARD_TOKENS = 10_000_000
SOURCES = {"web": (0.5, 700), "books": (0.3, 1500), "chat": (0.2, 300)}  # share, mean tokens of a document
PACE = 8 * 28_700  # tokens a second
FIRST, LATER = "ours, first pass (hashes compared)", "ours, later passes"
ALONE = "ours, later passes, without the thread that reads ahead"
TORCH_ROW = "`datasets`, torch format, random rows, one at a time"
TORCH = "`datasets`, torch format, random rows, a batch at a time"
TORCH_STORED = "`datasets`, torch format, stored order, a batch at a time"
ARROW_ROW = "`datasets`, arrow format, random rows, one at a time, made tensors"
ARROW = "`datasets`, arrow format, random rows, a batch at a time, made tensors"
TORCH_SAME = "the same work: torch format, random rows, one at a time, numbers of documents, fingerprints"
ARROW_SAME = "the same work: arrow format, random rows, one at a time, numbers of documents, fingerprints"
BATCH_SAME = "the same work: torch format, random rows, a batch at a time, numbers of documents, fingerprints"
ARROW_TABLES = "`datasets`, arrow format, stored order, tables: no token is touched"
STATEFUL, STATEFUL_WORKERS = "StatefulDataLoader, random rows, no worker", "StatefulDataLoader, random rows, 2 workers"


@dataclass(frozen=True)
class RowOrder:
    """A phase of the three sources, as the loader wants it."""

    sequence_length: int
    batch_rows: int
    steps: int
    first_row: int = 0
    mixture: Mixture = field(
        default_factory=lambda: Mixture(
            [share for share, _ in SOURCES.values()], [hashing.key(0, "benchmark", name) for name in SOURCES]
        )
    )

    def rows(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        source, number = self.mixture.rows(start, stop)
        return source, number * self.sequence_length


def write_source(folder: Path, name: str, tokens: int, mean: int) -> Source:
    """Documents of log-normal lengths, random ids."""
    folder.mkdir()
    random, shards, left = np.random.default_rng(mean), 0, tokens
    while left > 0:
        lengths = np.clip(random.lognormal(np.log(mean) - 0.5, 1.0, SHARD_TOKENS // mean * 3), 2, 60_000).astype(int)
        ends = np.cumsum(lengths)
        ends = ends[: np.searchsorted(ends, min(left, SHARD_TOKENS)) + 1]
        ids = random.integers(0, VOCABULARY - 1, ends[-1]).astype(np.uint32)
        ids[ends - 1] = VOCABULARY - 1
        write_shard(folder, shards, {"tokens": ids, "offsets": np.concatenate(([0], ends)).astype(np.int64)})
        shards, left = shards + 1, left - int(ends[-1])
    described = tuple(describe_shard(folder, number, False) for number in range(shards))
    source = Source(
        folder, name, np.dtype(np.uint32), "", VOCABULARY, VOCABULARY - 1, False, False, 0, described, made_from={}
    )
    write_description(source)
    return Source.open(folder)


def write_arrow(folder: Path, order: RowOrder, sources: list[Source]) -> Any:
    """The rows of all steps as a folder of `datasets`, opened."""
    import datasets
    import pyarrow

    width, tapes = order.sequence_length + 1, [Tape(source, 0) for source in sources]
    batches = []

    def lists(parts: list[np.ndarray]) -> Any:
        values = pyarrow.array(np.concatenate(parts))
        offsets = pyarrow.array(np.arange(0, len(values) + 1, width, dtype=np.int32))
        return pyarrow.ListArray.from_arrays(offsets, values)

    for start in range(0, order.steps * order.batch_rows, 1000):
        rows = zip(*order.rows(start, min(start + 1000, order.steps * order.batch_rows)), strict=True)
        pieces = [tapes[source].read(int(place), width) for source, place in rows]
        columns = {
            "input_ids": lists([piece.tokens for piece in pieces]),
            "document_ids": lists([piece.document_ids for piece in pieces]),
        }
        batches.append(pyarrow.record_batch(columns))
    datasets.disable_progress_bars()
    datasets.Dataset(datasets.table.InMemoryTable(pyarrow.Table.from_batches(batches))).save_to_disk(str(folder))
    return datasets.load_from_disk(str(folder))


class Sides:
    """What is compared; each side goes through all batches of a pass once, and notes how long each took to come."""

    def __init__(self, order: RowOrder, sources: list[Source], folder: Path) -> None:
        self.order, self.sources = order, sources
        self.tapes = [Tape(source, 0) for source in sources]
        stored = write_arrow(folder, order, sources)
        self.torch, self.arrow = (stored.with_format(name, columns=["input_ids"]) for name in ("torch", "arrow"))
        self.torch_same, self.arrow_same = stored.with_format("torch"), stored.with_format("arrow")
        self.latencies: dict[str, list[float]] = {}

    def consume(self, name: str, batches: Iterable[Any], use: Callable[[Any], object]) -> None:
        found, size, rows = self.latencies.setdefault(name, []), self.order.batch_rows, 0
        begin = time.perf_counter()
        for batch in batches:
            use(batch)
            found.append(time.perf_counter() - begin)
            rows += size
            begin = time.perf_counter()
        if rows != self.order.steps * size:
            sys.exit(f"{name} gave {rows} rows instead of {self.order.steps * size}")

    def ours(self, tapes: list[Tape]) -> Iterator[Tensor]:
        with open_loader(self.order, tapes) as loader:
            for (batch,) in loader:
                fingerprint(batch.tokens)
                yield batch.tokens

    def alone(self) -> Iterator[Tensor]:
        size = self.order.batch_rows
        for start in range(0, self.order.steps * size, size):
            batch = read_rows(self.order, self.tapes, np.arange(start, start + size), size)
            fingerprint(batch.tokens)
            yield batch.tokens

    def stored(self, rows: Any) -> Iterator[Any]:
        size = self.order.batch_rows
        for start in range(0, self.order.steps * size, size):
            yield rows[start : start + size]

    def random(self) -> Iterator[list[int]]:
        size = self.order.batch_rows
        order = np.random.default_rng(0).permutation(self.order.steps * size)
        for start in range(0, len(order), size):
            yield order[start : start + size].tolist()

    def stateful(self, workers: int) -> Iterator[Any]:
        from torchdata.stateful_dataloader import StatefulDataLoader

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield from StatefulDataLoader(
                self.torch, self.order.batch_rows, shuffle=True, drop_last=True, num_workers=workers
            )

    def as_tensor(self, table: Any, name: str = "input_ids") -> Tensor:
        """(rows * (length + 1),) int64"""
        chunks = [chunk.flatten().to_numpy() for chunk in table[name].chunks]
        return torch.from_numpy(np.concatenate(chunks).astype(np.int64))

    def same_work(self, source: Any, take: Callable[[Any, str], Tensor]) -> Iterator[Tensor]:
        """Rows one at a time, stacked, with the numbers of their documents, and fingerprints."""
        for numbers in self.random():
            rows = [source[number] for number in numbers]
            tokens, documents = (
                torch.stack([take(row, name) for row in rows]) for name in ("input_ids", "document_ids")
            )
            fingerprint(tokens)
            self.check(documents)
            yield tokens

    def same_work_in_batches(self) -> Iterator[Tensor]:
        for numbers in self.random():
            batch = self.torch_same[numbers]
            tokens, documents = ids(batch), ids(batch, "document_ids")
            fingerprint(tokens)
            self.check(documents)
            yield tokens

    def check(self, batch: Any) -> None:
        wanted = (self.order.batch_rows, self.order.sequence_length + 1)
        if batch.shape != wanted or batch.dtype != torch.int64:
            sys.exit(f"{batch.shape} {batch.dtype} instead of {wanted} int64")

    def all(self) -> dict[str, Callable[[], None]]:
        wanted = (self.order.batch_rows, self.order.sequence_length + 1)
        arrow, tensors = self.arrow, self.torch
        makers: dict[str, Callable[[], Iterable[Any]]] = {
            FIRST: lambda: self.ours([Tape(source, 0) for source in self.sources]),
            LATER: lambda: self.ours(self.tapes),
            ALONE: self.alone,
            TORCH_ROW: lambda: (torch.stack([tensors[i]["input_ids"] for i in rows]) for rows in self.random()),
            TORCH: lambda: (ids(tensors[rows]) for rows in self.random()),
            TORCH_STORED: lambda: (ids(batch) for batch in self.stored(tensors)),
            ARROW_ROW: lambda: (torch.stack([self.as_tensor(arrow[i]) for i in rows]) for rows in self.random()),
            ARROW: lambda: (self.as_tensor(arrow[rows]).view(wanted) for rows in self.random()),
            STATEFUL: lambda: (ids(batch) for batch in self.stateful(0)),
            STATEFUL_WORKERS: lambda: (ids(batch) for batch in self.stateful(2)),
            TORCH_SAME: lambda: self.same_work(self.torch_same, lambda row, name: row[name]),
            ARROW_SAME: lambda: self.same_work(self.arrow_same, self.as_tensor),
            BATCH_SAME: self.same_work_in_batches,
        }
        sides = {
            name: lambda name=name, make=make: self.consume(name, make(), self.check) for name, make in makers.items()
        }
        return {**sides, ARROW_TABLES: lambda: self.consume(ARROW_TABLES, self.stored(arrow), len)}


def ids(batch: Any, name: str = "input_ids") -> Tensor:
    """A column is read when it is asked for; a tensor is there."""
    return batch[name][:]


def open_loader(order: RowOrder, tapes: list[Tape]) -> Loader:
    return Loader(order, tapes, first_step=0, rank=0, world=1, micro_batch_size=order.batch_rows, prefetch=2)


def check_same_tokens(sides: Sides) -> None:
    ours = next(iter(sides.ours(sides.tapes)))
    theirs = next(sides.stored(sides.torch))["input_ids"][:]
    if not torch.equal(ours, theirs):
        sys.exit("the sides do not read the same tokens")


def report(sides: Sides, found: dict[str, list[Timing]], csv_file: Path | None) -> str:
    """Rows a second (medians of the rounds), latencies of a batch, and how much faster ours is."""
    rows = sides.order.steps * sides.order.batch_rows
    reference = median(found[LATER])
    lines = []
    for name, timings in found.items():
        middle, fastest = median(timings), best(timings)
        latencies = sorted(sides.latencies[name])
        late = latencies[int(len(latencies) * 0.99)]
        lines.append(
            [
                name,
                f"{rows / middle.seconds:,.0f}",
                f"{rows / fastest.seconds:,.0f}",
                f"{rows / middle.processor:,.0f}",
                f"{1e3 * statistics.median(latencies):.2f}",
                f"{1e3 * late:.2f}",
                f"{middle.seconds / reference.seconds:.2f}",
                f"{middle.processor / reference.processor:.2f}",
            ]
        )
    columns = [
        f"{sides.order.batch_rows} rows of {sides.order.sequence_length:,} tokens",
        "rows/s",
        "rows/s, best round",
        "rows per processor second",
        "batch, ms",
        "99 %, ms",
        "time / ours later",
        "processor / ours later",
    ]
    return table(columns, lines, csv_file)


def data_wait(order: RowOrder, sources: list[Source], seconds: float) -> str:
    """Take batches at the pace of eight H100s for `seconds`."""
    interval = order.batch_rows * order.sequence_length / PACE
    with open_loader(order, [Tape(source, 0) for source in sources]) as loader:
        begin = time.perf_counter()
        (batch,) = next(loader)
        first, waited, steps = time.perf_counter() - begin, 0.0, 0
        begin, processor = time.perf_counter(), time.process_time()
        while (due := begin + steps * interval) < begin + seconds:
            time.sleep(max(0.0, due - time.perf_counter()))
            fingerprint(batch.tokens)
            (batch,) = next(loader)
            waited, steps = waited + loader.waited, steps + 1
        elapsed, used = time.perf_counter() - begin, time.process_time() - processor
    return (
        f"At {PACE:,} tokens/s ({steps} steps of {order.batch_rows} x {order.sequence_length:,} in {elapsed:.1f} s): "
        f"data wait {100 * waited / elapsed:.3f} %, one core busy {100 * used / elapsed:.2f} % of the time; "
        f"the first step came after {first:.2f} s."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--tokens", type=int, default=24_000_000, help="of all sources (default 24,000,000)")
    parser.add_argument("--rounds", type=int, default=5, help="default 5")
    parser.add_argument("--seconds", type=float, default=8, help="of taking batches at the pace of eight H100s")
    parser.add_argument("--csv", type=Path, help="append the tables to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    # as in any process that has built a model: once a large block was freed, glibc keeps memory of this size for itself
    # instead of asking the system for every batch anew
    large = np.empty(30_000_000, np.uint8)
    del large
    os.environ["HF_HUB_OFFLINE"] = "1"
    print(head("torch", "numpy", "datasets", "pyarrow", "torchdata"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources = [
            write_source(folder / source, source, int(share * options.tokens) + 100_000, mean)
            for source, (share, mean) in SOURCES.items()
        ]
        for length, batch_rows in ((4096, 16), (28_672, 4)):
            order = RowOrder(length, batch_rows, options.tokens // (length * batch_rows))
            sides = Sides(order, sources, folder / f"rows-{length}")
            check_same_tokens(sides)
            found = in_turn(sides.all(), options.rounds)
            print(f"{report(sides, found, options.csv)}\n")
            print(f"{data_wait(order, sources, options.seconds)}\n", flush=True)


if __name__ == "__main__":
    main()
