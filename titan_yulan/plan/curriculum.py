"""What the phases of a run will read and how they lie on the ranks, from the configuration and the prepared sources
alone: what `titan-yulan plan` prints. No torch, no GPU; a source that is not prepared yet is no obstacle.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from titan_yulan.curriculum.plan import PhasePlan, Plan
from titan_yulan.data.partition import micro_batches
from titan_yulan.parallel.degrees import resolve_degrees


@dataclass(frozen=True)
class SourceUse:
    """What one phase reads of one source."""

    name: str
    share: float  # of the phase's rows, as the mix says
    rows: int
    begin: int  # where the source's tape stands before and after the phase, in tokens
    end: int
    prepared: int | None  # tokens of the prepared source; None: it is not prepared

    @property
    def tokens(self) -> int:
        return self.end - self.begin

    @property
    def epochs(self) -> tuple[float, float] | None:
        """How often the source was read before and after the phase; None: its size is not known."""
        return (self.begin / self.prepared, self.end / self.prepared) if self.prepared else None

    @property
    def repeats(self) -> bool:
        """Whether the phase reads something that was read before."""
        return self.tokens > 0 and self.prepared is not None and self.end > self.prepared


@dataclass(frozen=True)
class RankShare:
    """How the rows of one step lie on the ranks."""

    ranks: int  # that the global batch is cut into; ranks that share rows (tensor, context) count once
    rows: int  # of the fullest rank
    micro_batches: int
    idle: float  # share of the computed rows that are no rows of the batch

    @classmethod
    def of(cls, phase: PhasePlan, ranks: int) -> RankShare:
        """The cut of a phase's global batch into `ranks` parts. Every rank computes as many rows as the fullest one,
        in whole micro-batches; a rank with fewer waits or computes rows of weight zero."""
        micro = phase.section.batch.micro_batch_size
        count = micro_batches(phase.batch_rows, ranks, micro)
        rows = math.ceil(phase.batch_rows / ranks)
        return cls(ranks, rows, count, 1 - phase.batch_rows / (ranks * count * micro))


@dataclass(frozen=True)
class PhaseForecast:
    """One phase: `uses` has the largest share first; `moved` is the total variation distance to the mix of the phase
    before (half the sum of |share - share before|; 0 for the first)."""

    phase: PhasePlan
    learning_rates: tuple[float, float]  # of its first and its last step
    uses: tuple[SourceUse, ...]
    on_ranks: RankShare | None
    moved: float
    moves: tuple[tuple[str, float], ...]  # (source, share - share before), the largest first


def forecast(plan: Plan, prepared: Mapping[str, int], gpus: int | None = None) -> list[PhaseForecast]:
    """All phases of a run in order.

    Args:
        prepared: tokens of the sources whose size is known.
        gpus: ranks of the run; None: nothing is said about ranks.

    Raises:
        UserError: [parallel] does not fit this number of ranks.
    """
    forecasts: list[PhaseForecast] = []
    before = None
    for phase in plan.phases:
        section = phase.section
        on_ranks = None
        if gpus is not None:
            degrees = resolve_degrees(section.parallel, gpus, plan.config.model, section.sequence_length)
            on_ranks = RankShare.of(phase, degrees.data)
        change = phase.weights - before if before is not None else phase.weights * 0
        moves = sorted(zip(phase.sources, change.tolist(), strict=True), key=lambda move: -abs(move[1]))
        ends = plan.learning_rate(phase.start.step), plan.learning_rate(phase.end.step - 1)
        uses = source_uses(phase, prepared)
        forecasts.append(PhaseForecast(phase, ends, uses, on_ranks, float(abs(change).sum() / 2), tuple(moves)))
        before = phase.weights
    return forecasts


def source_uses(phase: PhasePlan, prepared: Mapping[str, int]) -> tuple[SourceUse, ...]:
    """What a phase reads, the largest share first; `prepared`: tokens of the sources whose size is known."""
    stands = zip(phase.sources, phase.weights.tolist(), phase.tape_start, phase.tapes(phase.rows_total), strict=True)
    uses = [
        SourceUse(name, share, (end - begin) // phase.sequence_length, begin, end, prepared.get(name))
        for name, share, begin, end in stands
        if share
    ]
    return tuple(sorted(uses, key=lambda use: (-use.share, use.name)))


def totals(forecasts: Sequence[PhaseForecast]) -> tuple[SourceUse, ...]:
    """What the phases together read of each source, the most read first; `share` is that of their tokens."""
    uses: dict[str, list[SourceUse]] = {}
    for item in forecasts:
        for use in item.uses:
            uses.setdefault(use.name, []).append(use)
    all_tokens = sum(use.tokens for each in uses.values() for use in each)
    together = [
        SourceUse(
            name,
            sum(use.tokens for use in each) / all_tokens,
            sum(use.rows for use in each),
            each[0].begin,
            each[-1].end,
            each[0].prepared,
        )
        for name, each in uses.items()
    ]
    return tuple(sorted(together, key=lambda use: (-use.tokens, use.name)))


def repetitions(phase: PhasePlan, uses: Iterable[SourceUse]) -> list[str]:
    """A line for each source of which a phase needs more than is left unread."""
    lines = []
    for use in uses:
        if use.repeats and use.prepared and use.epochs:
            left = max(0, use.prepared - use.begin)
            lines.append(
                f"phase {phase.name!r} reads {use.tokens:,} tokens of {use.name}, of whose {use.prepared:,} "
                f"{left:,} are left unread: epochs {use.epochs[0]:.2f} to {use.epochs[1]:.2f}"
            )
    return lines
