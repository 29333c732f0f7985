"""Trains the runs of a sweep on this machine, one after the other or several at a time."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from titan_yulan.data.report import say_now
from titan_yulan.errors import UserError
from titan_yulan.parallel.launched import end_with_parent, try_lock
from titan_yulan.plan.memory import Machine, inspect_machine
from titan_yulan.plan.start import Launch
from titan_yulan.sweep.runs import SweepRun, write_arguments

LOG = "sweep.log"
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
_LOOK_SECONDS = 0.1
_LAST_LINES = 3  # of a failed run's output


def run_all(runs: Sequence[SweepRun], at_a_time: int, say: Callable[[str], None] = say_now) -> int:
    """Train all runs that are not finished; half-done ones go on. Their output is `sweep.log` in each run folder.

    A signal is passed on to those under way, which save and end, and no other is begun: the same call goes on.

    Returns:
        0: all are finished; 75: some were stopped; 1: some failed (the others are trained nevertheless).

    Raises:
        UserError: the machine has fewer GPUs than runs at a time.
    """
    waiting = [run for run in runs if not run.finished]
    slots = _slots(at_a_time, inspect_machine())
    say(f"{len(runs) - len(waiting)} of {len(runs)} runs are finished, {len(waiting)} to train, {at_a_time} at a time")
    return _Trainer(waiting, slots, say).train()


def _slots(at_a_time: int, machine: Machine) -> list[dict[str, str]]:
    """What the environment of each run under way adds: its GPUs, or its share of the cores."""
    if at_a_time < 1:
        raise UserError(f"--run {at_a_time}: at least 1")
    if machine.accelerators:
        share = machine.accelerators // at_a_time
        if not share:
            raise UserError(f"--run {at_a_time}: this machine has {machine.accelerators} GPU(s), one at least for each")
        given = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = given.split(",") if given else [str(index) for index in range(machine.accelerators)]
        parts = [devices[slot * share : (slot + 1) * share] for slot in range(at_a_time)]
        return [{"CUDA_VISIBLE_DEVICES": ",".join(part)} for part in parts]
    if at_a_time == 1 or "OMP_NUM_THREADS" in os.environ:
        return [{} for _ in range(at_a_time)]
    processes = at_a_time * Launch.from_environment(machine).processes
    return [{"OMP_NUM_THREADS": str(max(1, machine.cores // processes))} for _ in range(at_a_time)]


def _is_free(run: SweepRun) -> bool:
    """Whether no launcher holds the lock of the run folder."""
    lock = run.folder / ".lock-0"  # of `parallel.launched.only_start`
    if not lock.exists():
        return True
    with lock.open("r+b") as file:  # NFS gives an exclusive lock only to those who may write
        return try_lock(file.fileno())


class _Trainer:
    """The runs under way, each in a slot of its own."""

    def __init__(self, runs: Sequence[SweepRun], slots: list[dict[str, str]], say: Callable[[str], None]) -> None:
        self._waiting, self._slots, self._say = deque(runs), slots, say
        self._active: dict[int, tuple[SweepRun, subprocess.Popen[bytes]]] = {}
        self._stopping = False
        self._told: set[str] = set()
        self._codes: list[int] = []

    def train(self) -> int:
        with self._signals():
            while self._active or (self._waiting and not self._stopping):
                for slot in range(len(self._slots)):
                    run = None if slot in self._active or self._stopping else self._next()
                    if run is not None:
                        self._begin(slot, run)
                time.sleep(_LOOK_SECONDS)
                for slot, (run, process) in list(self._active.items()):
                    if process.poll() is not None:
                        del self._active[slot]
                        self._end(run, process.returncode)
        failed = [code for code in self._codes if code not in (0, 75)]
        return 1 if failed else 75 if self._waiting or 75 in self._codes else 0

    def _next(self) -> SweepRun | None:
        """The first run that waits and that nobody trains: not another sweep, nor what a killed one left behind."""
        for run in self._waiting:
            if _is_free(run):
                self._waiting.remove(run)
                return run
            if run.name not in self._told:
                self._told.add(run.name)
                self._say(f"{run.name}: another start is training in {run.folder}, its turn comes when that has ended")
        return None

    def _begin(self, slot: int, run: SweepRun) -> None:
        write_arguments(run)
        self._say(f"{run.name}: {'goes on' if run.begun else 'begins'} ({run.state}), output in {run.folder / LOG}")
        with (run.folder / LOG).open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "titan_yulan.cli", "train", *run.arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self._slots[slot], "PYTHONUNBUFFERED": "1"},
                start_new_session=True,  # Ctrl-C comes here alone, and is passed on once
                preexec_fn=partial(end_with_parent, signal.SIGTERM, os.getpid()),
            )
        self._active[slot] = run, process
        if self._stopping:  # a signal came while it was begun
            process.send_signal(signal.SIGTERM)

    def _end(self, run: SweepRun, code: int) -> None:
        if code == 2 and not _is_free(run):  # another start took it between our look at the lock and the launcher's
            self._waiting.appendleft(run)
            return
        if self._stopping and code < 0:  # a signal came before the launcher could answer it
            code = 75
        self._codes.append(code)
        known = {0: "finished", 75: "stopped; the same command goes on"}
        self._say(f"{run.name}: {known.get(code, f'FAILED (exit code {code}), the end of {run.folder / LOG}:')}")
        if code not in known:
            for line in (run.folder / LOG).read_text(encoding="utf-8", errors="replace").splitlines()[-_LAST_LINES:]:
                self._say(f"  {line}")

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        def pass_on(number: int, _: object) -> None:
            self._stopping = True
            for _, process in list(self._active.values()):
                process.send_signal(signal.SIGTERM)

        before = {number: signal.signal(number, pass_on) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
