"""Which steps are traced, and what is left of a trace that is broken off."""

from __future__ import annotations

import errno
import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from tests.curriculum.making import configuration, phase
from titan_yulan.config.sections import MonitorSection
from titan_yulan.config.values import parse_steps
from titan_yulan.curriculum.plan import Plan
from titan_yulan.errors import UserError
from titan_yulan.monitor.breakdown import CATEGORIES, Breakdown
from titan_yulan.monitor.profile import Profile
from titan_yulan.parallel.process import World

CPU = World(0, 1, torch.device("cpu"), cast(Any, None))
CONFIG = configuration(phase("a", "30 steps", {"code": 1.0}))
PHASE = Plan(CONFIG).phases[0]


def make(folder: Path, told: list[str], world: World = CPU, **keys: Any) -> Profile:
    config = replace(CONFIG, monitor=MonitorSection(**keys))
    return Profile(config, folder, world, told.append)


def steps(profile: Profile, first: int, last: int) -> list[Breakdown]:
    """Run steps as the trainer does: a call before the first one and after every one."""
    found = [profile.next_step(first, PHASE)]
    for step in range(first, last + 1):
        torch.ones(3) @ torch.ones(3)
        found.append(profile.next_step(step + 1, PHASE))
    profile.drop()
    return [breakdown for breakdown in found if breakdown]


def recorded(file: Path) -> list[str]:
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    return sorted(event["name"] for event in events if event.get("name", "").startswith("ProfilerStep"))


@pytest.mark.parametrize(
    ("begin", "end", "folder", "traced"),
    [
        (1, 9, "step-4-6", 3),
        (3, 6, "step-4-6", 3),  # the first step of this start warms up; the range ends with the run
        (4, 9, "step-5-6", 2),  # a start inside the range: one step fewer
        (5, 9, "step-6-6", 1),
        (6, 9, None, 0),  # nothing would be left behind the warm-up
        (7, 9, None, 0),
        (1, 5, None, 0),  # ended before the range did
    ],
)
def test_the_steps_of_the_range_are_traced(
    tmp_path: Path, begin: int, end: int, folder: str | None, traced: int
) -> None:
    told: list[str] = []
    found = steps(make(tmp_path, told, profile_steps="4-6"), begin, end)
    assert [path.name for path in tmp_path.glob("traces/*")] == ([folder] if folder else [])
    if folder:
        assert len(recorded(tmp_path / "traces" / folder / "rank-0.json.gz")) == traced
        assert told == [f"traced steps {folder.removeprefix('step-')}: {tmp_path / 'traces' / folder}"]
        written = json.loads((tmp_path / "traces" / folder / "breakdown.json").read_text())
        assert written["window"] == found[0].window and set(written["seconds"]) == set(CATEGORIES)
    else:
        broken_off = begin <= 4 <= end
        assert not found
        assert told == (["WARNING: no trace of steps 4-6: it was broken off"] if broken_off else [])


@pytest.mark.parametrize(
    ("begun", "end", "told"),
    [
        (0, 30, ""),
        (2, 6, ""),
        (0, 5, "this start can record steps 2-5: only 4-5 are recorded"),
        (0, 3, "this start can record steps 2-3: none of them is recorded"),
        (3, 30, "this start can record steps 5-30: only 5-6 are recorded"),
        (6, 30, "this start can record steps 8-30: none of them is recorded"),
    ],
)
def test_a_range_ends_with_the_run_and_what_does_not_come_is_told(
    tmp_path: Path, begun: int, end: int, told: str
) -> None:
    profile = make(tmp_path, lines := [], profile_steps="4-6")
    profile.limit(begun, end)
    assert lines == ([f"note: monitor.profile_steps = 4-6: {told}"] if told else [])
    if end == 5:
        steps(profile, 1, 5)
        assert len(recorded(tmp_path / "traces" / "step-4-5" / "rank-0.json.gz")) == 2
        assert len(lines) == 2 and lines[1].startswith("traced steps 4-5: ")


def test_a_start_at_the_end_of_the_run_tells_nothing(tmp_path: Path) -> None:
    make(tmp_path, told := [], profile_steps="4-6").limit(9, 9)
    assert told == []


def _empty(_: object, path: str) -> None:
    """What PyTorch leaves, without an error, where its temporary file finds no room."""
    Path(path).write_bytes(gzip.compress(b""))


def _half(_: object, path: str) -> None:
    Path(path).write_bytes(gzip.compress(b'{"traceEvents": [{"name'))


def _torn(_: object, path: str) -> None:
    Path(path).write_bytes(gzip.compress(b'{"traceEvents": []}')[:-9])


def _full(_: object, path: str) -> None:
    Path(path).write_bytes(b"part")
    raise OSError(errno.ENOSPC, "No space left on device", path)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("export", [_empty, _half, _torn, _full])
def test_a_trace_that_fails_is_told_of_and_the_run_goes_on(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    rank: int,
    export: Callable[[object, str], None],
) -> None:
    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", export)
    profile = make(tmp_path, told := [], replace(CPU, rank=rank, size=2), profile_steps="2-2")
    assert steps(profile, 1, 4) == []
    assert list((tmp_path / "traces" / "step-2-2").iterdir()) == []
    (line,) = told if rank == 0 else capsys.readouterr().out.splitlines()
    assert line.startswith(f"WARNING: rank {rank}: no trace of steps 2-2: ")
    assert ("No space left" if export is _full else "disk" if export is not _torn else "end-of-stream") in line


