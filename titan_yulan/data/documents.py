"""From input files to documents.

*.txt *.md              one document a file
*.jsonl *.jsonl.gz      one document a line, an object; how a row becomes a document: `data/rows.py`
*.parquet               one document a row; `data/parquet.py`
*.bin with *.idx        Megatron-LM's indexed data sets; `data/megatron.py`
builtin:DOMAIN          the built-in corpus; `data/corpus.py`
"""

from __future__ import annotations

import glob
import gzip
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from titan_yulan.data import corpus
from titan_yulan.data.jsonl import parse_lines
from titan_yulan.data.megatron import index_path, read_megatron
from titan_yulan.data.parquet import METADATA, read_parquet
from titan_yulan.data.rows import BadRow, DamagedFile, Document, parse_row
from titan_yulan.errors import UserError

_SUFFIXES = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl",
    ".parquet": "parquet",
    ".bin": "megatron",
    ".idx": "megatron",
}


@dataclass(frozen=True)
class InputFile:
    """One file to read; the unit of resuming and of holding out.

    `name` identifies it on every machine: the path below the folder that all inputs share.
    """

    name: str
    path: Path
    kind: str  # text, jsonl, parquet, megatron (path: the .bin file), python, docstrings or chats

    @property
    def paths(self) -> tuple[Path, ...]:
        """All files that decide its documents."""
        return (self.path, index_path(self.path)) if self.kind == "megatron" else (self.path,)


def find_inputs(inputs: Sequence[str]) -> list[InputFile]:
    """The files behind paths, folders (searched for known suffixes), globs and `builtin:DOMAIN`, each once.

    The order is that of the arguments; inside a folder or a glob, by path, with numbers in their natural order
    (part-2 before part-10). The metadata files of YuLan-Mini's shards are passed over, and in a folder so is a .bin
    file without an .idx file.

    Links are followed; a file that is reached by several ways counts under the first.

    Raises:
        UserError: an argument matches nothing, a suffix is unknown, one file of a Megatron-LM pair is missing, a link
            leads nowhere, or a folder cannot be read.
    """
    builtin: list[InputFile] = []
    paths: list[Path] = []
    for argument in inputs:
        if argument.startswith("builtin:"):
            part = argument.removeprefix("builtin:")
            kind = {"prose": "docstrings", "chat": "chats"}.get(part.partition("/")[0], "python")
            builtin += [InputFile(name, path, kind) for name, path in corpus.builtin_files(part)]
        else:
            paths += _find_paths(argument)
    unique: dict[str, Path] = {}
    for path in paths:
        unique.setdefault(os.path.realpath(path), Path(os.path.abspath(path)))
    shared = os.path.commonpath([path.parent for path in unique.values()]) if unique else ""
    files = [InputFile(path.relative_to(shared).as_posix(), path, _kind(path)) for path in unique.values()]
    return list(dict.fromkeys(builtin + files))


def read_documents(file: InputFile, columns: Sequence[str] = ()) -> Iterator[Document | BadRow]:
    """The documents of one file, in order; empty ones included.

    Args:
        file: what to read.
        columns: keys of JSONL rows, or columns of Parquet, whose values `Document.columns` shall hold. A row without
            a value for one of them is a `BadRow`.

    Raises:
        DamagedFile: a damaged or truncated archive, Parquet file or index, or one that contradicts the file beside it.
            Documents may have come before.
        UserError: what other files may suffer from too: it is missing or may not be read, or has no such column.
    """
    try:
        if file.kind == "jsonl":
            yield from _read_jsonl(file, columns)
        elif file.kind == "parquet":
            yield from read_parquet(file.name, file.path, columns)
        elif columns:
            raise UserError(f"{file.path} is no table and has no column {columns[0]!r}: give JSONL or Parquet")
        elif file.kind == "megatron":
            yield from read_megatron(file.name, file.path)
        else:
            yield from _read_text(file)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DamagedFile(f"cannot read {file.path}: {error}") from error
    except OSError as error:
        raise UserError(f"cannot read {file.path}: {error}") from error


def _find_paths(argument: str) -> list[Path]:
    path = Path(argument)
    if path.is_dir():
        found = [child for child in _files_below(path) if _kind(child) and _is_whole(child)]
    elif path.is_file():
        found = [path]
    else:
        matches = [Path(match) for match in glob.glob(argument, recursive=True)]
        found = [match for match in matches if _is_file(match) and not _accompanies(match)]
    if not found:
        raise UserError(
            f"input {argument!r} is no file, no glob that matches, and no folder with {' '.join(_SUFFIXES)} files"
        )
    for file in found:
        if not file.exists():
            raise UserError(f"{file} is a link to {os.path.realpath(file)}, which does not exist: correct or delete it")
        if not _kind(file):
            raise UserError(f"cannot tell what {file} is: its name must end in {', '.join(_SUFFIXES)}")
        if not _is_whole(file):
            raise UserError(f"{file} needs {_other_half(file).name} beside it: a Megatron-LM data set is both files")
    pairs_once = [file.with_suffix(".bin") if file.suffix == ".idx" else file for file in found]
    return sorted(pairs_once, key=lambda path: (_natural(path), path))


def _files_below(folder: Path) -> Iterator[Path]:
    """All files, and links that lead nowhere; a folder that links lead to in several ways is searched once."""

    def refuse(error: OSError) -> None:
        raise UserError(f"cannot search {error.filename}: {error.strerror}") from error

    searched: set[str] = set()
    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        folders.sort()
        if (real := os.path.realpath(parent)) in searched:
            folders.clear()
            continue
        searched.add(real)
        yield from (path for name in names if _is_file(path := Path(parent, name)))


def _is_file(path: Path) -> bool:
    """Whether it is a file, or a link that leads nowhere (which must not be passed over)."""
    return path.is_file() or (path.is_symlink() and not path.exists())


def _natural(path: Path) -> list[list[str | int]]:
    """A sort key in which part-2 comes before part-10; re.split gives text and digits in turn."""
    pieces = [re.split(r"([0-9]+)", name) for name in path.parts]
    return [[int(piece) if place % 2 else piece for place, piece in enumerate(name)] for name in pieces]


def _other_half(path: Path) -> Path:
    return path.with_suffix(".bin" if path.suffix == ".idx" else ".idx")


def _is_whole(path: Path) -> bool:
    """False for one file of a Megatron-LM pair without the other."""
    return path.suffix not in (".bin", ".idx") or _other_half(path).is_file()


def _accompanies(path: Path) -> bool:
    """Whether a file is there for the sake of a shard beside it, as YuLan-Mini's tokeniser writes them."""
    return path.name.endswith(METADATA) and path.with_name(f"{path.name.removesuffix(METADATA)}.parquet").is_file()


def _kind(path: Path) -> str:
    return next((kind for suffix, kind in _SUFFIXES.items() if path.name.endswith(suffix)), "")


def _read_text(file: InputFile) -> Iterator[Document | BadRow]:
    try:
        text = file.path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        yield BadRow(file.name, f"not UTF-8 (byte {error.start})")
        return
    if file.kind == "chats":
        yield from (parse_row({"messages": messages}) for messages in corpus.read_chats(file.name, text))
    else:
        for part in corpus.read_docstrings(text) if file.kind == "docstrings" else [text]:
            yield Document(((part, True),))


def _read_jsonl(file: InputFile, columns: Sequence[str]) -> Iterator[Document | BadRow]:
    opened = gzip.open(file.path, "rb") if file.path.suffix == ".gz" else file.path.open("rb")
    with opened as lines:
        yield from parse_lines(file.name, lines, columns)
