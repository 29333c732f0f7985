"""First half of preparing: input files to token ids, one folder per group of files.

    units/00007/tokens.bin       ids of the group's documents in input order (uint16 or uint32, no header)
    units/00007/loss_mask.bin    one byte a token; only when some document masks a part
    units/00007/lengths.npy      int64, tokens of each document
    units/00007/held_out.npy     bool, is the document in the validation part
    units/00007/unit.json        counts

A group is one file, or neighbouring small files. Its folder appears whole, by a rename, so a killed run loses only
the groups it was working on. Documents stream through; memory does not grow with the file.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from titan_yulan.data.documents import BadRow, Document, InputFile, read_documents
from titan_yulan.data.holdout import HoldOut
from titan_yulan.data.storage import save_array, sync_files
from titan_yulan.data.tokenizer import Tokenizer
from titan_yulan.errors import UserError

_GROUP_BYTES = 4 * 2**20
_SHOWN_BAD_ROWS = 5


@dataclass(frozen=True)
class Unit:
    """A group of input files; `index` is its place in the input."""

    index: int
    files: tuple[InputFile, ...]


@dataclass(frozen=True)
class TokeniseJob:
    """What a worker needs besides the unit."""

    folder: Path  # the folder of all units
    tokenizer: Tokenizer
    dtype: np.dtype
    hold_out: HoldOut
    fail_on_bad_row: bool


@dataclass
class UnitCounts:
    """Counts of one unit; pairs are (training, validation)."""

    documents: list[int] = field(default_factory=lambda: [0, 0])
    tokens: list[int] = field(default_factory=lambda: [0, 0])
    text_bytes: list[int] = field(default_factory=lambda: [0, 0])
    empty: int = 0
    bad_rows: int = 0
    shown_bad_rows: list[str] = field(default_factory=list)
    has_loss_mask: bool = False


def group_files(files: Sequence[InputFile]) -> list[Unit]:
    """Neighbouring files in groups of at most 4 MiB, larger files alone."""
    groups: list[list[InputFile]] = []
    filled = _GROUP_BYTES
    for file in files:
        size = file.path.stat().st_size
        if filled + size > _GROUP_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(file)
        filled += size
    return [Unit(index, tuple(group)) for index, group in enumerate(groups)]


def unit_folder(folder: Path, index: int) -> Path:
    return folder / f"{index:05d}"


def read_counts(folder: Path, index: int) -> UnitCounts | None:
    """Counts of a finished unit; None when it is not finished."""
    file = unit_folder(folder, index) / "unit.json"
    return UnitCounts(**json.loads(file.read_bytes())) if file.exists() else None


def tokenise_unit(job: TokeniseJob, unit: Unit) -> UnitCounts:
    """Tokenise a unit and put its folder in place; a finished unit is not done again.

    Raises:
        UserError: a file cannot be read, or has a bad row and these are fatal.
    """
    if (finished := read_counts(job.folder, unit.index)) is not None:
        return finished
    final = unit_folder(job.folder, unit.index)
    temporary = final.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        with (temporary / "tokens.bin").open("wb") as tokens, (temporary / "loss_mask.bin").open("wb") as mask:
            counts = _write_documents(job, unit, temporary, tokens, mask)
        if not counts.has_loss_mask:
            (temporary / "loss_mask.bin").unlink()
        (temporary / "unit.json").write_text(json.dumps(asdict(counts)))
        sync_files(temporary)
        temporary.rename(final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return counts


def encode_document(tokenizer: Tokenizer, document: Document) -> tuple[np.ndarray, np.ndarray | None]:
    """Ids with one end of text at the end, and the loss mask (None: every token is a target).

    Raises:
        ValueError: a given id is outside the vocabulary.
    """
    if document.token_ids is not None:
        ids = document.token_ids
        if ids.size and int(ids.max()) >= tokenizer.vocab_size:
            raise ValueError(f"'input_ids' holds {ids.max()}, outside the vocabulary of {tokenizer.vocab_size}")
        ends = ids.size > 0 and int(ids[-1]) == tokenizer.eos_id
        return (ids if ends else np.append(ids, tokenizer.eos_id)), None
    encoded = [tokenizer.encode(text) for text, _ in document.parts]
    encoded[-1].append(tokenizer.eos_id)
    ids = np.concatenate([np.array(part, np.int64) for part in encoded])
    if all(trained for _, trained in document.parts):
        return ids, None
    trained = [trained for _, trained in document.parts]
    return ids, np.repeat(trained, [len(part) for part in encoded])


def _write_documents(job: TokeniseJob, unit: Unit, folder: Path, tokens: BinaryIO, mask: BinaryIO) -> UnitCounts:
    counts = UnitCounts()
    lengths: list[int] = []
    held_out: list[bool] = []
    for file, document, validation in _divided_documents(job, unit, counts):
        try:
            ids, loss_mask = encode_document(job.tokenizer, document)
        except ValueError as error:
            _count_bad_row(job, counts, BadRow(file.name, str(error)))
            continue
        tokens.write(ids.astype(job.dtype).tobytes())
        if loss_mask is not None and not counts.has_loss_mask:
            counts.has_loss_mask = True
            for length in lengths:
                mask.write(b"\x01" * length)
        if counts.has_loss_mask:
            mask.write(b"\x01" * len(ids) if loss_mask is None else loss_mask.tobytes())
        counts.documents[validation] += 1
        counts.tokens[validation] += len(ids)
        counts.text_bytes[validation] += len(document.text.encode())
        lengths.append(len(ids))
        held_out.append(validation)
    for name, array in (("lengths", np.array(lengths, np.int64)), ("held_out", np.array(held_out, bool))):
        with (folder / f"{name}.npy").open("wb") as file:
            save_array(file, array)
    return counts


def _divided_documents(job: TokeniseJob, unit: Unit, counts: UnitCounts) -> Iterator[tuple[InputFile, Document, bool]]:
    for file in unit.files:
        for document in read_documents(file):
            if isinstance(document, BadRow):
                _count_bad_row(job, counts, document)
            elif not document.text and not (document.token_ids is not None and document.token_ids.size):
                counts.empty += 1
            else:
                for part, validation in job.hold_out.divide(file, document):
                    yield file, part, validation


def _count_bad_row(job: TokeniseJob, counts: UnitCounts, row: BadRow) -> None:
    if job.fail_on_bad_row:
        raise UserError(f"bad row at {row}: correct it, or skip such rows with --on-bad-row skip")
    counts.bad_rows += 1
    if len(counts.shown_bad_rows) < _SHOWN_BAD_ROWS:
        counts.shown_bad_rows.append(str(row))
