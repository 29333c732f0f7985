"""Adding columns to documents: each input file becomes one output file with the same rows and more columns.

    OUTPUT/NAME               the rows of input file NAME that gave a document, in order, with the new columns
    OUTPUT/.done/NAME.json    what it was made from, and the counts; written last

Parquet stays Parquet and JSONL stays JSONL, with all columns of a row; a document of any other kind becomes a line of
NAME.jsonl. A file is read and written in blocks of rows, appears whole, and is not made again. A column that is there
already is replaced.
"""

from __future__ import annotations

import functools
import gzip
import io
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, BinaryIO

from titan_yulan.data.documents import InputFile, read_documents
from titan_yulan.data.report import Say
from titan_yulan.data.rows import BadRow, Document
from titan_yulan.data.storage import explain_full_disk, locked, write_atomic
from titan_yulan.data.workers import ordered_map
from titan_yulan.errors import UserError

# The new columns of each document, or why it can have none.
Compute = Callable[[Sequence[Document]], list[dict[str, Any] | str]]

_BLOCK = 512  # rows
_ROW_GROUP = 1 << 26  # bytes of a Parquet row group, before compression
_SHOWN = 5
_SAY_EVERY = 10.0  # seconds


@dataclass(frozen=True)
class Job:
    """What is done to every file.

    request: all that decides the new columns, for JSON; an output that was made by another request is refused.
    compute, say: picklable where several processes share the files; `say` gets progress lines.
    """

    output: Path
    request: Mapping[str, Any]
    compute: Compute
    say: Say
    fail_on_bad_row: bool = False


@dataclass
class Counts:
    """What became of the rows of one or more files."""

    documents: int = 0
    bad_rows: int = 0
    empty: int = 0
    shown: list[str] = field(default_factory=list)

    def add(self, other: Counts) -> None:
        self.documents += other.documents
        self.bad_rows += other.bad_rows
        self.empty += other.empty
        self.shown = (self.shown + other.shown)[:_SHOWN]

    def __str__(self) -> str:
        skipped = f"; skipped: {self.bad_rows:,} bad rows, {self.empty:,} empty documents"
        return f"{self.documents:,} documents{skipped if self.bad_rows or self.empty else ''}"


class _Progress:
    """Lines for people, not too many."""

    def __init__(self, say: Say) -> None:
        self._say, self._said = say, time.perf_counter()

    def __call__(self, line: str) -> None:
        if time.perf_counter() - self._said > _SAY_EVERY:
            self._said = time.perf_counter()
            self._say(line)


def annotate(files: Sequence[InputFile], job: Job, workers: int) -> Counts:
    """Annotate every file of `documents.find_inputs`, in `workers` processes; says the total and the first bad rows.

    Raises:
        UserError: an input cannot be read, an output would replace an input, is of another request, or two inputs
            would have one output; with `fail_on_bad_row`, the first bad row.
        RunError: the disk is full, or a worker died.
    """
    targets = {file: job.output / _output_name(file) for file in files}
    inputs = {file.path.resolve() for file in files}
    for target in targets.values():
        if target.resolve() in inputs:
            raise UserError(f"--output {job.output}: {target} is an input and would be replaced; give another folder")
    if len(set(targets.values())) < len(files):
        names = sorted(str(target) for target in targets.values())
        twice = next(name for name, following in pairwise(names) if name == following)
        raise UserError(f"two inputs would be written to {twice}: give them separate outputs")
    total, there, progress, start = Counts(), 0, _Progress(job.say), time.perf_counter()
    with explain_full_disk(job.output):
        for number, (counts, is_new) in enumerate(
            ordered_map(functools.partial(_annotate_file, job), files, workers), start=1
        ):
            total.add(counts)
            there += not is_new
            progress(f"{job.output}: {number:,} of {len(files):,} files, {total.documents:,} documents")
    already = f" ({there:,} of the files were there already)" if there else ""
    job.say(f"{job.output}: {len(files):,} files, {total}, {time.perf_counter() - start:.1f} s{already}")
    for row in total.shown:
        job.say(f"    {row}")
    return total


def _annotate_file(job: Job, file: InputFile) -> tuple[Counts, bool]:
    """The counts of one file, and whether it was not there already."""
    target = job.output / _output_name(file)
    record = job.output / ".done" / f"{_output_name(file)}.json"
    for path in (target, record):
        path.parent.mkdir(parents=True, exist_ok=True)
    with locked(record.with_suffix(".lock"), job.say):
        made_from = {"request": dict(job.request), "bytes": file.path.stat().st_size}
        if target.exists() and record.exists():
            done = json.loads(record.read_bytes())
            _compare(target, record, done["made_from"], json.loads(json.dumps(made_from)))
            return Counts(**done["counts"]), False
        counts = Counts()
        write_atomic(target, functools.partial(_write, job, file, counts))
        content = json.dumps({"made_from": made_from, "counts": vars(counts)}).encode()
        write_atomic(record, lambda opened: opened.write(content))
        return counts, True


