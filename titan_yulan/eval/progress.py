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

    The speed is that since the task was begun. A task that was not, or of which less is done than before, begins with
    its call: what was done until then took no time that is known.
    """

    def __init__(self, say: Say, terminal: TextIO | None = None) -> None:
        """`terminal`: where the bar is drawn; None: lines go to `say` instead."""
        self._say, self._terminal = say, terminal
        self._task, self._begin, self._shown, self._drawn = "", 0.0, 0.0, False
        self._first, self._last = 0, 0  # done when the task began, and at the last call

    def begin(self, task: str, done: int = 0) -> None:
        """Start the clock of a task, also of one that has the name of the one before."""
        self._task, self._first, self._last = task, done, done
        self._begin = self._shown = time.perf_counter()

    def __call__(self, task: str, done: int, total: int) -> None:
        if task != self._task or done < self._last:
            self.begin(task, done)
        self._last, now = done, time.perf_counter()
        if now - self._shown < (_BAR_EVERY if self._terminal else _LINE_EVERY):
            return
        self._shown = now
        speed = (done - self._first) / (now - self._begin)
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
