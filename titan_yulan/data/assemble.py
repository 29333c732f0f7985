"""Second half of preparing: tokenised units to shards, with memory for one shard a worker."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from titan_yulan.data.arrange import PLACE, Units
from titan_yulan.data.source import Shard, describe_shard, file_name, write_shard
from titan_yulan.errors import RunError


@dataclass(frozen=True)
class AssembleJob:
    """What a worker needs besides the shard."""

    units: Units
    places: Path  # see `arrange`
    has_loss_mask: bool


@dataclass(frozen=True)
class ShardJob:
    """One shard: where it is written, and its records in the file of places."""

    folder: Path
    shard: int
    first: int
    documents: int


def write_bucket(job: AssembleJob, shard: ShardJob) -> Shard:
    """Write a shard; one whose files are all there is not written again."""
    names = ["tokens", "offsets"] + ["loss_mask"] * job.has_loss_mask
    if not all((shard.folder / file_name(shard.shard, name)).exists() for name in names):
        write_shard(shard.folder, shard.shard, _gather(job, shard))
    return describe_shard(shard.folder, shard.shard, job.has_loss_mask)


def _gather(job: AssembleJob, shard: ShardJob) -> dict[str, np.ndarray]:
    places = np.fromfile(job.places, PLACE, shard.documents, offset=shard.first * PLACE.itemsize)
    sequence = np.argsort(places["order"], kind="stable")
    offsets = np.zeros(len(places) + 1, np.int64)
    np.cumsum(places["length"][sequence], out=offsets[1:])
    targets = np.empty(len(places), np.int64)
    targets[sequence] = offsets[:-1]
    arrays = {"tokens": np.empty(offsets[-1], job.units.recipe.dtype), "offsets": offsets}
    if job.has_loss_mask:
        arrays["loss_mask"] = np.ones(offsets[-1], bool)
    by_unit = np.argsort(places["unit"], kind="stable")
    units, first = np.unique(places["unit"][by_unit], return_index=True)
    for unit, here in zip(units.tolist(), np.split(by_unit, first[1:]), strict=True):
        _copy(job, unit, _runs(places["start"][here], targets[here], places["length"][here]), arrays)
    return arrays


def _runs(starts: np.ndarray, targets: np.ndarray, lengths: np.ndarray) -> list[tuple[int, int, int]]:
    """(start, target, length) of what to copy, with documents joined that stand side by side in both places."""
    joined = (starts[1:] == starts[:-1] + lengths[:-1]) & (targets[1:] == targets[:-1] + lengths[:-1])
    first = np.flatnonzero(np.r_[True, ~joined])
    columns = (starts[first], targets[first], np.add.reduceat(lengths, first))
    return list(zip(*(column.tolist() for column in columns), strict=True))


def _copy(job: AssembleJob, unit: int, runs: list[tuple[int, int, int]], arrays: dict[str, np.ndarray]) -> None:
    """Copy runs of tokens of a unit into the shard's arrays."""
    folder, recipe = job.units.folder(unit), job.units.recipe
    _read_runs(folder / "tokens.bin", recipe.dtype.itemsize, runs, arrays["tokens"])
    if job.has_loss_mask and job.units.counts[unit].has_loss_mask:
        _read_runs(folder / "loss_mask.bin", 1, runs, arrays["loss_mask"])


def _read_runs(path: Path, itemsize: int, runs: list[tuple[int, int, int]], array: np.ndarray) -> None:
    """Read stretches of a file straight into an array.

    Not by memory mapping: for the many short documents of a shuffled shard the system would read far more around each.
    """
    target = array.data.cast("B")
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        for start, to, length in runs:
            place, rest = start * itemsize, target[to * itemsize : (to + length) * itemsize]
            while rest:  # one call reads at most 2 GiB
                read = os.preadv(file.fileno(), [rest], place)
                if not read:
                    raise RunError(f"{path} is shorter than it was written: delete {path.parent} and start again")
                place, rest = place + read, rest[read:]
