"""Which document goes where: filters over the whole input, division by value, order, and the cut into shards.

The documents of one destination (training or validation part, and the value of a split-by column) go to shards in one
of two ways. Shuffled: document n of the destination goes to bucket `bits(n) mod number of buckets`, and stands inside
its bucket by a second hash of n; every bucket that got a document becomes a shard. In order: documents are laid one
after the other, as in the input or by a column, and each goes to the shard in which its first token falls.

The result is a file with one `PLACE` record a document, the records of a shard side by side, so that a worker reads
just those of its shard. It is filled by a counting sort in two passes over the units: memory is that of one unit, plus,
where they are asked for, bytes for each document of the whole input: 25 to find duplicates (hashes, their order, what
stays), 45 to sort by a number (key, length, destination, order, start), 100 by a string.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from titan_yulan.data import hashing
from titan_yulan.data.limit import documents_within
from titan_yulan.data.request import Recipe
from titan_yulan.data.unit import STRING, STRING_BYTES, UnitCounts, check_values, read_records, unit_folder
from titan_yulan.errors import UserError

# One document: its unit, its first token there, its tokens, and what sorts the documents of a shard.
PLACE = np.dtype([("unit", "<u4"), ("start", "<i8"), ("length", "<i8"), ("order", "<u8")])
_DIRTY = 2**18  # documents whose places may be in memory


@dataclass(frozen=True)
class Units:
    """All tokenised units of a request; unit u is in folder u modulo their number (one folder for each part)."""

    recipe: Recipe
    folders: tuple[Path, ...]
    counts: Sequence[UnitCounts]

    def folder(self, unit: int) -> Path:
        return unit_folder(self.folders[unit % len(self.folders)], unit)

    def records(self, unit: int) -> np.ndarray:
        """(documents,) records of `unit.document_dtype`."""
        return read_records(self.folder(unit), self.recipe, self.counts[unit])

    @property
    def documents(self) -> int:
        return sum(sum(counts.documents) for counts in self.counts)


@dataclass(frozen=True)
class Destination:
    """One source to be written: a side, perhaps one value of the split-by column, and what it will hold."""

    validation: bool
    value: str  # "" without a split
    documents: int
    tokens: int
    text_bytes: int
    shards: tuple[tuple[int, int], ...]  # first place and number of places of each


@dataclass(frozen=True)
class Arrangement:
    """Where everything goes. Destinations without documents are left out."""

    destinations: tuple[Destination, ...]
    duplicates: int
    units: int  # that documents come from, from the first on: all, or those before a limit


@dataclass(frozen=True)
class _UnitDocuments:
    """Columns of the documents of one unit that stay, in input order."""

    unit: int
    ordinals: np.ndarray  # in the whole input
    records: np.ndarray
    starts: np.ndarray  # in the unit's tokens
    destinations: np.ndarray


_Bucketed = tuple[_UnitDocuments, np.ndarray, np.ndarray]


class _Layout:
    """The documents that stay, and their destinations: side * number of values + place of the value."""

    def __init__(self, units: Units) -> None:
        self.units = units
        self.values = sorted({value for counts in units.counts for value in counts.values}) or [""]
        check_values(units.recipe, self.values)
        self.kept, self.duplicates, self.units_read = _kept(units)
        self.totals = {name: np.zeros(len(self), np.int64) for name in ("documents", "tokens", "text_bytes")}
        for some in self.documents():
            np.add.at(self.totals["documents"], some.destinations, 1)
            np.add.at(self.totals["tokens"], some.destinations, some.records["length"])
            np.add.at(self.totals["text_bytes"], some.destinations, some.records["text_bytes"])
        self.sorted_starts = _sorted_starts(self) if units.recipe.order_column else None

    def __len__(self) -> int:
        return 2 * len(self.values)

    def documents(self) -> Iterator[_UnitDocuments]:
        """What stays of each unit, in input order."""
        first = 0
        for unit, counts in enumerate(self.units.counts):
            records = self.units.records(unit)
            starts = np.cumsum(records["length"]) - records["length"]
            destinations = records["held_out"].astype(np.int64) * len(self.values)
            if counts.values:
                destinations += np.searchsorted(self.values, counts.values)[records["value"]]
            kept = slice(None) if self.kept is None else self.kept[first : first + len(records)]
            ordinals = np.arange(first, first + len(records))[kept]
            yield _UnitDocuments(unit, ordinals, records[kept], starts[kept], destinations[kept])
            first += len(records)


def arrange(units: Units, places: Path) -> Arrangement:
    """Decide for all documents and write the file of places.

    Args:
        units: the whole tokenised input.
        places: the file to write.

    Raises:
        UserError: the values of the order column are numbers in some files and strings in others, or there are too
            many values to split by.
        OSError: the disk is full.
    """
    layout = _Layout(units)
    buckets = np.maximum(1, -(-layout.totals["tokens"] // units.recipe.shard_tokens))
    first_bucket = np.cumsum(buckets) - buckets
    filled = np.zeros(int(buckets.sum()), np.int64)
    for _, in_bucket, _ in _bucketed(layout, buckets, first_bucket):
        filled += np.bincount(in_bucket, minlength=len(filled))
    first_place = np.cumsum(filled) - filled
    _write_places(places, _bucketed(layout, buckets, first_bucket), first_place.copy(), int(filled.sum()))
    destinations = []
    for code in np.flatnonzero(layout.totals["documents"]).tolist():
        own = slice(first_bucket[code], first_bucket[code] + buckets[code])
        shards = zip(first_place[own].tolist(), filled[own].tolist(), strict=True)
        destinations.append(
            Destination(
                validation=code >= len(layout.values),
                value=layout.values[code % len(layout.values)],
                shards=tuple(shard for shard in shards if shard[1]),
                **{name: int(total[code]) for name, total in layout.totals.items()},
            )
        )
    return Arrangement(tuple(destinations), layout.duplicates, layout.units_read)


def running_sums(groups: np.ndarray, amounts: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """For each item the sum of the amounts of its group before it, on top of the group's total so far.

    Args:
        groups: (n,) index into totals.
        amounts: (n,) int64.
        totals: (groups,) int64, gets the new totals.
    """
    order = np.argsort(groups, kind="stable")
    sorted_groups, sorted_amounts = groups[order], amounts[order]
    sums = np.cumsum(sorted_amounts) - sorted_amounts
    present, first, sizes = np.unique(sorted_groups, return_index=True, return_counts=True)
    sums += np.repeat(totals[present] - sums[first], sizes)
    np.add.at(totals, groups, amounts)
    result = np.empty_like(sums)
    result[order] = sums
    return result


def _write_places(path: Path, bucketed: Iterator[_Bucketed], following: np.ndarray, documents: int) -> None:
    """Second pass of the counting sort: every document's record to the next free place of its bucket."""
    size = max(1, documents) * PLACE.itemsize
    with path.open("w+b") as file:
        os.posix_fallocate(file.fileno(), 0, size)  # a full disk shows here, not as a fatal signal below
        mapping = mmap.mmap(file.fileno(), size)
    places = np.frombuffer(mapping, PLACE)
    dirty = 0
    for some, in_bucket, order in bucketed:
        records = np.empty(len(in_bucket), PLACE)
        records["unit"], records["start"], records["length"] = some.unit, some.starts, some.records["length"]
        records["order"] = order
        places[running_sums(in_bucket, np.ones(len(in_bucket), np.int64), following)] = records
        if (dirty := dirty + len(records)) > _DIRTY:
            mapping.madvise(mmap.MADV_DONTNEED)  # written pages go to the file, not into this process's memory
            dirty = 0


