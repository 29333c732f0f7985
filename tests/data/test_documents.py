"""Reading inputs: every format, every kind of bad row, and where it is."""

from __future__ import annotations

import gzip
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from titan_yulan.data import corpus
from titan_yulan.data.documents import BadRow, Document, find_inputs, read_documents
from titan_yulan.data.rows import DamagedFile, parse_row
from titan_yulan.errors import UserError


def read(path: Path | str) -> list[Document | BadRow]:
    return [document for file in find_inputs([str(path)]) for document in read_documents(file)]


def texts(path: Path | str) -> list[str]:
    return [document.text if isinstance(document, Document) else str(document) for document in read(path)]


def test_plain_text_is_one_document_a_file(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("two\n\nparagraphs")
    (tmp_path / "a.md").write_text("# title")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.txt").write_bytes(b"ok \xff")
    (tmp_path / "ignored.bin").write_bytes(b"x")
    assert texts(tmp_path) == ["# title", "two\n\nparagraphs", "sub/c.txt: not UTF-8 (byte 3)"]
    assert texts(str(tmp_path / "*.txt")) == ["two\n\nparagraphs"]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_jsonl_names_every_bad_line(tmp_path: Path, suffix: str) -> None:
    lines = [b'{"text": "one"}', b"{broken", b"", b'{"title": "x"}', b'{"text": 5}', b'{"text": "\xff"}', b"[1]"]
    lines += [b'{"text": "\\ud800"}', b'{"text": "last", "other": {}}', b'{"text": null}', b"[" * 100_000]
    path = tmp_path / f"a{suffix}"
    path.write_bytes(gzip.compress(b"\n".join(lines)) if suffix.endswith("gz") else b"\n".join(lines))
    read_back = texts(path)
    assert [text for text in read_back if not text.startswith("a.")] == ["one", "last"]
    reasons = {int(text.split(":")[1]): text for text in read_back if text.startswith("a.")}
    assert list(reasons) == [2, 4, 5, 6, 7, 8, 10, 11]
    words = {2: "not JSON", 4: "'title'", 5: "int", 6: "not UTF-8", 7: "not an object", 8: "surrogate"}
    for line, word in words.items():
        assert word in reasons[line]


def test_parquet_text_and_token_ids(tmp_path: Path) -> None:
    rows = 1500  # more than one batch
    table = pyarrow.table({"text": [None if row == 1200 else f"t{row}" for row in range(rows)], "id": range(rows)})
    pyarrow.parquet.write_table(table, tmp_path / "text.parquet")
    read_back = texts(tmp_path / "text.parquet")
    assert (len(read_back), read_back[0], read_back[-1]) == (rows, "t0", "t1499")
    assert read_back[1200].startswith("text.parquet:1201: none of the keys")
    ids = pyarrow.array([[1, 2, 3], [], None, [7, -1]], pyarrow.list_(pyarrow.int32()))
    pyarrow.parquet.write_table(pyarrow.table({"input_ids": ids}), tmp_path / "ids.parquet")
    documents = read(tmp_path / "ids.parquet")
    assert [d.token_ids.tolist() for d in documents if isinstance(d, Document) and d.token_ids is not None] == [
        [1, 2, 3],
        [],
    ]
    assert [str(d) for d in documents if isinstance(d, BadRow)][
        1
    ] == "ids.parquet:4: 'input_ids' holds the negative id -1"


def test_parquet_with_other_columns_only_or_one_twice(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x", "y"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet has no column of documents.* its columns are 'body'"):
        read(tmp_path / "a.parquet")
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match="has several columns 'text'"):
        read(tmp_path / "a.parquet")


def test_whole_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    whole = gzip.compress("".join(f'{{"text": "{number**7}"}}\n' for number in range(5000)).encode())
    (tmp_path / "b.jsonl.gz").write_bytes(whole[:-9])
    (tmp_path / "c.jsonl.gz").write_bytes(whole[:9000] + bytes(99) + whole[9099:])
    (tmp_path / "d.jsonl.gz").write_bytes(b'{"text": "x"}')
    for name in ("a.parquet", "b.jsonl.gz", "c.jsonl.gz", "d.jsonl.gz"):
        with pytest.raises(DamagedFile, match=name):
            read(tmp_path / name)


