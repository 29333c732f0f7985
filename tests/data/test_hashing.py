"""The counter hash: values that are a contract, and that it looks random."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from titan_yulan.data import hashing

_MASK = (1 << 64) - 1


def splitmix64(state: int, count: int) -> list[int]:
    """The generator of Steele, Lea and Flood in Python's integers."""
    values = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & _MASK
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        values.append(z ^ (z >> 31))
    return values


def test_bits_are_the_published_first_values_of_splitmix64() -> None:
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert hashing.bits(1234567, np.arange(5)).tolist() == known == splitmix64(1234567, 5)


@given(st.integers(0, _MASK), st.integers(0, 1000))
def test_bits_are_a_function_of_the_counter_alone(key: int, counter: int) -> None:
    assert hashing.bits(key, np.array([counter]))[0] == splitmix64(key, counter + 1)[-1]


def test_a_key_for_each_counter() -> None:
    keys = np.array([3, 3, 9], dtype=np.uint64)
    one_by_one = [int(hashing.bits(int(k), np.array([c]))[0]) for k, c in zip(keys, (0, 1, 1), strict=True)]
    assert hashing.bits(keys, np.array([0, 1, 1])).tolist() == one_by_one


def test_keys_differ_by_every_part_its_type_and_its_borders() -> None:
    keys = [
        hashing.key(*parts) for parts in ((1, "a"), (2, "a"), (1, "b"), ("1", "a"), ("1a",), (1, "a", ""), ("a", 1))
    ]
    assert len(set(keys)) == len(keys)
    assert all(0 <= key < 2**64 for key in keys)


def test_uniform_is_uniform_and_below_one() -> None:
    u = hashing.uniform(hashing.key(0, "test"), np.arange(100_000))
    assert u.min() >= 0 and u.max() < 1
    # 100 bins of 1000 +- 31; 5 standard deviations
    assert np.abs(np.histogram(u, 100, (0, 1))[0] - 1000).max() < 160
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.016


@given(st.integers(0, _MASK), st.integers(0, 300))
def test_permutation_has_every_number_once(key: int, n: int) -> None:
    order = hashing.permutation(key, n)
    assert sorted(order.tolist()) == list(range(n)) and order.dtype == np.int64


def test_permutations_of_different_keys_differ() -> None:
    assert hashing.permutation(1, 50).tolist() != hashing.permutation(2, 50).tolist() != list(range(50))


rows = st.lists(st.integers(0, 130_000), min_size=2, max_size=40)


@given(rows, st.randoms(use_true_random=False))
def test_fingerprint_depends_on_the_place_of_every_token(tokens: list[int], random) -> None:
    other = tokens.copy()
    random.shuffle(other)
    same = hashing.fingerprint(np.array(tokens)) == hashing.fingerprint(np.array(other))
    assert same == (tokens == other)


@given(rows, st.data())
def test_fingerprint_depends_on_every_token(tokens: list[int], data: st.DataObject) -> None:
    other = tokens.copy()
    other[data.draw(st.integers(0, len(tokens) - 1))] += 1
    assert hashing.fingerprint(np.array(tokens)) != hashing.fingerprint(np.array(other))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.uint32, np.int64])
def test_fingerprint_does_not_depend_on_the_type_or_the_other_rows(dtype: type) -> None:
    tokens = np.arange(24).reshape(2, 3, 4)
    prints = hashing.fingerprint(tokens.astype(dtype))
    assert prints.shape == (2, 3) and prints.dtype == np.uint64
    assert prints.tolist() == [[int(hashing.fingerprint(row)) for row in block] for block in tokens]
