"""Requests to stop: signals, a file, a time limit. Asked for at any rank, agreed on by all."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from titan_yulan.parallel.launched import STARTED_VARIABLE, STOP_FILE
from titan_yulan.parallel.process import World

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_LOOK_SECONDS = 1.0  # between two looks for the file, which may lie on a slow network file system


class StopRequests:
    """Within `with`, SIGTERM, SIGINT and SIGUSR1 are requests to stop and no longer end the process.

    A request, once seen, stays. Nothing here interrupts anything: whoever can stop asks for `reason` or `agreed`.

    Args:
        folder: the run folder, where a file named `stop` is a request.
        time_limit: hours after `started` that are a request; None: no limit.
        started: seconds since the epoch; None: when the launcher started, or now if there was none. A restart by
            torchrun does not begin the time anew.
        clock: seconds since the epoch, now.
        kill_switch: another file that is a request, and refuses the next start; None: there is none.
    """

    def __init__(
        self,
        folder: Path,
        time_limit: float | None,
        started: float | None = None,
        clock: Callable[[], float] = time.time,
        kill_switch: Path | None = None,
    ) -> None:
        self._files = {folder / STOP_FILE: f"file {folder / STOP_FILE}"}
        if kill_switch is not None:
            self._files[kill_switch] = f"kill switch {kill_switch}, to be removed before the next start"
        self._time_limit, self._clock = time_limit, clock
        self._started = float(os.environ.get(STARTED_VARIABLE, clock())) if started is None else started
        self._looked = float("-inf")
        self._reason = ""

    def __enter__(self) -> StopRequests:
        """Must be called in the main thread, as Python wants it of whoever handles signals."""
        self._before = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: object) -> None:
        self._reason = self._reason or f"signal {signal.Signals(number).name}"

    @property
    def reason(self) -> str:
        """Why this rank is to stop, such as "signal SIGTERM"; "" if nobody asked. Cheap; no collective."""
        if not self._reason:
            now = self._clock()
            if self._time_limit is not None and now - self._started >= self._time_limit * 3600:
                self._reason = f"time limit of {self._time_limit:g} hours"
            elif not 0 <= now - self._looked < _LOOK_SECONDS:  # also after the clock was set back
                self._looked = now
                self._reason = next((reason for file, reason in self._files.items() if file.exists()), "")
        return self._reason

    def agreed(self, world: World) -> str:
        """Why all ranks are to stop: the reason of the first rank that has one, the same on all; "" if none has.

        Collective over `world.host`; never waits for the device.
        """
        first = world.size - world.agree(world.size - world.rank if self.reason else 0)
        if first == world.size:
            return ""
        reason = [self.reason]
        dist.broadcast_object_list(reason, src=first, group=world.host)
        self._reason = reason[0]
        return self._reason