def _compare(target: Path, record: Path, done: dict[str, Any], asked: dict[str, Any]) -> None:
    """
    Raises:
        UserError: what is there was made from something else.
    """
    if done == asked:
        return
    old, new = ({"bytes": part["bytes"], **part["request"]} for part in (done, asked))
    changed = [f"{key} {old.get(key)!r} there, {new.get(key)!r} now" for key in new if old.get(key) != new.get(key)]
    raise UserError(
        f"{target} was made from something else ({'; '.join(changed)}): give another --output, or delete {record} to "
        "make it anew"
    )


def _output_name(file: InputFile) -> str:
    return file.name if file.kind in ("jsonl", "parquet") else f"{file.name}.jsonl"


def _write(job: Job, file: InputFile, counts: Counts, opened: BinaryIO) -> None:
    if file.kind == "parquet":
        _write_parquet(job, file, counts, opened)
    elif _output_name(file).endswith(".gz"):
        # no name and no time in the header: the same content has the same bytes
        with gzip.GzipFile("", "wb", fileobj=opened, mtime=0) as compressed:
            _write_jsonl(job, file, counts, compressed)
    else:
        _write_jsonl(job, file, counts, opened)


def _write_jsonl(job: Job, file: InputFile, counts: Counts, opened: BinaryIO | gzip.GzipFile) -> None:
    documents, progress = read_documents(file), _Progress(job.say)
    lines = _lines(file) if file.kind == "jsonl" else None
    while block := list(islice(documents, _BLOCK)):
        raw = list(islice(lines, len(block))) if lines is not None else [None] * len(block)
        for place, document, columns in _new_columns(job, file, block, counts):
            line = raw[place]
            row = _as_row(document) if line is None else json.loads(line)
            # half a surrogate pair in another column has no UTF-8, but an escape in JSON
            text = json.dumps(row | columns, ensure_ascii=False).encode(errors="backslashreplace")
            opened.write(text + b"\n")
        progress(f"{file.name}: {counts} so far")


def _write_parquet(job: Job, file: InputFile, counts: Counts, opened: BinaryIO) -> None:
    import pyarrow
    import pyarrow.parquet

    documents, progress = read_documents(file), _Progress(job.say)
    writer, waiting = None, []
    try:
        source = pyarrow.parquet.ParquetFile(file.path, pre_buffer=False, buffer_size=1 << 20)
        for batch in source.iter_batches(_BLOCK):
            if new := _new_columns(job, file, list(islice(documents, batch.num_rows)), counts):
                waiting.append(_extend(pyarrow.Table.from_batches([batch]), new))
            if sum(table.nbytes for table in waiting) > _ROW_GROUP:
                writer = writer or pyarrow.parquet.ParquetWriter(opened, waiting[0].schema)
                writer.write_table(pyarrow.concat_tables(waiting))
                waiting = []
            progress(f"{file.name}: {counts} so far")
        next(documents, None)  # what the reader checks at the end of a file
        writer = writer or pyarrow.parquet.ParquetWriter(opened, waiting[0].schema if waiting else source.schema_arrow)
        if waiting:
            writer.write_table(pyarrow.concat_tables(waiting))
    except pyarrow.ArrowException as error:
        raise UserError(f"cannot read {file.path} as Parquet: {error}") from error
    finally:
        if writer is not None:
            writer.close()


def _extend(table: Any, new: Sequence[tuple[int, Document, dict[str, Any]]]) -> Any:
    """The rows of an Arrow table that have new columns, with them."""
    import pyarrow

    table = table.take([place for place, _, _ in new])
    for name in new[0][2]:
        values = pyarrow.array([columns[name] for _, _, columns in new])
        there = table.column_names.index(name) if name in table.column_names else None
        table = table.append_column(name, values) if there is None else table.set_column(there, name, values)
    return table


def _new_columns(
    job: Job, file: InputFile, block: Sequence[Document | BadRow], counts: Counts
) -> list[tuple[int, Document, dict[str, Any]]]:
    """(place in the block, document, new columns) of those rows that have some; the others are counted."""
    documents: dict[int, Document] = {}
    reasons: list[str] = []
    for place, item in enumerate(block):
        if isinstance(item, BadRow):
            reasons.append(str(item))
        elif not (item.text if item.token_ids is None else len(item.token_ids)):
            counts.empty += 1
        else:
            documents[place] = item
    new: list[tuple[int, Document, dict[str, Any]]] = []
    results = job.compute(list(documents.values())) if documents else []
    for (place, document), result in zip(documents.items(), results, strict=True):
        if isinstance(result, str):
            reasons.append(f"{file.name}: {result}")
        else:
            new.append((place, document, result))
    if reasons and job.fail_on_bad_row:
        raise UserError(f"bad row {reasons[0]}")
    counts.add(Counts(len(new), len(reasons), 0, reasons[:_SHOWN]))
    return new


def _lines(file: InputFile) -> Iterator[bytes]:
    """The lines of a JSONL file that `read_documents` makes something of."""
    opened: io.BufferedIOBase = gzip.open(file.path, "rb") if file.path.suffix == ".gz" else file.path.open("rb")  # type: ignore[assignment]
    with opened:
        yield from (line for line in opened if line.strip())


def _as_row(document: Document) -> dict[str, Any]:
    return {"text": document.text} if document.token_ids is None else {"input_ids": document.token_ids.tolist()}