def test_chat_trains_on_answers_only() -> None:
    messages = [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "3+3?"},
        {"role": "assistant", "content": "6"},
    ]
    document = parse_row({"messages": messages})
    assert document.text == "### User\n\n2+2?\n\n### Assistant\n\n4\n\n### User\n\n3+3?\n\n### Assistant\n\n6"
    assert [part for part, trained in document.parts if trained] == ["4\n\n", "6"]
    assert document.parts[0] == ("### User\n\n2+2?\n\n### Assistant\n\n", False)


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "hello",
        [{"role": "user", "content": "only a question"}],
        [{"role": "robot", "content": "x"}],
        [{"role": "assistant"}],
        [{"role": "assistant", "content": 3}],
        ["x"],
    ],
)
def test_broken_chats_are_bad_rows(messages: object) -> None:
    with pytest.raises(ValueError):
        parse_row({"messages": messages})


@pytest.mark.parametrize("ids", ["abc", [1.5], [[1], [2]], [[1], [2, 3]], [True], 7])
def test_broken_token_ids_are_bad_rows(ids: object) -> None:
    with pytest.raises(ValueError, match="input_ids"):
        parse_row({"input_ids": ids})


def test_names_are_independent_of_the_place(tmp_path: Path) -> None:
    for root in ("x", "y/z"):
        folder = tmp_path / root / "sub"
        folder.mkdir(parents=True)
        (folder / "a.txt").write_text("a")
        (folder.parent / "b.txt").write_text("b")
    names = [[file.name for file in find_inputs([str(tmp_path / root)])] for root in ("x", "y/z")]
    assert names == [["b.txt", "sub/a.txt"]] * 2


