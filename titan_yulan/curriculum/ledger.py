"""What a run has read of every source: rows, tokens, epochs. From the plan alone, so it needs no bookkeeping while
training: a phase reads its sources' tapes from where the phase before left them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from titan_yulan.curriculum.plan import PhasePlan, Plan


@dataclass(frozen=True)
class SourceLedger:
    """What was read of one source up to a step. Rows that a skip list leaves out are read as well.

    Attributes:
        rows: that this run has read; they are as long as the sequences of the phase that read them.
        tokens: where the source's tape stands: all that was read of it, by the run of `[phase] start_from` too.
        epochs: how often the source was read, `tokens` by its size; None: the size is not known.
        phase_rows, phase_tokens: what of that the phase of the last step has read.
    """

    rows: int
    tokens: int
    epochs: float | None
    phase_rows: int
    phase_tokens: int


def ledger(plan: Plan, step: int, source_tokens: Mapping[str, int]) -> dict[str, SourceLedger]:
    """Every source of the configuration, in alphabetical order, after `step` finished steps of the run.

    Args:
        step: counted as the run counts; at the end of a phase, that phase is "the phase of the last step".
        source_tokens: tokens of the prepared sources; one that is not named has no epochs.
    """
    rows = [0] * len(plan.sources)
    tapes, counts, length = plan.phases[0].tape_start, rows, 0
    for phase in plan.phases:
        if step <= phase.start.step:
            break
        done = min(step, phase.end.step) - phase.start.step
        counts, length = phase.counts(done * phase.batch_rows).tolist(), phase.sequence_length
        rows = [before + new for before, new in zip(rows, counts, strict=True)]
        tapes = tuple(start + new * length for start, new in zip(phase.tape_start, counts, strict=True))
    return {
        name: SourceLedger(rows[i], tapes[i], _epochs(tapes[i], source_tokens.get(name)), counts[i], counts[i] * length)
        for i, name in enumerate(plan.sources)
    }


def _epochs(tokens: int, size: int | None) -> float | None:
    return tokens / size if size else None


def ledger_json(entries: Mapping[str, SourceLedger]) -> dict[str, dict[str, Any]]:
    """The sources that were read, for a checkpoint's state."""
    return {name: asdict(entry) for name, entry in entries.items() if entry.tokens}


def ledger_lines(phase: PhasePlan, entries: Mapping[str, SourceLedger]) -> list[str]:
    """The table to print when `phase` ends: every source that was ever read, those that the phase read most first."""
    read = {name: entry for name, entry in entries.items() if entry.tokens}
    order = sorted(read, key=lambda name: (-read[name].phase_tokens, -read[name].tokens, name))
    width = max([len("source"), *map(len, read)])
    heads = ("phase rows", "phase tokens", "rows", "tokens", "epochs")
    lines = [f"read up to step {phase.end.step}, the end of phase {phase.name!r}"]
    lines.append(f"  {'source':<{width}}" + "".join(f"{head:>18}" for head in heads))
    for name in order:
        entry = read[name]
        numbers = (entry.phase_rows, entry.phase_tokens, entry.rows, entry.tokens)
        epochs = f"{entry.epochs:>18.4f}" if entry.epochs is not None else f"{'?':>18}"
        lines.append(f"  {name:<{width}}" + "".join(f"{number:>18,}" for number in numbers) + epochs)
    return lines
