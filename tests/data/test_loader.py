"""The global loader: for any number of ranks the same rows, each once, and clean ends."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from typing import cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.curriculum.making import configuration, phase
from titan_yulan.curriculum.plan import PhasePlan, Plan
from titan_yulan.curriculum.position import Position
from titan_yulan.data import hashing, loader
from titan_yulan.data.loader import Batch, Loader, Prefetcher, read_rows
from titan_yulan.data.tape import Tape, TapeSlice
from titan_yulan.errors import RunError

LENGTH = 6


class CountingTape:
    """A tape whose token at a place is that place, in documents of 5 tokens; every third token is no target."""

    def __init__(self, source: int, masked: bool) -> None:
        self.source, self.masked = source, masked

    def read(self, start: int, count: int) -> TapeSlice:
        places = np.arange(start, start + count)
        mask = places % 3 != 0 if self.masked else None
        return TapeSlice((places + 1000 * self.source).astype(np.int32), places // 5, mask, 0)


TAPES = cast(Sequence[Tape], [CountingTape(0, False), CountingTape(1, True)])


def make_plan(steps: int, batch_rows: int) -> PhasePlan:
    section = phase("a", f"{steps} steps", {"x": 0.6, "y": 0.4}, sequence_length=LENGTH, batch=batch_rows)
    return Plan(configuration(section), start=Position(10, 500, 3000)).phases[0]


def load(plan: PhasePlan, *, first_step: int = 0, rank: int = 0, world: int = 1, size: int = 2) -> list[list[Batch]]:
    options = {"first_step": first_step, "rank": rank, "world": world, "micro_batch_size": size, "prefetch": 2}
    with Loader(plan, TAPES, **options) as steps:
        return list(steps)


def real_rows(batches: list[Batch]) -> list[tuple]:
    rows = []
    for batch in batches:
        parts = (batch.tokens, batch.document_ids, batch.loss_mask, batch.source, batch.position)
        for weight, *row in zip(batch.weight.tolist(), *(part.tolist() for part in parts), strict=True):
            if weight:
                assert weight == 1
                rows.append(tuple(map(str, row)))
    return rows


@given(st.integers(1, 13), st.integers(1, 5), st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_the_ranks_together_read_exactly_the_global_batch(batch_rows: int, world: int, size: int) -> None:
    plan = make_plan(3, batch_rows)
    alone = load(plan, size=batch_rows)
    ranks = [load(plan, rank=rank, world=world, size=size) for rank in range(world)]
    for step in range(3):
        assert len({len(rank[step]) for rank in ranks}) == 1
        assert all(batch.tokens.shape == (size, LENGTH + 1) for rank in ranks for batch in rank[step])
        rows = list(itertools.chain.from_iterable(real_rows(rank[step]) for rank in ranks))
        assert rows == real_rows(alone[step]) and len(rows) == batch_rows


def test_rows_are_those_of_the_plan() -> None:
    plan = make_plan(3, 4)
    batch = load(plan, size=4)[1][0]
    sources, places = plan.rows(4, 8)
    assert batch.source.tolist() == sources.tolist()
    assert batch.position.tolist() == [504, 505, 506, 507]
    for row, (source, place) in enumerate(zip(sources.tolist(), places.tolist(), strict=True)):
        expected = np.arange(place, place + LENGTH + 1)
        assert batch.tokens[row].tolist() == (expected + 1000 * source).tolist()
        assert batch.document_ids[row].tolist() == (expected // 5).tolist()
        assert batch.loss_mask[row].tolist() == ([True] * 7 if source == 0 else (expected % 3 != 0).tolist())


@given(st.integers(0, 6), st.integers(1, 3))
@settings(max_examples=15, deadline=None)
def test_beginning_at_a_step_gives_the_steps_from_there_on(first: int, world: int) -> None:
    plan = make_plan(6, 5)
    for rank in range(world):
        through = load(plan, rank=rank, world=world)
        resumed = load(plan, first_step=first, rank=rank, world=world)
        assert [real_rows(step) for step in resumed] == [real_rows(step) for step in through[first:]]


def test_rows_that_fill_up_have_no_weight_and_no_position() -> None:
    batch = read_rows(make_plan(2, 4), TAPES, np.array([2, 3]), 5)
    assert batch.weight.tolist() == [1, 1, 0, 0, 0]
    assert batch.position.tolist() == [502, 503, -1, -1, -1]
    assert batch.tokens[2:].abs().sum() == 0 and batch.weight.dtype == torch.float32
    empty = read_rows(make_plan(2, 4), TAPES, np.arange(0), 2)
    assert empty.weight.tolist() == [0, 0]


def test_batch_moves_to_a_device_as_a_whole() -> None:
    batch = read_rows(make_plan(2, 4), TAPES, np.array([0]), 1).to(torch.device("meta"))
    assert {value.device.type for value in vars(batch).values()} == {"meta"}


def alive() -> int:
    return sum(thread.name == "loader" for thread in threading.enumerate())


def test_an_exception_in_the_background_is_raised_at_its_turn_and_again() -> None:
    def items():
        yield 1
        raise RunError("shard 3 is damaged")

    steps = Prefetcher(items(), 2)
    assert next(steps) == 1
    for _ in range(2):
        with pytest.raises(RunError, match="shard 3 is damaged"):
            next(steps)
    steps.close()


def test_a_missing_source_file_reaches_the_consumer() -> None:
    class Damaged(CountingTape):
        def read(self, start: int, count: int) -> TapeSlice:
            raise RunError("cannot map shard-00000.tokens.npy")

    tapes = cast(Sequence[Tape], [Damaged(0, False)] * 2)
    with Loader(make_plan(2, 2), tapes, first_step=0, rank=0, world=1, micro_batch_size=1, prefetch=1) as steps:
        with pytest.raises(RunError, match="cannot map"):
            next(steps)


def test_the_end_stays_the_end() -> None:
    steps = Prefetcher(iter([1, 2]), 1)
    assert list(steps) == [1, 2] and list(steps) == []
    steps.close()


def test_no_more_than_the_depth_is_read_ahead() -> None:
    read = []
    asked = threading.Semaphore(0)

    def items():
        for i in itertools.count():
            read.append(i)
            asked.release()
            yield i

    steps = Prefetcher(items(), 3)
    for _ in range(4):
        assert asked.acquire(timeout=20)  # 3 in the queue, one in the hand
    assert not asked.acquire(timeout=0.05)
    assert next(steps) == 0
    assert asked.acquire(timeout=20)
    steps.close()
    assert read == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_closing_ends_the_thread_wherever_it_is(taken: int) -> None:
    before = alive()
    with Loader(make_plan(50, 2), TAPES, first_step=0, rank=0, world=1, micro_batch_size=1, prefetch=2) as steps:
        assert len(list(itertools.islice(steps, taken))) == taken
        assert alive() == before + 1
    assert alive() == before


def test_waited_is_the_time_spent_waiting_for_the_last_item(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    with Loader(make_plan(3, 2), TAPES, first_step=0, rank=0, world=1, micro_batch_size=1, prefetch=2) as steps:
        monkeypatch.setattr(loader.time, "perf_counter", lambda: float(next(clock)))
        next(steps)
        next(steps)
        monkeypatch.undo()
        assert steps.waited == 1  # of the last item


@given(st.lists(st.lists(st.integers(0, 2**31), min_size=5, max_size=5), min_size=1, max_size=4))
def test_fingerprint_by_operators_of_torch_is_that_of_numpy(rows: list[list[int]]) -> None:
    on_torch = loader.fingerprint_on_device(torch.tensor(rows))
    assert on_torch.dtype == torch.int64
    assert on_torch.numpy().view(np.uint64).tolist() == hashing.fingerprint(np.array(rows)).tolist()
    assert torch.equal(loader.fingerprint(torch.tensor(rows)), on_torch)


def test_fingerprint_on_torch_differs_when_two_tokens_change_places() -> None:
    row = torch.randint(0, 99000, (1, 4097), generator=torch.Generator().manual_seed(0))
    other = row.clone()
    other[0, [17, 2000]] = row[0, [2000, 17]]
    assert loader.fingerprint(row) != loader.fingerprint(other)
