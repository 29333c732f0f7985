"""GPT-2's two files: the same ids as Hugging Face's own reader, and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from titan_yulan.data.bpe import train_bpe
from titan_yulan.data.gpt2 import PATTERN, byte_letters, read_gpt2
from titan_yulan.data.tokenizer import Tokenizer
from titan_yulan.errors import UserError

TEXT = "The cat sat on the mat; it isn't the cat's mat. 1234 numbers, ünïcödé, 猫猫 and\n\n  blanks.\t\x00\x7f" * 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary in GPT-2's layout: its order of the bytes, then merges."""
    folder = tmp_path_factory.mktemp("gpt2")
    letters = {value: letter for letter, value in byte_letters().items()}
    tokens = [
        "".join(letters[value] for value in token)
        for token in train_bpe([TEXT, Path(json.decoder.__file__).read_text(encoding="utf-8")], 340)
    ]
    whole = [*byte_letters(), *tokens[256:]]
    ids = {token: rank for rank, token in enumerate(whole)} | {"<|endoftext|>": len(whole)}
    merges = [_split(token, set(whole[: rank + 256])) for rank, token in enumerate(tokens[256:])]
    (folder / "vocab.json").write_text(json.dumps(ids))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    return folder


def _split(token: str, before: set[str]) -> str:
    """A pair of earlier tokens that makes a token."""
    places = [i for i in range(1, len(token)) if token[:i] in before and token[i:] in before]
    return f"{token[: places[0]]} {token[places[0] :]}"


def test_sizes_and_end_of_text(folder: Path):
    for path in (folder, folder / "vocab.json", folder / "merges.txt"):
        tokenizer = Tokenizer.load(path)
        assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.pattern) == (340, 339, PATTERN)
    assert tokenizer.decode([*tokenizer.encode(TEXT), 339]) == TEXT + "<|endoftext|>"
    other = Tokenizer(tokenizer.ranks)
    assert other.fingerprint != tokenizer.fingerprint  # the pattern decides ids, too


@given(st.text(max_size=60) | st.sampled_from([TEXT, "it's 1234  \n x", " <|endoftext|>"]))
@settings(max_examples=80, deadline=None)
def test_the_ids_of_hugging_faces_reader(folder: Path, text: str):
    tokenizers = pytest.importorskip("tokenizers")
    peer = tokenizers.ByteLevelBPETokenizer.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    assert Tokenizer.load(folder).encode(text) == peer.encode(text).ids


def test_a_tokenizer_json_comes_first(folder: Path, tmp_path: Path):
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_refusals(folder: Path, tmp_path: Path):
    vocabulary, merges = (tmp_path / name for name in ("vocab.json", "merges.txt"))
    vocabulary.write_bytes((folder / "vocab.json").read_bytes())
    with pytest.raises(UserError, match=r"cannot read GPT-2's vocab.json and merges.txt"):
        read_gpt2(vocabulary)
    merges.write_text((folder / "merges.txt").read_text(encoding="utf-8") + "one two three\n", encoding="utf-8")
    with pytest.raises(UserError, match="is no pair of tokens: 'one two three'"):
        read_gpt2(tmp_path)
    merges.write_text((folder / "merges.txt").read_text(encoding="utf-8") + "zz zz\n", encoding="utf-8")
    with pytest.raises(UserError, match="'zzzz' is None, by the merges it would be 339"):
        read_gpt2(tmp_path)
    merges.write_bytes((folder / "merges.txt").read_bytes())
    vocabulary.write_text("[]")
    with pytest.raises(UserError, match=r"vocab.json is not that of merges.txt"):
        read_gpt2(tmp_path)
