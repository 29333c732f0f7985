"""Requests to stop by signal, file and time; all ranks report the same one. Time-outs of process groups."""

from __future__ import annotations

import signal
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.distributed.ranks import run_ranks
from titan_yulan.parallel import process
from titan_yulan.parallel.launched import STARTED_VARIABLE, STOP_FILE
from titan_yulan.parallel.process import World
from titan_yulan.parallel.stopping import StopRequests


class Clock:
    def __init__(self, now: float = 1e9) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_is_a_request_and_no_end(tmp_path: Path, name: str) -> None:
    number = signal.Signals[name]
    before = signal.getsignal(number)
    with StopRequests(tmp_path, None) as stop:
        assert stop.reason == ""
        signal.raise_signal(number)
        assert stop.reason == f"signal {name}"
    assert signal.getsignal(number) is before


def test_the_first_request_stays(tmp_path: Path) -> None:
    clock = Clock()
    with StopRequests(tmp_path, 1.0, clock.now, clock) as stop:
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)
        (tmp_path / STOP_FILE).touch()
        clock.now += 3600
        assert stop.reason == "signal SIGUSR1"


def test_the_file_is_looked_for_once_a_second(tmp_path: Path) -> None:
    clock = Clock()
    stop = StopRequests(tmp_path, None, clock=clock)
    assert stop.reason == ""
    (tmp_path / STOP_FILE).touch()
    clock.now += 0.9
    assert stop.reason == ""
    clock.now += 0.2
    assert stop.reason == f"file {tmp_path / STOP_FILE}"
    (tmp_path / STOP_FILE).unlink()
    clock.now += 10
    assert stop.reason == f"file {tmp_path / STOP_FILE}"


def test_the_file_is_found_after_the_clock_was_set_back(tmp_path: Path) -> None:
    clock = Clock()
    stop = StopRequests(tmp_path, None, clock=clock)
    assert stop.reason == ""
    (tmp_path / STOP_FILE).touch()
    clock.now -= 7200
    assert stop.reason == f"file {tmp_path / STOP_FILE}"


def test_the_kill_switch_is_a_second_file(tmp_path: Path) -> None:
    clock, switch = Clock(), tmp_path / "switch"
    stop = StopRequests(tmp_path, None, clock=clock, kill_switch=switch)
    assert stop.reason == ""
    switch.touch()
    clock.now += 1.1
    assert stop.reason == f"kill switch {switch}, to be removed before the next start"
    switch.unlink()
    (tmp_path / STOP_FILE).touch()
    assert StopRequests(tmp_path, None, clock=clock, kill_switch=switch).reason == f"file {tmp_path / STOP_FILE}"


def test_the_time_limit_counts_from_the_start_that_is_given(tmp_path: Path) -> None:
    clock = Clock()
    stop = StopRequests(tmp_path, 11.5, clock.now - 11 * 3600, clock)
    clock.now += 1799
    assert stop.reason == ""
    clock.now += 1
    assert stop.reason == "time limit of 11.5 hours"


def test_the_time_limit_counts_from_the_launcher_and_not_from_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setenv(STARTED_VARIABLE, str(clock.now - 3600))
    assert StopRequests(tmp_path, 1.0, clock=clock).reason == "time limit of 1 hours"
    monkeypatch.delenv(STARTED_VARIABLE)
    assert StopRequests(tmp_path, 1.0, clock=clock).reason == ""


def ask_together(world: World, folder: Path) -> list[str]:
    """What this rank reports in each of several rounds; every round begins with no request."""
    reports = []
    last = world.size - 1
    own = folder / str(world.rank)
    own.mkdir()

    def report(signals: dict[int, signal.Signals], hours: dict[int, float]) -> None:
        clock = Clock()
        with StopRequests(own, hours.get(world.rank), clock.now - 7200, clock) as stop:
            if world.rank in signals:
                signal.raise_signal(signals[world.rank])
            reports.append(stop.agreed(world))
            assert stop.reason == reports[-1]  # who had no reason of its own has this one from now on
            assert stop.agreed(world) == reports[-1]

    report({}, {})
    report({last: signal.SIGTERM}, {})
    report({0: signal.SIGUSR1, last: signal.SIGTERM}, {})
    report({last: signal.SIGTERM}, {last - 1: 1.5})
    if world.rank == last:
        (own / STOP_FILE).touch()
    report({}, {})
    return reports


def check_timeouts(world: World) -> None:
    """The new limit holds for groups made before it, in the collectives that begin after it."""
    alone = dist.new_group(backend="gloo", timeout=timedelta(seconds=50))
    assert isinstance(alone, dist.ProcessGroup)
    process.set_timeout(world, 0.3)
    groups = [alone, world.host, dist.group.WORLD]
    limits = {group._get_backend(torch.device("cpu")).options._timeout for group in groups if group is not None}
    assert limits == {timedelta(seconds=0.3)}
    if world.rank == 0:
        with pytest.raises(RuntimeError, match=r"(?i)timed? ?out"):
            dist.all_reduce(torch.ones(1), group=alone)  # no other rank comes
    process.set_timeout(world, 60)


def body(world: World, folder: Path) -> list[str]:
    reports = ask_together(world, folder)
    check_timeouts(world)
    return reports


@pytest.mark.parametrize("size", [2, 3])
def test_all_ranks_report_the_same_request(tmp_path: Path, size: int) -> None:
    last = size - 1
    expected = [
        "",
        "signal SIGTERM",
        "signal SIGUSR1",
        "time limit of 1.5 hours",
        f"file {tmp_path / str(last) / STOP_FILE}",
    ]
    assert run_ranks(body, size, tmp_path) == [expected] * size
