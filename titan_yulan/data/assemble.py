"""Second half of preparing: tokenised units to shards, with memory for one shard a worker."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from titan_yulan.data.arrange import PLACE, Units
from titan_yulan.data.source import Shard, describe_shard, file_name, write_shard


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
        rows = places[here]
        _copy(job, unit, [column.tolist() for column in (rows["start"], targets[here], rows["length"])], arrays)
    return arrays


def _copy(job: AssembleJob, unit: int, places: list[list[int]], arrays: dict[str, np.ndarray]) -> None:
    """Copy documents (starts, targets, lengths) of a unit into the shard's arrays."""
    folder = job.units.folder(unit)
    tokens = np.asarray(np.memmap(folder / "tokens.bin", job.units.recipe.dtype, mode="r"))
    masked = job.has_loss_mask and job.units.counts[unit].has_loss_mask
    mask = np.asarray(np.memmap(folder / "loss_mask.bin", bool, mode="r")) if masked else None
    for start, target, length in zip(*places, strict=True):
        arrays["tokens"][target : target + length] = tokens[start : start + length]
        if mask is not None:
            arrays["loss_mask"][target : target + length] = mask[start : start + length]
