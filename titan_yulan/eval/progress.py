"""How far an evaluation is: a bar on a terminal, elsewhere a line every five seconds."""

from __future__ import annotations

import shutil
import time
from typing import TextIO

from titan_yulan.data.report import Say

_LINE_EVERY, _BAR_EVERY = 5.0, 0.2  # seconds
_CELLS = 30


class Progress:
    """Called with (task, done, total) as often as anything is done; `say` prints other lines without breaking the bar.

    Of a task, the speed is that since its first call.
    """

    def __init__(self, say: Say, terminal: TextIO | None = None) -> None:
        """`terminal`: where the bar is drawn; None: lines go to `say` instead."""
        self._say, self._terminal = say, terminal
        self._task, self._begin, self._shown, self._drawn = "", 0.0, 0.0, False

    def __call__(self, task: str, done: int, total: int) -> None:
        now = time.perf_counter()
        if task != self._task:
            self._task, self._begin, self._shown = task, now, now
        if now - self._shown < (_BAR_EVERY if self._terminal else _LINE_EVERY):
            return
        self._shown = now
        speed = done / (now - self._begin)
        counts = f"{done:,} of {total:,}, {speed:,.1f} a second"
        if self._terminal is None:
            self._say(f"{task}: {counts}")
            return
        filled = _CELLS * done // total
        left = f", {(total - done) / speed:,.0f} s left" if speed else ""
        line = f"{task} [{'#' * filled}{'.' * (_CELLS - filled)}] {counts}{left}"
        self._draw(line[: shutil.get_terminal_size().columns - 1])

    def say(self, line: str) -> None:
        """Print a line; a bar gives way to it."""
        self.clear()
        self._say(line)

    def clear(self) -> None:
        """Take the bar away."""
        if self._drawn:
            self._draw("")
            self._drawn = False

    def _draw(self, text: str) -> None:
        if self._terminal is not None:
            self._terminal.write(f"\r\x1b[K{text}")
            self._terminal.flush()
            self._drawn = True
