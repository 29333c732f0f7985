"""The plan of a run: where every phase starts and ends, its rows, and the learning rate, from the configuration alone.

Everything here is a pure function of the resolved configuration; no file is opened and no torch is imported, so the
same code answers `titan-yulan plan`, the loader and the trainer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from titan_yulan.config.sections import BatchSection, PhaseSection, RunConfig
from titan_yulan.config.values import Duration, Tokens, Unit
from titan_yulan.curriculum.learning_rate import Schedule, place_segments
from titan_yulan.curriculum.mixture import Mixture
from titan_yulan.curriculum.position import Position, Timeline
from titan_yulan.data import hashing
from titan_yulan.errors import UserError


def batch_rows(batch: BatchSection, sequence_length: int) -> int:
    """Rows of one global batch."""
    size = batch.global_batch_size
    return int(size.value // sequence_length) if isinstance(size, Tokens) else size


@dataclass(frozen=True)
class PhasePlan:
    """One phase, placed in its run.

    `sources` are all sources of the configuration in alphabetical order (a source id is an index into it);
    `tape_start` is where each source's tape stands when the phase begins, in tokens.
    """

    section: PhaseSection
    index: int
    seed: int
    sources: tuple[str, ...]
    start: Position
    steps: int
    tape_start: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.section.name

    @property
    def sequence_length(self) -> int:
        return self.section.sequence_length

    @cached_property
    def batch_rows(self) -> int:
        """Rows of one optimizer step."""
        return batch_rows(self.section.batch, self.sequence_length)

    @property
    def first_row(self) -> int:
        """Number of this phase's first row in the run."""
        return self.start.row

    @property
    def rows_total(self) -> int:
        return self.steps * self.batch_rows

    @property
    def end(self) -> Position:
        return self.position(self.steps)

    def position(self, step: int) -> Position:
        """Position after `step` steps of this phase."""
        rows = step * self.batch_rows
        return Position(self.start.step + step, self.start.row + rows, self.start.token + rows * self.sequence_length)

    def steps_in(self, duration: Duration) -> int:
        """A distance such as `[checkpoint] every` in whole steps of this phase, at least 1."""
        value = {
            "steps": duration.value,
            "rows": duration.value / self.batch_rows,
            "tokens": duration.value / (self.batch_rows * self.sequence_length),
            "share": duration.value * self.steps,
        }[duration.unit]
        return max(1, int(value))

    @cached_property
    def weights(self) -> np.ndarray:
        """Share of each source, float64 (sources,), sums to 1."""
        amounts = np.array([_amount(self.section.mix.get(name, 0.0)) for name in self.sources])
        return amounts / amounts.sum()

    @cached_property
    def _mixture(self) -> Mixture:
        keys = [hashing.key(self.seed, "mixture", self.name, source) for source in self.sources]
        return Mixture(self.weights.tolist(), keys)

    def rows(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows start..stop-1 of this phase: (source ids, tape positions in tokens), int64 each.

        A row reads `sequence_length + 1` tokens from its tape position; the next row of that source starts
        `sequence_length` later, so that every token is a target exactly once.
        """
        source, number = self._mixture.rows(start, stop)
        return source, np.asarray(self.tape_start, dtype=np.int64)[source] + number * self.sequence_length

    def tapes(self, row: int) -> tuple[int, ...]:
        """Where each tape stands after `row` rows of this phase, in tokens."""
        counts = self._mixture.counts(row)
        return tuple(int(start + n * self.sequence_length) for start, n in zip(self.tape_start, counts, strict=True))


class Plan:
    """All phases of a run in order, with the learning-rate schedule across them."""

    def __init__(
        self, config: RunConfig, start: Position = Position(0, 0, 0), tapes: Mapping[str, int] | None = None
    ) -> None:
        """
        Args:
            start: where the first phase begins; not zero if it continues another run (`[phase] start_from`).
            tapes: where the sources' tapes stand there, in tokens; a source not named is unread.

        Raises:
            UserError: a phase is shorter than one global batch.
        """
        self.config = config
        self.sources = tuple(sorted(config.data.sources))
        position = start
        stands = tuple((tapes or {}).get(name, 0) for name in self.sources)
        phases: list[PhasePlan] = []
        for index, section in enumerate(config.phases):
            phase = PhasePlan(section, index, config.run.seed, self.sources, position, phase_steps(section), stands)
            phases.append(phase)
            position = phase.end
            if index + 1 < len(config.phases):
                stands = phase.tapes(phase.rows_total)
        self.phases = tuple(phases)
        self.end = position
        self.timeline = Timeline([phases[0].start, *(phase.end for phase in phases)])
        pieces = []
        for phase in phases:
            if phase.section.lr:
                # a phase's own segments replace whatever was still running
                pieces += place_segments(phase.section.lr, phase.start.step, self.timeline, _resolver(phase))
        self._schedule = Schedule(pieces, self.timeline)

    def phase_at(self, step: int) -> PhasePlan:
        """The phase that the optimizer step after `step` finished steps belongs to (the last one at the end)."""
        for phase in self.phases:
            if step < phase.end.step:
                return phase
        return self.phases[-1]

    def position(self, step: int) -> Position:
        """Position after `step` steps of the run."""
        phase = self.phase_at(step)
        return phase.position(step - phase.start.step)

    def learning_rate(self, step: int) -> float:
        """Learning rate of the optimizer step that follows `step` finished steps."""
        return self.config.optimizer.learning_rate * self._schedule(step)


def phase_steps(section: PhaseSection) -> int:
    """Optimizer steps of a phase: its length rounded down to whole global batches.

    Raises:
        UserError: not even one batch fits.
    """
    rows = batch_rows(section.batch, section.sequence_length)
    length = section.length or Duration(sum(_amount(value) for value in section.mix.values()), "tokens")
    tokens = rows * section.sequence_length
    steps = int({"steps": length.value, "rows": length.value / rows, "tokens": length.value / tokens}[length.unit])
    if steps < 1:
        raise UserError(
            f"phase {section.name!r} is shorter than one global batch: length = {str(length)!r}, one batch is "
            f"{rows} rows = {tokens} tokens; make phase.length longer or batch.global_batch_size smaller"
        )
    return steps


def _amount(value: float | Tokens) -> float:
    return value.value if isinstance(value, Tokens) else value


def _resolver(phase: PhasePlan):
    def resolve(duration: Duration) -> tuple[float, Unit]:
        if duration.unit == "share":
            return duration.value * phase.steps, "steps"
        return duration.value, duration.unit

    return resolve
