"""Files with more columns: what becomes of damaged, empty and unfit input."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from titan_yulan.data import annotate as annotate_module
from titan_yulan.data.annotate import Counts, Job, annotate
from titan_yulan.data.documents import find_inputs, read_documents
from titan_yulan.data.rows import Document
from titan_yulan.errors import UserError


def measure(documents: Sequence[Document]) -> list[dict[str, Any] | str]:
    """The length of a text; a text of more than 100 characters is refused."""
    lengths = [len(document.text) if document.token_ids is None else -1 for document in documents]
    return [{"length": length} if length <= 100 else "too long" for length in lengths]


def run(inputs: Path | list[Path], output: Path, said: list[str] | None = None, **options: Any) -> Counts:
    files = find_inputs([str(path) for path in ([inputs] if isinstance(inputs, Path) else inputs)])
    say = said.append if said is not None else lambda line: None
    return annotate(files, Job(output, {"rule": 1}, measure, say, **options), workers=1)


def test_an_existing_column_is_replaced_and_a_refused_row_left_out(tmp_path: Path) -> None:
    half_a_pair = "\ud800"  # which no UTF-8 has
    rows = [{"text": "abc", "length": "old"}, {"text": "x" * 101}, {"input_ids": [4, 5], "note": half_a_pair}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    said: list[str] = []
    counts = run(tmp_path / "a.jsonl", tmp_path / "out", said)
    assert (counts.documents, counts.bad_rows) == (2, 1) and said[1] == "    a.jsonl: too long"
    written = [json.loads(line) for line in (tmp_path / "out" / "a.jsonl").read_text().splitlines()]
    assert written == [{"text": "abc", "length": 3}, {"input_ids": [4, 5], "note": half_a_pair, "length": -1}]
    with pytest.raises(UserError, match=r"bad row a\.jsonl: too long"):
        run(tmp_path / "a.jsonl", tmp_path / "other", fail_on_bad_row=True)
    assert not (tmp_path / "other" / "a.jsonl").exists()


def test_a_parquet_file_without_good_rows_gives_one_without_rows(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": ["", None, "y" * 200], "id": [1, 2, 3]}), tmp_path / "a.parquet")
    counts = run(tmp_path / "a.parquet", tmp_path / "out")
    assert (counts.documents, counts.bad_rows, counts.empty) == (0, 2, 1)
    [file] = find_inputs([str(tmp_path / "out")])
    assert list(read_documents(file)) == []


def test_a_parquet_file_is_written_in_large_groups_and_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"{i:04d}" * 20 for i in range(3000)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    for size, groups in ((1 << 26, 1), (100_000, 2)):
        monkeypatch.setattr(annotate_module, "_ROW_GROUP", size)
        run(tmp_path / "a.parquet", tmp_path / str(size))
        written = pyarrow.parquet.ParquetFile(tmp_path / str(size) / "a.parquet")
        assert written.num_row_groups == groups and written.read()["text"].to_pylist() == texts
        assert set(written.read()["length"].to_pylist()) == {80}


def test_a_metadata_file_that_counts_more_rows_is_named(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"input_ids": [[1, 2], [3]]}), tmp_path / "part-1.parquet")
    entries = [{"num_tokens": 2}, {"num_tokens": 1}, {"num_tokens": 4}]
    metadata = json.dumps({"total_tokens_num": 7, "metadata": entries})
    (tmp_path / "part-1-metadata.json").write_text(metadata)
    with pytest.raises(UserError, match=r"2 rows, but .* counts 3 documents"):
        run(tmp_path / "part-1.parquet", tmp_path / "out")
    assert not (tmp_path / "out" / "part-1.parquet").exists()


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.parquet"])
def test_a_truncated_file_is_named_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    path, table = tmp_path / name, pyarrow.table({"text": [str(i) for i in range(3000)]})
    if name.endswith("gz"):
        path.write_bytes(gzip.compress(b'{"text": "one"}\n' * 3000))
    else:
        pyarrow.parquet.write_table(table, path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=f"cannot read .*{name}"):
        run(path, tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == [".done"]
    assert list((tmp_path / "out" / ".done").glob("*.json")) == []


def test_an_archive_has_the_same_bytes_every_time(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "one"}\n' * 600))
    for output in ("first", "second"):
        run(tmp_path / "a.jsonl.gz", tmp_path / output)
    first, second = ((tmp_path / output / "a.jsonl.gz").read_bytes() for output in ("first", "second"))
    assert first == second and gzip.decompress(first) == b'{"text": "one", "length": 3}\n' * 600


def test_two_inputs_never_share_an_output(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "a.txt.jsonl").write_text('{"text": "row"}')
    with pytest.raises(UserError, match=r"two inputs would be written to .*a\.txt\.jsonl"):
        run(tmp_path, tmp_path / "out")
