"""The ledger against a count of the rows that the plan lists."""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tests.curriculum.making import configuration, phase
from titan_yulan.config.sections import SourceSection
from titan_yulan.curriculum.adaptive import Adjustment
from titan_yulan.curriculum.ledger import SourceLedger, ledger, ledger_json, ledger_lines
from titan_yulan.curriculum.plan import Plan
from titan_yulan.curriculum.position import Position

SOURCES = {name: SourceSection(path=name) for name in ("code", "math", "prose", "unread")}
SIZES = {"code": 1000, "math": 77, "unread": 50}  # of "prose" nothing is known


def counted(plan: Plan, step: int, tapes: Mapping[str, int]) -> dict[str, tuple[int, int, int, int]]:
    """(rows, tokens, rows of the last phase, tokens of it) of each source, row by row."""
    found = {name: [0, tapes.get(name, 0), 0, 0] for name in plan.sources}
    for each in plan.phases:
        if step <= each.start.step:
            break
        for entry in found.values():
            entry[2:] = [0, 0]
        source, place = each.rows(0, (min(step, each.end.step) - each.start.step) * each.batch_rows)
        for index, begin in zip(source.tolist(), place.tolist(), strict=True):
            entry = found[plan.sources[index]]
            assert begin == entry[1]  # a row begins where the one before it on this tape ended
            for i, new in enumerate((1, each.sequence_length, 1, each.sequence_length)):
                entry[i] += new
    return {name: (entry[0], entry[1], entry[2], entry[3]) for name, entry in found.items()}


@st.composite
def plans(draw: st.DrawFn) -> tuple[Plan, int, dict[str, int]]:
    mixes = st.dictionaries(st.sampled_from(["code", "math", "prose"]), st.floats(0.05, 5), min_size=1)
    sections = [
        phase(
            f"p{index}",
            f"{draw(st.integers(1, 12))} steps",
            draw(mixes),
            sequence_length=draw(st.sampled_from([4, 16, 33])),
            batch=draw(st.integers(1, 40)),
        )
        for index in range(draw(st.integers(1, 4)))
    ]
    tapes = draw(st.dictionaries(st.sampled_from(["code", "math"]), st.integers(0, 500)))
    start = Position(draw(st.integers(0, 9)), 80, 640)
    # an adaptive mixture changes inside a phase
    changes = [
        Adjustment(section.name, 0, draw(st.integers(1, 400)), {"code": 0.25, "prose": 0.75}, {})
        for section in sections
        if draw(st.booleans())
    ]
    plan = Plan(configuration(*sections, sources=SOURCES), start, tapes, changes)
    return plan, draw(st.integers(start.step, plan.end.step)), tapes


@given(plans())
def test_the_ledger_is_the_count_of_all_rows(drawn: tuple[Plan, int, dict[str, int]]) -> None:
    plan, step, tapes = drawn
    entries = ledger(plan, step, SIZES)
    assert list(entries) == list(plan.sources)
    found = {name: (e.rows, e.tokens, e.phase_rows, e.phase_tokens) for name, e in entries.items()}
    assert found == counted(plan, step, tapes)
    for name, entry in entries.items():
        assert entry.epochs == (entry.tokens / SIZES[name] if name in SIZES else None)
    rows = sum(entry.rows for entry in entries.values())
    assert rows == plan.position(step).row - 80


@given(plans())
def test_the_ledger_survives_json(drawn: tuple[Plan, int, dict[str, int]]) -> None:
    plan, step, _ = drawn
    entries = ledger(plan, step, SIZES)
    read = json.loads(json.dumps(ledger_json(entries)))
    assert {name: SourceLedger(**values) for name, values in read.items()} == {
        name: entry for name, entry in entries.items() if entry.tokens
    }


def test_the_table_of_a_phase_has_what_was_read_largest_first() -> None:
    first = phase("first", "2 steps", {"code": 1, "math": 3}, sequence_length=16, batch=8)
    second = phase("second", "3 steps", {"code": 5, "prose": 1}, sequence_length=32, batch=4)
    plan = Plan(configuration(first, second, sources=SOURCES))
    lines = ledger_lines(plan.phases[1], ledger(plan, 5, SIZES))
    assert lines[0] == "read up to step 5, the end of phase 'second'"
    cells = [line.split() for line in lines[1:]]
    assert cells[0] == ["source", "phase", "rows", "phase", "tokens", "rows", "tokens", "epochs"]
    # 16 rows at 1:3, then 12 at 5:1; no row of a share is more than one away
    entries = ledger(plan, 5, SIZES)
    assert [line[0] for line in cells[1:]] == ["code", "prose", "math"]
    for name, *numbers in cells[1:]:
        entry = entries[name]
        assert numbers[:4] == [f"{n:,}" for n in (entry.phase_rows, entry.phase_tokens, entry.rows, entry.tokens)]
        assert (
            numbers[4] == {"code": f"{entry.tokens / 1000:.4f}", "prose": "?", "math": f"{entry.tokens / 77:.4f}"}[name]
        )
    assert entries["math"].phase_rows == 0 and entries["math"].rows == entries["math"].tokens // 16
    assert np.isclose(entries["code"].phase_rows, 10, atol=1)
