"""Preparing: what is written, how it is ordered and divided, which rows are bad, what is refused."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.making import BYTES, EOS, content, documents, make, write_files
from titan_yulan.data import tokenise
from titan_yulan.data.inspect import inspect_source
from titan_yulan.data.source import Source, write_description
from titan_yulan.data.tape import Tape
from titan_yulan.errors import UserError


def test_every_document_is_stored_once_and_shuffled_across_shards(tmp_path: Path) -> None:
    inputs = write_files(tmp_path / "in")
    report = make(inputs, tmp_path / "out", shard_tokens=1000)
    source = Source.open(tmp_path / "out")
    stored = documents(source)
    expected = [f"document {file}.{row} " + "x" * (row % 7) for file in range(40) for row in range(10)]
    assert sorted(stored) == sorted(expected) and stored != expected
    first_shard = [text.split(".")[0] for text in stored[: source.shards[0].documents]]
    assert len(set(first_shard)) > 15  # the first of 8 shards has documents of files from everywhere
    assert (source.documents, source.tokens) == (400, sum(len(text) + 1 for text in expected))
    assert (report.documents, report.tokens, report.text_bytes) == (400, source.tokens, source.tokens - 400)
    assert 6 <= len(source.shards) <= 8 and source.dtype == np.uint16
    assert sorted(os.listdir(tmp_path)) == [".out.lock", "in", "out"]
    assert Tape(source, 0).read(0, source.tokens).document_ids[-1] == 399


def test_ordered_source_keeps_the_order(tmp_path: Path) -> None:
    inputs = write_files(tmp_path / "in", files=4)
    make(inputs, tmp_path / "out", shard_tokens=100, order="keep")
    source = Source.open(tmp_path / "out")
    expected = [f"document {file}.{row} " + "x" * (row % 7) for file in range(4) for row in range(10)]
    assert documents(source) == expected
    assert len(source.shards) > 3
    assert BYTES.decode(Tape(source, 5).read(0, 30).tokens.tolist()).startswith(
        expected[0] + "<|endoftext|>" + expected[1]
    )


def test_workers_do_not_change_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenise, "_GROUP_BYTES", 2000)
    inputs = write_files(tmp_path / "in")
    options = {"shard_tokens": 1000, "validation_share": 0.2}
    make(inputs, tmp_path / "a", validation_output=tmp_path / "av", **options)
    make(inputs, tmp_path / "b", validation_output=tmp_path / "bv", workers=2, **options)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert content(tmp_path / "av") == content(tmp_path / "bv")


def test_held_out_by_file_is_the_same_for_every_source(tmp_path: Path) -> None:
    inputs = write_files(tmp_path / "in")
    report = make(inputs, tmp_path / "out", validation_output=tmp_path / "val", validation_share=0.2)
    make(inputs, tmp_path / "out2", validation_output=tmp_path / "val2", validation_share=0.2, seed=9, order="keep")

    def files(name: str) -> set[str]:
        return {text.split(".")[0] for text in documents(Source.open(tmp_path / name))}

    assert files("val") and files("val").isdisjoint(files("out"))
    assert files("val") == files("val2") and files("out") == files("out2")
    assert 4 <= len(files("val")) <= 13
    assert report.documents + report.validation_documents == 400


def test_held_out_by_document_keeps_copies_together(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"text": f"text {row % 50}"} for row in range(200)]
    rows += [{"text": f"text{space}{row}"} for row in range(50) for space in " \u3000"]
    rows += [{"input_ids": [row, 1, *end]} for row in range(100) for end in ((), (EOS,))]
    (tmp_path / "one.jsonl").write_text("\n".join(map(json.dumps, rows)))
    make(str(tmp_path / "one.jsonl"), tmp_path / "out", validation_output=tmp_path / "val", validation_share=0.2)
    training, validation = documents(Source.open(tmp_path / "out")), documents(Source.open(tmp_path / "val"))
    assert len(training) + len(validation) == 500 and len(set(validation)) > 9
    assert set(training).isdisjoint(validation)


def test_held_out_tail_of_one_text(tmp_path: Path) -> None:
    text = "".join(f"line {line}\n" for line in range(100))
    (tmp_path / "book.txt").write_text(text)
    make(str(tmp_path / "book.txt"), tmp_path / "out", validation_output=tmp_path / "val", validation_share=0.1)
    (training,), (validation,) = documents(Source.open(tmp_path / "out")), documents(Source.open(tmp_path / "val"))
    assert training + validation == text
    assert validation.startswith("line 8") or validation.startswith("line 9")
    assert 60 <= len(validation) <= 100


def test_chat_masks_and_text_in_one_source(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "answer"}]}
    rows = [{"text": "plain one"}, chat, {"text": "plain two"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    make(str(tmp_path / "a.jsonl"), tmp_path / "out", order="keep")
    source = Source.open(tmp_path / "out")
    piece = Tape(source, 0).read(0, source.tokens)
    assert piece.loss_mask is not None
    trained = BYTES.decode(piece.tokens[piece.loss_mask].tolist())
    assert trained == "plain one<|endoftext|>answer<|endoftext|>plain two<|endoftext|>"


def test_token_ids_get_one_end_of_text_and_are_checked(tmp_path: Path) -> None:
    ids = [[1, 2], [3, EOS], [EOS + 1], [], [EOS]]
    rows = [{"input_ids": row} for row in ids]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    report = make(str(tmp_path / "a.jsonl"), tmp_path / "out", order="keep")
    assert Source.open(tmp_path / "out").shard_tokens(0).tolist() == [1, 2, EOS, 3, EOS]
    assert (report.bad_rows, report.empty_documents, report.text_bytes) == (1, 2, 0)
    assert "outside the vocabulary of 257" in report.shown_bad_rows[0]


def test_bad_rows_are_counted_or_fatal(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n' + "broken\n" * 9)
    report = make(str(tmp_path / "a.jsonl"), tmp_path / "out")
    assert (report.documents, report.bad_rows, len(report.shown_bad_rows)) == (1, 9, 5)
    assert any("a.jsonl:2: not JSON" in line for line in report.lines())
    with pytest.raises(UserError, match=r"a\.jsonl:2.*--on-bad-row skip"):
        make(str(tmp_path / "a.jsonl"), tmp_path / "strict", on_bad_row="fail")
    assert not (tmp_path / "strict").exists()


def test_other_content_in_the_way_is_refused(tmp_path: Path) -> None:
    inputs = write_files(tmp_path / "in", files=1)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="in the way"):
        make(inputs, tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["thesis.txt"]


def test_empty_parts_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": ""}')
    with pytest.raises(UserError, match="raise validation_share"):
        make(str(tmp_path / "a.jsonl"), tmp_path / "out", validation_output=tmp_path / "val", validation_share=1e-9)
    (tmp_path / "b.jsonl").write_text("broken")
    with pytest.raises(UserError, match="1 bad rows skipped"):
        make(str(tmp_path / "b.jsonl"), tmp_path / "out")


def test_what_cannot_be_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}')
    (tmp_path / "file").write_text("")
    out, sides = tmp_path / "out", {"validation_output": tmp_path / "val", "validation_share": 0.1}
    for wrong, message in (
        ({"validation_share": 0.1}, "both or neither"),
        ({**sides, "validation_output": out}, "must be apart"),
        ({**sides, "validation_output": out / "val"}, "must be apart"),
        ({**sides, "validation_output": tmp_path}, "must be apart"),
        ({**sides, "validation_output": tmp_path / "file" / "val"}, "cannot make .*file/val: "),
        ({**sides, "validation_share": 1.0}, "validation_share 1.0: at least 0 and below 1"),
        ({**sides, "validation_share": float("nan")}, "validation_share nan"),
        ({**sides, "validation_share": -0.1}, "validation_share -0.1"),
        ({"minimum_tokens": -1}, "minimum_tokens -1: at least 0"),
        ({"workers": 0}, "workers 0: at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            make(str(tmp_path / "a.jsonl"), out, **wrong)
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "file"]


def test_an_output_that_no_rename_can_replace_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}')
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    make(str(tmp_path / "a.jsonl"), tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and documents(Source.open(tmp_path / "link")) == ["one"]
    assert make(str(tmp_path / "a.jsonl"), tmp_path / "link").reused
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    make("../a.jsonl", Path("."))
    assert documents(Source.open(tmp_path / "here")) == ["one"]


def test_inspecting_a_split_and_what_another_program_wrote(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one", "topic": "math"}')
    make(str(tmp_path / "a.jsonl"), tmp_path / "out", split_by="topic")
    with pytest.raises(
        UserError, match=r"holds 1, one for each value of a column: name one of them, such as .*out/math"
    ):
        inspect_source(tmp_path / "out")
    write_description(replace(Source.open(tmp_path / "out" / "math"), made_from={}))
    assert "made from    something else than data prepare" in inspect_source(tmp_path / "out" / "math")
