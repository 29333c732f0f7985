"""What can be drawn and how often, and text whose characters are spread over tokens."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.data.making import BYTES
from titan_yulan.data.tokenizer import Tokenizer
from titan_yulan.errors import UserError
from titan_yulan.eval.sampling import Sampling
from titan_yulan.eval.text_stream import InOrder, TextStream

SHARES = [0.1, 0.4, 0.2, 0.25, 0.05]
LOGITS = torch.tensor(SHARES).log()[None]


def drawn(draws: int = 2000, **settings: Any) -> list[float]:
    """The share of each token over numbers that lie evenly between 0 and 1."""
    sampling = Sampling(**settings)
    numbers = ((np.arange(draws) + 0.5) / draws).tolist()
    tokens = sampling.choose(LOGITS.expand(draws, -1), numbers)
    return (np.bincount(tokens, minlength=len(SHARES)) / draws).tolist()


def normalised(weights: dict[int, float]) -> list[float]:
    return [weights.get(token, 0.0) / math.fsum(weights.values()) for token in range(len(SHARES))]


@pytest.mark.parametrize(
    ("settings", "shares"),
    [
        ({"temperature": 1.0, "top_k": 0}, dict(enumerate(SHARES))),
        ({"temperature": 0.5, "top_k": 0}, {token: share**2 for token, share in enumerate(SHARES)}),
        ({"temperature": 1.0, "top_k": 2}, {1: 0.4, 3: 0.25}),
        ({"temperature": 1.0, "top_k": 0, "top_p": 0.6}, {1: 0.4, 3: 0.25}),
        ({"temperature": 1.0, "top_k": 0, "top_p": 0.7}, {1: 0.4, 3: 0.25, 2: 0.2}),
        ({"temperature": 1.0, "top_k": 2, "top_p": 0.6}, {1: 0.4}),  # 0.4 of 0.65 is more than 0.6
        ({"temperature": 1.0, "top_k": 0, "top_p": 1e-9}, {1: 1.0}),
        ({"temperature": 0.0}, {1: 1.0}),
        ({"temperature": 1e-300}, {1: 1.0}),
    ],
)
def test_tokens_are_drawn_as_often_as_they_are_likely(settings: dict[str, Any], shares: dict[int, float]) -> None:
    assert drawn(**settings) == pytest.approx(normalised(shares), abs=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "--temperature -0.1"),
        ({"temperature": math.nan}, "--temperature nan"),
        ({"top_k": -1}, "--top-k -1"),
        ({"top_p": 0.0}, "--top-p 0.0"),
        ({"top_p": 1.1}, "--top-p 1.1"),
    ],
)
def test_values_out_of_range_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Sampling(**settings)


def test_numbers_depend_on_seed_prompt_and_place() -> None:
    numbers = Sampling(seed=1).numbers([1, 23], 9)
    assert Sampling(seed=1).numbers([1, 23], 5).tolist() == numbers[:5].tolist()
    for other in (Sampling(seed=2).numbers([1, 23], 9), Sampling(seed=1).numbers([12, 3], 9)):
        assert not set(other.tolist()) & set(numbers.tolist())


@given(st.text(min_size=1, max_size=12), st.binary(max_size=150))
def test_streamed_pieces_are_the_text_in_whole_characters(prompt: str, content: bytes) -> None:
    pieces: list[str] = []
    prompt_ids, ids = BYTES.encode(prompt), list(content)
    stream = TextStream(BYTES, prompt_ids, pieces.append)
    for number, token in enumerate(ids, start=1):
        stream.add(token)
        assert "".join(pieces) == BYTES.decode(ids[:number]).rstrip("\ufffd")
    stream.close()
    assert "".join(pieces) == content.decode("utf-8", "replace")


def test_a_character_is_shown_with_its_last_byte() -> None:
    shown: list[str] = []
    stream = TextStream(BYTES, BYTES.encode("x"), shown.append)
    for token in "é中".encode():
        stream.add(token)
        shown.append("|")
    assert "".join(shown) == "|é|||中|"


def test_texts_that_grow_side_by_side_are_shown_in_order() -> None:
    shown: list[str] = []
    output = InOrder(["a", "b", "c"], shown.append)
    for number, piece in ((0, "1"), (1, "2"), (2, "3")):
        output.add(number, piece)
    output.close(2)
    output.add(0, "4")
    assert "".join(shown) == "a14"  # the first as it grows
    output.close(0)
    assert "".join(shown) == "a14\nb2"
    output.close(1)
    assert "".join(shown) == "a14\nb2\nc3\n"


def test_blanks_between_words_survive_a_tokenizer_that_drops_the_first(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({"▁to": 0, "▁be": 1, "▁or": 2, "<end>": 3, "?": 4}, "?"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    core.decoder = tokenizers.decoders.Metaspace()
    core.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.decode([1]) == "be"
    pieces: list[str] = []
    stream = TextStream(tokenizer, tokenizer.encode("to"), pieces.append)
    for token in [1, 2] * 50:
        stream.add(token)
    assert pieces == [" be", " or"] * 50
