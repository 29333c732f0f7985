"""From input files to documents: plain text, JSONL, Parquet, chats, token ids and the built-in corpus.

    *.txt *.md            one document a file
    *.jsonl *.jsonl.gz    one document a line, an object with one of the keys below
    *.parquet             one document a row, with one of the columns below
    builtin:code|math|prose

A row is read by the first of these keys it has: `input_ids` (a list of token ids, kept as they are), `messages` (a
chat: a list of {"role", "content"}), `text` (a string). A row that has none, or holds something else, is a `BadRow`.
"""

from __future__ import annotations

import glob
import gzip
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from titan_yulan.data import corpus
from titan_yulan.errors import UserError

_SUFFIXES = {".txt": "text", ".md": "text", ".jsonl": "jsonl", ".jsonl.gz": "jsonl", ".parquet": "parquet"}
_KEYS = ("input_ids", "messages", "text")
_ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class InputFile:
    """One file to read; the unit of resuming and of holding out.

    `name` identifies it on every machine: the path below the folder that all inputs share.
    """

    name: str
    path: Path
    kind: str  # text, jsonl, parquet, python or docstrings


@dataclass(frozen=True)
class Document:
    """Either text, as (text, is it trained on) parts, or token ids. `text` joins the parts."""

    parts: tuple[tuple[str, bool], ...] = ()
    token_ids: np.ndarray | None = field(default=None, compare=False)

    @property
    def text(self) -> str:
        return "".join(part for part, _ in self.parts)


@dataclass(frozen=True)
class BadRow:
    """A row that gives no document: where it is (file and line or row, from 1) and why."""

    place: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


def find_inputs(inputs: Sequence[str]) -> list[InputFile]:
    """The files behind paths, folders (searched for known suffixes), globs and `builtin:DOMAIN`, each once.

    The order is that of the arguments; inside a folder or a glob, sorted by path.

    Raises:
        UserError: an argument matches nothing, or a file's suffix is unknown.
    """
    builtin: list[InputFile] = []
    paths: list[Path] = []
    for argument in inputs:
        if argument.startswith("builtin:"):
            domain = argument.removeprefix("builtin:")
            kind = "docstrings" if domain == "prose" else "python"
            builtin += [InputFile(name, path, kind) for name, path in corpus.builtin_files(domain)]
        else:
            paths += _find_paths(argument)
    unique = list(dict.fromkeys(Path(os.path.abspath(path)) for path in paths))
    shared = os.path.commonpath([path.parent for path in unique]) if unique else ""
    files = [InputFile(path.relative_to(shared).as_posix(), path, _kind(path)) for path in unique]
    return list(dict.fromkeys(builtin + files))


def read_documents(file: InputFile) -> Iterator[Document | BadRow]:
    """The documents of one file, in order; empty ones included.

    Raises:
        UserError: the file as a whole cannot be read (missing, a damaged archive or Parquet file).
    """
    try:
        if file.kind == "jsonl":
            yield from _read_jsonl(file)
        elif file.kind == "parquet":
            yield from _read_parquet(file)
        else:
            yield from _read_text(file)
    except (OSError, EOFError) as error:
        raise UserError(f"cannot read {file.path}: {error}") from error


def parse_row(row: Any) -> Document:
    """One row of JSONL or Parquet as a document.

    Raises:
        ValueError: the row has none of the known keys, or its value is not what the key stands for.
    """
    if not isinstance(row, dict):
        raise ValueError("not an object with the key 'text'")
    if row.get("input_ids") is not None:
        return Document(token_ids=_token_ids(row["input_ids"]))
    if row.get("messages") is not None:
        return Document(_chat_parts(row["messages"]))
    if row.get("text") is not None:
        return Document(((_checked_text(row["text"], "'text'"), True),))
    keys = ", ".join(map(repr, list(row)[:8])) or "none"
    raise ValueError(f"none of the keys 'text', 'messages', 'input_ids' has a value (keys: {keys})")


def _find_paths(argument: str) -> list[Path]:
    path = Path(argument)
    if path.is_dir():
        found = sorted(child for child in path.rglob("*") if child.is_file() and _kind(child))
    elif path.is_file():
        found = [path]
    else:
        found = [Path(match) for match in sorted(glob.glob(argument, recursive=True)) if Path(match).is_file()]
    if not found:
        raise UserError(
            f"input {argument!r} is no file, no glob that matches, and no folder with {' '.join(_SUFFIXES)} files"
        )
    for file in found:
        if not _kind(file):
            raise UserError(f"cannot tell what {file} is: its name must end in {', '.join(_SUFFIXES)}")
    return found


