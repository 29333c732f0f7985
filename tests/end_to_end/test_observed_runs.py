"""What a run tells of itself, and what that costs: no wait for the device in a step, and not a bit of its numbers."""

from __future__ import annotations

import gzip
import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.ranks import run_ranks
from tests.end_to_end import harness
from tests.end_to_end.observed import PHASES, SAVE_EVERY, STATISTICS_EVERY, VALIDATE_EVERY, observe
from titan_yulan import config as configuration
from titan_yulan.data.ensure import ensure_prepared
from titan_yulan.monitor.metrics import read_lines

LAST, PHASE_END = 19, 14
WRITTEN = [4, 8, 12, 14, 16, 19]  # every fourth step, and the ends of phases
# they read a number of the host's own, which gloo has exchanged
HOST_ONLY = "parallel/process.py:agree"
FETCH, VALIDATION = "monitor/recorder.py:_fetch", "monitor/recorder.py:validation"


@pytest.fixture(scope="module")
def observed(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("observed")
    file = harness.write_small_config(folder, small_data, folder / "outputs", phases=PHASES)
    ensure_prepared(configuration.load(file).config, lambda line: None)
    yield {"folder": folder / "outputs", "ranks": run_ranks(observe, 2, file, limit=300)}


def waits(run: dict[str, Any]) -> dict[int, Counter[str]]:
    """By step, the places that made the host wait for the device, and how often."""
    found: dict[int, Counter[str]] = {step: Counter() for step in range(LAST + 1)}
    for _, place, step in run["reads"]:
        if place != HOST_ONLY:
            found[step][place] += 1
    return found


def measured(step: int) -> bool:
    """Whether a validation or a checkpoint comes after a step."""
    in_phase = step - PHASE_END if step > PHASE_END else step
    return step in (0, PHASE_END, LAST) or in_phase % VALIDATE_EVERY == 0 or in_phase % SAVE_EVERY == 0


@pytest.mark.parametrize("which", ["plain", "looking"])
@pytest.mark.parametrize("rank", [0, 1])
def test_the_host_waits_once_in_a_printed_interval_and_never_in_between(
    observed: dict[str, Any], rank: int, which: str
) -> None:
    found = waits(observed["ranks"][rank][which])
    for step in range(1, LAST + 1):
        places = found[step]
        if step in WRITTEN:
            assert places[FETCH] == 1, (step, places)
        elif which == "looking" and step == 7:  # a trace begins behind it
            assert places[FETCH] == 1, (step, places)
        elif not measured(step):
            assert not places, (step, places)
        assert set(places) <= {FETCH, VALIDATION}, (step, places)


def test_the_count_sees_what_there_is(observed: dict[str, Any]) -> None:
    run = observed["ranks"][0]["plain"]
    assert waits(run)[VALIDATE_EVERY][VALIDATION] == 1
    agreements = Counter(
        step for what, place, step in run["reads"] if (what, place) == ("_local_scalar_dense", HOST_ONLY)
    )
    # between the two micro-batches of each rank, and after the step
    assert agreements[1] == agreements[2] == 2


def test_looking_changes_no_bit(observed: dict[str, Any]) -> None:
    plain, looking = (observed["folder"] / name for name in ("plain", "looking"))
    assert harness.same_in_every_bit(looking, plain)
    assert len(read_lines(plain / "metrics.jsonl")) == LAST


@pytest.mark.parametrize("rank", [0, 1])
def test_no_tensor_waits_for_the_collector(observed: dict[str, Any], rank: int) -> None:
    for run in observed["ranks"][rank].values():
        assert run["unreachable"] == [] and run["collects"]


def test_intervals_hold_all_the_time(observed: dict[str, Any]) -> None:
    for name in ("plain", "looking"):
        lines = read_lines(observed["folder"] / name / "intervals.jsonl")
        assert [line["step"] for line in lines] == [*WRITTEN, LAST]
        assert lines[-1]["steps"] == 0 and "tokens_per_s" not in lines[-1]
        assert sum(line["steps"] for line in lines) == LAST
        seconds = [line["seconds"] for line in lines]
        assert all(value >= 0 for kinds in seconds for value in kinds.values())
        whole = sum(sum(kinds.values()) for kinds in seconds)
        assert 0.5 * observed["ranks"][0][name]["seconds"] < whole < observed["ranks"][0][name]["seconds"]
        kinds = {kind: sum(interval[kind] for interval in seconds) for kind in seconds[0]}
        assert kinds["checkpoint"] > 0 and kinds["validation"] > 0 and kinds["setup"] > 0 and kinds["compute"] > 0


@pytest.mark.parametrize("rank", [0, 1])
def test_a_trace_holds_the_steps_that_were_asked_for(observed: dict[str, Any], rank: int) -> None:
    folder = observed["folder"] / "looking" / "traces" / "step-8-9"
    with gzip.open(folder / f"rank-{rank}.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    names = Counter(event["name"] for event in events if event.get("cat") in ("user_annotation", "cpu_op"))
    assert names["ProfilerStep#1"] == names["ProfilerStep#2"] == 1
    assert not names["ProfilerStep#0"] and not names["ProfilerStep#3"]
    assert names["Optimizer.step#AdamW.step"] == 2


def test_a_trace_is_divided_into_what_it_was_spent_on(observed: dict[str, Any]) -> None:
    folder = observed["folder"] / "looking" / "traces" / "step-8-9"
    found = json.loads((folder / "breakdown.json").read_text())
    with gzip.open(folder / "rank-0.json.gz", "rt") as file:
        ranges = [event for event in json.load(file)["traceEvents"] if event.get("cat") == "user_annotation"]
    spent = {event["name"]: 1e-6 * event["dur"] for event in ranges}
    steps = sum(seconds for name, seconds in spent.items() if name.startswith("ProfilerStep"))
    # the checkpoint behind step 9 was begun inside the range
    assert spent["between steps: checkpoint"] > 0
    assert found["window"] == pytest.approx(steps - spent["between steps: checkpoint"], rel=0.01)
    assert sum(found["seconds"].values()) == pytest.approx(found["window"])
    assert found["seconds"]["MLP"] > 0 and found["communication"] > 0
    shares = curves(observed["folder"] / "looking")["perf/share_communication_percent"]
    assert shares == {9: pytest.approx(100 * found["seconds"]["exposed communication"] / found["window"])}


def curves(run: Path) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board: Any = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {tag: {event.step: event.value for event in board.Scalars(tag)} for tag in board.Tags()["scalars"]}


def test_curves_agree_with_the_lines(observed: dict[str, Any]) -> None:
    run = observed["folder"] / "looking"
    shown = curves(run)
    kinds = ("data_wait", "compute", "checkpoint", "validation", "setup")
    for line in read_lines(run / "intervals.jsonl")[:-1]:  # the last one was not printed
        step, wall = line["step"], sum(line["seconds"].values())
        shares = {kind: shown[f"perf/share_{kind}_percent"][step] for kind in kinds}
        assert shares == pytest.approx({kind: 100 * line["seconds"][kind] / wall for kind in kinds}, rel=1e-5)
        assert shown["perf/tokens_per_s"][step] == pytest.approx(line["tokens_per_s"])
        assert shown["memory/host_gib"][step] == pytest.approx(line["memory"]["host_gib"])
    for step, loss in shown["loss/val"].items():
        assert shown["loss/val_perplexity"][step] == pytest.approx(math.exp(loss), rel=1e-5)
    assert shown["progress/rows"][PHASE_END] == 14 * 7 and shown["progress/rows"][LAST] == 14 * 7 + 5 * 4
    assert shown["progress/batch_rows"] == {step: 7.0 if step <= PHASE_END else 4.0 for step in range(1, LAST + 1)}


def test_statistics_are_in_their_file_and_under_the_same_tags(observed: dict[str, Any]) -> None:
    run = observed["folder"] / "looking"
    lines, shown = read_lines(run / "statistics.jsonl"), curves(run)
    assert [line["step"] for line in lines] == list(range(STATISTICS_EVERY, LAST + 1, STATISTICS_EVERY))
    assert len(lines[0]["values"]) > 10
    for tag, value in lines[-1]["values"].items():
        assert shown[tag][lines[-1]["step"]] == pytest.approx(value, rel=1e-5)
    assert not (observed["folder"] / "plain" / "statistics.jsonl").exists()
