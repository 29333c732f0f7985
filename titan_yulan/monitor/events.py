"""`events.jsonl` in the run folder: what happened to a run besides its steps, a line each, for people and for tests.

Restarts, stops, damaged checkpoints, steps that were skipped or tried again, hangs, slow ranks. No torch: the launcher
writes here too.
"""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

EVENTS = "events.jsonl"


def append_event(folder: Path, kind: str, **details: Any) -> None:
    """Add one line, after whatever a crash or a full disk left of the line before.

    Args:
        folder: the run folder.
        kind: what happened, in a word or two, such as "restart".
        details: what a reader needs to understand it; anything that JSON can hold.

    Raises:
        OSError: the line could not be written, or not all of it.
    """
    line = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "host": socket.gethostname(), "event": kind, **details}
    content = (json.dumps(line) + "\n").encode()
    descriptor = os.open(folder / EVENTS, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            content = b"\n" + content
        # one write, so that the lines of several processes do not mix; only a disk that is nearly full takes a part,
        # and says why when it is offered the rest
        while content:
            content = content[os.write(descriptor, content) :]
    finally:
        os.close(descriptor)


def read_events(folder: Path) -> list[dict[str, Any]]:
    """All events of a run, oldest first; a line that was cut off by a crash or a full disk is left out."""
    events = []
    if (folder / EVENTS).exists():
        for line in (folder / EVENTS).read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                events.append(json.loads(line))
            except ValueError:
                continue
    return events
