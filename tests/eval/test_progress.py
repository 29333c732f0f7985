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
