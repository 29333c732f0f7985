"""Metrics against values computed by hand."""

from __future__ import annotations

import math

import pytest

from titan_yulan.eval.likelihood import Likelihood
from titan_yulan.eval.metrics import choice_numbers, cloze_numbers, text_numbers
from titan_yulan.eval.requests import Choice, Cloze


def value(logprob: float, tokens: int = 1, greedy: bool = False) -> Likelihood:
    return Likelihood(logprob, tokens, greedy, False)


def test_choices_by_every_norm() -> None:
    # lengths without the blank: 2 characters; 8 characters and 16 bytes; 4
    item = Choice("1", ("q",) * 3, (" ab", " éééééééé", " abcd"), 1)
    found = [value(-2.0, 1), value(-6.0, 4), value(-3.5, 2)]
    #    total       -2  -6    -3.5     the first
    #    per token   -2  -1.5  -1.75    the second, right
    #    per char    -1  -0.75 -0.875   the second, right
    #    per byte    -1  -0.375 -0.875  the second, right
    #    pmi         -1  -1    0.5      the third
    bare = [value(-1.0), value(-5.0), value(-4.0)]
    numbers = choice_numbers([item], [found], [bare])
    assert numbers.metrics == {
        "accuracy": 0.0,
        "accuracy_per_token": 1.0,
        "accuracy_per_character": 1.0,
        "accuracy_per_byte": 1.0,
        "accuracy_pmi": 0.0,
        "bits_per_byte": pytest.approx(6.0 / (math.log(2) * 17)),
    }
    assert "accuracy_pmi" not in choice_numbers([item], [found], None).metrics


def test_standard_error_is_that_of_the_mean() -> None:
    items = [Choice(str(i), ("q", "q"), (" a", " b"), 0) for i in range(4)]
    found = [[value(-1.0), value(-2.0)]] * 3 + [[value(-2.0), value(-1.0)]]
    numbers = choice_numbers(items, found, None)
    assert numbers.metrics["accuracy"] == 0.75
    assert numbers.errors["accuracy"] == pytest.approx(math.sqrt(0.75 * 0.25 * 4 / 3 / 4))


def test_cloze() -> None:
    items = [Cloze("1", "c", " ab"), Cloze("2", "c", " abcd")]
    numbers = cloze_numbers(items, [value(-1.0, 2, True), value(-3.0, 2, False)])
    assert numbers.metrics == {
        "accuracy": 0.5,
        "perplexity": pytest.approx(math.exp(2.0)),
        "bits_per_byte": pytest.approx(4.0 / (math.log(2) * 8)),
    }


def test_text() -> None:
    numbers = text_numbers(["1", "2"], [-10.0, -20.0], [5, 15], [30, 50])
    assert numbers.metrics == {
        "bits_per_byte": pytest.approx(30.0 / math.log(2) / 80),
        "perplexity": pytest.approx(math.exp(1.5)),
        "tokens": 20.0,
    }
    assert text_numbers(["1"], [-1e6], [1], [1]).metrics["perplexity"] == math.inf
