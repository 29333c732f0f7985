"""The formulas against published numbers, and against themselves written out by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.scaling.making import LAW, PLANTED
from titan_yulan.errors import UserError
from titan_yulan.scaling.forms import PUBLISHED, Law, critical_compute


def test_published_check_values():
    law = PUBLISHED["datablations"]  # values of github.com/huggingface/datablations
    assert law.loss(6.34e9, 242e9, 25e9) == pytest.approx(2.2256440889984477, rel=1e-12)
    assert law.loss(8.67e9, 178e9, 25e9) == pytest.approx(2.2269634075087867, rel=1e-12)


@pytest.mark.parametrize(("unique", "flops"), [(25e6, 2.3e18), (50e6, 1.05e19), (100e6, 4.7e19), (500e6, 1.56e21)])
def test_published_critical_compute(unique: float, flops: float):
    assert critical_compute(unique) == pytest.approx(flops, rel=0.01)
    assert critical_compute(unique) == pytest.approx(2.12e15 * (unique / 1e6) ** 2.174, rel=1e-12)


def test_critical_compute_refuses_no_data():
    with pytest.raises(UserError, match="unique-tokens 0: at least 1"):
        critical_compute(0)


def by_hand(parameters: float, tokens: float, unique: float) -> float:
    p = PLANTED
    g = (p["a"] * p["A"] / (p["b"] * p["B"])) ** (1 / (p["a"] + p["b"]))
    fresh = min(parameters, (unique * g) ** (p["b"] / p["a"]) * g)
    size = fresh + fresh * p["R_N"] * (1 - math.exp(-(parameters / fresh - 1) / p["R_N"]))
    data = unique + unique * p["R_D"] * (1 - math.exp(-(tokens / unique - 1) / p["R_D"]))
    return p["E"] + p["A"] / size ** p["a"] + p["B"] / data ** p["b"]


positive = st.floats(6, 12).map(lambda power: 10**power)


@given(positive, positive, st.floats(1, 1000))
def test_data_constrained_form(parameters: float, unique: float, epochs: float):
    expected = by_hand(parameters, unique * epochs, unique)
    assert LAW.loss(parameters, unique * epochs, unique) == pytest.approx(expected, rel=1e-9)


@given(positive, positive)
def test_one_epoch_at_most_optimal_size_is_chinchilla(parameters: float, tokens: float):
    plain = Law("chinchilla", {name: PLANTED[name] for name in ("E", "A", "B", "a", "b")})
    p = PLANTED
    g = (p["a"] * p["A"] / (p["b"] * p["B"])) ** (1 / (p["a"] + p["b"]))
    size = min(parameters, (tokens * g) ** (p["b"] / p["a"]) * g)
    assert LAW.loss(size, tokens) == pytest.approx(plain.loss(size, tokens), rel=1e-9)


@given(positive, positive, st.floats(1, 1000), st.floats(1.01, 10))
def test_more_is_never_worse(parameters: float, unique: float, epochs: float, factor: float):
    tokens = unique * epochs
    loss = LAW.loss(parameters, tokens, unique)
    assert LAW.loss(parameters * factor, tokens, unique) <= loss * (1 + 1e-12)
    assert LAW.loss(parameters, tokens * factor, unique) <= loss * (1 + 1e-12)
    assert LAW.loss(parameters, tokens, unique * min(factor, epochs)) <= loss * (1 + 1e-12)
