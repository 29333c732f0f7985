"""The counter hash behind every random choice whose value is a contract: orders, plan keys, row fingerprints.

A random number is a pure function of a key (made from the seed and the purpose) and a counter, so it does not depend
on how many numbers were drawn before, on the world size, or on a library's generator. The mixing function is the
finaliser of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
"""

from __future__ import annotations

import hashlib

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_M1 = np.uint64(0xBF58476D1CE4E5B9)
_M2 = np.uint64(0x94D049BB133111EB)
_POSITION = np.uint64(0xD6E8FEB86659FD93)
_CACHED_VALUES = 2**15  # that `fingerprint` works on at a time, so that they stay in the processor's cache


def key(*parts: int | str) -> int:
    """A 64-bit key of (seed, purpose, names, ...); different parts give independent keys."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def mix(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser, a bijection on 64-bit integers; uint64 in, uint64 out, any shape."""
    values = (values ^ (values >> np.uint64(30))) * _M1
    values = (values ^ (values >> np.uint64(27))) * _M2
    return values ^ (values >> np.uint64(31))


def bits(key: int | np.ndarray, counters: np.ndarray) -> np.ndarray:
    """64 random bits for each counter, uint64 of the same shape; one key for all, or an array with one for each."""
    return mix(np.uint64(key) + (counters.astype(np.uint64) + np.uint64(1)) * _GOLDEN)


def uniform(key: int | np.ndarray, counters: np.ndarray) -> np.ndarray:
    """A float64 in [0, 1) for each counter (53 random bits)."""
    return (bits(key, counters) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(key: int, n: int) -> np.ndarray:
    """A random order of 0..n-1 (int64), the same on every machine."""
    return np.argsort(bits(key, np.arange(n)), kind="stable")


def fingerprint(tokens: np.ndarray) -> np.ndarray:
    """64-bit fingerprint of each row of token ids: (..., length) integers -> (...,) uint64.

    Depends on every token and on its place in the row. `data.loader.fingerprint` computes the same on a device.
    """
    length = tokens.shape[-1]
    rows = np.ascontiguousarray(tokens, np.int64).view(np.uint64).reshape(-1, length)
    places = (np.arange(length, dtype=np.uint64) + np.uint64(1)) * _POSITION + _GOLDEN
    sums = np.empty(len(rows), np.uint64)
    together = max(1, _CACHED_VALUES // max(1, length))
    space = np.empty((2, min(together, len(rows)), length), np.uint64)
    for first in range(0, len(rows), together):
        part = rows[first : first + together]
        values, other = space[:, : len(part)]
        np.multiply(part, _GOLDEN, out=values)
        values += places
        _mix_in_place(values, other)
        values.sum(axis=-1, dtype=np.uint64, out=sums[first : first + together])
    return mix(sums).reshape(tokens.shape[:-1])


def _mix_in_place(values: np.ndarray, space: np.ndarray) -> None:
    """`mix`; `space` is for what is in between."""
    values ^= np.right_shift(values, np.uint64(30), out=space)
    values *= _M1
    values ^= np.right_shift(values, np.uint64(27), out=space)
    values *= _M2
    values ^= np.right_shift(values, np.uint64(31), out=space)
