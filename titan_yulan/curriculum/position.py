"""Position in a run: how many steps, rows and tokens were consumed, and the conversion between the three."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Position:
    """Optimizer steps done, rows consumed, tokens trained on (targets of rows, counted before any loss mask)."""

    step: int
    row: int
    token: int


class Timeline:
    """Steps, rows and tokens at every phase boundary; linear between them, and past the last boundary as before it."""

    def __init__(self, boundaries: Sequence[Position]) -> None:
        """`boundaries`: the start of the first phase, then the end of each phase (at least one phase)."""
        self._axes = {
            "steps": [position.step for position in boundaries],
            "rows": [position.row for position in boundaries],
            "tokens": [position.token for position in boundaries],
        }

    def convert(self, value: float, unit: str, to: Literal["steps", "rows", "tokens"] | str) -> float:
        """The same position in another unit (fractions of a step are possible)."""
        if unit == to:
            return value
        source, target = self._axes[unit], self._axes[to]
        i = min(max(bisect.bisect_right(source, value) - 1, 0), len(source) - 2)
        return target[i] + (value - source[i]) * (target[i + 1] - target[i]) / (source[i + 1] - source[i])
