"""Ends a process in which nothing goes on any more, after writing down where every thread of every rank stands.

Each rank watches itself. The first whose limit passes makes a new folder `hangs/N` in the run folder; the others, which
may wait for the one that is stuck, or be it, see the folder and write their stacks too, before they are ended because
the first one ended.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from titan_yulan.monitor.events import append_event

HANGS = "hangs"
_LONGEST_POLL = 5.0  # seconds
_GRACE = 45.0  # seconds that other ranks have to see the folder and write: NFS may hide a new one for 30


class _Beat(NamedTuple):
    """What began when, by two clocks: one to measure with, in seconds, and one to tell people, since the epoch."""

    what: str
    begin: float
    since: float


class Watchdog:
    """Ends this process with code 1 if `beat` is not called for longer than a limit.

    On expiry, every rank writes its stacks to `hangs/N/rank-R.txt` and, with NCCL, its last collectives to
    `hangs/N/collectives-R`, which `torchfrtrace --prefix collectives- hangs/N` compares (torch records them if
    TORCH_FR_BUFFER_SIZE is set); the first one adds an event "hang".

    A thread of Python's keeps the time. If the hang holds the interpreter's lock, so that this thread cannot run
    either, faulthandler's own thread writes the stacks to standard error and ends the process a little later.

    Args:
        folder: the run folder.
        rank: of this process.
        first: seconds without a beat that are a hang until `settle`, and within `patient`.
        steady: the same afterwards.
    """

    def __init__(self, folder: Path, rank: int, first: float, steady: float) -> None:
        self._folder, self._rank, self._first, self._steady = folder, rank, first, steady
        self._settled, self._patient = False, 0
        self._poll = min(_LONGEST_POLL, min(first, steady) / 20)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin to watch. Once, when all ranks have found each other."""
        hangs = self._folder / HANGS
        earlier = [int(path.name) for path in hangs.glob("*") if path.name.isdigit()]
        self._hang = hangs / str(max(earlier, default=0) + 1)
        self._ranks = dist.get_world_size() if dist.is_initialized() else 1
        self.beat("starting")
        self._thread.start()

    def stop(self) -> None:
        """End watching; returns when the watching thread has ended."""
        self._stopped.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def beat(self, what: str) -> None:
        """Something has gone on, and `what` begins. Costs next to nothing: call it at every micro-batch."""
        self._beat = _Beat(what, time.monotonic(), time.time())

    def settle(self) -> None:
        """From now on the steady limit: what is compiled at its first use has been compiled. Counts as a beat."""
        self.beat(self._beat.what)
        self._settled = True

    @contextlib.contextmanager
    def patient(self, what: str = "a long operation") -> Iterator[None]:
        """The first limit again, while compiling, saving or evaluating; beats within are counted as everywhere.

        All ranks should come to the end together: one that leaves early waits for the others under the steady limit.
        """
        self._patient += 1
        self.beat(what)
        try:
            yield
        finally:
            self.beat(f"after {what}")  # before the limit changes: the thread may look in between
            self._patient -= 1

    @property
    def limit(self) -> float:
        """Seconds without a beat that are a hang at this moment."""
        return self._steady if self._settled and not self._patient else self._first

    def _watch(self) -> None:
        while not self._stopped.wait(self._poll):
            limit, beat = self.limit, self._beat  # in this order: see `patient`
            faulthandler.dump_traceback_later(limit + _GRACE, exit=True, file=2)
            waited = time.monotonic() - beat.begin
            if os.path.exists(self._hang):  # unlike Path.exists, no error if the file system has one
                self._end(beat, "another rank has found that nothing goes on")
            elif waited > limit:
                self._end(beat, f"nothing has gone on for {waited:.1f} seconds, the limit is {limit:g}")

    def _end(self, beat: _Beat, reason: str) -> None:
        """Write down what there is to know, then end the process, whatever of that fails or hangs itself."""
        faulthandler.dump_traceback_later(2 * _GRACE, exit=True, file=2)
        try:
            since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(beat.since))
            place = f"rank {self._rank}, process {os.getpid()} on {socket.gethostname()}"
            line = f"{place}, in {beat.what!r} since {since}: {reason}"
            # not print: the main thread may be the one that holds the lock of standard error
            os.write(2, f"ERROR: {line}; stacks of all ranks are in {self._hang}\n".encode())
            if self._announce():
                details = {"rank": self._rank, "what": beat.what, "reason": reason, "stacks": str(self._hang)}
                append_event(self._folder, "hang", **details)
            self._write_stacks(line)
            self._write_collectives()
            self._wait_for_others()
        except OSError as error:
            os.write(2, f"{error}; the stacks of this rank:\n".encode())
            faulthandler.dump_traceback(2, all_threads=True)
        finally:
            os._exit(1)

    def _announce(self) -> bool:
        """Whether this rank is the first to make the folder."""
        self._hang.parent.mkdir(exist_ok=True)
        try:
            self._hang.mkdir()
        except FileExistsError:
            return False
        return True

    def _write_stacks(self, line: str) -> None:
        with open(self._hang / f"rank-{self._rank}.txt", "w", encoding="utf-8") as file:
            file.write(f"{line}\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
            os.fsync(file.fileno())

    def _write_collectives(self) -> None:
        dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace", None)  # in builds with NCCL; nothing is public
        if dump is not None:
            (self._hang / f"collectives-{self._rank}").write_bytes(dump())

    def _wait_for_others(self) -> None:
        end = time.monotonic() + _GRACE
        while time.monotonic() < end and len(list(self._hang.glob("rank-*.txt"))) < self._ranks:
            time.sleep(self._poll)
        time.sleep(self._poll)  # for what they write after the stacks
