"""The parallel map: order, errors, dead workers, stopping early, both ways of starting processes."""

from __future__ import annotations

import functools
import os
import signal
import sys
from types import ModuleType

import pytest

from titan_yulan.data.workers import ordered_map
from titan_yulan.errors import RunError, UserError


def square_or_fail(bad: int, number: int) -> tuple[int, int]:
    if number == bad:
        raise UserError(f"bad {number}")
    return number * number, os.getpid()


def die(number: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_results_are_in_order_and_from_other_processes(monkeypatch: pytest.MonkeyPatch, start: str) -> None:
    for name in ("torch", "pyarrow", "datasets"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    if start == "spawn":
        monkeypatch.setitem(sys.modules, "torch", ModuleType("torch"))
    results = list(ordered_map(functools.partial(square_or_fail, -1), range(20), 2))
    assert [square for square, _ in results] == [number * number for number in range(20)]
    assert os.getpid() not in {process for _, process in results}


def test_one_worker_is_this_process() -> None:
    assert [process for _, process in ordered_map(functools.partial(square_or_fail, -1), [1, 2], 1)] == [
        os.getpid()
    ] * 2
    assert [process for _, process in ordered_map(functools.partial(square_or_fail, -1), [1], 8)] == [os.getpid()]


@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_error_is_raised_after_the_results_before_it(workers: int) -> None:
    results = ordered_map(functools.partial(square_or_fail, 2), range(5), workers)
    assert [next(results)[0], next(results)[0]] == [0, 1]
    with pytest.raises(UserError, match="bad 2"):
        next(results)


def test_a_dead_worker_is_reported() -> None:
    with pytest.raises(RunError, match="worker process died"):
        list(ordered_map(die, [1, 2], 2))


def test_stopping_early_ends_the_workers() -> None:
    results = ordered_map(functools.partial(square_or_fail, -1), range(100), 2)
    _, process = next(results)
    results.close()
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
