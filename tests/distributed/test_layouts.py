"""Layouts that contain the code of all others train as one process does (`layouts.py` makes the whole table)."""

from __future__ import annotations

import pytest

from tests.distributed.layouts import LOSS_TOLERANCE, NORM_TOLERANCE, STEPS, Row, cases, measure

Measured = tuple[list[Row], list[tuple[str, str, list[str]]]]


@pytest.fixture(scope="module")
def measured() -> Measured:
    return measure(cases(short=True))


def test_every_layout_trains_as_one_process(measured: Measured) -> None:
    rows, _ = measured
    assert len({row.case.layout for row in rows}) == 7
    for row in rows:
        assert row.same_rows, row.case.name
        assert row.loss <= LOSS_TOLERANCE and row.norm <= NORM_TOLERANCE, (row.case.name, row.loss, row.norm)


def test_the_comparison_is_of_training_that_moves(measured: Measured) -> None:
    for row in measured[0]:
        losses = [step[0] for step in row.steps]
        assert len(losses) == STEPS and losses[-1] < losses[0] - 0.1, row.case.name


def test_what_is_saved_is_what_every_rank_holds(measured: Measured) -> None:
    assert [(row.case.name, row.differs) for row in measured[0] if row.differs] == []


def test_every_layout_reads_the_checkpoints_of_the_others(measured: Measured) -> None:
    _, pairs = measured
    assert len({pair[:2] for pair in pairs}) == 18
    assert [pair for pair in pairs if pair[2]] == []


def test_nothing_is_compiled_after_the_second_step(measured: Measured) -> None:
    rows, _ = measured
    assert any(row.case.backend for row in rows)
    assert [line for row in rows for line in row.recompiled] == []
