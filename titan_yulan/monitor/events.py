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
    """Add one line, whole or not at all: one write to a file opened for appending.

    Args:
        folder: the run folder.
        kind: what happened, in a word or two, such as "restart".
        details: what a reader needs to understand it; anything that JSON can hold.
    """
    line = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "host": socket.gethostname(), "event": kind, **details}
    descriptor = os.open(folder / EVENTS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, (json.dumps(line) + "\n").encode())
    finally:
        os.close(descriptor)


def read_events(folder: Path) -> list[dict[str, Any]]:
    """All events of a run, oldest first; a line that was cut off by a crash is left out."""
    events = []
    if (folder / EVENTS).exists():
        for line in (folder / EVENTS).read_text(encoding="utf-8").splitlines():
            try:
                events.append(json.loads(line))
            except ValueError:
                continue
    return events
