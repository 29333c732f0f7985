"""Look at the stream from outside: the rows of a phase with their fingerprints, the text of a step."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from titan_yulan.curriculum.plan import PhasePlan, Plan
from titan_yulan.data import hashing
from titan_yulan.data.partition import rank_rows
from titan_yulan.data.tape import Tape, open_tape
from titan_yulan.data.tokenizer import Tokenizer
from titan_yulan.errors import UserError

_READ_AT_ONCE = 256


def _open_tapes(plan: Plan, phase: PhasePlan) -> dict[int, Tape]:
    """The tape of every source of a phase, by source id."""
    read = phase.counts(phase.rows_total)
    return {i: open_tape(plan.config, name) for i, name in enumerate(plan.sources) if read[i]}


def stream_rows(
    plan: Plan,
    phase_name: str | None,
    first: int,
    count: int,
    world: int | None = None,
    rank: int | None = None,
    batch: int | None = None,
) -> Iterator[str]:
    """One JSON line for each of the rows [first, first + count) of a phase, counted in the phase.

    With `world` and `rank`, only those that this rank would read when the global batch has `batch` rows.

    Raises:
        UserError: no such phase, rows or rank.
    """
    config = plan.config
    phase = _phase(plan, phase_name or config.phases[config.first_phase].name)
    if first < 0 or count < 1 or first + count > phase.rows_total:
        raise UserError(
            f"--from-row {first} --rows {count}: phase {phase.name!r} has the rows 0 to {phase.rows_total - 1}"
        )
    if batch is not None and batch < 1:
        raise UserError(f"--batch {batch}: a global batch has at least one row")
    if (world is None) != (rank is None) or (world is not None and rank is not None and not 0 <= rank < world):
        raise UserError("--world W and --rank R go together, with 0 <= R < W")
    tapes = _open_tapes(plan, phase)
    rows_a_batch = batch or phase.batch_rows
    start, stop = rank_rows(rows_a_batch, rank, world) if world is not None and rank is not None else (0, rows_a_batch)
    for begin in range(first, first + count, _READ_AT_ONCE):
        end = min(begin + _READ_AT_ONCE, first + count)
        for row, source, position in zip(range(begin, end), *phase.rows(begin, end), strict=True):
            if start <= row % rows_a_batch < stop:
                tokens = tapes[source].read(int(position), phase.sequence_length + 1).tokens
                yield json.dumps(
                    {
                        "row": row,
                        "position": phase.first_row + row,
                        "source": plan.sources[source],
                        "tape": int(position),
                        "fingerprint": f"{int(hashing.fingerprint(np.asarray(tokens))):016x}",
                    }
                )


def show_step(plan: Plan, step: int, rows: int) -> Iterator[str]:
    """The first `rows` rows of the global batch of a step (from 1), decoded.

    Raises:
        UserError: the run has no such step.
    """
    config, begin = plan.config, plan.phases[0].start.step
    if not begin < step <= plan.end.step:
        raise UserError(f"--step {step}: the run has the steps {begin + 1} to {plan.end.step}")
    phase = plan.phase_at(step - 1)
    tokenizer = Tokenizer.load(Path(config.tokenizer.path))
    tapes = _open_tapes(plan, phase)
    first = (step - 1 - phase.start.step) * phase.batch_rows
    yield (
        f"step {step} of {plan.end.step}, phase {phase.name!r}: rows {first}-{first + phase.batch_rows - 1} of the "
        f"phase, learning rate {plan.learning_rate(step - 1):.6g}"
    )
    stop = first + min(rows, phase.batch_rows)
    for row, source, position in zip(range(first, stop), *phase.rows(first, stop), strict=True):
        piece = tapes[source].read(int(position), phase.sequence_length + 1)
        documents = len(np.unique(piece.document_ids))
        yield f"--- row {row}: {plan.sources[source]}, tape {position}, {documents} document(s), epoch {piece.epoch}"
        yield tokenizer.decode(piece.tokens.tolist())


def _phase(plan: Plan, name: str) -> PhasePlan:
    for phase in plan.phases:
        if phase.name == name:
            return phase
    raise UserError(f"--phase {name}: the configuration has {', '.join(phase.name for phase in plan.phases)}")
