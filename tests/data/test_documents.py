"""Reading inputs: every format, every kind of bad row, and where it is."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from titan_yulan.data import corpus
from titan_yulan.data.documents import BadRow, Document, find_inputs, parse_row, read_documents
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
    for line, word in {
        2: "not JSON",
        4: "'title'",
        5: "int",
        6: "not UTF-8",
        7: "not an object",
        8: "surrogate",
    }.items():
        assert word in reasons[line]


def test_parquet_text_and_token_ids(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
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


def test_parquet_with_other_columns_only(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x", "y"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet has no column of documents.* its columns are 'body'"):
        read(tmp_path / "a.parquet")


def test_whole_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 99)[:-9])
    for name in ("a.parquet", "b.jsonl.gz"):
        with pytest.raises(UserError, match=name):
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
    assert [part for part, trained in document.parts if trained] == ["4", "\n\n", "6"]


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


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install sympy"):
        corpus.builtin_files("math")


def test_json_of_a_chat_line(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text(json.dumps({"messages": [{"role": "assistant", "content": "hi"}]}))
    assert texts(tmp_path / "c.jsonl") == ["### Assistant\n\nhi"]


def test_parquet_without_datasets_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        read(tmp_path / "a.parquet")
