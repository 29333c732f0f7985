"""The order of the rows of a phase: which source each row comes from, by keys that can be generated anywhere.

With weights w_s that sum to 1, row k of source s has the key (k + u_{s,k}) / w_s with u in [0, 1) a hash of the seed.
The rows in the order of their keys are the phase. Consequences:

- the order does not depend on the phase's length, so a phase can be extended;
- between the keys t and t + n there are n w_s rows of s, give or take one: the mixture is right in every window;
- the number of rows of s below any key is known without generating them, so a window in the middle of a phase
  of any size costs what a window at its start costs. Nothing is stored.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from titan_yulan.data import hashing

_WINDOW = 8192  # rows (in units of the key) that are sorted at a time


class Mixture:
    """The endless row order of a mixture of sources; immutable."""

    def __init__(self, weights: Sequence[float], keys: Sequence[int]) -> None:
        """
        Args:
            weights: one non-negative weight per source, any scale, not all zero.
            keys: one 64-bit hash key per source (seed, phase and source name).
        """
        w = np.asarray(weights, dtype=np.float64)
        self._active = np.flatnonzero(w > 0)
        self._weights = w[self._active] / w.sum()
        self._keys = np.asarray(keys, dtype=np.uint64)[self._active]
        self._sources = len(w)
        # (window, number of its first row, source ids, row numbers), always replaced as a whole: the loader's thread
        # and the trainer's read at the same time
        self._cached: tuple[int, int, np.ndarray, np.ndarray] | None = None

    def _row_keys(self, source: np.ndarray, k: np.ndarray) -> np.ndarray:
        u = hashing.uniform(self._keys[source], k)
        return (k + u) / self._weights[source]

    def _counts_below(self, t: float) -> np.ndarray:
        """Rows of each active source whose key is below t. Only three rows a source can be near t; they are compared
        by the very keys that sorting uses, so that rounding cannot make the two disagree."""
        m = np.maximum(np.floor(t * self._weights).astype(np.int64) - 1, 0)
        counts = m.copy()
        every = np.arange(len(self._active))
        for offset in range(3):
            counts += self._row_keys(every, m + offset) < t
        return counts

    def _window(self, j: int) -> tuple[int, np.ndarray, np.ndarray]:
        """Rows with keys in [j, j+1) * _WINDOW: (number of the first one, source ids, row numbers in the source)."""
        cached = self._cached
        if cached is None or cached[0] != j:
            low, high = self._counts_below(j * float(_WINDOW)), self._counts_below((j + 1) * float(_WINDOW))
            source = np.repeat(np.arange(len(self._active)), high - low)
            starts = np.repeat(low - np.concatenate(([0], np.cumsum(high - low)[:-1])), high - low)
            k = np.arange(len(source)) + starts
            order = np.lexsort((source, self._row_keys(source, k)))
            cached = self._cached = (j, int(low.sum()), self._active[source[order]], k[order])
        return cached[1:]

    def _locate(self, row: int) -> int:
        """The window that holds `row`."""
        cached = self._cached
        if cached is not None and cached[1] <= row < cached[1] + len(cached[2]):
            return cached[0]  # as nearly always: rows are asked for in their order
        j = row // _WINDOW
        while int(self._counts_below(j * float(_WINDOW)).sum()) > row:
            j -= 1
        while int(self._counts_below((j + 1) * float(_WINDOW)).sum()) <= row:
            j += 1
        return j

    def rows(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows start..stop-1 of the order: (source ids, row numbers within their source), int64 each."""
        sources, numbers = [], []
        j = self._locate(start) if stop > start else 0
        while start < stop:
            first, source, number = self._window(j)
            part = slice(start - first, min(stop - first, len(source)))
            sources.append(source[part])
            numbers.append(number[part])
            start = first + part.stop
            j += 1
        empty = np.zeros(0, dtype=np.int64)
        return (np.concatenate(sources), np.concatenate(numbers)) if sources else (empty, empty)

    def counts(self, row: int) -> np.ndarray:
        """Rows of each source among the first `row` rows, int64 (sources,)."""
        counts = np.zeros(self._sources, dtype=np.int64)
        if row > 0:
            j = self._locate(row - 1)
            counts[self._active] = self._counts_below(j * float(_WINDOW))
            first, source, _ = self._window(j)
            counts += np.bincount(source[: row - first], minlength=self._sources)
        return counts
