"""A tokenised group of input files on disk, between the two halves of preparing.

tokens.bin       ids of the group's documents in input order (uint16 or uint32, no header)
loss_mask.bin    one byte a token; only when some document masks a part
documents.bin    one record a document, of the type `document_dtype`
unit.json        counts; the folder is renamed into place, so it is there when the folder is
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from titan_yulan.data.request import Recipe
from titan_yulan.errors import UserError

NUMBER, STRING = "number", "string"
STRING_BYTES = 64
_BLOCK = 4096  # documents
_SHOWN_BAD_ROWS = 5
_MOST_VALUES = 1000


@dataclass
class UnitCounts:
    """Counts of one unit, duplicates among them; pairs are (training, validation)."""

    documents: list[int] = field(default_factory=lambda: [0, 0])
    tokens: list[int] = field(default_factory=lambda: [0, 0])
    text_bytes: list[int] = field(default_factory=lambda: [0, 0])
    empty: int = 0
    short: int = 0
    ideographic_spaces: int = 0  # documents that had some
    bad_rows: int = 0
    shown_bad_rows: list[str] = field(default_factory=list)
    bad_files: list[str] = field(default_factory=list)  # name and reason
    has_loss_mask: bool = False
    key: str = ""  # what the documents are sorted by: "", NUMBER or STRING
    values: list[str] = field(default_factory=list)  # of the split-by column; records hold the index

    def add_bad_row(self, row: str) -> None:
        self.bad_rows += 1
        if len(self.shown_bad_rows) < _SHOWN_BAD_ROWS:
            self.shown_bad_rows.append(row)


def document_dtype(recipe: Recipe, key: str) -> np.dtype:
    """The record of a document; `key` is that of its unit's counts.

    length: tokens. text_bytes: UTF-8. held_out: in the validation part? value: index into the unit's split-by values.
    content: 64 bits of a hash of ids and loss mask. key: what to sort by.
    """
    fields = [("length", "<i8"), ("text_bytes", "<i8"), ("held_out", "?")]
    if recipe.split_by:
        fields.append(("value", "<u2"))
    if recipe.deduplicate:
        fields.append(("content", "<u8"))
    if recipe.order_column:
        fields.append(("key", f"S{STRING_BYTES}" if key == STRING else "<f8"))
    return np.dtype(fields)


def check_values(recipe: Recipe, values: Collection[str]) -> None:
    """Refuse to make more folders than anybody wants.

    Raises:
        UserError: the split-by column has too many values.
    """
    if len(values) > _MOST_VALUES:
        raise UserError(
            f"source {recipe.name}: the column {recipe.split_by!r} has more than {_MOST_VALUES} values (such as "
            f"{', '.join(map(repr, sorted(values)[:3]))}): split by a column with fewer"
        )


def unit_folder(folder: Path, index: int) -> Path:
    """Where a unit of work leaves what it made."""
    return folder / f"{index:05d}"


def finished_counts(folder: Path, index: int) -> UnitCounts | None:
    """Counts of a finished unit; None when it is not finished."""
    file = unit_folder(folder, index) / "unit.json"
    return UnitCounts(**json.loads(file.read_bytes())) if file.exists() else None


def read_records(folder: Path, recipe: Recipe, counts: UnitCounts) -> np.ndarray:
    """(documents,) records of the unit in `folder`, in input order."""
    return np.fromfile(folder / "documents.bin", document_dtype(recipe, counts.key))


@dataclass(frozen=True)
class Mark:
    """A place to go back to."""

    counts: UnitCounts
    sizes: dict[str, int]


class UnitWriter:
    """Writes the files of a unit, all but unit.json; a context manager that closes them."""

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        self.counts = UnitCounts()
        self._folder = folder
        self._recipe = recipe
        self._files = {name: (folder / f"{name}.bin").open("wb") for name in ("tokens", "loss_mask", "documents")}
        self._rows: list[tuple] = []

    def __enter__(self) -> UnitWriter:
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        try:
            if kind is None:
                self._flush()
        finally:
            for file in self._files.values():
                file.close()
        if kind is None and not self.counts.has_loss_mask:
            (self._folder / "loss_mask.bin").unlink()

    def add(
        self,
        ids: np.ndarray,
        loss_mask: np.ndarray | None,
        text_bytes: int,
        held_out: bool,
        value: str | None,
        key: float | bytes | None,
    ) -> None:
        """Append a document.

        Args:
            ids: (length,) end of text included.
            loss_mask: (length,) bool; None: every token is a target.
            text_bytes: UTF-8 bytes of its text.
            held_out: is it in the validation part.
            value: of the split-by column; None without one.
            key: what it is sorted by; None when nothing.
        """
        tokens = ids.astype(self._recipe.dtype).tobytes()
        mask = b"" if loss_mask is None else loss_mask.tobytes()
        row: list[object] = [len(ids), text_bytes, held_out]
        if value is not None:
            row.append(self._place(value))
        if self._recipe.deduplicate:
            row.append(int.from_bytes(hashlib.blake2b(tokens + mask, digest_size=8).digest(), "little"))
        if key is not None:
            self.counts.key = STRING if isinstance(key, bytes) else NUMBER
            row.append(key)
        self._write_mask(len(ids), mask)
        self._files["tokens"].write(tokens)
        self.counts.documents[held_out] += 1
        self.counts.tokens[held_out] += len(ids)
        self.counts.text_bytes[held_out] += text_bytes
        self._rows.append(tuple(row))
        if len(self._rows) == _BLOCK:
            self._flush()

    def mark(self) -> Mark:
        """Where the writing stands."""
        self._flush()
        return Mark(copy.deepcopy(self.counts), {name: file.tell() for name, file in self._files.items()})

    def roll_back(self, mark: Mark) -> None:
        """Take back all that was added, and counted, since `mark`."""
        self.counts = mark.counts
        self._rows.clear()
        for name, file in self._files.items():
            file.seek(mark.sizes[name])
            file.truncate()

    def _place(self, value: str) -> int:
        if value not in self.counts.values:
            self.counts.values.append(value)
            check_values(self._recipe, self.counts.values)
        return self.counts.values.index(value)

    def _write_mask(self, length: int, mask: bytes) -> None:
        if mask and not self.counts.has_loss_mask:
            self.counts.has_loss_mask = True
            before = sum(self.counts.tokens)
            while before:
                before -= self._files["loss_mask"].write(b"\x01" * min(before, 2**20))
        if self.counts.has_loss_mask:
            self._files["loss_mask"].write(mask or b"\x01" * length)

    def _flush(self) -> None:
        records = np.array(self._rows, document_dtype(self._recipe, self.counts.key))
        self._files["documents"].write(records.tobytes())
        self._rows.clear()
