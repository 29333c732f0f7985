"""Masked diffusion with dropout, stopped in the middle of data that is read three times and gone on with on 1, 2 and 3
ranks: the same rows, the same hidden tokens, and on as many ranks the same numbers (`repeated.py`)."""

from __future__ import annotations

from typing import Any

from tests.distributed.bodies import BATCH_ROWS
from tests.distributed.repeated import EPOCHS, STOP, UNIQUE_ROWS

Trained = dict[int, list[dict[str, Any]]]
STEPS = UNIQUE_ROWS * EPOCHS // BATCH_ROWS


def of_all_ranks(ranks: list[dict[str, Any]], key: str) -> dict[int, list[bool]]:
    return {position: hidden for rank in ranks for position, hidden in rank["repeated"][key].items()}


def test_as_many_ranks_go_on_bit_by_bit(trained: Trained) -> None:
    for rank in trained[2]:
        found = rank["repeated"]
        assert len(found["undisturbed"]) == STEPS > STOP
        assert found["continued"] == found["undisturbed"][STOP:]


def test_other_numbers_of_ranks_have_the_same_rows_and_hidden_tokens(trained: Trained) -> None:
    undisturbed = trained[2][0]["repeated"]["undisturbed"]
    hidden = of_all_ranks(trained[2], "undisturbed hidden")
    assert sorted(hidden) == list(range(STEPS * BATCH_ROWS))
    assert 0.2 < sum(map(sum, hidden.values())) / sum(map(len, hidden.values())) < 0.8
    # a row that comes again is hidden in other places
    assert sum(hidden[row] == hidden[row + UNIQUE_ROWS] for row in range(UNIQUE_ROWS)) < UNIQUE_ROWS / 2
    for world, ranks in trained.items():
        found = of_all_ranks(ranks, "hidden")
        assert found == {row: hidden[row] for row in range(STOP * BATCH_ROWS, STEPS * BATCH_ROWS)}, world
        for rank in ranks:
            prints = [step[2] for step in rank["repeated"]["continued"]]
            assert prints == [step[2] for step in undisturbed[STOP:]], world


def test_dropout_is_another_one_on_other_numbers_of_ranks(trained: Trained) -> None:
    """Only statistically the same, so that nobody compares losses."""
    losses = {world: ranks[0]["repeated"]["continued"][0][0] for world, ranks in trained.items()}
    assert len(set(losses.values())) == 3
    assert all(abs(loss - losses[2]) < 0.5 * losses[2] for loss in losses.values())
