"""Inputs and sources for the tests of preparing."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

from titan_yulan.data.prepare import prepare
from titan_yulan.data.report import Report
from titan_yulan.data.source import Source
from titan_yulan.data.tokenizer import Tokenizer

BYTES = Tokenizer({bytes([value]): value for value in range(256)})
EOS = BYTES.eos_id


def write_files(folder: Path, files: int = 40, rows: int = 10) -> str:
    """JSONL files whose documents name themselves."""
    folder.mkdir(parents=True)
    for file in range(files):
        lines = [json.dumps({"text": f"document {file}.{row} " + "x" * (row % 7)}) for row in range(rows)]
        (folder / f"{file:03d}.jsonl").write_text("\n".join(lines))
    return str(folder)


def make(inputs: str | list[str], output: Path, **options: Any) -> Report:
    options = {"workers": 1, "minimum_tokens": 0, "say": lambda line: None, **options}
    return prepare("test", [inputs] if isinstance(inputs, str) else inputs, output, BYTES, **options)


def documents(source: Source) -> list[str]:
    """All documents in stored order; each must end with the one end of text."""
    found = []
    for shard in range(len(source.shards)):
        tokens, offsets = source.shard_tokens(shard), source.shard_offsets(shard)
        for start, end in pairwise(offsets):
            assert tokens[end - 1] == EOS and EOS not in tokens[start : end - 1]
            found.append(BYTES.decode(tokens[start : end - 1].tolist()))
    return found


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
