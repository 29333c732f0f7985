"""safetensors files written as a stream: the header follows from names, shapes and types, then the bytes go out part
by part, so that no more than one part is in memory. (The package's own writer wants all tensors of a file at once.)

A file is an 8-byte little-endian length, a JSON header of that length with `dtype`, `shape` and `data_offsets` of every
tensor, and the tensors' bytes without gaps (github.com/huggingface/safetensors, "Format"). Within a file the wider
types come first, so that every tensor is aligned to its type.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from titan_yulan.checkpoint.hugging_face import INDEX, WEIGHTS

_TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_ALIGNMENT = 8


@dataclass(frozen=True)
class Layout:
    """Shape and type of a tensor to be written."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def split_into_files(layouts: Mapping[str, Layout], shard_size: int) -> dict[str, list[str]]:
    """File name -> names of its tensors, in the order given; a tensor larger than `shard_size` bytes has its own."""
    parts: list[list[str]] = [[]]
    filled = 0
    for name, layout in layouts.items():
        if parts[-1] and filled + layout.size > shard_size:
            parts.append([])
            filled = 0
        parts[-1].append(name)
        filled += layout.size
    if len(parts) == 1:
        return {WEIGHTS: parts[0]}
    stem, suffix = WEIGHTS.split(".")
    return {f"{stem}-{i:05d}-of-{len(parts):05d}.{suffix}": names for i, names in enumerate(parts, start=1)}


def write_index(folder: Path, files: Mapping[str, list[str]], layouts: Mapping[str, Layout]) -> None:
    """The table of which file holds which tensor; a single file needs none."""
    if len(files) > 1:
        places = {name: file for file, names in files.items() for name in names}
        index = {"metadata": {"total_size": sum(layouts[name].size for name in places)}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def in_file_order(names: Iterable[str], layouts: Mapping[str, Layout]) -> list[str]:
    """The order in which `write_file` wants the tensors of one file."""
    return sorted(names, key=lambda name: -layouts[name].dtype.itemsize)


def write_file(path: Path, layouts: Mapping[str, Layout], parts: Iterator[Tensor]) -> None:
    """Write one file durably.

    Args:
        layouts: the tensors of this file, in the order of `in_file_order`.
        parts: their values in that order, each in any number of contiguous parts, already of the type to be written.

    Raises:
        OSError: the disk is full, and the like.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, layout in layouts.items():
        begin, end = end, end + layout.size
        header[name] = {"dtype": _TYPES[layout.dtype], "shape": layout.shape, "data_offsets": (begin, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for part in parts:
            file.write(part.contiguous().view(-1).view(torch.uint8).numpy().data)
        if file.tell() != 8 + len(text) + end:
            raise ValueError(f"{path} got {file.tell() - 8 - len(text)} bytes of tensors instead of {end}")
        file.flush()
        os.fsync(file.fileno())
