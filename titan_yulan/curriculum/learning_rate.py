"""Learning-rate shapes as pure functions of position, and the schedule that a curriculum's segments make.

The multiplier of optimizer step n + 1 is the schedule at position n (n steps done), the convention of PyTorch's
LambdaLR. A segment holds its value past its end or past `hold_at`; it never wraps or jumps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from titan_yulan.config.sections import LearningRateSegment
from titan_yulan.config.values import Duration, Unit
from titan_yulan.curriculum.position import Timeline


def shape_value(shape: str, start: float, end: float, u: float) -> float:
    """Multiplier at progress `u` of a segment from `start` to `end`; `u` is clamped to [0, 1].

    linear: a + (b-a)u; cosine (half wave): a + (b-a)(1-cos(pi u))/2; quarter-cosine: a + (b-a)(1-cos(pi u/2));
    1-sqrt: b + (a-b)(1-sqrt(u)) (Haegele et al., arXiv 2405.18392; YuLan-Mini anneals with it).
    """
    u = min(max(u, 0.0), 1.0)
    match shape:
        case "constant":
            return start
        case "linear":
            return start + (end - start) * u
        case "cosine":
            return start + (end - start) * (1 - math.cos(math.pi * u)) / 2
        case "quarter-cosine":
            return start + (end - start) * (1 - math.cos(math.pi * u / 2))
        case "1-sqrt":
            return end + (start - end) * (1 - math.sqrt(u))
    raise ValueError(f"unknown learning-rate shape {shape!r}")


@dataclass(frozen=True)
class Piece:
    """A segment placed on the timeline: it starts at `start` (in `unit`) and takes `over` of that unit."""

    shape: str
    from_: float
    to: float
    unit: Unit
    start: float
    over: float
    hold_at: float

    def value(self, measure: float) -> float:
        """Multiplier where the timeline shows `measure` of this piece's unit."""
        progress = min(measure - self.start, self.hold_at)
        return shape_value(self.shape, self.from_, self.to, progress / self.over if math.isfinite(self.over) else 0.0)


class Schedule:
    """The multiplier of the peak learning rate at any position of a curriculum."""

    def __init__(self, pieces: Sequence[Piece], timeline: Timeline) -> None:
        self.pieces, self.timeline = tuple(pieces), timeline

    def __call__(self, step: int) -> float:
        """Multiplier for the optimizer step that follows `step` finished steps."""
        current = None
        for piece in self.pieces:
            if self.timeline.convert(step, "steps", piece.unit) >= piece.start:
                current = piece
        if current is None:
            return 1.0
        return current.value(self.timeline.convert(step, "steps", current.unit))


def place_segments(
    segments: Sequence[LearningRateSegment],
    phase_start: float,
    timeline: Timeline,
    resolve: Callable[[Duration], tuple[float, Unit]],
) -> list[Piece]:
    """Place a phase's segments one after the other from the phase's first step (`phase_start`, in steps)."""
    pieces: list[Piece] = []
    end, end_unit = float(phase_start), "steps"
    for segment in segments:
        over, unit = resolve(segment.over) if segment.over else (math.inf, "steps")
        hold, hold_unit = resolve(segment.hold_at) if segment.hold_at else (math.inf, unit)
        start = timeline.convert(end, end_unit, unit)
        if hold_unit != unit:
            hold = timeline.convert(timeline.convert(start, unit, hold_unit) + hold, hold_unit, unit) - start
        pieces.append(Piece(segment.shape, segment.from_, segment.to, unit, start, over, hold))
        end, end_unit = start + over, unit
    return pieces
