"""First half of preparing: input files to token ids, one folder per group of files.

A group is one file, or neighbouring small files. Its folder (`data/unit.py`) appears whole, by a rename, so a killed
run loses only the groups it was working on. Documents stream through; memory does not grow with the file. A file whose
content breaks off gives nothing at all: what was read of it is taken back.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from titan_yulan.data.documents import InputFile, read_documents
from titan_yulan.data.jsonl import parse_lines, piece_lines
from titan_yulan.data.request import Recipe
from titan_yulan.data.rows import BadRow, DamagedFile, Document
from titan_yulan.data.storage import sync_files
from titan_yulan.data.tokenizer import Tokenizer
from titan_yulan.data.unit import NUMBER, STRING, STRING_BYTES, UnitCounts, UnitWriter, finished_counts, unit_folder
from titan_yulan.errors import UserError

_GROUP_BYTES = 4 * 2**20
_PIECE_BYTES = 64 * 2**20
_IDEOGRAPHIC_SPACE = "\u3000"
_SAFE_NAME = re.compile(r"\w([\w.+ -]{0,58}[\w+-])?")


@dataclass(frozen=True)
class Unit:
    """A group of input files, or a piece of one; `index` is its place in the input, `size` its bytes."""

    index: int
    files: tuple[InputFile, ...]
    size: int
    piece: tuple[int, int] | None = None  # of the one file: the lines that begin in these bytes


@dataclass(frozen=True)
class TokeniseJob:
    """What a worker needs besides the unit."""

    folder: Path  # the folder of all units
    recipe: Recipe
    tokenizer: Tokenizer
    fail_on_bad_row: bool


def group_files(files: Sequence[InputFile]) -> list[Unit]:
    """Neighbouring files in groups of at most 4 MiB; larger files alone, lines of JSON in pieces of 64 MiB."""
    units: list[Unit] = []
    for file in files:
        size = sum(path.stat().st_size for path in file.paths)
        last = units[-1] if units else None
        if last and not last.piece and last.size + size <= _GROUP_BYTES:
            units[-1] = replace(last, files=(*last.files, file), size=last.size + size)
        elif size > _PIECE_BYTES and file.path.suffix == ".jsonl":
            for start in range(0, size, _PIECE_BYTES):
                end = min(size, start + _PIECE_BYTES)
                units.append(Unit(len(units), (file,), end - start, (start, end)))
        else:
            units.append(Unit(len(units), (file,), size))
    return units


def tokenise_unit(job: TokeniseJob, unit: Unit) -> UnitCounts:
    """Tokenise a unit and put its folder in place; a finished unit is not done again.

    Raises:
        UserError: a file cannot be read, or has a bad row and these are fatal; or a value of the split-by column
            names no folder.
    """
    if (finished := finished_counts(job.folder, unit.index)) is not None:
        return finished
    final = unit_folder(job.folder, unit.index)
    temporary = final.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        with UnitWriter(temporary, job.recipe) as writer:
            for file in unit.files:
                _tokenise_file(job, file, unit.piece, writer)
        (temporary / "unit.json").write_text(json.dumps(asdict(writer.counts)))
        sync_files(temporary)
        temporary.rename(final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return writer.counts


def encode_document(tokenizer: Tokenizer, document: Document) -> tuple[np.ndarray, np.ndarray | None]:
    """Ids with an end of text at the end, and the loss mask (None: every token is a target).

    Args:
        tokenizer: makes the ids.
        document: not empty; given ids are without their end of text.

    Raises:
        ValueError: a given id is outside the vocabulary.
    """
    if document.token_ids is not None:
        ids = document.token_ids
        if int(ids.max()) >= tokenizer.vocab_size:
            raise ValueError(f"'input_ids' holds {ids.max()}, outside the vocabulary of {tokenizer.vocab_size}")
        return np.append(ids, tokenizer.eos_id), None
    encoded = [tokenizer.encode(text) for text, _ in document.parts]
    encoded[-1].append(tokenizer.eos_id)
    ids = np.concatenate([np.array(part, np.int64) for part in encoded])
    if all(trained for _, trained in document.parts):
        return ids, None
    trained = [trained for _, trained in document.parts]
    return ids, np.repeat(trained, [len(part) for part in encoded])


def _tokenise_file(job: TokeniseJob, file: InputFile, piece: tuple[int, int] | None, writer: UnitWriter) -> None:
    mark = writer.mark()
    name = f"{file.name}, from byte {piece[0]}" if piece else file.name
    try:
        for number, document in enumerate(_read(name, file, piece, job.recipe.columns), start=1):
            try:
                if isinstance(document, BadRow):
                    _count_bad_row(job, writer.counts, document)
                else:
                    _tokenise_document(job, file, document, writer)
            except ValueError as error:
                _count_bad_row(job, writer.counts, BadRow(f"{name}, document {number}", str(error)))
    except DamagedFile as error:
        if job.fail_on_bad_row:
            raise UserError(f"{error}: replace the file, or leave such files out with --on-bad-row skip") from error
        writer.roll_back(mark)
        writer.counts.bad_files.append(f"{file.name}: {error}")


def _read(
    name: str, file: InputFile, piece: tuple[int, int] | None, columns: Sequence[str]
) -> Iterator[Document | BadRow]:
    return parse_lines(name, piece_lines(file.path, *piece), columns) if piece else read_documents(file, columns)


def _tokenise_document(job: TokeniseJob, file: InputFile, document: Document, writer: UnitWriter) -> None:
    """Normalise, divide, encode, filter and write one document of the input, or count why not.

    Raises:
        ValueError: it is bad; nothing of it was written.
    """
    recipe, columns = job.recipe, document.columns
    normal = _normalised(document, recipe.eos_id)
    if not normal.text and (normal.token_ids is None or not normal.token_ids.size):
        writer.counts.empty += 1
        return
    key = _order_key(columns[recipe.order_column], writer.counts.key) if recipe.order_column else None
    value = _folder_name(columns[recipe.split_by], file) if recipe.split_by else None
    pieces = [
        (piece, held_out, *encode_document(job.tokenizer, piece))
        for piece, held_out in recipe.hold_out.divide(file, normal)
    ]
    writer.counts.ideographic_spaces += normal.parts is not document.parts
    for piece, held_out, ids, loss_mask in pieces:
        if len(ids) - 1 < recipe.minimum_tokens:
            writer.counts.short += 1
        else:
            writer.add(ids, loss_mask, len(piece.text.encode()), held_out, value, key)


def _normalised(document: Document, eos_id: int) -> Document:
    """The document with U+3000 (the ideographic space) as a plain space, and given ids without their end of text.

    The first as for the published training data of YuLan-Mini. The second so that copies with and without it are
    empty, short, held out or duplicates alike.
    """
    ids = document.token_ids
    if ids is not None and ids.size and int(ids[-1]) == eos_id:
        return replace(document, token_ids=ids[:-1])
    if not any(_IDEOGRAPHIC_SPACE in text for text, _ in document.parts):
        return document
    parts = tuple((text.replace(_IDEOGRAPHIC_SPACE, " "), trained) for text, trained in document.parts)
    return replace(document, parts=parts)


def _order_key(value: object, kind: str) -> float | bytes:
    """What a document is sorted by; `kind` is that of the documents before it in the unit."""
    if isinstance(value, str) and kind != NUMBER:
        key = value.encode()
        if len(key) > STRING_BYTES:
            raise ValueError(f"the value to order by is longer than {STRING_BYTES} bytes: {value[:20]!r}...")
        return key
    if isinstance(value, int | float) and not isinstance(value, bool) and kind != STRING:
        try:
            number = float(value)
        except OverflowError:
            number = math.nan
        if not math.isnan(number):
            return number
    raise ValueError(f"the value to order by is {value!r}, not a {kind or 'number or a string'}")


def _folder_name(value: object, file: InputFile) -> str:
    """The value of the split-by column, if it can name a folder.

    Raises:
        ValueError: it is neither a string nor a whole number.
        UserError: it is no name. Leaving the row out could leave out a whole topic.
    """
    if not isinstance(value, int | str):
        raise ValueError(f"the value to split by is {value!r}, neither a string nor a whole number")
    if not _SAFE_NAME.fullmatch(str(value)):
        raise UserError(
            f"{file.path}: the value {str(value)[:100]!r} cannot name a folder (up to 60 letters, digits, blanks "
            "and _.+-, a letter or digit first): correct the column, or split by another one"
        )
    return str(value)


def _count_bad_row(job: TokeniseJob, counts: UnitCounts, row: BadRow) -> None:
    if job.fail_on_bad_row:
        raise UserError(f"bad row at {row}: correct it, or skip such rows with --on-bad-row skip")
    counts.add_bad_row(str(row))
