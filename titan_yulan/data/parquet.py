"""Parquet files of text, chats or token ids, and YuLan-Mini's tokenised shards.

A shard is `splited_part-N.parquet` or `splitted_part-NNNN.parquet`, one list `input_ids` a row. Beside it may stand a
file of the same name with `-metadata.json` for `.parquet`, one entry a row:

    {"total_tokens_num": n, "metadata": [{"source": ..., "num_tokens": n}, ...]}

Its counts must be those of the rows, else the two do not belong together or one was cut short.
Source: the preprocessing scripts of github.com/RUC-GSAI/YuLan-Mini.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence, Sized
from pathlib import Path
from typing import Any

import numpy as np

from titan_yulan.data.rows import KEYS, BadRow, DamagedFile, Document, parse_row
from titan_yulan.errors import UserError

METADATA = "-metadata.json"
_ROWS = 100  # rows that are in memory at a time: a document may have megabytes
_BUFFER = 1 << 20  # bytes of each column's pages that are read at a time


def read_parquet(name: str, path: Path, columns: Sequence[str] = ()) -> Iterator[Document | BadRow]:
    """The documents of a Parquet file, a row each; only the columns that count are read.

    Args:
        name: what to call the file in a `BadRow` (followed by the row, from 1).
        path: the file.
        columns: further columns whose values `Document.columns` shall hold.

    Raises:
        DamagedFile: its content cannot be read, or the metadata file beside it cannot be read or has other counts.
        UserError: it cannot be opened, has no column that gives documents, or lacks one of `columns` or has it twice.
    """
    file = _open(path)
    there = file.schema_arrow.names
    _check_columns(path, there, columns)
    names = [column for column in there if column in KEYS or column in columns]
    expected = _expected_counts(path) if "input_ids" in names else None
    number = 0
    for batch in _batches(path, file, names):
        values = {column: _column_values(batch.column(column)) for column in names}
        if expected is not None:
            _check_counts(path, values["input_ids"], number, expected)
        for row in zip(*values.values(), strict=True):
            number += 1
            try:
                yield parse_row(dict(zip(names, row, strict=True)), columns)
            except ValueError as error:
                yield BadRow(f"{name}:{number}", str(error))
    if expected is not None and number != expected.size:
        raise DamagedFile(
            f"{path} has {number:,} rows, but {_metadata_of(path).name} counts {expected.size:,} documents"
        )


def _metadata_of(path: Path) -> Path:
    return path.with_name(path.stem + METADATA)


def _check_columns(path: Path, there: Sequence[str], columns: Sequence[str]) -> None:
    shown = ", ".join(map(repr, there[:8]))
    if not set(there) & set(KEYS):
        raise UserError(f"{path} has no column of documents, such as 'text' or 'input_ids': its columns are {shown}")
    if repeated := [name for name in there if there.count(name) > 1 and (name in KEYS or name in columns)]:
        raise UserError(f"{path} has several columns {repeated[0]!r}: rename them")
    missing = [column for column in columns if column not in there]
    if missing:
        raise UserError(f"{path} has no column {missing[0]!r}: its columns are {shown}")


def _expected_counts(path: Path) -> np.ndarray | None:
    """(rows,) tokens of each row by the metadata file, or None where there is none."""
    file = _metadata_of(path)
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_bytes())
        counts = np.array([entry["num_tokens"] for entry in content["metadata"]], np.int64)
        total = int(content["total_tokens_num"])
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise DamagedFile(
            f'{file} is damaged ({error!r}): it needs "total_tokens_num" and a list "metadata" of {{"num_tokens": n}}. '
            f"Correct it, or remove it to read {path.name} unchecked"
        ) from None
    if total != counts.sum():
        summed = counts.sum()
        raise DamagedFile(f"{file} contradicts itself: total_tokens_num is {total:,}, its entries sum to {summed:,}")
    return counts


def _check_counts(path: Path, rows: Sequence[Any], start: int, expected: np.ndarray) -> None:
    """Compare the lengths of some rows, from row `start`, with the metadata file."""
    lengths = np.array([len(ids) if isinstance(ids, Sized) else 0 for ids in rows], np.int64)
    counts = expected[start : start + lengths.size]
    differing = np.flatnonzero(lengths[: counts.size] != counts)
    if differing.size:
        row = int(differing[0])
        raise DamagedFile(
            f"{path}, row {start + row + 1}, has {lengths[row]:,} tokens, but {_metadata_of(path).name} counts "
            f"{counts[row]:,}: they do not belong together, or one of them is damaged"
        )


def _open(path: Path) -> Any:
    # Not through `datasets`, which reads with pyarrow too: for every file it leaves a lock in the cache folder and
    # reports the use to a server, and it imports torch into every worker (300 MB).
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"reading {path} needs the package pyarrow: pip install pyarrow") from error
    try:
        # Buffered, else the whole row group would be in memory: it may be the whole file.
        return pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER)
    except (pyarrow.ArrowException, OSError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> UserError:
    elsewhere = isinstance(error, MemoryError) or getattr(error, "errno", None) is not None
    return (UserError if elsewhere else DamagedFile)(f"cannot read {path} as Parquet: {error}")


def _batches(path: Path, file: Any, columns: Sequence[str]) -> Iterator[Any]:
    """Arrow batches of at most `_ROWS` rows with these columns."""
    import pyarrow

    try:
        yield from file.iter_batches(_ROWS, columns=list(columns), use_threads=False)
    except (pyarrow.ArrowException, OSError) as error:
        raise _unreadable(path, error) from error


def _column_values(column: Any) -> list[Any]:
    """Python values of an Arrow column; lists of numbers stay numpy arrays (ten times faster than lists)."""
    import pyarrow.types as types

    kind = column.type
    if (types.is_list(kind) or types.is_large_list(kind)) and types.is_integer(kind.value_type):
        return [value.values.to_numpy(zero_copy_only=False) if value.is_valid else None for value in column]
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_cell_value(cell) for cell in column]


def _cell_value(cell: Any) -> Any:
    """The value of a cell, or the bytes of a string that is no UTF-8: `parse_row` refuses these."""
    try:
        return cell.as_py()
    except UnicodeDecodeError as error:
        return error.object
