"""What an evaluation says about how far it is, on a terminal and elsewhere."""

from __future__ import annotations

import io

import pytest

from titan_yulan.eval import progress
from titan_yulan.eval.progress import Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A list whose last entry is the time."""
    times = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: times[-1])
    return times


def test_lines_every_five_seconds(clock: list[float]) -> None:
    said: list[str] = []
    tell = Progress(said.append)
    for second in range(13):
        clock.append(100.0 + second)
        tell("mmlu", 100 * second, 2000)
    assert said == ["mmlu: 500 of 2,000, 100.0 a second", "mmlu: 1,000 of 2,000, 100.0 a second"]
    tell("piqa", 5, 10)
    assert len(said) == 2


def test_what_was_done_before_the_clock_started_is_not_in_the_speed(clock: list[float]) -> None:
    said: list[str] = []
    tell = Progress(said.append)
    tell("mmlu", 1000, 2000)  # told when the first batch is done
    clock.append(110.0)
    tell("mmlu", 1200, 2000)
    assert said == ["mmlu: 1,200 of 2,000, 20.0 a second"]
    tell("mmlu", 100, 2000)  # of the next model
    clock.append(115.0)
    tell("mmlu", 150, 2000)
    assert said[1:] == ["mmlu: 150 of 2,000, 10.0 a second"]


def test_a_task_that_is_begun_has_a_clock_of_its_own(clock: list[float]) -> None:
    said: list[str] = []
    tell = Progress(said.append)
    tell.begin("mmlu")
    clock.append(104.0)
    tell("mmlu", 40, 40)  # in one batch
    clock.append(1000.0)
    tell.begin("mmlu")  # of the next model
    clock.append(1004.0)
    tell("mmlu", 40, 40)
    assert said == []
    clock.append(1008.0)
    tell("mmlu", 40, 40)
    assert said == ["mmlu: 40 of 40, 5.0 a second"]


def test_a_bar_on_a_terminal_gives_way_to_lines(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "90")
    terminal, said = io.StringIO(), []
    tell = Progress(said.append, terminal)
    tell("mmlu", 0, 2000)
    clock.append(100.1)
    tell("mmlu", 100, 2000)
    assert terminal.getvalue() == "" and said == []
    clock.append(110.0)
    tell("mmlu", 1000, 2000)
    bar = "#" * 15 + "." * 15
    assert terminal.getvalue() == f"\r\x1b[Kmmlu [{bar}] 1,000 of 2,000, 100.0 a second, 10 s left"
    tell.say("done")
    assert terminal.getvalue().endswith("left\r\x1b[K") and said == ["done"]
    monkeypatch.setenv("COLUMNS", "20")
    clock.append(111.0)
    tell("mmlu", 1500, 2000)
    assert terminal.getvalue().endswith("\r\x1b[Kmmlu [#############")
