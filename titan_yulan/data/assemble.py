"""Second half of preparing: tokenised units to shards, shuffled with memory for one shard a worker.

Document n of the input (n counts through all units) goes to bucket `bits(n) mod number of buckets`, and stands inside
its bucket by a second hash of n. Every bucket that got a document becomes a shard. A worker that writes a shard reads
the lengths of all units and copies just the documents of its bucket. An ordered source is cut into consecutive runs
instead: a document goes to the bucket in which its first token falls.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from titan_yulan.data import hashing
from titan_yulan.data.source import Shard, describe_shard, file_name, write_shard
from titan_yulan.data.tokenise import UnitCounts, unit_folder


@dataclass(frozen=True)
class AssembleJob:
    """One side (training or validation) of a source."""

    units_folder: Path
    counts: Sequence[UnitCounts]
    folder: Path  # gets the shards
    validation: bool
    dtype: np.dtype
    ordered: bool
    seed: int
    shard_tokens: int

    @property
    def tokens(self) -> int:
        return sum(counts.tokens[self.validation] for counts in self.counts)

    @property
    def documents(self) -> int:
        return sum(counts.documents[self.validation] for counts in self.counts)

    @property
    def has_loss_mask(self) -> bool:
        return any(counts.has_loss_mask for counts in self.counts)

    @property
    def buckets(self) -> int:
        return max(1, -(-self.tokens // self.shard_tokens))


@dataclass(frozen=True)
class _UnitDocuments:
    """The documents of this side in one unit, as parallel arrays."""

    unit: int
    starts: np.ndarray  # in the unit's tokens
    lengths: np.ndarray
    buckets: np.ndarray
    order: np.ndarray  # sorts the documents of a bucket


def filled_buckets(job: AssembleJob) -> list[int]:
    """The buckets with documents, ascending; the n-th becomes shard n."""
    filled = np.zeros(job.buckets, bool)
    for documents in _unit_documents(job):
        filled[documents.buckets] = True
    return np.flatnonzero(filled).tolist()


def write_bucket(job: AssembleJob, shard: int, bucket: int) -> Shard:
    """Write the bucket as a shard; a shard whose files are all there is not written again."""
    names = ["tokens", "offsets"] + ["loss_mask"] * job.has_loss_mask
    if not all((job.folder / file_name(shard, name)).exists() for name in names):
        write_shard(job.folder, shard, _gather(job, bucket))
    return describe_shard(job.folder, shard, job.has_loss_mask)


def _gather(job: AssembleJob, bucket: int) -> dict[str, np.ndarray]:
    pieces = []
    for documents in _unit_documents(job):
        chosen = documents.buckets == bucket
        if chosen.any():
            unit = np.full(int(chosen.sum()), documents.unit)
            pieces.append((unit, documents.starts[chosen], documents.lengths[chosen], documents.order[chosen]))
    units, starts, lengths, order = (np.concatenate(column) for column in zip(*pieces, strict=True))
    offsets = np.zeros(len(lengths) + 1, np.int64)
    sequence = np.argsort(order, kind="stable")
    np.cumsum(lengths[sequence], out=offsets[1:])
    targets = np.empty(len(lengths), np.int64)
    targets[sequence] = offsets[:-1]
    arrays = {"tokens": np.empty(offsets[-1], job.dtype), "offsets": offsets}
    if job.has_loss_mask:
        arrays["loss_mask"] = np.ones(offsets[-1], bool)
    for unit in np.unique(units):
        here = np.flatnonzero(units == unit)
        places = [column[here].tolist() for column in (starts, targets, lengths)]
        _copy(job, int(unit), places, arrays)
    return arrays


def _copy(job: AssembleJob, unit: int, places: list[list[int]], arrays: dict[str, np.ndarray]) -> None:
    """Copy documents (starts, targets, lengths) of a unit into the shard's arrays."""
    folder = unit_folder(job.units_folder, unit)
    tokens = np.asarray(np.memmap(folder / "tokens.bin", job.dtype, mode="r"))
    masked = job.has_loss_mask and job.counts[unit].has_loss_mask
    mask = np.asarray(np.memmap(folder / "loss_mask.bin", bool, mode="r")) if masked else None
    for start, target, length in zip(*places, strict=True):
        arrays["tokens"][target : target + length] = tokens[start : start + length]
        if mask is not None:
            arrays["loss_mask"][target : target + length] = mask[start : start + length]


def _unit_documents(job: AssembleJob) -> Iterator[_UnitDocuments]:
    bucket_key = hashing.key(job.seed, "prepare", "bucket")
    order_key = hashing.key(job.seed, "prepare", "order")
    documents_before = tokens_before = 0
    for unit, counts in enumerate(job.counts):
        folder = unit_folder(job.units_folder, unit)
        all_lengths = np.load(folder / "lengths.npy")
        chosen = np.load(folder / "held_out.npy") == job.validation
        lengths = all_lengths[chosen]
        ordinals = documents_before + np.arange(len(lengths))
        if job.ordered:
            buckets = (tokens_before + np.cumsum(lengths) - lengths) // job.shard_tokens
            order = ordinals.astype(np.uint64)
        else:
            buckets = (hashing.bits(bucket_key, ordinals) % np.uint64(job.buckets)).astype(np.int64)
            order = hashing.bits(order_key, ordinals)
        yield _UnitDocuments(unit, (np.cumsum(all_lengths) - all_lengths)[chosen], lengths, buckets, order)
        documents_before += counts.documents[job.validation]
        tokens_before += counts.tokens[job.validation]
