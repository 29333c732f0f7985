"""Megatron-LM's indexed data sets: PREFIX.bin holds token ids, PREFIX.idx says where sequences and documents begin.

    idx:  "MMIDIDX" and two zero bytes
          uint64  version, 1
          uint8   code of the ids' type
          uint64  number of sequences S
          uint64  number of document indices D
          int32   [S] tokens of each sequence
          int64   [S] place of each sequence in the .bin file, in bytes
          int64   [D] the sequence with which each document begins; the last entry is S
          int8    [S] modes, in multimodal data sets only

All little-endian. Source: megatron/core/datasets/indexed_dataset.py of github.com/NVIDIA/Megatron-LM.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from titan_yulan.data.rows import BadRow, DamagedFile, Document, token_ids
from titan_yulan.errors import UserError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
_BLOCK = 1 << 20  # entries of the index that are checked at a time


@dataclass(frozen=True)
class Index:
    """The content of an .idx file, memory-mapped."""

    dtype: np.dtype
    lengths: np.ndarray  # (S,) tokens of each sequence
    pointers: np.ndarray  # (S,) bytes
    documents: np.ndarray  # (D,) first sequence of each document, and S


def index_path(path: Path) -> Path:
    """The index that belongs to a .bin file."""
    return path.with_suffix(".idx")


def read_megatron(name: str, path: Path) -> Iterator[Document | BadRow]:
    """The documents of PREFIX.bin by the indices of PREFIX.idx; several sequences of a document are joined.

    Args:
        name: what to call the file in a `BadRow` (followed by the document, from 1).
        path: the .bin file.

    Raises:
        DamagedFile: one of the two files is damaged or cut short, or they do not belong together.
        UserError: the index is of another version, or the data are no token ids.
        OSError: one of them cannot be read.
    """
    index = read_index(index_path(path))
    size = path.stat().st_size
    described = int(index.lengths.sum(dtype=np.int64)) * index.dtype.itemsize
    if size != described:
        raise DamagedFile(
            f"{path} has {size:,} bytes, but its index {index_path(path).name} describes {described:,}: one of them is "
            "cut short, or they do not belong together"
        )
    ids = np.memmap(path, index.dtype, mode="r") if size else np.empty(0, index.dtype)
    for number, (first, end) in enumerate(pairwise(_blocks(index.documents)), start=1):
        begin = int(index.pointers[first]) // index.dtype.itemsize if first < end else 0
        count = int(index.lengths[first:end].sum(dtype=np.int64))
        try:
            yield Document(token_ids=token_ids(ids[begin : begin + count], "the document"))
        except ValueError as error:
            yield BadRow(f"{name}:{number}", str(error))


def read_index(path: Path) -> Index:
    """Open an .idx file and check that it is whole and consistent.

    Raises:
        DamagedFile: it is of another format, cut short, or its numbers contradict each other.
        UserError: it is of another version, or the data are no token ids.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        header = file.read(_HEADER.size)
    if header[: len(_MAGIC)] != _MAGIC:
        raise DamagedFile(f"{path} is no index of a Megatron-LM data set: it does not begin with MMIDIDX")
    if len(header) < _HEADER.size:
        raise DamagedFile(f"{path} is cut short: its header needs {_HEADER.size} bytes, it has {len(header)}")
    _, version, code, sequences, entries = _HEADER.unpack(header)
    if version != 1:
        raise UserError(f"{path} has version {version} of Megatron-LM's index format: only version 1 is known")
    dtype = np.dtype(_TYPES.get(code, "V1"))
    if dtype.kind not in "iu":
        raise UserError(f"{path} says that its data has the type code {code}: token ids are whole numbers (1-5 or 8)")
    size, needed = path.stat().st_size, _HEADER.size + 12 * sequences + 8 * entries
    if size not in (needed, needed + sequences):
        raise DamagedFile(
            f"{path} has {size:,} bytes, but {sequences:,} sequences and {entries:,} document indices need {needed:,}: "
            "it is damaged or cut short"
        )
    raw = np.memmap(path, np.uint8, mode="r", offset=0)
    ends = np.cumsum([_HEADER.size, 4 * sequences, 8 * sequences, 8 * entries])
    parts = [raw[start:end] for start, end in pairwise(ends.tolist())]
    index = Index(dtype, parts[0].view("<i4"), parts[1].view("<i8"), parts[2].view("<i8"))
    _check(path, index)
    return index


def _check(path: Path, index: Index) -> None:
    documents = index.documents
    if not (documents.size and documents[0] == 0 and documents[-1] == index.lengths.size):
        raise DamagedFile(f"{path} is damaged: its document indices do not go from 0 to the number of sequences")
    for start in range(0, documents.size, _BLOCK):
        if np.any(np.diff(documents[start : start + _BLOCK + 1]) < 0):
            raise DamagedFile(f"{path} is damaged: its document indices do not increase")
    place = 0  # sequences stand one after the other: a document is one stretch of the file
    for start in range(0, index.lengths.size, _BLOCK):
        lengths = index.lengths[start : start + _BLOCK].astype(np.int64)
        ends = place + np.cumsum(lengths) * index.dtype.itemsize
        begins = ends - lengths * index.dtype.itemsize
        if np.any(lengths < 0) or np.any(index.pointers[start : start + _BLOCK] != begins):
            raise DamagedFile(f"{path} is damaged: its sequences do not stand one after the other")
        place = int(ends[-1])


def _blocks(array: np.ndarray) -> Iterator[int]:
    """The elements as ints, without a Python list of all of them."""
    for start in range(0, array.size, _BLOCK):
        yield from array[start : start + _BLOCK].tolist()