def _bucketed(layout: _Layout, buckets: np.ndarray, first_bucket: np.ndarray) -> Iterator[_Bucketed]:
    """For each unit its documents, their buckets (counted through all destinations), and their order there."""
    recipe = layout.units.recipe
    bucket_key = hashing.key(recipe.seed, "prepare", "bucket")
    order_key = hashing.key(recipe.seed, "prepare", "order")
    totals = np.zeros(len(layout), np.int64)
    for some in layout.documents():
        to = some.destinations
        if recipe.ordered:
            if layout.sorted_starts is None:
                order = running_sums(to, some.records["length"], totals)
            else:
                order = layout.sorted_starts[some.ordinals]
            bucket = order // recipe.shard_tokens
        else:
            ordinals = running_sums(to, np.ones(len(to), np.int64), totals)
            order = hashing.bits(order_key, ordinals)
            bucket = (hashing.bits(bucket_key, ordinals) % buckets[to].astype(np.uint64)).astype(np.int64)
        yield some, first_bucket[to] + bucket, order


def _kept(units: Units) -> tuple[np.ndarray | None, int, int]:
    """What stays of the input: (documents,) bool, None for all; how many of the others are duplicates; units read."""
    kept = _first_copies(units) if units.recipe.deduplicate else None
    end, read = documents_within(units, kept) if units.recipe.limited else (units.documents, len(units.counts))
    if kept is None and not units.recipe.limited:
        return None, 0, read
    kept = np.ones(units.documents, bool) if kept is None else kept
    kept[end:] = False
    return kept, int(end - kept[:end].sum()), read


