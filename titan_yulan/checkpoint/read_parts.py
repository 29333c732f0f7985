"""The tensors of a checkpoint one after another, in one process, whatever layout of ranks wrote them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Size, Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from titan_yulan.checkpoint import store
from titan_yulan.checkpoint.layout import Checkpoint

# Tensors are read in groups of so many bytes; a tensor that is larger is read alone. One by one, the index, which has
# an entry for each part of each rank, would be read for every one of them.
_GROUP = 2**27


def stored_shapes(checkpoint: Checkpoint, section: str = "model") -> dict[str, Size]:
    """Whole shape of every tensor of a section (`Learner.tensors`), by name."""
    entries = store.read_index(checkpoint).state_dict_metadata
    return {
        name.removeprefix(f"{section}."): entry.size
        for name, entry in entries.items()
        if name.startswith(f"{section}.") and isinstance(entry, TensorStorageMetadata)
    }


def read_parts(checkpoint: Checkpoint, names: Iterable[str], section: str = "model") -> Iterator[tuple[str, Tensor]]:
    """Name and tensor, whole and in float32, of each name in turn; a name may come again.

    Raises:
        RunError: a file cannot be read.
    """
    shapes = stored_shapes(checkpoint, section)
    for group in _groups(list(names), shapes):
        tensors = {f"{section}.{name}": torch.empty(shapes[name], dtype=torch.float32) for name in group}
        store.read_tensors(checkpoint, tensors)
        for name in group:
            yield name, tensors[f"{section}.{name}"]


def _groups(names: list[str], shapes: dict[str, Size]) -> Iterator[list[str]]:
    group: list[str] = []
    filled = 0
    for name in names:
        size = shapes[name].numel() * torch.float32.itemsize
        if group and filled + size > _GROUP:
            yield group
            group, filled = [], 0
        group.append(name)
        filled += size
    if group:
        yield group
