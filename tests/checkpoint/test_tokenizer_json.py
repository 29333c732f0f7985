"""tokenizer.json files made from tiktoken vocabularies: the ids of tiktoken, read by tokenizers and by transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.checkpoint.exporting import write_vocabulary
from titan_yulan.checkpoint.export_check import TEXT, verify_tokenizer
from titan_yulan.checkpoint.tokenizer_json import merges, tokenizer_json, write_tokenizer
from titan_yulan.data.corpus import builtin_files
from titan_yulan.data.tokenizer import END_OF_TEXT, HuggingFaceTokenizer, Tokenizer
from titan_yulan.errors import RunError

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

BYTES = {bytes([value]): value for value in range(256)}


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("words") / "words.tiktoken"
    write_vocabulary(path, 700)
    return path


@pytest.fixture(scope="module")
def ours(words: Path) -> Tokenizer:
    return Tokenizer.load(words)


@pytest.fixture(scope="module")
def folder(words: Path, ours: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("folder")
    write_tokenizer(ours, words, path, longest=64)
    return path


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


def test_real_text_has_the_same_ids(ours: Tokenizer, theirs: Tokenizer, folder: Path) -> None:
    peer = transformers.AutoTokenizer.from_pretrained(folder)
    files = [path.read_text(encoding="utf-8", errors="replace") for _, path in builtin_files("code")[:12]]
    for text in (TEXT, *files, " " * 5000, "\n" * 70 + "\t \t", "ab" * 2000, ""):
        ids = ours.encode(text)
        assert theirs.encode(text) == ids
        assert peer(text.replace(END_OF_TEXT, "")).input_ids == ours.encode(text.replace(END_OF_TEXT, ""))
        assert theirs.decode(ids) == text
    assert (peer.eos_token_id, len(peer), peer.bos_token) == (ours.eos_id, ours.vocab_size, None)
    assert peer.decode(peer(TEXT, split_special_tokens=True).input_ids) == TEXT


@given(
    st.text(st.one_of(st.sampled_from("ab'sSlL12 \n\t\r\u3000\u00a0\x85.,_"), st.characters(exclude_categories=["Cs"])))
)
@settings(max_examples=300, deadline=None)
def test_any_text_has_the_same_ids(ours: Tokenizer, theirs: Tokenizer, text: str) -> None:
    assert theirs.encode(text) == ours.encode(text)


@st.composite
def vocabularies(draw: st.DrawFn) -> dict[bytes, int]:
    """Tokens of two letters, each made of two before it, so that many can be made in several ways."""
    tokens = [b"a", b"b"]
    for _ in range(draw(st.integers(2, 12))):
        pair = draw(st.sampled_from(tokens)) + draw(st.sampled_from(tokens))
        if pair not in tokens and len(pair) < 20:
            tokens.append(pair)
    return BYTES | {token: 256 + rank for rank, token in enumerate(tokens[2:])}


@given(vocabularies(), st.lists(st.text("ab", max_size=40), min_size=5, max_size=5))
@settings(max_examples=60, deadline=None)
def test_tokens_that_can_be_made_in_several_ways(ranks: dict[bytes, int], texts: list[str]) -> None:
    peer = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(ranks)))
    for text in texts:
        assert peer.encode(text).ids == Tokenizer(ranks).encode(text)


def test_merges_are_in_the_order_of_ranks_and_complete() -> None:
    ranks = BYTES | {b"bc": 256, b"ab": 257, b"abc": 258, b"zz zz": 259}
    expected = [(b"b", b"c"), (b"a", b"b"), (b"a", b"bc"), (b"ab", b"c")]
    assert merges(ranks) == expected  # none makes "zz zz", which is found only where it is a whole pre-token


def test_a_file_with_other_ids_is_found(ours: Tokenizer, words: Path, tmp_path: Path) -> None:
    write_tokenizer(ours, words, tmp_path, longest=64)
    content: dict[str, Any] = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["merges"].reverse()
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(RunError, match="gives other ids than tiktoken does, first near '"):
        verify_tokenizer(ours, tmp_path)
    verify_tokenizer(Tokenizer(BYTES), _written(Tokenizer(BYTES), words, tmp_path / "bytes"))
    with pytest.raises(RunError, match="another end of text or another size"):
        verify_tokenizer(Tokenizer(BYTES), tmp_path)


def _written(tokenizer: Tokenizer, source: Path, folder: Path) -> Path:
    folder.mkdir()
    write_tokenizer(tokenizer, source, folder, longest=64)
    return folder


def test_a_tokenizer_json_is_given_back_with_what_belongs_to_it(folder: Path, tmp_path: Path) -> None:
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<|endoftext|>"}')
    tokenizer = Tokenizer.load(folder)
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    for number, source in enumerate((folder, folder / "tokenizer.json")):
        copy = _written(tokenizer, source, tmp_path / str(number))
        verify_tokenizer(tokenizer, copy)
        assert {file.name: file.read_bytes() for file in copy.iterdir()} == {
            file.name: file.read_bytes() for file in folder.iterdir()
        }
        assert Tokenizer.load(copy).fingerprint == tokenizer.fingerprint
