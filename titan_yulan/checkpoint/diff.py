"""`titan-yulan checkpoint diff`: two checkpoints against each other, in one process, a part at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from titan_yulan import config as configuration
from titan_yulan.checkpoint import store
from titan_yulan.checkpoint.layout import CONFIG, Checkpoint, find_damage, open_checkpoint
from titan_yulan.errors import RunError

# Tensors are read in parts of so many bytes; a tensor that is larger is a part of its own.
_PART = 2**28


def diff_checkpoints(first: Path, second: Path) -> Iterator[str]:
    """A line per key of configuration and state, and per tensor, that differs; nothing if nothing does.

    Args:
        first, second: step folders, or run folders (then their newest).

    Raises:
        RunError: one of them is missing or damaged.
    """
    old, new = open_checkpoint(first), open_checkpoint(second)
    for checkpoint in (old, new):
        if damage := find_damage(checkpoint):
            raise RunError(f"{checkpoint.path} is damaged: {'; '.join(damage)}")
    configs = [configuration.load(checkpoint.path / CONFIG).config for checkpoint in (old, new)]
    for difference in configuration.diff(*configs):
        yield f"configuration: {difference}"
    states = [asdict(checkpoint.state()) for checkpoint in (old, new)]
    for key, value in states[0].items():
        if value != states[1][key]:
            yield f"state: {key}: {value} -> {states[1][key]}"
    yield from _diff_tensors(old, new)


def _diff_tensors(old: Checkpoint, new: Checkpoint) -> Iterator[str]:
    first, second = _layout(old), _layout(new)
    for name in sorted(first.keys() ^ second.keys()):
        yield f"tensor: {name}: only in {(old if name in first else new).path}"
    shared = []
    for name in sorted(first.keys() & second.keys()):
        if first[name] == second[name]:
            shared.append(name)
        else:
            yield "tensor: {}: {} {} -> {} {}".format(name, *_words(first[name]), *_words(second[name]))
    differing = 0
    for names in _parts(shared, first):
        tensors, others = ({name: torch.empty(first[name][0], dtype=first[name][1]) for name in names} for _ in "ab")
        store.read_tensors(old, tensors)
        store.read_tensors(new, others)
        for name in names:
            if not torch.equal(tensors[name], others[name]):
                differing += 1
                yield f"tensor: {name}: {_difference(tensors[name], others[name])}"
    if differing:
        yield f"{differing} of {len(shared)} tensors of the same shape differ"


def _layout(checkpoint: Checkpoint) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and type of every tensor by its full name, such as `optimizer.model.norm.weight.exp_avg`."""
    entries = store.read_index(checkpoint).state_dict_metadata.items()
    return {name: (e.size, e.properties.dtype) for name, e in entries if isinstance(e, TensorStorageMetadata)}


def _words(layout: tuple[torch.Size, torch.dtype]) -> tuple[str, str]:
    return str(layout[1]).removeprefix("torch."), str(tuple(layout[0]))


def _parts(names: list[str], layouts: dict[str, tuple[torch.Size, torch.dtype]]) -> Iterator[list[str]]:
    part: list[str] = []
    size = 0
    for name in names:
        shape, dtype = layouts[name]
        length = shape.numel() * dtype.itemsize
        if part and size + length > _PART:
            yield part
            part, size = [], 0
        part.append(name)
        size += length
    if part:
        yield part


def _difference(old: Tensor, new: Tensor) -> str:
    distance = (old.double() - new.double()).abs().max()
    return f"differs by up to {distance:.3g}, with values up to {old.double().abs().max():.3g}"