def test_order_is_that_of_the_arguments_and_repeats_count_once(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.txt").write_text(name)
    arguments = [str(tmp_path / "c.txt"), str(tmp_path / "[ab].txt"), str(tmp_path)]
    assert [file.name for file in find_inputs(arguments)] == ["c.txt", "a.txt", "b.txt"]


def test_links_are_followed_and_their_ends_count_once(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "b.txt").write_text("far")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("near")
    for link, end in (("c.txt", "a.txt"), ("far", "../far"), ("far2", "../far"), ("loop", ".")):
        (tmp_path / "in" / link).symlink_to(end)
    assert texts(tmp_path / "in") == ["near", "far"]
    (tmp_path / "in" / "d.txt").symlink_to("nowhere.txt")
    for argument in ("in", "in/*.txt"):
        with pytest.raises(UserError, match=r"d\.txt is a link to .*nowhere\.txt, which does not exist"):
            find_inputs([str(tmp_path / argument)])


def test_a_folder_that_may_not_be_searched_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.txt").write_text("a")
    scan = os.scandir

    def refusing(path: str) -> Any:
        if path.endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(UserError, match=r"cannot search .*closed: Permission denied"):
        find_inputs([str(tmp_path)])


def test_byte_order_marks_and_carriage_returns(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": "two"}\r\n')
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf\r\n")
    (tmp_path / "c.txt").write_bytes(b"\xef\xbb\xbfthree\r\n")
    assert texts(tmp_path) == ["one", "two", "three\r\n"]


@pytest.mark.parametrize("argument", ["none.txt", "*.txt", "builtin:poems", "data.bin"])
def test_inputs_that_give_nothing_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argument: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data.bin").write_bytes(b"x")
    with pytest.raises(UserError, match=argument.replace("*", r"\*")):
        find_inputs([argument])


def test_docstrings_longer_than_the_limit() -> None:
    long = "Words of a docstring. " * 12
    source = f'"""{long}"""\nclass A:\n    """short"""\n    async def f(self):\n        r"""{long}\\d"""\n'
    assert [text.split("\\d")[0].strip() for text in corpus.read_docstrings(source)] == [long.strip()] * 2
    assert list(corpus.read_docstrings("def broken(:")) == []


def test_built_in_domains_use_one_name_for_a_file() -> None:
    names = {domain: dict(corpus.builtin_files(domain)) for domain in corpus.DOMAINS}
    assert len(names["code"]) > 100 and len(names["math"]) > 100
    assert names["code"].keys().isdisjoint(names["math"])
    for domain in ("code", "math"):
        shared = names[domain].keys() & names["prose"].keys()
        assert len(shared) > 100
        assert all(names[domain][name] == names["prose"][name] for name in shared)
    assert not [name for name in names["code"] if "/test/" in name or "site-packages" in name]


def test_parts_of_a_domain_have_no_file_in_common_and_make_it_up() -> None:
    parts = [corpus.builtin_files(f"math/{package}") for package in ("sympy", "mpmath", "networkx")]
    assert sorted(file for part in parts for file in part) == corpus.builtin_files("math")
    assert sum(map(len, parts)) == len(corpus.builtin_files("math")) and min(map(len, parts)) > 10
    assert {file.kind for file in find_inputs(["builtin:prose/stdlib"])} == {"docstrings"}
    with pytest.raises(UserError, match=r"unknown part 'builtin:math/numpy': builtin:math is made of sympy, mpmath"):
        corpus.builtin_files("math/numpy")


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install sympy"):
        corpus.builtin_files("math")


def test_json_of_a_chat_line(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text(json.dumps({"messages": [{"role": "assistant", "content": "hi"}]}))
    assert texts(tmp_path / "c.jsonl") == ["### Assistant\n\nhi"]


def test_parquet_without_pyarrow_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        read(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"question": "Why?", "answer": "So."}, "Why?\n\nSo."),
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, "Add.\n\n1 2\n\n3"),
        ({"instruction": "Sing.", "input": "", "output": "La"}, "Sing.\n\nLa"),
        ({"instruction": "Sing.", "output": "La"}, "Sing.\n\nLa"),
        ({"text": "whole", "question": "q", "answer": "a"}, "whole"),
        ({"text": None, "question": "q", "answer": "a", "instruction": "i", "output": "o"}, "q\n\na"),
    ],
)
def test_pairs_are_plain_documents(row: dict[str, object], text: str) -> None:
    assert parse_row(row).parts == ((text, True),)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q"}, "'answer' has no value"),
        ({"question": "q", "answer": ""}, "'answer' has no value"),
        ({"question": "", "answer": "a"}, "'question' has no value"),
        ({"question": ["q"], "answer": "a"}, "'question' is a list"),
        ({"instruction": "i", "input": 3, "output": "o"}, "'input' is a int"),
        ({"answer": "a"}, "keys: 'answer'"),
    ],
)
def test_broken_pairs_are_bad_rows(row: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_row(row)


def test_further_columns_are_carried_and_their_absence_named(tmp_path: Path) -> None:
    rows = [{"text": "a", "perplexity": 3.5, "x": [1]}, {"text": "b"}, {"text": "c", "perplexity": None}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pyarrow.parquet.write_table(pyarrow.table({"perplexity": [3.5, None], "text": ["a", "b"]}), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        first, *others = read_documents(find_inputs([str(tmp_path / name)])[0], ["perplexity"])
        assert isinstance(first, Document) and (first.text, dict(first.columns)) == ("a", {"perplexity": 3.5})
        assert others and all(f"{name}:" in str(row) and "'perplexity' has no value" in str(row) for row in others)
    (tmp_path / "a.txt").write_text("x")
    for name, message in (("a.txt", "a.txt is no table"), ("a.parquet", "no column 'topic'.*'perplexity', 'text'")):
        with pytest.raises(UserError, match=message):
            list(read_documents(find_inputs([str(tmp_path / name)])[0], ["topic"]))


def test_parquet_with_broken_rows(tmp_path: Path) -> None:
    cells = [b"good", None, b"half \xed\xa0\x80", b"\xff", "naïve".encode()]
    binary = pyarrow.array(cells, pyarrow.binary())
    for name, column in (("text", binary.view(pyarrow.string())), ("bytes", binary)):
        pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / f"{name}.parquet")
        read_back = texts(tmp_path / f"{name}.parquet")
        assert (read_back[0], read_back[4]) == ("good", "naïve")
        assert "none of the keys" in read_back[1]
        assert read_back[2:4] == [
            f"{name}.parquet:3: 'text' is not UTF-8 (byte 5)",
            f"{name}.parquet:4: 'text' is not UTF-8 (byte 0)",
        ]
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "numbers.parquet")
    assert texts(tmp_path / "numbers.parquet")[1] == "numbers.parquet:2: 'text' is a int, not a string"


def test_a_truncated_parquet_file_is_named_whatever_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    generator = random.Random(0)
    table = pyarrow.table({"text": [generator.randbytes(200).hex() for _ in range(5000)]})
    pyarrow.parquet.write_table(table, path, row_group_size=1000)
    whole = path.read_bytes()
    footer = int.from_bytes(whole[-8:-4], "little") + 8
    for damaged in (whole[: len(whole) // 2], whole[:-1], b"", whole[:50] + whole[-footer:]):
        path.write_bytes(damaged)
        with pytest.raises(DamagedFile, match=r"cannot read .*a\.parquet as Parquet"):
            read(path)


def test_a_parquet_file_of_one_row_group_streams(tmp_path: Path) -> None:
    path, rows = tmp_path / "a.parquet", 10_000
    generator = random.Random(0)
    table = pyarrow.table({"text": [generator.randbytes(2000).hex() for _ in range(rows)]})
    pyarrow.parquet.write_table(table, path, row_group_size=rows)
    size = table.nbytes
    del table
    before, most = pyarrow.total_allocated_bytes(), 0
    for number, _ in enumerate(read_documents(find_inputs([str(path)])[0])):
        if number % 50 == 0:
            most = max(most, pyarrow.total_allocated_bytes() - before)
    assert 0 < most < size / 3


def test_paths_with_pattern_characters_are_read_as_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "a[1]*"
    folder.mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x"]}), folder / "b?.parquet")
    assert texts(folder) == ["x"]


def write_shard(path: Path, rows: list[list[int]], counts: list[int] | None = None) -> None:
    """A tokenised shard and its metadata as YuLan-Mini's preprocessing writes them."""
    pyarrow.parquet.write_table(pyarrow.table({"input_ids": pyarrow.array(rows, pyarrow.list_(pyarrow.int64()))}), path)
    counts = [len(row) for row in rows] if counts is None else counts
    entries = [{"source": f"a.jsonl:{place}", "num_tokens": count} for place, count in enumerate(counts)]
    metadata = {"total_tokens_num": sum(counts), "metadata": entries}
    path.with_name(f"{path.stem}-metadata.json").write_text(json.dumps(metadata))


@pytest.mark.parametrize("spelling", ["splited_part-{}", "splitted_part-{:04d}"])
def test_tokenised_shards_in_their_natural_order(tmp_path: Path, spelling: str) -> None:
    for number in range(12):
        write_shard(tmp_path / f"{spelling.format(number)}.parquet", [[number, 1], [number, 2, 3]])
    for argument in (tmp_path, tmp_path / "*", tmp_path / "*.parquet"):
        ids = [document.token_ids.tolist() for document in read(argument)]  # type: ignore[union-attr]
        assert ids == [row for number in range(12) for row in ([number, 1], [number, 2, 3])]


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([2, 4, 1], "row 2, has 3 tokens, but splited_part-0-metadata.json counts 4"),
        ([2, 3], "has 3 rows, but splited_part-0-metadata.json counts 2"),
        ([2, 3, 1, 1], "has 3 rows, but splited_part-0-metadata.json counts 4"),
        (None, "metadata.json is damaged"),
        ([], "contradicts itself"),
    ],
)
def test_shards_and_metadata_must_agree(tmp_path: Path, counts: list[int] | None, message: str) -> None:
    path, metadata = tmp_path / "splited_part-0.parquet", tmp_path / "splited_part-0-metadata.json"
    write_shard(path, [[1, 2], [3, 4, 5], [6]], counts or [2, 3, 1])
    if counts is None:
        metadata.write_text(metadata.read_text()[:-20])
    elif not counts:
        metadata.write_text(metadata.read_text().replace('num": 6', 'num": 7'))
    with pytest.raises(DamagedFile, match=message):
        read(tmp_path)
    metadata.unlink()
    assert len(read(tmp_path)) == 3


def test_metadata_that_ends_many_rows_early(tmp_path: Path) -> None:
    write_shard(tmp_path / "splited_part-0.parquet", [[1]] * 250, [1] * 50)
    with pytest.raises(DamagedFile, match=r"has 250 rows, but splited_part-0-metadata\.json counts 50"):
        read(tmp_path)


def test_numbers_in_names_sort_as_numbers(tmp_path: Path) -> None:
    names = ["1.txt", "2.txt", "02.txt", "10.txt", "a-9/b-2.txt", "a-9/b-10.txt", "a-10/b-1.txt", "a/1.txt"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    order = texts(tmp_path)
    assert sorted(order) == sorted(names)
    assert [name for name in order if name[0] != "a"] == ["1.txt", "02.txt", "2.txt", "10.txt"]
    assert [name for name in order if name[0] == "a"] == ["a/1.txt", "a-9/b-2.txt", "a-9/b-10.txt", "a-10/b-1.txt"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.parquet", "a.bin"])
def test_a_file_that_went_away_is_not_taken_for_a_damaged_one(tmp_path: Path, name: str) -> None:
    for each in (name, "a.idx"):
        (tmp_path / each).write_bytes(b"")
    (file,) = find_inputs([str(tmp_path / name)])
    for each in (name, "a.idx"):
        (tmp_path / each).unlink()
    with pytest.raises(UserError, match="cannot read") as caught:
        list(read_documents(file))
    assert not isinstance(caught.value, DamagedFile)
