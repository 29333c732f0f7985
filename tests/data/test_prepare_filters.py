"""What preparing leaves out or changes, how it counts it, and what a damaged file does."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from tests.data.making import BYTES, EOS, documents, make
from titan_yulan.data.inspect import inspect_source
from titan_yulan.data.prepare import prepare
from titan_yulan.data.source import Source
from titan_yulan.errors import UserError


def write_lines(path: Path, rows: list[Any]) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def write_parquet(path: Path, columns: dict[str, list[Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=100, compression="none")


def test_short_documents_are_left_out_by_default(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]  # longer than 20 as text
    rows = [{"text": "x" * 19}, {"text": "x" * 20}, {"input_ids": [1] * 19 + [EOS]}, {"messages": chat}]
    inputs = write_lines(tmp_path / "a.jsonl", rows)
    report = prepare("test", [inputs], tmp_path / "out", BYTES, order="keep", workers=1, say=lambda line: None)
    assert (report.documents, report.short_documents) == (2, 2)
    assert documents(Source.open(tmp_path / "out"))[0] == "x" * 20
    assert "  skipped: 2 short documents" in report.lines()
    with pytest.raises(UserError, match=r"2 short documents skipped.*lower minimum_tokens \(now 99\)"):
        make(write_lines(tmp_path / "b.jsonl", rows[:2]), tmp_path / "none", minimum_tokens=99)


def test_held_out_documents_are_filtered_too(tmp_path: Path) -> None:
    inputs = write_lines(tmp_path / "a.jsonl", [{"text": f"{row:03d}" * (1 + row % 2)} for row in range(200)])
    sides = {"validation_output": tmp_path / "val", "validation_share": 0.3}
    report = make(inputs, tmp_path / "out", minimum_tokens=4, **sides)
    assert (report.short_documents, report.documents + report.validation_documents) == (100, 100)
    assert all(len(text) == 6 for side in ("out", "val") for text in documents(Source.open(tmp_path / side)))


def test_of_equal_documents_the_first_stays_on_whatever_side(tmp_path: Path) -> None:
    rows = [{"text": f"text {row % 30}"} for row in range(90)] + [{"text": f"only {row}"} for row in range(10)]
    inputs = [write_lines(tmp_path / "in" / f"{part}.jsonl", rows[part * 5 : part * 5 + 5]) for part in range(20)]
    sides = {"validation_output": tmp_path / "val", "validation_share": 0.3, "order": "keep"}
    report = make(inputs, tmp_path / "out", deduplicate=True, **sides)
    training, validation = documents(Source.open(tmp_path / "out")), documents(Source.open(tmp_path / "val"))
    assert sorted(training + validation) == sorted({row["text"] for row in rows})
    assert report.duplicate_documents == 60
    assert Source.open(tmp_path / "out").text_bytes == sum(map(len, training))
    # input order within each side: the first copies
    first = {row["text"]: place for place, row in reversed(list(enumerate(rows)))}
    assert [first[text] for text in training] == sorted(first[text] for text in training)
    made_from = Source.open(tmp_path / "val").made_from
    assert (made_from["deduplicate"], made_from["duplicate_documents"]) == (True, 60)


def test_equal_text_with_another_mask_is_another_document(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"messages": chat}, {"text": "### User\n\na\n\n### Assistant\n\nb"}, {"messages": chat}]
    assert make(write_lines(tmp_path / "a.jsonl", rows), tmp_path / "out", deduplicate=True).documents == 2


def test_ideographic_spaces_become_plain(tmp_path: Path) -> None:
    rows = [{"text": "一\u3000二\u3000"}, {"text": "一 二 "}, {"text": "三"}]
    report = make(write_lines(tmp_path / "a.jsonl", rows), tmp_path / "out", order="keep", deduplicate=True)
    assert documents(Source.open(tmp_path / "out")) == ["一 二 ", "三"]
    assert (report.ideographic_spaces, report.duplicate_documents) == (1, 1)
    assert report.lines()[-1] == "  ideographic spaces (U+3000) made plain in 1 documents"


def test_a_parquet_file_with_bad_rows_and_a_cut_one(tmp_path: Path) -> None:
    good = [f"good document {row}" for row in range(200)]
    write_parquet(tmp_path / "in" / "a.parquet", {"text": [*good[:50], None, "", *good[50:100]]})
    write_parquet(tmp_path / "in" / "b.parquet", {"text": good})
    whole = (tmp_path / "in" / "b.parquet").read_bytes()
    (tmp_path / "in" / "b.parquet").write_bytes(whole[: len(whole) // 2])
    write_parquet(tmp_path / "in" / "c.parquet", {"text": good[100:]})
    report = make(str(tmp_path / "in"), tmp_path / "out", order="keep")
    assert documents(Source.open(tmp_path / "out")) == good
    lines = report.lines()
    assert "  skipped: 1 bad rows, 1 bad files, 1 empty documents" in lines
    assert [line for line in lines if "b.parquet: cannot read" in line] and "a.parquet:51" in lines[-1]
    assert Source.open(tmp_path / "out").made_from["bad_files"] == list(report.bad_files)
    with pytest.raises(UserError, match=r"no document.*1 bad files skipped; b\.parquet: cannot read"):
        make(str(tmp_path / "in" / "b.parquet"), tmp_path / "none")
    (tmp_path / "in" / "a.parquet").unlink()
    with pytest.raises(UserError, match=r"b\.parquet.*--on-bad-row skip"):
        make(str(tmp_path / "in"), tmp_path / "strict", on_bad_row="fail")


def test_a_bad_row_of_a_large_file_is_found_by_byte_and_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("titan_yulan.data.tokenise._PIECE_BYTES", 100)
    rows = [json.dumps({"text": f"document {row:02d}"}) for row in range(12)]  # 23 bytes and a line feed each
    lines = [*rows[:9], "broken", *rows[9:11], json.dumps({"input_ids": [EOS + 1]})]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    report = make(str(tmp_path / "a.jsonl"), tmp_path / "out", order="keep")
    assert documents(Source.open(tmp_path / "out")) == [f"document {row:02d}" for row in range(11)]
    assert "a.jsonl, from byte 200:1: not JSON" in report.shown_bad_rows[0]
    assert "a.jsonl, from byte 200, document 4: 'input_ids' holds 257" in report.shown_bad_rows[1]


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_nothing_of_a_damaged_archive_enters(tmp_path: Path, damage: str) -> None:
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    rows = [{"text": f"document {row} " + "x" * (row * 7919 % 300)} for row in range(9000)] + [chat]
    damaged = bytearray(gzip.compress("\n".join(map(json.dumps, [chat, *rows, {"bad": 1}])).encode(), mtime=0))
    if damage == "cut":
        del damaged[-2000:]
    else:
        damaged[len(damaged) // 2 :] = bytes(byte ^ 0x55 for byte in damaged[len(damaged) // 2 :])
    write_lines(tmp_path / "in" / "a.jsonl", [{"text": "before"}])
    (tmp_path / "in" / "b.jsonl.gz").write_bytes(damaged)
    write_lines(tmp_path / "in" / "c.jsonl", [{"text": "after"}, {"text": "more"}])
    report = make(str(tmp_path / "in"), tmp_path / "out", order="keep", deduplicate=True)
    source = Source.open(tmp_path / "out")
    assert documents(source) == ["before", "after", "more"]
    assert not source.has_loss_mask and (report.bad_rows, report.text_bytes) == (0, 15)
    assert len(report.bad_files) == 1 and report.bad_files[0].startswith("b.jsonl.gz: cannot read")


def test_a_file_that_may_not_be_read_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from titan_yulan.data import documents as reading

    def refused(*arguments: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    inputs = write_lines(tmp_path / "a.jsonl", [{"text": "a"}])
    monkeypatch.setattr(reading, "_read_jsonl", refused)
    with pytest.raises(UserError, match="Permission denied"):
        make(inputs, tmp_path / "out")


@pytest.mark.parametrize(
    ("order", "told"),
    [("shuffle", "shuffled"), ("keep", "kept in order"), ("score", "score from low"), ("-score", "score from high")],
)
def test_inspect_says_the_order(tmp_path: Path, order: str, told: str) -> None:
    make(write_lines(tmp_path / "a.jsonl", [{"text": "a", "score": 1}]), tmp_path / "out", order=order)
    assert told in "\n".join(inspect_source(tmp_path / "out"))


def test_values_that_cannot_be_sorted_are_bad_rows(tmp_path: Path) -> None:
    scores = [2, "high", None, float("nan"), True, 10**400, [1], 1]
    rows = [{"text": f"row {place}", "score": score} for place, score in enumerate(scores)] + [{"text": "no score"}]
    report = make(write_lines(tmp_path / "a.jsonl", rows), tmp_path / "out", order="score")
    assert documents(Source.open(tmp_path / "out")) == ["row 7", "row 0"]
    assert report.bad_rows == 7 and "'high', not a number" in report.shown_bad_rows[0]
    rows = [{"text": "long", "date": "x" * 65}, {"text": "b", "date": "b"}, {"text": "a", "date": "a"}]
    report = make(write_lines(tmp_path / "b.jsonl", rows), tmp_path / "dates", order="date")
    assert (documents(Source.open(tmp_path / "dates")), report.bad_rows) == (["a", "b"], 1)
    mixed = [write_lines(tmp_path / "c.jsonl", [{"text": "a", "date": 3}]), str(tmp_path / "b.jsonl")]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="numbers in some files and strings"):
        patch.setattr("titan_yulan.data.tokenise._GROUP_BYTES", 1)
        make(mixed, tmp_path / "mixed", order="date")


def test_split_by_a_column(tmp_path: Path) -> None:
    rows = [{"text": f"text {row}", "topic": ["math", "code", 7][row % 3]} for row in range(300)]
    inputs = write_lines(tmp_path / "a.jsonl", [*rows, {"text": "bad", "topic": 1.5}, {"text": "bad", "topic": None}])
    sides = {"validation_output": tmp_path / "val", "validation_share": 0.1}
    report = make(inputs, tmp_path / "out", split_by="topic", **sides)
    sources = {path.name: Source.open(path) for path in (tmp_path / "out").iterdir()}
    assert sorted(sources) == sorted(path.name for path in (tmp_path / "val").iterdir()) == ["7", "code", "math"]
    for name, source in sources.items():
        assert source.name == f"test/{name}" and source.made_from["value"] == name
        training, validation = report.values[name]
        assert (training.documents, training.tokens) == (source.documents, source.tokens)
        assert training.documents + validation.documents == 100
    assert report.bad_rows == 2
    assert [line.split(":")[0].strip() for line in report.lines()[2:5]] == ["7", "code", "math"]
    assert make(inputs, tmp_path / "out", split_by="topic", **sides).reused
    with pytest.raises(UserError, match="delete the folder"):
        make(inputs, tmp_path / "out", split_by="topic", seed=1, **sides)
    with pytest.raises(UserError, match="in the way"):
        make(inputs, tmp_path / "out", **sides)


@pytest.mark.parametrize("value", ["../up", "", ".hidden", "a/b", "x" * 61, "end "])
def test_values_that_name_no_folder_stop_the_work(tmp_path: Path, value: str) -> None:
    inputs = write_lines(tmp_path / "a.jsonl", [{"text": "a", "topic": value}])
    with pytest.raises(UserError, match="cannot name a folder"):
        make(inputs, tmp_path / "out", split_by="topic")
    assert not (tmp_path / "out").exists()


def test_too_many_values_stop_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [write_lines(tmp_path / "in" / f"{n}.jsonl", [{"text": "a", "topic": n}]) for n in range(4)]
    monkeypatch.setattr("titan_yulan.data.unit._MOST_VALUES", 3)
    for size in (2**20, 1):  # all in one group; each in its own
        monkeypatch.setattr("titan_yulan.data.tokenise._GROUP_BYTES", size)
        with pytest.raises(UserError, match="more than 3 values"):
            make(inputs, tmp_path / "out", split_by="topic")


def test_an_order_needs_a_name(tmp_path: Path) -> None:
    inputs = write_lines(tmp_path / "a.jsonl", [{"text": "a"}])
    for order in ("", "-"):
        with pytest.raises(UserError, match="none of shuffle, keep"):
            make(inputs, tmp_path / "out", order=order)
