"""What a law answers, against closed forms and the figures of arXiv 2507.15857."""

from __future__ import annotations

import math

import pytest

from tests.scaling.making import LAW, PLANTED
from titan_yulan.errors import UserError
from titan_yulan.scaling.answers import (
    compute_optimal,
    epochs_worth,
    first_win_interval,
    ranges_won,
    tokens_for_one_epoch,
)
from titan_yulan.scaling.forms import Law

CHINCHILLA = Law("chinchilla", {name: PLANTED[name] for name in ("E", "A", "B", "a", "b")})


def test_compute_optimal_is_chinchillas_closed_form():
    p = PLANTED
    g = (p["a"] * p["A"] / (p["b"] * p["B"])) ** (1 / (p["a"] + p["b"]))
    for flops in (1e18, 1e21, 1e24):
        best = compute_optimal(CHINCHILLA, flops)
        assert best.parameters == pytest.approx(g * (flops / 6) ** (p["b"] / (p["a"] + p["b"])), rel=1e-5)
        assert 6 * best.parameters * best.tokens == pytest.approx(flops)
        assert best.loss == pytest.approx(CHINCHILLA.loss(best.parameters, best.tokens))


def test_limited_data_wants_repeats_and_costs_loss():
    free, limited = compute_optimal(LAW, 1e20), compute_optimal(LAW, 1e20, 1e8)
    assert limited.loss > free.loss
    assert limited.epochs(1e8) > 1
    for factor in (0.8, 1.25):  # no other size is better
        assert LAW.loss(limited.parameters * factor, limited.tokens / factor, 1e8) >= limited.loss


def test_epochs_worth():
    assert epochs_worth(LAW, math.exp(-1)) == pytest.approx(1 + PLANTED["R_D"])
    step = 1e-4  # dD'/dD, by differences
    epochs = epochs_worth(LAW, 0.25)
    effective = [1 + PLANTED["R_D"] * (1 - math.exp(-(e - 1) / PLANTED["R_D"])) for e in (epochs, epochs + step)]
    assert (effective[1] - effective[0]) / step == pytest.approx(0.25, rel=1e-4)
    with pytest.raises(UserError, match="knows nothing of repeated data"):
        epochs_worth(CHINCHILLA, 0.5)
    with pytest.raises(UserError, match="between 0 and 1"):
        epochs_worth(LAW, 1.0)


@pytest.mark.parametrize(
    ("flops", "millions", "billions"),
    [(1e19, 217.5, 7.66), (1e19, 123.6, 13.49), (3e19, 416.9, 11.99), (1e20, 700.25, 23.80), (1e20, 416.89, 39.98)],
)
def test_published_sizes_of_one_epoch(flops: float, millions: float, billions: float):
    assert tokens_for_one_epoch(flops, millions * 1e6) == pytest.approx(billions * 1e9, rel=1e-3)


# worse with fresh data, but repeats are worth much more: what the study says of masked diffusion
OTHER = Law("data_constrained", {**PLANTED, "B": 2400.0, "R_D": 500.0, "R_N": 50.0})
WITHIN = (1e12, 1e24)


def changed(**coefficients: float) -> Law:
    return Law("data_constrained", {**PLANTED, **coefficients})


def test_the_second_law_wins_from_where_the_curves_cross():
    before = 0.0
    for unique in (2.5e7, 1e8, 4e8):
        [(crossing, end)] = ranges_won(LAW, OTHER, unique, WITHIN)
        assert crossing > before and end == 1e24
        before = crossing
        for factor, sign in ((1.001, -1), (0.999, 1)):
            flops = crossing * factor
            gap = compute_optimal(OTHER, flops, unique).loss - compute_optimal(LAW, flops, unique).loss
            assert gap * sign > 0
    assert ranges_won(LAW, changed(E=1.0), 1e8, WITHIN) == [WITHIN]
    assert ranges_won(LAW, changed(E=3.0), 1e8, WITHIN) == []
    assert ranges_won(LAW, LAW, 1e8, WITHIN) == []


def test_two_crossings_and_exchanged_laws():
    # falls faster at first, is passed, and wins again when data are repeated often
    twice = changed(A=200.0, a=0.29, B=1700.0, R_D=300.0, R_N=50.0)
    won = ranges_won(LAW, twice, 1e8, WITHIN)
    assert len(won) == 2 and won[0][0] == 1e12 and won[1][1] == 1e24
    [rest] = ranges_won(twice, LAW, 1e8, WITHIN)
    assert rest == pytest.approx((won[0][1], won[1][0]), rel=1e-9)
    for low, high in ((won[0][1], won[1][0]), *won):
        flops = math.sqrt(low * high)
        wins = compute_optimal(twice, flops, 1e8).loss < compute_optimal(LAW, flops, 1e8).loss
        assert wins == ((low, high) in won)


def test_range_of_the_first_crossing():
    laws = [LAW] * 20
    others = [changed(B=2400.0 * (1 + 0.004 * i), R_D=500.0, R_N=50.0) for i in range(20)]
    low, high = first_win_interval(laws, others, 1e8, WITHIN)
    starts = sorted(ranges_won(LAW, other, 1e8, WITHIN)[0][0] for other in others)
    assert (low, high) == (starts[0], starts[-1])  # of 20 values 95 % are all
    assert first_win_interval([LAW], [changed(E=3.0)], 1e8, WITHIN) == (math.inf, math.inf)
    assert first_win_interval([LAW], [changed(E=1.0)], 1e8, WITHIN) == (1e12, 1e12)
