"""Events are read whatever became of the disk while they were written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from titan_yulan.monitor import events
from titan_yulan.monitor.events import append_event, read_events


def kinds(folder: Path) -> list[str]:
    return [event["event"] for event in read_events(folder)]


def test_an_event_is_a_line_with_its_details(tmp_path: Path) -> None:
    assert read_events(tmp_path) == []
    append_event(tmp_path, "resume", step=3, message="ü")
    append_event(tmp_path, "stop")
    first, second = read_events(tmp_path)
    assert (first["event"], first["step"], first["message"]) == ("resume", 3, "ü") and second["event"] == "stop"
    assert len((tmp_path / "events.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("taken", [1, 20])
def test_a_disk_that_takes_half_a_line_is_an_error_and_the_next_event_is_whole(
    tmp_path: Path, taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    append_event(tmp_path, "one")
    write, room = os.write, taken

    def nearly_full(descriptor: int, content: bytes) -> int:
        nonlocal room
        if not room:
            raise OSError("No space left on device")
        written, room = write(descriptor, content[:room]), 0
        return written

    monkeypatch.setattr(events.os, "write", nearly_full)
    with pytest.raises(OSError, match="No space left"):
        append_event(tmp_path, "two")
    monkeypatch.undo()
    append_event(tmp_path, "three")
    append_event(tmp_path, "four")
    assert kinds(tmp_path) == ["one", "three", "four"]
    assert len((tmp_path / "events.jsonl").read_text().splitlines()) == 4


def test_what_is_no_text_is_left_out(tmp_path: Path) -> None:
    append_event(tmp_path, "one")
    with (tmp_path / "events.jsonl").open("ab") as file:
        file.write(bytes(7) + b"\xff\n\n")
    append_event(tmp_path, "two")
    assert kinds(tmp_path) == ["one", "two"]
