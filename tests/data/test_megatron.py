"""Megatron-LM's .bin/.idx: against a writer of our own that follows the public format, and every kind of damage."""

from __future__ import annotations

import itertools
import json
import struct
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data.making import EOS, make
from titan_yulan.data.documents import BadRow, Document, find_inputs, read_documents
from titan_yulan.data.rows import DamagedFile
from titan_yulan.data.source import Source
from titan_yulan.errors import UserError

# as in megatron/core/datasets/indexed_dataset.py of github.com/NVIDIA/Megatron-LM
CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "float64": 6, "float32": 7, "uint16": 8}


def write(prefix: Path, documents: list[list[list[int]]], dtype: str = "int32", modes: bool = False) -> None:
    """Documents of sequences of ids, one struct at a time."""
    sequences = [sequence for document in documents for sequence in document]
    size = np.dtype(dtype).itemsize
    with Path(f"{prefix}.bin").open("wb") as file:
        for sequence in sequences:
            file.write(np.array(sequence, dtype).tobytes())
    with Path(f"{prefix}.idx").open("wb") as file:
        file.write(b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", CODES[dtype]))
        file.write(struct.pack("<QQ", len(sequences), len(documents) + 1))
        for sequence in sequences:
            file.write(struct.pack("<i", len(sequence)))
        place = 0
        for sequence in sequences:
            file.write(struct.pack("<q", place))
            place += len(sequence) * size
        first = 0
        file.write(struct.pack("<q", 0))
        for document in documents:
            first += len(document)
            file.write(struct.pack("<q", first))
        if modes:
            file.write(bytes(len(sequences)))


def read(path: Path) -> list[list[int] | str]:
    found: list[list[int] | str] = []
    for file in find_inputs([str(path)]):
        for document in read_documents(file):
            if isinstance(document, BadRow):
                found.append(str(document))
            else:
                assert document.token_ids is not None
                found.append(document.token_ids.tolist())
    return found


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "int32", "int64", "uint16"])
@pytest.mark.parametrize("modes", [False, True])
def test_every_type_of_ids(tmp_path: Path, dtype: str, modes: bool) -> None:
    documents = [[[1, 2, 3]], [[4], [5, 6], []], [], [[127]]]
    write(tmp_path / "corpus.text_document", documents, dtype, modes)
    joined = [list(itertools.chain(*document)) for document in documents]
    for suffix in (".bin", ".idx"):
        assert read(tmp_path / f"corpus.text_document{suffix}") == joined
    assert read(tmp_path) == joined  # once, though both files match
    assert read(tmp_path / "*") == joined


IDS = st.lists(st.integers(0, 2**16 - 1), max_size=5)


@given(st.lists(st.lists(IDS, max_size=4), max_size=8))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_document_comes_back(tmp_path: Path, documents: list[list[list[int]]]) -> None:
    write(tmp_path / "x", documents, "uint16")
    assert read(tmp_path / "x.bin") == [list(itertools.chain(*document)) for document in documents]


def test_both_files_decide_the_content(tmp_path: Path) -> None:
    write(tmp_path / "x", [[[1]]])
    (file,) = find_inputs([str(tmp_path / "x.idx")])
    assert (file.name, file.kind) == ("x.bin", "megatron")
    assert file.paths == (tmp_path / "x.bin", tmp_path / "x.idx")


def test_one_file_without_the_other(tmp_path: Path) -> None:
    write(tmp_path / "x", [[[1]]])
    (tmp_path / "x.idx").unlink()
    with pytest.raises(UserError, match=r"x\.bin needs x\.idx beside it"):
        find_inputs([str(tmp_path / "x.bin")])
    (tmp_path / "a.txt").write_text("text")
    assert [file.name for file in find_inputs([str(tmp_path)])] == ["a.txt"]


def test_negative_ids_are_bad_rows(tmp_path: Path) -> None:
    write(tmp_path / "x", [[[1]], [[2, -3]], [[4]]])
    assert read(tmp_path / "x.bin") == [[1], "x.bin:2: the document holds the negative id -3", [4]]


