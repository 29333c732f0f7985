"""Bad numbers and requests to stop in the middle of things, in whole runs; `faults/sitecustomize.py` makes them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end import harness
from tests.end_to_end.harness import column, metrics, same_in_every_bit, train, validations
from titan_yulan.checkpoint.layout import find_checkpoints
from titan_yulan.monitor.events import read_events

FAULTS = Path(__file__).parent / "faults"


@pytest.fixture
def start(tmp_path, small_data):
    """Start (or go on with) a run on 2 ranks in this test's own folder, with faults."""
    config = harness.write_small_config(tmp_path, small_data, tmp_path / "outputs")

    def start(faults: list[dict[str, Any]], *arguments: str) -> harness.Result:
        environment = {"PYTHONPATH": str(FAULTS), "TEST_FAULTS": json.dumps(faults)}
        return train(config, 2, *arguments, environment=environment)

    return start


@pytest.fixture
def run(tmp_path) -> Path:
    return tmp_path / "outputs" / "small"


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(run) if event["event"] == kind]


def test_retry_of_a_transient_fault_changes_no_bit(start, run, reference):
    """Before there is a checkpoint, after it, and seen some steps late."""
    faults = [{"step": step, "what": "nan", "times": 1} for step in (3, 17)]
    result = start(faults, "--recovery.non_finite=retry", "--monitor.log_every=5")
    assert result.code == 0, result.output
    bad = [(event["step"], event["reason"], event["policy"]) for event in events(run, "bad step")]
    assert bad == [(3, "not finite", "retry"), (17, "not finite", "retry")]
    assert column(events(run, "went back"), "step") == [0, 16]
    assert same_in_every_bit(run, reference)


def test_skipped_and_jumped_steps_are_listed_and_all_others_read_the_same_rows(start, run, reference):
    faults = [{"step": 9, "what": "nan"}, {"step": 20, "what": "nan"}, {"step": 27, "what": 1000}]
    policy = ("--recovery.non_finite=skip", "--recovery.spike=rollback")
    result = start(faults, *policy, "--recovery.spike_window=8", "--recovery.spike_factor=40")
    assert result.code == 0, result.output
    lines, expected = metrics(run), metrics(reference)
    for key in ("step", "tokens", "learning_rate", "batch_fingerprint"):
        assert column(lines, key) == column(expected, key)
    skipped = {line["step"]: line["skipped"] for line in lines if "skipped" in line}
    assert skipped == {9: "not finite", 20: "not finite", 27: "rollback"}
    assert lines[26]["loss"] is None and lines[26]["source_tokens"] == {"code": 0, "math": 0, "prose": 0}
    assert lines[:8] == expected[:8] and lines[8]["gradient_norm"] is None
    assert all(math.isfinite(line["loss"]) for line in lines if line["step"] not in skipped)
    bad = [(event["step"], event["first_row"], event["last_row"], event["policy"]) for event in events(run, "bad step")]
    assert bad == [(9, 56, 62, "skip"), (20, 133, 139, "skip"), (27, 182, 188, "rollback")]
    assert column(events(run, "went back"), "step") == [23]
    assert [c.state().skipped for c in find_checkpoints(run / "checkpoints")] == [[9], [9, 20, 27]] + 2 * [[9, 20, 27]]


def test_a_lasting_fault_ends_the_run_and_nothing_bad_is_saved(start, run, reference):
    lasting = [{"step": 11, "what": "nan"}]
    given_up = start(lasting, "--recovery.non_finite=retry")
    assert given_up.code == 1, given_up.output
    assert "step 11: loss nan, gradient norm nan are not finite, also after 2 retries" in given_up.output
    assert len(events(run, "went back")) == 2
    stopped = start(lasting)
    assert stopped.code == 1, stopped.output
    assert "step 11: loss nan, gradient norm nan are not finite. Nothing after the last checkpoint" in stopped.output
    assert "Traceback" not in given_up.output + stopped.output
    assert [checkpoint.step for checkpoint in find_checkpoints(run / "checkpoints")] == [7]
    assert column(metrics(run), "step") == list(range(1, 12))
    finished = start([])
    assert finished.code == 0, finished.output
    assert same_in_every_bit(run, reference)


def test_a_step_or_validation_broken_off_by_a_request_to_stop_is_done_again(start, run, reference):
    every = "--eval.every=10 steps"
    stopped = start([{"step": 11, "what": "stop validation"}], every)
    assert stopped.code == 75, stopped.output
    assert column(validations(run), "step") == [0]
    assert find_checkpoints(run / "checkpoints")[-1].step == 10
    stopped = start([{"step": 15, "what": "stop"}], every)
    assert stopped.code == 75, stopped.output
    assert column(metrics(run), "step") == list(range(1, 15))
    assert column(validations(run), "step") == [0, 10]
    assert [(event["step"], event["reason"]) for event in events(run, "stop")] == [
        (10, "signal SIGTERM"),
        (14, "signal SIGTERM"),
    ]
    finished = start([], every, "--recovery.spike_window=16")
    assert finished.code == 0, finished.output
    assert "holds no window of this length; it begins empty" in finished.output
    assert metrics(run) == metrics(reference)
    assert column(validations(run), "step") == [0, 10, 26, 38]
