"""The plan of a run: where every phase starts and ends, its rows, and the learning rate, from the configuration alone.

Everything here is a pure function of the resolved configuration; no file is opened and no torch is imported, so the
same code answers `titan-yulan plan`, the loader and the trainer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from titan_yulan.config.sections import PhaseSection, RunConfig
from titan_yulan.config.subset import unique_amount
from titan_yulan.config.values import Duration, Unit, amount
from titan_yulan.curriculum.adaptive import Adjustment
from titan_yulan.curriculum.learning_rate import Schedule, place_segments
from titan_yulan.curriculum.mixture import Mixture
from titan_yulan.curriculum.position import Position, Timeline
from titan_yulan.data import hashing
from titan_yulan.errors import UserError


@dataclass(frozen=True)
class _Segment:
    """Rows of a phase, from `first_row` on, that are mixed by one set of weights."""

    first_row: int
    counts: np.ndarray  # (sources,) int64, rows of each source in the phase before this segment
    mixture: Mixture


@dataclass(frozen=True)
class PhasePlan:
    """One phase, placed in its run.

    `sources` are all sources of the configuration in alphabetical order (a source id is an index into it);
    `tape_start` is where each source's tape stands when the phase begins, in tokens. `adjustments` are the known
    changes of the mix inside the phase, in the order of their rows; the last one holds for all rows after it.
    """

    section: PhaseSection
    index: int
    seed: int
    sources: tuple[str, ...]
    start: Position
    steps: int
    tape_start: tuple[int, ...]
    adjustments: tuple[Adjustment, ...] = ()

    @property
    def name(self) -> str:
        return self.section.name

    @property
    def sequence_length(self) -> int:
        return self.section.sequence_length

    @cached_property
    def batch_rows(self) -> int:
        """Rows of one optimizer step."""
        return self.section.batch.rows(self.sequence_length)

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
        """Share of each source as the mix says, float64 (sources,), sums to 1."""
        amounts = np.array([amount(self.section.mix.get(name, 0.0)) for name in self.sources])
        return amounts / amounts.sum()

    def shares(self, row: int) -> dict[str, float]:
        """Share of each source from row `row` of the phase on, as far as is known."""
        known = [entry for entry in self.adjustments if 0 < entry.row <= row]
        if known:
            return {name: known[-1].shares.get(name, 0.0) for name in self.sources}
        return dict(zip(self.sources, self.weights.tolist(), strict=True))

    @cached_property
    def _segments(self) -> tuple[_Segment, ...]:
        """Each is mixed alone, by keys of its own; the tapes go on from one to the next."""
        segments: list[_Segment] = []
        counts = np.zeros(len(self.sources), dtype=np.int64)
        for row in [0, *(entry.row for entry in self.adjustments if entry.row)]:
            if segments:
                counts = counts + segments[-1].mixture.counts(row - segments[-1].first_row)
            weights = list(self.shares(row).values())
            place = (row,) if row else ()
            keys = [hashing.key(self.seed, "mixture", self.name, source, *place) for source in self.sources]
            segments.append(_Segment(row, counts, Mixture(weights, keys)))
        return tuple(segments)

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[_Segment, int, int]]:
        """The segments that hold rows start..stop-1 of the phase, with the part of each, counted in the segment."""
        ends = [segment.first_row for segment in self._segments[1:]] + [stop]
        for segment, end in zip(self._segments, ends, strict=True):
            first, last = max(start, segment.first_row), min(stop, end)
            if first < last:
                yield segment, first - segment.first_row, last - segment.first_row

    def rows(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows start..stop-1 of this phase: (source ids, tape positions in tokens), int64 each.

        A row reads `sequence_length + 1` tokens from its tape position; the next row of that source starts
        `sequence_length` later, so that every token is a target exactly once.
        """
        sources, places = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
        for segment, first, last in self._pieces(start, stop):
            source, number = segment.mixture.rows(first, last)
            begin = np.asarray(self.tape_start, dtype=np.int64) + segment.counts * self.sequence_length
            sources.append(source)
            places.append(begin[source] + number * self.sequence_length)
        return np.concatenate(sources), np.concatenate(places)

    def counts(self, row: int) -> np.ndarray:
        """Rows of each source among the first `row` rows of this phase, int64 (sources,)."""
        segment = [segment for segment in self._segments if segment.first_row <= row][-1]
        return segment.counts + segment.mixture.counts(row - segment.first_row)

    def tapes(self, row: int) -> tuple[int, ...]:
        """Where each tape stands after `row` rows of this phase, in tokens."""
        counts = self.counts(row).tolist()
        return tuple(start + n * self.sequence_length for start, n in zip(self.tape_start, counts, strict=True))


