"""Preparing against a model of a few lines: filters, order, split and parts together, for any input."""

from __future__ import annotations

import io
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.making import content, documents, make
from titan_yulan.data import tokenise
from titan_yulan.data.arrange import running_sums
from titan_yulan.data.jsonl import piece_lines
from titan_yulan.data.parts import own_units
from titan_yulan.data.prepare import merge
from titan_yulan.data.source import Source

rows = st.fixed_dictionaries(
    {
        "text": st.text(alphabet="ab ", min_size=0, max_size=4) | st.just(5),  # a bad row
        "score": st.sampled_from([-1.5, 0, 2, 1e300, float("inf")]),
        "date": st.sampled_from(["2023", "2024-01", "é"]),
        "topic": st.sampled_from(["math", "code", "数学"]),
    }
)


def expected(files: list[list[dict[str, Any]]], options: dict[str, Any]) -> dict[str, list[str]]:
    """Value of the split-by column -> texts in order (of the input, when shuffled)."""
    texts = [row for file in files for row in file if isinstance(row["text"], str) and row["text"]]
    kept = [row for row in texts if len(row["text"]) >= options["minimum_tokens"]]
    if options["deduplicate"]:
        firsts: dict[str, dict[str, Any]] = {}
        for row in kept:
            firsts.setdefault(row["text"], row)
        kept = list(firsts.values())
    kept = within(kept, options["max_documents"] or 1000, options["max_tokens"] or 10**6)
    column = options["order"].removeprefix("-")
    if column in ("score", "date"):
        kept.sort(key=lambda row: row[column], reverse=options["order"].startswith("-"))
    values: dict[str, list[str]] = {}
    for row in kept:
        values.setdefault(row[options["split_by"]] if options["split_by"] else "", []).append(row["text"])
    return values


def within(kept: list[dict[str, Any]], most: int, tokens: int) -> list[dict[str, Any]]:
    """The first rows, up to the one with which a limit is reached."""
    ends = np.cumsum([len(row["text"]) + 1 for row in kept])
    return kept[: min(most, 1 + int((ends < tokens).sum()))]


def write_rows(folder: Path, files: list[list[dict[str, Any]]]) -> str:
    folder.mkdir()
    for number, file in enumerate(files):
        (folder / f"{number}.jsonl").write_text("\n".join(map(json.dumps, file)))
    return str(folder)


@given(
    files=st.lists(st.lists(rows, min_size=1, max_size=8), min_size=1, max_size=5),
    options=st.fixed_dictionaries(
        {
            "order": st.sampled_from(["shuffle", "keep", "score", "-score", "date", "-date"]),
            "split_by": st.sampled_from(["", "topic"]),
            "minimum_tokens": st.integers(0, 2),
            "deduplicate": st.booleans(),
            "max_documents": st.none() | st.integers(1, 12),
            "max_tokens": st.none() | st.integers(1, 40),
            "shard_tokens": st.sampled_from([4, 30]),
            "seed": st.integers(0, 3),
        }
    ),
    parts=st.integers(1, 4),
)
@settings(max_examples=20, deadline=None)
def test_any_request_whole_and_in_parts(files: list, options: dict[str, Any], parts: int) -> None:
    values = expected(files, options)
    if not values:
        return
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenise, "_GROUP_BYTES", 300)
        patch.setattr(tokenise, "_PIECE_BYTES", 400)
        folder = Path(name)
        inputs = write_rows(folder / "in", files)
        report = make(inputs, folder / "whole", **options)
        sources = {value: Source.open(folder / "whole" / value) for value in values}
        assert report.documents == sum(map(len, values.values()))
        assert sum(source.text_bytes for source in sources.values()) == report.tokens - report.documents
        for value, texts in values.items():
            stored = documents(sources[value])
            assert sorted(stored) == sorted(texts)
            assert options["order"] == "shuffle" or stored == texts
            assert sources[value].ordered == (options["order"] != "shuffle")
        left_out = report.bad_rows + report.empty_documents + report.short_documents + report.duplicate_documents
        if options["max_documents"] is None and options["max_tokens"] is None:
            assert report.documents + left_out == sum(map(len, files))
            assert report.bad_rows == sum(row["text"] == 5 for file in files for row in file)
        for part in range(1, parts + 1):
            make(inputs, folder / "divided", part=(part, parts), **options)
        merge(folder / "divided", workers=1, say=lambda line: None)
        for value in values:
            assert content(folder / "whole" / value) == content(folder / "divided" / value)
        assert sorted(path.name for path in folder.iterdir()) == [
            ".divided.lock",
            ".whole.lock",
            "divided",
            "in",
            "whole",
        ]


@given(
    items=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9)), max_size=30),
    totals=st.lists(st.integers(0, 9), min_size=6, max_size=6),
)
def test_running_sums(items: list[tuple[int, int]], totals: list[int]) -> None:
    groups, amounts = (np.array([item[place] for item in items], np.int64) for place in (0, 1))
    after = np.array(totals, np.int64)
    sums = running_sums(groups, amounts, after)
    for (group, amount), found in zip(items, sums.tolist(), strict=True):
        assert found == totals[group]
        totals[group] += amount
    assert after.tolist() == totals


@given(content=st.lists(st.sampled_from([b"a", b"\r", b"\n"]), max_size=20).map(b"".join), size=st.integers(1, 9))
def test_every_line_is_in_one_piece(content: bytes, size: int) -> None:
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        pieces = [list(piece_lines(Path(file.name), start, start + size)) for start in range(0, len(content), size)]
    assert [line for piece in pieces for line in piece] == io.BytesIO(content).readlines()


@given(units=st.integers(0, 50), parts=st.integers(1, 60))
def test_every_group_belongs_to_one_part(units: int, parts: int) -> None:
    owned = [unit for part in range(1, parts + 1) for unit in own_units((part, parts), units)]
    assert sorted(owned) == list(range(units))
    sizes = [len(own_units((part, parts), units)) for part in range(1, parts + 1)]
    assert max(sizes) - min(sizes) <= 1
