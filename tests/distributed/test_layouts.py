"""Layouts that contain the code of all others train as one process does (`layouts.py` makes the whole table)."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.distributed.layout_cases import STEPS, Case, cases
from tests.distributed.layouts import Pairs, Row, compare, measure

Measured = tuple[list[Row], Pairs]


@pytest.fixture(scope="module")
def measured() -> Measured:
    return measure(cases(short=True), every_pair=False)


def test_every_layout_trains_as_one_process(measured: Measured) -> None:
    rows, _ = measured
    assert {row.case.layout for row in rows if row.case.world > 1} == {
        "FSDP 3",
        "HSDP 2 x 2",
        "TP 3",
        "FSDP 2 x TP 2",
        "CP 2 x TP 2",
    }
    for row in rows:
        assert row.same_rows, row.case.name
        assert row.close, (row.case.name, row.loss, row.norm, row.validation)


def test_every_layout_writes_the_text_of_one_process(measured: Measured) -> None:
    rows, _ = measured
    assert [row.case.name for row in rows if not row.same_text] == []


@pytest.mark.parametrize(
    ("index", "value"),
    [(0, math.nan), (1, math.nan), (1, math.inf)],
    ids=["loss", "gradient norm", "infinite gradient norm"],
)
def test_numbers_that_are_not_finite_never_count_as_close(index: int, value: float) -> None:
    def result(broken: float | None) -> dict[str, Any]:
        steps = [[2.0, 1.0, 7, [5.0, 3.0]] for _ in range(3)]
        if broken is not None:
            steps[1][index] = broken
        return {"steps": steps, "validation": [4.0], "text": [1], "recompiled": [], "seconds": 1.0}

    case = Case(2, "FSDP 2")
    assert compare(case, [result(None)] * 2, result(None)).good
    for ranks, one in (([None, value], None), ([None, None], value), ([value, value], value)):
        assert not compare(case, [result(broken) for broken in ranks], result(one)).good


def test_the_comparison_is_of_training_that_moves(measured: Measured) -> None:
    for row in measured[0]:
        losses = [step[0] for step in row.steps]
        assert len(losses) == STEPS and losses[-1] < losses[0] - 0.1, row.case.name


def test_what_is_saved_is_what_every_rank_holds(measured: Measured) -> None:
    assert [(row.case.name, row.differs) for row in measured[0] if row.differs] == []


def test_every_layout_reads_the_checkpoints_of_the_others(measured: Measured) -> None:
    _, pairs = measured
    assert len({pair[:2] for pair in pairs}) == 11
    assert [pair for pair in pairs if pair[2]] == []


def test_nothing_is_compiled_after_the_second_step(measured: Measured) -> None:
    rows, _ = measured
    assert any(row.case.backend for row in rows)
    assert [line for row in rows for line in row.recompiled] == []