def _kind(path: Path) -> str:
    return next((kind for suffix, kind in _SUFFIXES.items() if path.name.endswith(suffix)), "")


def _read_text(file: InputFile) -> Iterator[Document | BadRow]:
    try:
        text = file.path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        yield BadRow(file.name, f"not UTF-8 (byte {error.start})")
        return
    for part in corpus.read_docstrings(text) if file.kind == "docstrings" else [text]:
        yield Document(((part, True),))


def _read_jsonl(file: InputFile) -> Iterator[Document | BadRow]:
    # Not through `datasets`: its JSON reader parses blocks, so one broken line loses the rows around it and its place.
    opened = gzip.open(file.path, "rb") if file.path.suffix == ".gz" else file.path.open("rb")
    with opened as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield parse_row(json.loads(line.decode("utf-8")))
            except UnicodeDecodeError as error:
                yield BadRow(f"{file.name}:{number}", f"not UTF-8 (byte {error.start} of the line)")
            except json.JSONDecodeError as error:
                yield BadRow(f"{file.name}:{number}", f"not JSON ({error.msg} at column {error.colno})")
            except (ValueError, RecursionError) as error:
                yield BadRow(f"{file.name}:{number}", str(error))


def _read_parquet(file: InputFile) -> Iterator[Document | BadRow]:
    number = 0
    for batch in _parquet_batches(file):
        # Only known columns are turned into Python objects; another may be large.
        names = [name for name in batch.column_names if name in _KEYS]
        columns = [_column_values(batch.column(name)) for name in names]
        for values in zip(*columns, strict=True) if columns else [()] * batch.num_rows:
            number += 1
            try:
                yield parse_row(dict(zip(names, values, strict=True)) or dict.fromkeys(batch.column_names))
            except ValueError as error:
                yield BadRow(f"{file.name}:{number}", str(error))


def _parquet_batches(file: InputFile) -> Iterator[Any]:
    """Arrow tables of at most 1000 rows."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"reading {file.path} needs the package datasets: pip install datasets") from error
    try:
        rows: Any = datasets.load_dataset("parquet", data_files=str(file.path), split="train", streaming=True)
        yield from rows.with_format("arrow").iter(batch_size=1000)
    except Exception as error:  # the errors of pyarrow and datasets share no base class
        raise UserError(f"cannot read {file.path} as Parquet: {error}") from error


def _column_values(column: Any) -> list[Any]:
    """Python values of an Arrow column; lists of numbers stay numpy arrays (ten times faster than lists)."""
    kind = column.type
    import pyarrow.types as types

    if (types.is_list(kind) or types.is_large_list(kind)) and types.is_integer(kind.value_type):
        return [value.values.to_numpy(zero_copy_only=False) if value.is_valid else None for value in column]
    return column.to_pylist()


def _checked_text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what} is a {type(value).__name__}, not a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} holds half of a surrogate pair (character {error.start})") from None
    return value


def _token_ids(value: Any) -> np.ndarray:
    """Whole, non-negative numbers as int64; the upper limit depends on the vocabulary and is checked later."""
    try:
        ids = np.asarray(value)
    except ValueError:
        raise ValueError("'input_ids' is not a flat list of whole numbers") from None
    if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
        raise ValueError("'input_ids' is not a flat list of whole numbers")
    if ids.size and int(ids.min()) < 0:
        raise ValueError(f"'input_ids' holds the negative id {ids.min()}")
    return ids.astype(np.int64)


def _chat_parts(messages: Any) -> tuple[tuple[str, bool], ...]:
    """A chat as text, with a header before every message; only what the assistant says is trained on.

    ### User            (no)
                        (no)
    What is 2 + 2?      (no)
                        (no)
    ### Assistant       (no)
                        (no)
    4                   (yes, and the blank line or end of text after it, which is how the answer ends)
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError("'messages' is not a list of messages")
    parts: list[tuple[str, bool]] = []
    for place, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            raise ValueError(f"message {place} has no role of {', '.join(_ROLES)}")
        content = _checked_text(message.get("content"), f"the content of message {place}")
        answers = message["role"] == "assistant"
        if place > 1:
            parts.append(("\n\n", parts[-1][1]))
        parts.append((f"### {message['role'].capitalize()}\n\n", False))
        parts.append((content, answers))
    if not any(trained for _, trained in parts):
        raise ValueError("the chat has no message of the assistant to train on")
    return tuple(parts)
