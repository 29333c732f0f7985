"""The order of rows: properties that hold for any weights and any window."""

from __future__ import annotations

import itertools
import sys
from types import FrameType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from titan_yulan.curriculum import mixture
from titan_yulan.curriculum.mixture import Mixture
from titan_yulan.data import hashing

weights_of_sources = st.lists(st.floats(0, 10).filter(lambda w: w == 0 or w > 1e-3), min_size=1, max_size=20).filter(
    any
)


def make(weights: list[float], seed: int = 0) -> Mixture:
    return Mixture(weights, [hashing.key(seed, "mixture", str(i)) for i in range(len(weights))])


def by_definition(weights: list[float], rows: int, seed: int = 0) -> list[tuple[int, int]]:
    """The first rows by sorting the keys of more rows of every source than can be among them."""
    share = np.array(weights) / np.sum(weights)
    keyed = []
    for source in np.flatnonzero(share):
        k = np.arange(int(rows * share[source]) + 3)
        u = hashing.uniform(hashing.key(seed, "mixture", str(source)), k)
        keyed += [(key, int(source), int(n)) for key, n in zip((k + u) / share[source], k, strict=True)]
    return [(source, number) for _, source, number in sorted(keyed)[:rows]]


def pairs(m: Mixture, start: int, stop: int) -> list[tuple[int, int]]:
    source, number = m.rows(start, stop)
    assert source.dtype == number.dtype == np.int64
    return list(zip(source.tolist(), number.tolist(), strict=True))


@given(weights_of_sources, st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_the_order_is_that_of_the_keys(weights: list[float], seed: int) -> None:
    assert pairs(make(weights, seed), 0, 500) == by_definition(weights, 500, seed)


@given(weights_of_sources, st.lists(st.integers(0, 30_000), min_size=2, max_size=6))
@settings(max_examples=25, deadline=None)
def test_rows_do_not_depend_on_the_window_they_are_asked_in(weights: list[float], cuts: list[int]) -> None:
    m = make(weights)
    cuts = sorted(cuts)
    whole = pairs(make(weights), cuts[0], cuts[-1])
    parts = [pairs(m, a, b) for a, b in itertools.pairwise(cuts)][::-1]  # asked from the last to the first
    assert [row for part in parts[::-1] for row in part] == whole


@given(weights_of_sources, st.integers(0, 40_000))
@settings(max_examples=25, deadline=None)
def test_counts_are_the_counts_of_the_rows_and_number_them(weights: list[float], row: int) -> None:
    m = make(weights)
    source, number = m.rows(0, row)
    assert m.counts(row).tolist() == np.bincount(source, minlength=len(weights)).tolist()
    for s in range(len(weights)):  # each source's rows in their own order, none left out
        assert (number[source == s] == np.arange((source == s).sum())).all()


def worst_in_any_window(weights: list[float], rows: int = 1008) -> np.ndarray:
    """How many rows each source strays from its share in the worst window of the first 20,000 rows."""
    source, _ = make(weights).rows(0, 20_000)
    share = np.array(weights) / np.sum(weights)
    below = np.concatenate((np.zeros((1, len(share))), np.cumsum(source[:, None] == np.arange(len(share)), axis=0)))
    return np.abs(below[rows:] - below[:-rows] - rows * share).max(axis=0)


@given(weights_of_sources)
@settings(max_examples=25, deadline=None)
def test_no_window_strays_further_than_the_keys_allow(weights: list[float]) -> None:
    """Between two keys every source is off by less than 2 rows; a window in rows adds w times what all are off."""
    share = np.array(weights) / np.sum(weights)
    sources = np.count_nonzero(share)
    assert (worst_in_any_window(weights) <= 2 * (1 - share) + 2 * share * (sources - 1) + 1e-6).all()


def test_20_sources_are_within_4_rows_of_their_shares_in_every_window() -> None:
    """Independent draws with these shares stray by 50."""
    weights = [0.3, 0.2, 0.12, 0.08, 0.05, 0.04, 0.04, 0.03, 0.03, 0.02, 0.02, 0.02, 0.01, 0.01, 0.01]
    weights += [0.008, 0.005, 0.004, 0.002, 0.001]
    assert worst_in_any_window(weights).max() <= 4


@given(weights_of_sources)
@settings(max_examples=20, deadline=None)
def test_zero_weights_never_appear(weights: list[float]) -> None:
    source, _ = make(weights).rows(0, 9000)
    assert {weights[s] > 0 for s in set(source.tolist())} == {True}


def test_far_rows_are_found_without_the_rows_before() -> None:
    m = make([0.7, 0.2999, 0.0001])
    far = 10_000_000_000
    source, _ = m.rows(far, far + 1000)
    counts = m.counts(far)
    assert counts.sum() == far
    assert counts.tolist() == pytest.approx([7e9, 2.999e9, 1e6], abs=2)
    assert m.counts(far + 1000).tolist() == (counts + np.bincount(source, minlength=3)).tolist()


def test_another_key_gives_another_order_of_the_same_shares() -> None:
    first, second = make([0.5, 0.5], 0), make([0.5, 0.5], 1)
    assert pairs(first, 0, 1000) != pairs(second, 0, 1000)
    assert first.counts(1000).tolist() == pytest.approx(second.counts(1000).tolist(), abs=2)


def test_no_rows() -> None:
    source, number = make([1.0]).rows(5, 5)
    assert len(source) == len(number) == 0
    assert make([1.0, 2.0]).counts(0).tolist() == [0, 0]


def test_two_threads_may_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loader's thread asks for rows while the trainer asks where the tapes stand for a checkpoint.

    Wherever the other thread comes in, both must be right: a trace function reads another window at every line.
    """
    monkeypatch.setattr(mixture, "_WINDOW", 16)
    m, alone = make([0.5, 0.3, 0.2]), make([0.5, 0.3, 0.2])
    expected = {row: (alone.counts(row).tolist(), pairs(alone, row, row + 3)) for row in (5, 40, 90)}
    lines = 0

    def other_thread(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal lines
        if frame.f_code.co_filename == mixture.__file__ and event == "line":
            lines += 1
            m.rows(70, 72)  # not traced itself
        return other_thread

    before = sys.gettrace()
    for row, (counts, rows) in expected.items():
        sys.settrace(other_thread)
        try:
            found = m.counts(row).tolist(), pairs(m, row, row + 3)
        finally:
            sys.settrace(before)
        assert found == (counts, rows)
    assert lines > 50
