"""Results of finished tasks, kept on disk while others of the same evaluation are not finished.

`finished.jsonl` in the folder of the reports gets a line for each task as it is done: what it depends on, and its
result. An evaluation that is started again takes them from there; the end of the last task, with its reports, removes
the file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from titan_yulan.errors import UserError
from titan_yulan.eval.evaluate import Result
from titan_yulan.eval.share import Share
from titan_yulan.monitor.metrics import read_lines, write_atomically

FILE = "finished.jsonl"


class Finished:
    """The results found and those added; all ranks know them, the first one writes."""

    def __init__(self, folder: Path | None, share: Share) -> None:
        """
        Args:
            folder: of the reports; None: nothing is kept.
            share: the ranks that evaluate together.

        Raises:
            UserError: the folder cannot be written.
        """
        self._file = None if folder is None or share.rank else folder / FILE
        lines: list[dict[str, Any]] = []
        if self._file is not None:
            with _explained(self._file):
                self._file.parent.mkdir(parents=True, exist_ok=True)
                lines = read_lines(self._file)
                # without a line that was cut off, behind which the next would be lost
                write_atomically(self._file, "".join(json.dumps(line) + "\n" for line in lines))
        self._found = share.merge({_key(line["of"]): line["result"] for line in lines})

    def find(self, of: dict[str, Any]) -> Result | None:
        """The result of the task that `of` tells from all others, if it is there."""
        found = self._found.get(_key(of))
        return None if found is None else Result(**found)

    def add(self, of: dict[str, Any], result: Result) -> None:
        """Keep a result.

        Raises:
            UserError: the folder cannot be written.
        """
        if self._file is not None:
            with _explained(self._file), self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"of": of, "result": asdict(result)}) + "\n")
                file.flush()
                os.fsync(file.fileno())

    def remove(self) -> None:
        """Forget all: the reports are written."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)


def _key(of: dict[str, Any]) -> str:
    return json.dumps(of, sort_keys=True)


@contextmanager
def _explained(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"--output: cannot write {file}: {error.strerror}; name a folder that can be written, with room"
        ) from None
