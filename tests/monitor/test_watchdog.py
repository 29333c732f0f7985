"""The watchdog against processes that really hang (`hanging.py`): in a lock, in a collective, in C with the
interpreter's lock."""

from __future__ import annotations

import json
import linecache
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from titan_yulan.monitor.events import read_events

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Outcome:
    folder: Path
    codes: list[int]

    def report(self, rank: int, hang: int = 1) -> str:
        return (self.folder / "hangs" / str(hang) / f"rank-{rank}.txt").read_text()

    def error(self, rank: int) -> str:
        return (self.folder / f"stderr-{rank}").read_text()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    folder = tmp_path_factory.mktemp("hanging")
    command = [sys.executable, "-m", "tests.monitor.hanging", str(folder)]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert answer.returncode == 0, answer.stderr
    return {name: Outcome(folder / name, codes) for name, codes in json.loads(answer.stdout).items()}


def blocked_lines(report: str) -> list[str]:
    """The source lines of the scenario's own file that occur in the stacks, innermost first."""
    places = re.findall(r'File "(.*hanging\.py)", line (\d+)', report)
    return [linecache.getline(path, int(line)).strip() for path, line in places]


def test_both_ranks_are_ended_and_name_the_line_where_they_stand(outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes["stay_away"]
    assert outcome.codes == [1, 1]
    waits, stuck = outcome.report(0, hang=4), outcome.report(1, hang=4)
    assert blocked_lines(waits)[0] == "dist.all_reduce(torch.ones(1))"
    assert blocked_lines(stuck)[0] == "lock.acquire()"
    for rank, report in enumerate((waits, stuck)):
        assert re.match(
            rf"rank {rank}, process \d+ on \S+, in 'step 7' since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d: ", report
        )


def test_an_earlier_hang_is_kept_and_no_reason_to_end(outcomes: dict[str, Outcome]) -> None:
    assert sorted(path.name for path in (outcomes["stay_away"].folder / "hangs").iterdir()) == ["3", "4"]


def test_a_hang_is_one_event(outcomes: dict[str, Outcome]) -> None:
    for name, what in (("stay_away", "step 7"), ("follow", "starting")):
        (event,) = read_events(outcomes[name].folder)
        assert (event["event"], event["what"]) == ("hang", what)
        assert re.fullmatch(r"nothing has gone on for [1-9][\d.]* seconds, the limit is 1", event["reason"])
        assert Path(event["stacks"], f"rank-{event['rank']}.txt").exists()


def test_the_last_collectives_are_written_where_torch_records_them(outcomes: dict[str, Outcome]) -> None:
    folder = outcomes["stay_away"].folder / "hangs" / "4"
    assert [(folder / f"collectives-{rank}").read_bytes() for rank in range(2)] == [b"of rank 0", b"of rank 1"]
    assert list(outcomes["follow"].folder.glob("hangs/1/collectives-*")) == []


def test_a_rank_whose_limit_is_far_away_follows_the_one_that_found_the_hang(outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes["follow"]
    assert outcome.codes == [1, 1]
    assert "the limit is 1\n" in outcome.report(0)
    assert "another rank has found that nothing goes on" in outcome.report(1)
    assert blocked_lines(outcome.report(1))[0] == "lock.acquire()"


def test_beats_prevent_it(outcomes: dict[str, Outcome]) -> None:
    assert outcomes["beat_for_long"].codes == [1]
    assert "in 'stuck' since" in outcomes["beat_for_long"].report(0)


def test_settling_narrows_and_patience_widens_the_limit(outcomes: dict[str, Outcome]) -> None:
    assert outcomes["be_patient"].codes == [1]
    report = outcomes["be_patient"].report(0)
    assert "in 'after saving' since" in report and "the limit is 0.8\n" in report


def test_no_alarm_after_stopping(outcomes: dict[str, Outcome]) -> None:
    assert outcomes["stop_watching"].codes == [0]
    assert outcomes["stop_watching"].error(0) == ""
    assert not (outcomes["stop_watching"].folder / "hangs").exists()


def test_a_process_that_holds_the_interpreters_lock_is_ended_too(outcomes: dict[str, Outcome]) -> None:
    assert outcomes["hold_interpreter"].codes == [1]
    assert blocked_lines(outcomes["hold_interpreter"].error(0))[0] == "ctypes.PyDLL(None).sleep(30)"


def test_what_cannot_be_written_goes_to_standard_error(outcomes: dict[str, Outcome]) -> None:
    assert outcomes["fill_disk"].codes == [1]
    assert "lock.acquire()" in blocked_lines(outcomes["fill_disk"].error(0))
