"""BPE training and the tokenizer: golden merges, a naive peer, round trips, chunking, damaged files."""

from __future__ import annotations

import pickle
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from titan_yulan.data import tokenizer as tokenizer_module
from titan_yulan.data.bpe import PATTERN, count_pre_tokens, train_bpe, train_from_counts
from titan_yulan.data.tokenizer import Tokenizer, save_ranks
from titan_yulan.errors import UserError

TEXTS = [
    Path(tokenizer_module.__file__).read_text(),
    Path(__file__).read_text(),
    "The cat's 12345 naïve 日本語 hats.\n",
]
BYTES = {bytes([value]): value for value in range(256)}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(train_bpe(TEXTS, 600))


def naive_bpe(counts: dict[str, int], vocab_size: int) -> dict[bytes, int]:
    """The definition: count all pairs anew for every merge."""
    words = {word: [bytes([byte]) for byte in word.encode()] for word in counts}
    ranks = dict(BYTES)
    while len(ranks) < vocab_size - 1:
        pairs: Counter[tuple[int, int]] = Counter()
        for word, parts in words.items():
            for left, right in pairwise(parts):
                pairs[ranks[left], ranks[right]] += counts[word]
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        by_rank = {rank: token for token, rank in ranks.items()}
        left, right = by_rank[best[0]], by_rank[best[1]]
        ranks.setdefault(left + right, len(ranks))
        for parts in words.values():
            place = 0
            while place < len(parts) - 1:
                if parts[place] == left and parts[place + 1] == right:
                    parts[place : place + 2] = [left + right]
                place += 1
    return ranks


def test_first_merges_of_a_small_text() -> None:
    counts = {"low": 5, "lower": 2, "newest": 6, "widest": 3}
    ranks = train_from_counts(counts, 256 + 4 + 1)
    # es 9, st 9 (e < s decides), then es+t 9, then lo 7
    assert [token for token, rank in ranks.items() if rank >= 256] == [b"es", b"est", b"lo", b"low"]


def test_training_equals_the_definition() -> None:
    counts = count_pre_tokens(TEXTS)
    assert train_from_counts(counts, 420) == naive_bpe(counts, 420)


@given(st.dictionaries(st.text("ab", min_size=2, max_size=12), st.integers(1, 5), min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_training_equals_the_definition_on_repetitive_words(counts: dict[str, int]) -> None:
    assert train_from_counts(counts, 258) == naive_bpe(counts, 258)


def test_training_does_not_depend_on_the_order_of_the_text() -> None:
    assert train_bpe(TEXTS, 500) == train_bpe(TEXTS[::-1], 500)


@pytest.mark.parametrize(("texts", "size", "message"), [(["abc"], 300, "too small"), (["abc"], 256, "at least 257")])
def test_impossible_sizes_are_refused(texts: list[str], size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        train_bpe(texts, size)


def test_vocabulary_counts_end_of_text(tokenizer: Tokenizer) -> None:
    assert (len(tokenizer.ranks), tokenizer.vocab_size, tokenizer.eos_id) == (599, 600, 599)
    assert tokenizer.decode([*tokenizer.encode("a b"), tokenizer.eos_id]) == "a b<|endoftext|>"


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_every_text_survives(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= token_id < tokenizer.eos_id for token_id in ids)


def test_special_text_is_ordinary_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<|endoftext|>")
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == "<|endoftext|>"


PIECES = st.lists(
    st.sampled_from(["don't", " ", "  ", "\n", "\r\n", "\t", "x", "12", "日本", "é", "--", "'s", "'re ", "A"])
)


@given(PIECES.map("".join), st.integers(4, 12))
@settings(max_examples=300, deadline=None)
def test_chunks_encode_like_the_whole(tokenizer: Tokenizer, text: str, size: int) -> None:
    """Wherever a chunk of `size` holds a letter before a blank, cutting changes no id; the text survives always."""
    whole = tiktoken.Encoding("peer", pat_str=PATTERN, mergeable_ranks=tokenizer.ranks, special_tokens={})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_module, "MAX_CHUNK", size)
        ids = tokenizer.encode(text)
        pieces = tokenizer_module._pieces(text)
    assert tokenizer.decode(ids) == text
    assert all(0 < end - start <= size for start, end in pieces if text)
    if all(text[end - 1].isalpha() and text[end].isspace() for _, end in pieces[:-1]):
        assert ids == whole.encode_ordinary(text)


@pytest.mark.parametrize("unit", [" ", "a", "\n", "日", "1", "-"])
def test_long_runs_do_not_abort(tokenizer: Tokenizer, unit: str) -> None:
    text = unit * 1_200_000
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_file_round_trip_and_retraining_at_the_same_path(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "folder" / "vocabulary.tiktoken"
    save_ranks(path, tokenizer.ranks)
    loaded = Tokenizer.load(path)
    assert (loaded.ranks, loaded.fingerprint) == (tokenizer.ranks, tokenizer.fingerprint)
    save_ranks(path, BYTES)
    assert Tokenizer.load(path).vocab_size == 257
    assert Tokenizer.load(path).fingerprint != tokenizer.fingerprint
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_pickled_for_workers(tokenizer: Tokenizer) -> None:
    text = "a tokenizer for workers"
    assert pickle.loads(pickle.dumps(tokenizer)).encode(text) == tokenizer.encode(text)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda lines: [*lines[:70], "not base64! x", *lines[71:]], "line 71"),
        (lambda lines: [*lines[:70], "QQ==", *lines[71:]], "line 71"),
        (lambda lines: lines[:5] + lines[6:], "not 0"),
        (lambda lines: lines[:200], "single bytes"),
        (lambda lines: [*lines, lines[-1]], "twice"),
        (lambda _: [], "single bytes"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, damage, message: str) -> None:
    path = tmp_path / "vocabulary.tiktoken"
    save_ranks(path, BYTES)
    path.write_text("\n".join(damage(path.read_text().splitlines())))
    with pytest.raises(UserError, match=message) as caught:
        Tokenizer.load(path)
    assert str(path) in str(caught.value)


def test_missing_file_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tokenizer train"):
        Tokenizer.load(tmp_path / "none.tiktoken")


def test_unknown_id_is_named(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="token id 600"):
        tokenizer.decode([1, 600])
