"""Every second between two printed lines belongs to one kind."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from tests.curriculum.making import configuration, phase
from titan_yulan.curriculum.plan import Plan
from titan_yulan.monitor import intervals
from titan_yulan.monitor.flops import flops_per_token
from titan_yulan.monitor.intervals import Intervals, trained_flops
from titan_yulan.parallel.process import World

CONFIG = configuration(
    phase("a", "10 steps", {"code": 1.0}, batch=8, sequence_length=16),
    phase("b", "5 steps", {"code": 1.0}, batch=4, sequence_length=64),
)
PLAN = Plan(CONFIG)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(intervals, "time", made)
    return made


def make() -> Intervals:
    return Intervals(CONFIG.model, World(0, 2, torch.device("cpu"), cast(Any, None)))


def test_every_second_counts_once(clock: Clock) -> None:
    measured = make()
    with measured.spending("setup"):
        clock.now += 7
        with measured.spending("checkpoint"):  # inside another it is that other's
            clock.now += 1
    for waited in (0.5, 0.25):
        clock.now += 2 + waited
        measured.step(PLAN.phases[0], waited)
    with measured.spending("validation"):
        clock.now += 3
    found = measured.close()
    assert found.seconds == {"data_wait": 0.75, "checkpoint": 0, "validation": 3, "setup": 8, "compute": 4}
    assert found.steps == 2 and found.tokens_per_s == pytest.approx(2 * 8 * 16 / 4.75) and found.mfu_percent is None
    shares = found.scalars()
    assert shares["perf/share_setup_percent"] == pytest.approx(100 * 8 / 15.75)
    assert sum(value for tag, value in shares.items() if "share" in tag) == pytest.approx(100)
    assert shares["data/wait_percent"] == pytest.approx(100 * 0.75 / 4.75)


def test_the_next_interval_begins_where_the_last_one_ends(clock: Clock) -> None:
    measured = make()
    clock.now += 4
    measured.close()
    clock.now += 2
    with pytest.raises(KeyError), measured.spending("checkpoint"):  # what fails has taken its time, too
        clock.now += 1
        raise KeyError
    found = measured.close()
    assert found.seconds == {"data_wait": 0, "checkpoint": 1, "validation": 0, "setup": 0, "compute": 2}
    line = found.line(10, 1280)
    assert line["steps"] == 0 and "tokens_per_s" not in line and "mfu_percent" not in line
    assert line["memory"]["host_gib"] > 0.05  # PyTorch alone is more


def test_mfu_is_of_all_devices_and_of_the_length_of_each_step(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = make()
    monkeypatch.setattr(measured, "_peak", 1e9)
    clock.now += 5
    for section in PLAN.phases:
        measured.step(section, 0.0)
    flops = 128 * flops_per_token(CONFIG.model, 16) + 256 * flops_per_token(CONFIG.model, 64)
    assert measured.close().mfu_percent == pytest.approx(100 * flops / (5 * 1e9 * 2))


@pytest.mark.parametrize(("step", "steps"), [(0, (0, 0)), (3, (3, 0)), (10, (10, 0)), (12, (10, 2)), (15, (10, 5))])
def test_flops_follow_the_length_of_the_phases(step: int, steps: tuple[int, int]) -> None:
    expected = steps[0] * 128 * flops_per_token(CONFIG.model, 16) + steps[1] * 256 * flops_per_token(CONFIG.model, 64)
    assert trained_flops(CONFIG.model, PLAN, step) == expected
