"""Opening, verifying and inspecting a source."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.making import BYTES, make, write_files
from titan_yulan.data.inspect import inspect_source
from titan_yulan.data.source import Source
from titan_yulan.data.tokenizer import Tokenizer, save_ranks
from titan_yulan.errors import RunError, UserError


def damage_flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["shard-00000.tokens.npy", "shard-00000.offsets.npy"])
def test_damaged_files_are_named(tmp_path: Path, name: str) -> None:
    make(write_files(tmp_path / "in", files=1), tmp_path / "out")
    path = tmp_path / "out" / name
    whole = path.read_bytes()
    damage_flip(path)
    source = Source.open(tmp_path / "out")
    with pytest.raises(RunError, match=name):
        source.verify()
    path.write_bytes(whole[:-1])
    with pytest.raises(RunError, match=rf"{name} has {len(whole) - 1} bytes instead of {len(whole)}"):
        Source.open(tmp_path / "out")
    path.unlink()
    with pytest.raises(RunError, match=rf"{name} is missing"):
        Source.open(tmp_path / "out")
    path.write_bytes(whole)
    Source.open(tmp_path / "out").verify()


def test_damaged_description(tmp_path: Path) -> None:
    make(write_files(tmp_path / "in", files=1), tmp_path / "out")
    path = tmp_path / "out" / "source.json"
    text = path.read_text()
    for damaged, error, message in [
        (text[:100], RunError, "damaged"),
        (text.replace('"eos_id": 256', '"eos_id": 255'), RunError, "edited"),
        (text.replace('"vocab_size"', '"size"'), RunError, "vocab_size"),
        (text.replace('"format_version": 1', '"format_version": 2'), UserError, "format version 2"),
    ]:
        path.write_text(damaged)
        with pytest.raises(error, match=message):
            Source.open(tmp_path / "out")
    path.unlink()
    with pytest.raises(UserError, match="not a prepared source"):
        Source.open(tmp_path / "out")


def test_inspect_shows_counts_text_and_damage(tmp_path: Path) -> None:
    make(write_files(tmp_path / "in", files=2), tmp_path / "out", order="keep")
    text = "\n".join(inspect_source(tmp_path / "out", tokenizer=BYTES, documents=1))
    assert "documents    20" in text and "document 0.0" in text and "hashes are right" in text
    assert "100 111 99" in "\n".join(inspect_source(tmp_path / "out", documents=1))  # "doc"
    other = Tokenizer({**BYTES.ranks, b"ab": 256})
    with pytest.raises(UserError, match="another tokenizer"):
        inspect_source(tmp_path / "out", tokenizer=other)
    damage_flip(tmp_path / "out" / "shard-00000.tokens.npy")
    with pytest.raises(RunError, match=r"tokens\.npy"):
        inspect_source(tmp_path / "out")


def test_reading_prepared_sources_needs_neither_datasets_nor_tiktoken(tmp_path: Path) -> None:
    make(write_files(tmp_path / "in", files=1), tmp_path / "out")
    save_ranks(tmp_path / "t.tiktoken", BYTES.ranks)
    program = (
        "import sys\n"
        "for name in ('datasets', 'tiktoken', 'torch', 'pyarrow', 'regex'): sys.modules[name] = None\n"
        "from titan_yulan.data import prepare, ensure\n"
        "from titan_yulan.data.source import Source\n"
        "from titan_yulan.data.tape import Tape\n"
        "from titan_yulan.data.tokenizer import Tokenizer\n"
        f"print(Tape(Source.open({str(tmp_path / 'out')!r}), 0).length)\n"
        f"print(Tokenizer.load({str(tmp_path / 't.tiktoken')!r}).decode([104, 105]))\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert run.stdout.split() == [str(Source.open(tmp_path / "out").tokens), "hi"], run.stderr