def patch(path: Path, place: int, value: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[place : place + len(value)] = value
    path.write_bytes(content)


# lengths begin at 34, pointers at 34 + 4 x 3, document indices at 34 + 12 x 3
@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, b"TNTIDX", "does not begin with MMIDIDX"),
        (9, struct.pack("<Q", 2), "version 2"),
        (17, bytes([7]), "type code 7"),
        (17, bytes([99]), "type code 99"),
        (17, bytes([8]), "do not stand one after the other"),
        (18, struct.pack("<Q", 4), "damaged or cut short"),
        (18, struct.pack("<Q", 2**60), "damaged or cut short"),
        (34, struct.pack("<i", 3), "one after the other"),
        (42, struct.pack("<i", 7), "has 20 bytes, but its index x.idx describes 40"),
        (46, struct.pack("<q", 4), "one after the other"),
        (70, struct.pack("<q", 1), "do not go from 0"),
        (78, struct.pack("<q", 5), "do not increase"),
        (86, struct.pack("<q", 1), "do not go from 0"),
    ],
)
def test_a_damaged_index_is_named(tmp_path: Path, place: int, value: bytes, message: str) -> None:
    write(tmp_path / "x", [[[1, 2]], [[3], [4, 5]]])
    patch(tmp_path / "x.idx", place, value)
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path / "x.bin")
    assert "x.idx" in str(caught.value)


@pytest.mark.parametrize(("name", "kept"), [("x.idx", 0), ("x.idx", 20), ("x.idx", 60), ("x.bin", 0), ("x.bin", 18)])
def test_a_truncated_file_is_named(tmp_path: Path, name: str, kept: int) -> None:
    write(tmp_path / "x", [[[1, 2]], [[3], [4, 5]]])
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:kept])
    with pytest.raises(DamagedFile, match=name.replace(".", r"\.")):
        read(tmp_path / "x.bin")


def test_a_large_file_is_mapped_not_read(tmp_path: Path) -> None:
    """Documents at the start of a sparse file of 16 GiB, more than this machine would read in the time of a test."""
    count, length = 1024, 1 << 22
    lengths = np.full(count, length, "<i4")
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 4, count, count + 1)
    pointers = np.arange(count, dtype="<i8") * length * 4
    index = header + lengths.tobytes() + pointers.tobytes() + np.arange(count + 1, dtype="<i8").tobytes()
    (tmp_path / "x.idx").write_bytes(index)
    with (tmp_path / "x.bin").open("wb") as file:
        file.truncate(count * length * 4)
    (file,) = find_inputs([str(tmp_path / "x.bin")])
    document = next(read_documents(file))
    assert isinstance(document, Document) and document.token_ids is not None
    assert document.token_ids.shape == (length,) and not document.token_ids.any()


def test_every_tokenised_input_gives_the_same_source(tmp_path: Path) -> None:
    """JSONL rows, Parquet shards and indexed data sets of the same ids, through all of preparing."""
    random = np.random.default_rng(0)
    documents = [random.integers(0, EOS, int(length)).tolist() for length in random.integers(1, 60, 300)]
    parts = [documents[:120], documents[120:130], documents[130:]]
    for number, part in zip((1, 2, 10), parts, strict=True):
        for kind in ("jsonl", "parquet", "megatron"):
            (tmp_path / kind).mkdir(exist_ok=True)
        lines = [json.dumps({"input_ids": ids}) for ids in part]
        (tmp_path / "jsonl" / f"part-{number}.jsonl").write_text("\n".join(lines))
        table = pyarrow.table({"input_ids": part})
        pyarrow.parquet.write_table(table, tmp_path / "parquet" / f"splited_part-{number}.parquet")
        write(tmp_path / "megatron" / f"part-{number}", [[ids[:7], ids[7:]] for ids in part], "uint16")
    reports = [make(str(tmp_path / kind), tmp_path / f"out-{kind}") for kind in ("jsonl", "parquet", "megatron")]
    sources = [Source.open(tmp_path / f"out-{kind}") for kind in ("jsonl", "parquet", "megatron")]
    assert len({source.fingerprint for source in sources}) == 1
    assert [report.documents for report in reports] == [300] * 3
    assert sources[0].tokens == sum(len(ids) + 1 for ids in documents)
