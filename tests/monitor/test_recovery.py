"""What each policy makes of a verdict; the table of `[recovery]`, its bounds and its record."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.curriculum.making import configuration, phase
from titan_yulan.config.sections import RecoverySection
from titan_yulan.curriculum.plan import Plan
from titan_yulan.errors import RunError
from titan_yulan.monitor.events import read_events
from titan_yulan.monitor.recovery import LEFT_OUT, LEFT_OUT_FILE, GoBack, Recovery
from titan_yulan.optimizer.guard import FINE, NOT_FINITE, SPIKE

PLAN = Plan(configuration(phase("a", "3000 steps", {"code": 1.0}, batch=4), phase("b", "3000 steps", {"code": 1.0})))


def make(folder: Path, is_main: bool = True, **section: Any) -> Recovery:
    return Recovery(RecoverySection(**section), PLAN, folder, is_main)


def see(recovery: Recovery, *steps: tuple[int, int]) -> tuple[list[dict[str, Any]], Exception | None]:
    """Review (step, verdict) pairs."""
    loss = {FINE: 3.0, SPIKE: 9.0, NOT_FINITE: math.nan, LEFT_OUT: math.nan}
    lines = [{"step": step, "loss": loss[verdict], "gradient_norm": 1.5} for step, verdict in steps]
    return recovery.review(lines, [verdict for _, verdict in steps])


@pytest.mark.parametrize(
    ("section", "verdict", "end", "mark", "skipped"),
    [
        ({"non_finite": "stop"}, NOT_FINITE, RunError, {"skipped": "not finite"}, []),
        ({"non_finite": "retry"}, NOT_FINITE, GoBack, {"skipped": "not finite"}, []),
        ({"non_finite": "skip"}, NOT_FINITE, None, {"skipped": "not finite"}, [6]),
        ({"non_finite": "rollback"}, NOT_FINITE, GoBack, {"skipped": "not finite"}, [6]),
        ({"spike": "warn"}, SPIKE, None, {"warning": "spike"}, []),
        ({"spike": "skip"}, SPIKE, None, {"skipped": "spike"}, [6]),
        ({"spike": "rollback"}, SPIKE, GoBack, {"skipped": "spike"}, [6]),
        ({}, LEFT_OUT, None, {"skipped": "rollback"}, []),
    ],
)
@pytest.mark.parametrize("is_main", [True, False])
def test_every_policy(
    tmp_path: Path, section: dict[str, Any], verdict: int, end: type | None, mark: dict, skipped: list, is_main: bool
) -> None:
    recovery = make(tmp_path, is_main, **section)
    lines, found = see(recovery, (5, FINE), (6, verdict), (7, FINE))
    assert type(found) is (end or type(None))
    assert len(lines) == (2 if end else 3)  # what came after the end is worth nothing
    assert lines[0] == {"step": 5, "loss": 3.0, "gradient_norm": 1.5}
    assert {key: lines[1][key] for key in lines[1].keys() - lines[0].keys()} == mark
    assert recovery.skipped == skipped and recovery.leaves_out(6) == bool(skipped)
    assert len(read_events(tmp_path)) == (is_main and verdict != LEFT_OUT)


def test_an_event_names_the_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    see(make(tmp_path, non_finite="skip"), (3001, NOT_FINITE))
    (event,) = read_events(tmp_path)
    assert {key: event[key] for key in event.keys() - {"time", "host"}} == {
        "event": "bad step",
        "step": 3001,
        "first_row": 12000,
        "last_row": 12007,
        "reason": "not finite",
        "policy": "skip",
        "loss": "nan",
        "gradient_norm": 1.5,
    }
    assert capsys.readouterr().out.startswith("WARNING: step 3001: loss nan, gradient norm 1.5 are not finite")


def test_one_step_is_tried_again_so_often_and_others_as_well(tmp_path: Path) -> None:
    recovery = make(tmp_path, non_finite="retry", max_retries=2)
    for step in (6, 6, 9, 9):
        assert isinstance(see(recovery, (step, NOT_FINITE))[1], GoBack)
    with pytest.raises(RunError, match=r"step 9: .*also after 2 retries.*--step 9"):
        raise see(recovery, (9, NOT_FINITE))[1] or AssertionError


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_so_many_of_a_thousand_steps_may_be_left_out(tmp_path: Path, policy: str) -> None:
    recovery = make(tmp_path, non_finite=policy, spike=policy, max_skips=3)
    for step, verdict in ((1, NOT_FINITE), (400, SPIKE), (900, NOT_FINITE), (1001, SPIKE)):  # step 1 is long ago
        assert not isinstance(see(recovery, (step, verdict))[1], RunError)
    end = see(recovery, (1399, NOT_FINITE))[1]
    assert isinstance(end, RunError) and "4 of the last 1000 steps are left out" in str(end)
    assert "recovery.max_skips" in str(end)


def test_going_back_keeps_what_is_to_be_left_out_and_forgets_what_will_be_judged_again(tmp_path: Path) -> None:
    recovery = make(tmp_path, non_finite="skip", spike="rollback")
    recovery.resume([2])
    see(recovery, (8, NOT_FINITE), (9, SPIKE))
    assert recovery.skipped == [2, 8, 9]
    recovery.resume([2])  # the checkpoint is of step 7
    assert recovery.skipped == [2, 9]
    assert [recovery.leaves_out(step) for step in (8, 9)] == [False, True]


def test_a_rollback_decided_by_an_earlier_start_still_holds(tmp_path: Path) -> None:
    see(make(tmp_path, non_finite="rollback"), (6, NOT_FINITE))
    assert json.loads((tmp_path / LEFT_OUT_FILE).read_text()) == [6]
    see(make(tmp_path / "other", is_main=False, non_finite="rollback"), (6, NOT_FINITE))
    assert not (tmp_path / "other").exists()  # only the main rank writes