def _first_copies(units: Units) -> np.ndarray:
    """(documents of the input,) bool: false for a document whose content stood somewhere before it."""
    contents = np.empty(units.documents, np.uint64)
    first = 0
    for unit in range(len(units.counts)):
        records = units.records(unit)
        contents[first : first + len(records)] = records["content"]
        first += len(records)
    order = np.argsort(contents, kind="stable")
    contents = contents[order]
    kept = np.ones(len(contents), bool)
    kept[order[1:][contents[1:] == contents[:-1]]] = False
    return kept


def _sorted_starts(layout: _Layout) -> np.ndarray:
    """(documents of the input,) int64: the first token of each in its sorted destination; any, if it was left out."""
    recipe = layout.units.recipe
    kinds = {counts.key for counts in layout.units.counts if counts.key}
    if len(kinds) > 1:
        raise UserError(
            f"source {recipe.name}: the column {recipe.order_column!r} holds numbers in some files and strings in "
            "others: make them alike"
        )
    documents = int(layout.totals["documents"].sum())
    columns = {"key": np.float64 if kinds != {STRING} else f"S{STRING_BYTES}", "length": np.int64, "to": np.int16}
    arrays = {name: np.empty(documents, kind) for name, kind in columns.items()}
    filled = 0
    for some in layout.documents():
        rows = slice(filled, filled + len(some.records))
        arrays["key"][rows], arrays["length"][rows] = some.records["key"], some.records["length"]
        arrays["to"][rows] = some.destinations
        filled = rows.stop
    keys = arrays.pop("key")
    order = np.lexsort((_descending(keys) if recipe.order.startswith("-") else keys, arrays.pop("to")))
    del keys  # these columns are the memory of a large input
    lengths = arrays.pop("length")[order]
    sums = np.cumsum(lengths)
    sums -= lengths
    ends, tokens = np.cumsum(layout.totals["documents"]), layout.totals["tokens"]
    for end, some, before in zip(ends, layout.totals["documents"], np.cumsum(tokens) - tokens, strict=True):
        sums[end - some : end] -= before
    starts = np.empty(layout.units.documents, np.int64)
    starts[order if layout.kept is None else np.flatnonzero(layout.kept)[order]] = sums
    return starts


def _descending(keys: np.ndarray) -> np.ndarray:
    """Numbers that sort the other way round; equal keys stay equal, so that a stable sort keeps their order."""
    return -keys if keys.dtype.kind == "f" else -np.unique(keys, return_inverse=True)[1]
