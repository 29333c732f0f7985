"""What the loader reads at once, and how a tape collects it: the ways that are fast give what the plain ones give."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.test_tape import make_source
from titan_yulan.curriculum.mixture import Mixture
from titan_yulan.data import hashing, tape
from titan_yulan.data.loader import _stretches
from titan_yulan.data.tape import Tape


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5).map(lambda n: 10 * n)), min_size=1, max_size=20))
def test_stretches_hold_every_row_once_each_behind_the_other(rows: list[tuple[int, int]]) -> None:
    ids, starts = (np.array(column) for column in zip(*rows, strict=True))
    found = list(_stretches(ids, starts, 10))
    assert sorted(itertools.chain.from_iterable(numbers for numbers, _, _ in found)) == list(range(len(rows)))
    for numbers, source, start in found:
        assert [rows[number] for number in numbers] == [(source, start + 10 * n) for n in range(len(numbers))]


def test_consecutive_rows_of_a_source_are_one_stretch() -> None:
    ids, starts = np.array([1, 0, 1, 1, 0]), np.array([7, 0, 12, 17, 99])
    assert list(_stretches(ids, starts, 5)) == [([1], 0, 0), ([4], 0, 99), ([0, 2, 3], 1, 7)]


@pytest.mark.parametrize("masked", [False, True])
def test_long_and_short_documents_are_collected_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, masked: bool
) -> None:
    source = make_source(tmp_path / "s", [[3, 1, 4], [1, 5, 9, 2]], masked=masked)
    pieces = []
    for limit in (0, 10**9):
        monkeypatch.setattr(tape, "_LONG_STRETCH", limit)
        pieces.append([Tape(source, seed=3).read(start, 20) for start in range(30)])
    for one, other in zip(*pieces, strict=True):
        assert one.tokens.dtype == other.tokens.dtype == np.int32
        assert one.tokens.tolist() == other.tokens.tolist()
        assert one.document_ids.tolist() == other.document_ids.tolist()
        assert (one.loss_mask is not None) == masked
        np.testing.assert_array_equal(one.loss_mask, other.loss_mask)


@given(st.lists(st.integers(0, 60_000), min_size=1, max_size=12))
@settings(max_examples=15, deadline=None)
def test_rows_do_not_depend_on_what_was_asked_before(starts: list[int]) -> None:
    mixture = Mixture([0.5, 0.3, 0.2], [1, 2, 3])
    for start in starts:
        fresh = Mixture([0.5, 0.3, 0.2], [1, 2, 3])
        for mine, theirs in zip(mixture.rows(start, start + 40), fresh.rows(start, start + 40), strict=True):
            np.testing.assert_array_equal(mine, theirs)


def test_fingerprints_do_not_depend_on_how_many_rows_are_hashed_together() -> None:
    tokens = np.random.default_rng(0).integers(0, 99_000, (11, 4097))  # more values than are hashed at a time
    words = (tokens.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    places = (np.arange(4097, dtype=np.uint64) + np.uint64(1)) * np.uint64(0xD6E8FEB86659FD93)
    expected = hashing.mix(hashing.mix(words + places).sum(axis=-1, dtype=np.uint64))
    assert hashing.fingerprint(tokens).tolist() == expected.tolist()
    assert hashing.fingerprint(tokens[:0]).shape == (0,)
