"""Lines of JSON as documents; a large file in pieces, so that several processes can share it."""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from titan_yulan.data.rows import BadRow, Document, parse_row


def parse_lines(name: str, lines: Iterable[bytes], columns: Sequence[str] = ()) -> Iterator[Document | BadRow]:
    """A document for each line that is not blank.

    Not through a reader of blocks, which would lose the rows around a broken line, and its place.

    Args:
        name: what to call their source in a `BadRow` (followed by the line, from 1).
        lines: JSON objects in UTF-8; a byte order mark before one is passed over.
        columns: further keys whose values `Document.columns` shall hold.
    """
    for number, line in enumerate((line.removeprefix(BOM_UTF8) for line in lines), start=1):
        if not line.strip():
            continue
        try:
            yield parse_row(json.loads(line.decode("utf-8")), columns)
        except UnicodeDecodeError as error:
            yield BadRow(f"{name}:{number}", f"not UTF-8 (byte {error.start} of the line)")
        except json.JSONDecodeError as error:
            yield BadRow(f"{name}:{number}", f"not JSON ({error.msg} at column {error.colno})")
        except (ValueError, RecursionError) as error:
            yield BadRow(f"{name}:{number}", str(error))


def piece_lines(path: Path, start: int, end: int) -> Iterator[bytes]:
    """The lines of a file whose first byte is in [start, end): every line is in one of the pieces of a file."""
    with path.open("rb") as file:
        place = start
        if start:
            file.seek(start - 1)
            place += len(file.readline()) - 1
        while place < end and (line := file.readline()):
            yield line
            place += len(line)
