"""The files of a run's record: lines of JSON that can go back to a step, and `status.json`."""

from __future__ import annotations

import json
import math
import os
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from titan_yulan.checkpoint.layout import sync_folder


def write_atomically(path: Path, text: str) -> None:
    """Replace a file so that a reader sees the old or the new text, never a part, also after a crash of the machine."""
    # nodes share run folders, and containers on them have the same process ids
    temporary = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # else a power cut can leave the new name with nothing in it
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_status(folder: Path, state: str, exit_code: int, **details: Any) -> None:
    """`status.json`: what became of the run; the launcher turns `exit_code` into its own.

    state: running, finished, stopped (resumable) or failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "status.json"
    text = json.dumps({"state": state, "exit_code": exit_code, **details}, indent=2)
    try:
        write_atomically(path, text)
    except OSError:
        # on a full disk there is no room for a second file, but there is in the block of the old one
        with path.open("r+", encoding="utf-8") as file:
            file.write(text)
            file.truncate()


def read_status(folder: Path) -> dict[str, Any]:
    """What `write_status` wrote; empty if there is nothing to read."""
    try:
        return json.loads((folder / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a JSON-lines file; a last line that was cut off by a kill is left out."""
    lines = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").split("\n"):
            try:
                lines.append(json.loads(line))
            except ValueError:
                break
    return lines


class JsonLines:
    """Appends dictionaries to a file; on opening, lines of steps after `step` are dropped (they will come again)."""

    def __init__(self, path: Path, step: int) -> None:
        self._path = path
        self._open(step)

    def _open(self, step: int) -> None:
        kept = [line for line in read_lines(self._path) if line["step"] <= step]
        write_atomically(self._path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = self._path.open("a", encoding="utf-8")

    def rewind(self, step: int) -> None:
        """Drop the lines of steps after `step`, which are done again."""
        self._file.close()
        self._open(step)

    def write(self, lines: Iterable[dict[str, Any]]) -> None:
        """Append lines; a number that is not finite becomes null (JSON has no NaN)."""
        self._file.writelines(json.dumps(_without_nan(line), allow_nan=False) + "\n" for line in lines)
        self._file.flush()

    def sync(self) -> None:
        """Make what was written survive a crash of the machine."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class RunLines:
    """The JSON-lines files of a run, `NAME.jsonl` in its folder, which go back and are made durable together."""

    def __init__(self, folder: Path, step: int, names: Iterable[str]) -> None:
        """
        Args:
            step: lines of later ones are dropped.
            names: those that will be written.
        """
        self._files = {name: JsonLines(folder / f"{name}.jsonl", step) for name in names}

    def __getitem__(self, name: str) -> JsonLines:
        return self._files[name]

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def rewind(self, step: int) -> None:
        for file in self._files.values():
            file.rewind(step)

    def sync(self) -> None:
        for file in self._files.values():
            file.sync()

    def close(self) -> None:
        for file in self._files.values():
            file.close()