class Plan:
    """All phases of a run in order, with the learning-rate schedule across them."""

    def __init__(
        self,
        config: RunConfig,
        start: Position = Position(0, 0, 0),
        tapes: Mapping[str, int] | None = None,
        history: Sequence[Adjustment] = (),
    ) -> None:
        """
        Args:
            start: where the first phase begins; not zero if it continues another run (`[phase] start_from`).
            tapes: where the sources' tapes stand there, in tokens; a source not named is unread.
            history: the known changes of the mix inside phases.

        Raises:
            UserError: a phase is shorter than one global batch.
        """
        self.config = config
        self.sources = tuple(sorted(config.data.sources))
        self._start = start
        self._tapes = tuple((tapes or {}).get(name, 0) for name in self.sources)
        self.adapt(history)
        self.timeline = Timeline([start, *(phase.end for phase in self.phases)])
        pieces = []
        for phase in self.phases:
            if phase.section.lr:
                # a phase's own segments replace whatever was still running
                pieces += place_segments(phase.section.lr, phase.start.step, self.timeline, _resolver(phase))
        self._schedule = Schedule(pieces, self.timeline)

    def adapt(self, history: Sequence[Adjustment]) -> None:
        """Plan all rows anew with these changes of the mix inside phases. Only rows after a change that was not known
        before are other rows than before; phases keep their places, and the learning rate is the same."""
        self.history = tuple(history)
        position, stands = self._start, self._tapes
        phases: list[PhasePlan] = []
        for index, section in enumerate(self.config.phases):
            steps = phase_steps(section)
            own = tuple(sorted((e for e in self.history if e.phase == section.name), key=lambda e: e.row))
            phase = PhasePlan(section, index, self.config.run.seed, self.sources, position, steps, stands, own)
            phases.append(phase)
            position = phase.end
            if index + 1 < len(self.config.phases):
                stands = phase.tapes(phase.rows_total)
        self.phases, self.end = tuple(phases), position

    def history_until(self, phase: PhasePlan, row: int) -> list[Adjustment]:
        """The changes of the mix in the phases before `phase`, and in it up to row `row` of the run."""
        before = {earlier.name for earlier in self.phases[: phase.index]}
        return [
            entry
            for entry in self.history
            if entry.phase in before or (entry.phase == phase.name and entry.row <= row - phase.start.row)
        ]

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


def phase_length(section: PhaseSection) -> Duration:
    """The length of a phase: as written, or its epochs of unique tokens, or the amounts of its mix."""
    if section.length is not None:
        return section.length
    if section.epochs is not None:
        return Duration(section.epochs * (unique_amount(section) or 0), "tokens")
    return Duration(sum(amount(share) for share in section.mix.values()), "tokens")


def phase_steps(section: PhaseSection) -> int:
    """Optimizer steps of a phase: its length rounded down to whole global batches.

    Raises:
        UserError: not even one batch fits.
    """
    rows = section.batch.rows(section.sequence_length)
    length = phase_length(section)
    tokens = rows * section.sequence_length
    steps = int({"steps": length.value, "rows": length.value / rows, "tokens": length.value / tokens}[length.unit])
    if steps < 1:
        raise UserError(
            f"phase {section.name!r} is shorter than one global batch: length = {str(length)!r}, one batch is "
            f"{rows} rows = {tokens} tokens; make phase.length longer or batch.global_batch_size smaller"
        )
    return steps


def _resolver(phase: PhasePlan):
    def resolve(duration: Duration) -> tuple[float, Unit]:
        if duration.unit == "share":
            return duration.value * phase.steps, "steps"
        return duration.value, duration.unit

    return resolve
