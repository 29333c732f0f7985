"""The files of a run: nothing half-written is read, nothing is recorded twice."""

from __future__ import annotations

import errno
import itertools
import json
import os
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest

from titan_yulan.monitor import metrics
from titan_yulan.monitor.board import TensorBoard
from titan_yulan.monitor.metrics import JsonLines, read_lines, read_status, write_atomically, write_status


def test_a_file_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, "old")
    seen = []
    replace = os.replace

    def look_then_replace(source: str, target: Path) -> None:
        seen.append((Path(source).read_text(), path.read_text()))
        replace(source, target)

    monkeypatch.setattr(metrics.os, "replace", look_then_replace)
    write_atomically(path, "new ü")
    assert seen == [("new ü", "old")] and path.read_text(encoding="utf-8") == "new ü"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_on_the_disk_before_it_takes_the_name_of_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, calls = tmp_path / "metrics.jsonl", []
    path.write_text('{"step": 1}\n{"step": 2}\n')
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor: int) -> None:
        calls.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else os.fstat(descriptor).st_size)
        fsync(descriptor)

    def note_replace(source: str, target: Path) -> None:
        calls.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    lines = JsonLines(path, 1)
    assert calls == [12, "replace", "folder"]
    lines.rewind(0)
    assert calls[3:] == [0, "replace", "folder"]
    lines.close()


def test_a_failed_replacement_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_atomically(path, "old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(metrics.os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_files_can_be_read_by_the_team(tmp_path: Path) -> None:
    """The records of a run are not secret: the permissions are those of any new file."""
    before = os.umask(0o022)
    try:
        write_atomically(tmp_path / "file", "")
    finally:
        os.umask(before)
    assert stat.filemode((tmp_path / "file").stat().st_mode) == "-rw-r--r--"


def test_status(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert read_status(folder) == {}
    write_status(folder, "stopped", 75, step=12)
    assert read_status(folder) == {"state": "stopped", "exit_code": 75, "step": 12}
    (folder / "status.json").write_text('{"state"')
    assert read_status(folder) == {}


def test_status_is_told_even_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_status(tmp_path, "running", 1, note="a long text that must not remain")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(metrics, "write_atomically", full)
    write_status(tmp_path, "failed", 1)
    assert read_status(tmp_path) == {"state": "failed", "exit_code": 1}


def test_a_line_that_a_kill_cut_off_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_lines(path) == []
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert [line["step"] for line in read_lines(path)] == [1, 2]


def test_lines_of_steps_that_come_again_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path, -1)
    lines.write({"step": step, "loss": 1 / step} for step in range(1, 8))
    lines.close()
    with path.open("a") as file:
        file.write('{"step": 8, "lo')
    lines = JsonLines(path, 5)
    lines.write([{"step": 6, "loss": 0.5}])
    assert [line["step"] for line in read_lines(path)] == [1, 2, 3, 4, 5, 6]  # written without closing
    assert [json.loads(text) for text in path.read_text().splitlines()][4:] == [
        {"step": 5, "loss": 0.2},
        {"step": 6, "loss": 0.5},
    ]
    lines.close()


def test_a_fresh_start_drops_everything(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n')
    JsonLines(path, -1).close()
    assert path.read_text() == ""


def test_curves_are_not_doubled_after_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.summary.writer import event_file_writer

    # files are read in the order of their names, which begin with the second of the start
    seconds = itertools.count(1_000_000_000)
    monkeypatch.setattr(event_file_writer, "time", SimpleNamespace(time=lambda: float(next(seconds))))
    for first, last, value in ((1, 6, 0.0), (4, 8, 1.0)):  # killed after step 6, resumed from step 3
        board = TensorBoard(tmp_path, first - 1, ["code"])
        for step in range(first, last + 1):
            board.scalars(step, {"loss/train": value})
        board.flush()
        board.close()
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("loss/train")
    assert [(event.step, event.value) for event in events] == [(s, float(s > 3)) for s in range(1, 9)]