def test_a_folder_that_cannot_be_made_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "traces").write_text("a file is in the way")
    assert steps(make(tmp_path, told := [], profile_steps="2-2"), 1, 3) == []
    assert len(told) == 1 and told[0].startswith("WARNING: rank 0: no trace of steps 2-2: ")


def test_a_breakdown_that_cannot_be_written_leaves_the_trace(tmp_path: Path) -> None:
    (tmp_path / "traces" / "step-2-2" / "breakdown.json").mkdir(parents=True)
    assert len(steps(make(tmp_path, told := [], profile_steps="2-2"), 1, 3)) == 1
    assert (tmp_path / "traces" / "step-2-2" / "rank-0.json.gz").is_file()
    assert [line.split(":")[0] for line in told] == ["traced steps 2-2", "WARNING"]


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_the_device_is_waited_for_where_measuring_begins_and_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    plain = torch.profiler.profile.step
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("wait"))
    monkeypatch.setattr(torch.profiler.profile, "step", lambda profiler: (calls.append("step"), plain(profiler)))
    cuda = replace(CPU, device=torch.device("cuda"))
    profile = make(tmp_path, [], cuda, profile_steps="4-5")
    flushed = []
    for step in range(1, 9):
        flushed += [step] if profile.begins(step) or profile.ends(step) else []
        profile.next_step(step, PHASE)
    assert flushed == [4, 6]
    assert calls == ["wait", "step", "step", "wait", "step"]


def test_going_back_begins_a_trace_anew(tmp_path: Path) -> None:
    profile = make(tmp_path, [], profile_steps="4-6")
    profile.next_step(3, PHASE)
    profile.next_step(4, PHASE)
    profile.drop()  # after step 4 the run goes back to step 2
    assert len(steps(profile, 3, 7)) == 1
    assert len(recorded(tmp_path / "traces" / "step-4-6" / "rank-0.json.gz")) == 3


def test_nothing_is_due_without_a_range(tmp_path: Path) -> None:
    profile = make(tmp_path, [])
    assert not any(profile.due(step) or profile.ends(step) for step in range(1, 30))


def test_another_rank_writes_its_trace_and_no_breakdown(tmp_path: Path) -> None:
    assert steps(make(tmp_path, [], replace(CPU, rank=3, size=4), profile_steps="2-2"), 1, 3) == []
    assert [path.name for path in (tmp_path / "traces" / "step-2-2").iterdir()] == ["rank-3.json.gz"]


def test_memory_snapshots_of_a_cpu_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"monitor.memory_snapshot_steps: .* only on GPUs; remove the key"):
        make(tmp_path, [], memory_snapshot_steps="2-3")


@pytest.mark.parametrize("ran_out", [False, True])
def test_allocations_are_recorded_in_their_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ran_out: bool
) -> None:
    """The order of the calls; what PyTorch writes needs a GPU."""
    calls: list[str] = []
    memory = torch.cuda.memory
    monkeypatch.setattr(memory, "_record_memory_history", lambda enabled="all", **_: calls.append(str(enabled)))
    monkeypatch.setattr(memory, "_dump_snapshot", lambda path: calls.append(Path(path).name))
    profile = make(tmp_path, told := [], replace(CPU, device=torch.device("cuda")), memory_snapshot_steps="3-4")
    for step in range(1, 5):
        profile.next_step(step, PHASE)
        assert calls == (["all"] if step >= 3 else [])
    profile.out_of_memory() if ran_out else profile.next_step(5, PHASE)
    assert calls == ["all", "memory-rank-0.pickle", "None"]
    assert told == [f"recorded the allocations of steps 3-4: {tmp_path / 'traces' / 'step-3-4'}"]
    profile.next_step(6, PHASE)
    profile.out_of_memory()
    profile.drop()
    assert len(calls) == 3


def test_memory_that_runs_out_is_not_hidden_by_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = torch.cuda.memory
    monkeypatch.setattr(memory, "_record_memory_history", lambda enabled="all", **_: calls.append(str(enabled)))
    monkeypatch.setattr(memory, "_dump_snapshot", lambda path: _full(None, path))
    calls: list[str] = []
    profile = make(tmp_path, told := [], replace(CPU, device=torch.device("cuda")), memory_snapshot_steps="3-4")
    profile.next_step(3, PHASE)
    profile.out_of_memory()
    assert calls == ["all", "None"] and list((tmp_path / "traces" / "step-3-4").iterdir()) == []
    assert len(told) == 1 and told[0].startswith("WARNING: rank 0: no record of the allocations of steps 3-4: [Errno")
    profile.drop()
    assert len(told) == 1
    profile.next_step(4, PHASE)
    profile.drop()
    assert told[1:] == ["WARNING: no record of the allocations of steps 4-4: it was broken off"]


@pytest.mark.parametrize(("text", "expected"), [("", range(0)), ("20-24", range(20, 25)), ("2-2", range(2, 3))])
def test_steps_are_read(text: str, expected: range) -> None:
    assert parse_steps(text) == expected


@pytest.mark.parametrize("text", ["20", "24-20", "1-3", "0-3", "a-b", "2-3-4", "-3", "2 - 3"])
def test_what_are_no_steps_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="FIRST-LAST, like '20-24', the first at least 2"):
        parse_steps(text)
