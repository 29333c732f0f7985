"""Two agents train one run on one machine; one is lost, the other goes on, a new one joins (see `elastic.py`)."""

from __future__ import annotations

import pytest

from tests.end_to_end import harness
from tests.end_to_end.elastic import Report, lose_one_and_let_one_join
from tests.end_to_end.harness import column, metrics
from titan_yulan.monitor.events import read_events
from titan_yulan.monitor.metrics import read_status


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("elastic")


@pytest.fixture(scope="module")
def report(folder, small_data) -> Report:
    config = harness.write_small_config(folder, small_data, folder / "outputs")
    report = lose_one_and_let_one_join(config, folder / "outputs" / "small")
    print(f"loss: {report.seconds_after_loss:.1f} s, joining: {report.seconds_after_joining:.1f} s to the next step")
    return report


def test_the_group_shrinks_and_grows_and_the_run_ends_well(report, folder) -> None:
    assert report.worlds == [2, 1, 2], report.output
    assert report.codes == (0, 0), report.output
    assert read_status(folder / "outputs" / "small")["state"] == "finished"


def test_every_step_saw_the_rows_of_an_undisturbed_run(report, folder, reference) -> None:
    lines, expected = metrics(folder / "outputs" / "small"), metrics(reference)
    assert column(lines, "step") == column(expected, "step")
    assert column(lines, "batch_fingerprint") == column(expected, "batch_fingerprint")


def test_the_group_forms_anew_in_seconds(report) -> None:
    assert report.seconds_after_loss < 30, report.output  # torchrun's own settings take 45 s before a process starts


def test_what_happened_is_in_the_events(report, folder) -> None:
    events = read_events(folder / "outputs" / "small")
    kinds = [event["event"] for event in events if event["event"] in ("group", "failure", "nodes join")]
    assert kinds == ["group", "failure", "group", "nodes join", "group"]
    (failure,) = [event for event in events if event["event"] == "failure"]
    (worker,) = failure["workers"]  # of the node that was left: the lost one can tell nothing
    assert "onnection" in worker["reason"]
    before, after, at_last = [event for event in events if event["event"] == "group"]
    assert [event["nodes"] for event in (before, after, at_last)] == [2, 1, 2]
    assert len(before["hosts"]) == 2 and after["restarts"] == 1
