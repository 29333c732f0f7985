"""What the launcher and the processes it starts agree on, without torch: device, start, stopping, a common end.

Two locks in the run folder, each a file for every node, keep a second group of processes out. The launcher holds
`.lock-N` and hands it to torchrun; workers, to whom torchrun hands nothing, share `.workers-N`. Whoever is killed
leaves its lock to the kernel, so what they say is true after any end.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from titan_yulan.errors import RunError, UserError

# Set by the launcher: the device ("cuda" or "cpu") that its plan and its memory check were made for.
DEVICE_VARIABLE = "TITAN_YULAN_DEVICE"
# Set by the launcher: when it started, in seconds since the epoch; a time limit counts from there across restarts.
STARTED_VARIABLE = "TITAN_YULAN_STARTED"
# In the run folder: a request to save and end.
STOP_FILE = "stop"

# Set by the launcher: the number of the signal that a worker gets when its torchrun dies.
DEATH_VARIABLE = "TITAN_YULAN_DEATH_SIGNAL"
# Set by the launcher: the file that this node's workers lock together.
WORKERS_VARIABLE = "TITAN_YULAN_WORKERS"
# Set by torchrun's agent: its process id.
AGENT_VARIABLE = "TITAN_YULAN_AGENT"

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # Lustre without -o flock, NFS without its lock daemon
_LOOK_SECONDS = 0.2
_EARLIER_SECONDS = 60.0  # for workers of an earlier start, whose torchrun was killed, to save and end
_ONE_REQUEST = 2.0  # seconds in which signals are one request: schedulers and shells pass the same one on twice


def death_signal(leaves: bool) -> signal.Signals:
    """What a process gets when its parent dies: a request to save and end, or, on a node that an elastic run can do
    without (`leaves`), an end at once, so that the rest forms a new group instead of ending with it."""
    return signal.SIGKILL if leaves else signal.SIGTERM


def end_with_parent(number: int | None = None, parent: int | None = None) -> None:
    """Ask the kernel to send this process a signal when its parent dies, however it dies. Linux only; else nothing.

    Args:
        number: the signal; without it the one that the launcher chose, else SIGTERM.
        parent: process id that the parent has, if it lives; if not, this process ends at once.
    """
    if sys.platform == "linux":
        chosen = int(os.environ.get(DEATH_VARIABLE, signal.SIGTERM)) if number is None else number
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, chosen)
    if parent is not None and os.getppid() != parent:  # it died before the kernel was asked
        sys.exit("ERROR: the process that started this one is gone")


def prepare_torchrun(number: int, launcher: int) -> None:
    """What torchrun's process does before it becomes torchrun.

    Args:
        number: the signal that it gets when the launcher dies.
        launcher: process id of the launcher.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the launcher's handler would swallow it until torchrun is loaded
    end_with_parent(number, launcher)
    # Slurm's SIGUSR1 reaches every process of a job step: torchrun, or a worker that is still starting, would die of it
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def join_launch() -> None:
    """What a worker does first, before it imports torch, which takes seconds: bind its life to torchrun's, and hold
    the lock of the workers until it ends. Without the launcher only the former."""
    agent = os.environ.get(AGENT_VARIABLE)
    end_with_parent(parent=int(agent) if agent else None)
    if path := os.environ.get(WORKERS_VARIABLE):
        descriptor = os.open(path, os.O_RDONLY)  # never closed: what this process forks holds it too
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        except OSError as error:
            if error.errno not in _NO_LOCKS:  # the launcher has warned
                raise


def try_lock(descriptor: int) -> bool:
    """Lock a file for this process alone; False: another one holds it. Where there are no locks, warns and says True.

    Raises:
        OSError: the file system failed.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        _warn_without_locks(str(error))
    return True


@functools.cache
def _warn_without_locks(why: str) -> None:
    print(
        f"WARNING: the file system of the run folder has no locks ({why}): nothing keeps a second start from training "
        "in it at the same time",
        flush=True,
    )


def workers_lock(folder: Path, node_rank: int) -> Path:
    """The file that the workers of a node lock."""
    return folder / f".workers-{node_rank}"


def wait_for_workers(path: Path, seconds: float, give_up: Callable[[], bool] = lambda: False) -> bool:
    """Wait until no worker lives that was started with `path` as its lock; make the file.

    Args:
        path: of `workers_lock`.
        seconds: to wait.
        give_up: asked while waiting.

    Returns:
        whether they have all ended.
    """
    end, told = time.monotonic() + seconds, False
    with open(path, "w") as file:
        while not try_lock(file.fileno()):
            if time.monotonic() >= end or give_up():
                return False
            if not told:
                told = True
                print(
                    f"training processes still live without torchrun: waiting {seconds:.0f} s for them",
                    flush=True,
                )
            time.sleep(_LOOK_SECONDS)
    return True


class Stopped(Exception):
    """The launcher was asked to stop before it started anything."""


class StopSignals:
    """Within `with`, signals to the launcher are requests to stop, and no longer end it.

    Before torchrun is started, the first request is answered by the next `check`, and a second one ends this process.
    Afterwards the first becomes the run's stop file, which the workers look for at every step: torchrun, told itself,
    would report a failure although every worker ended well, and a worker that is still starting would die of the signal
    and be started again. A second one goes to torchrun, which gives the workers time to end; a third one kills it, and
    the kernel tells them.
    """

    def __init__(self) -> None:
        self._times: list[float] = []
        self._folder: Path | None = None
        self._torchrun: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> StopSignals:
        self._process = os.getpid()
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
        self._before = {number: signal.signal(number, self._on_signal) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def requests(self) -> int:
        """How often this process was asked."""
        return len(self._times)

    def check(self) -> None:
        """End the preparation here if that was asked for.

        Raises:
            Stopped: it was.
        """
        if self._times:
            raise Stopped

    def answer_in(self, folder: Path) -> None:
        """From now on a first request becomes the stop file of this run folder."""
        self._folder = folder
        self.check()

    def pass_on_to(self, torchrun: subprocess.Popen[bytes]) -> None:
        """From now on later requests go to this process."""
        self._torchrun = torchrun

    def _on_signal(self, number: int, _: object) -> None:
        if os.getpid() != self._process:  # forked from the launcher: its handlers are not meant for that one
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if self._times and time.monotonic() - self._times[-1] <= _ONE_REQUEST:
            return
        self._times.append(time.monotonic())
        if self.requests == 1:
            if self._folder is not None:
                (self._folder / STOP_FILE).touch()
        elif self._torchrun is None:
            sys.exit(75)
        else:
            self._torchrun.send_signal(signal.SIGTERM if self.requests == 2 else signal.SIGKILL)


@contextlib.contextmanager
def only_start(folder: Path, node_rank: int, signals: StopSignals) -> Iterator[int]:
    """Hold the run folder's lock, one on each node; torchrun inherits it, so that it outlasts a killed launcher.

    Raises:
        UserError: another start holds it.
        RunError: workers of an earlier start have outlived it, and do not end.
        Stopped: a request to stop came while they were waited for.
    """
    with open(folder / f".lock-{node_rank}", "w") as file:
        if not try_lock(file.fileno()):
            raise UserError(f"another start is training in {folder}; wait for it, stop it, or use another run.name")
        path = workers_lock(folder, node_rank)
        if not wait_for_workers(path, _EARLIER_SECONDS, give_up=lambda: signals.requests > 0):
            signals.check()
            raise RunError(
                f"processes of an earlier start still live and train in {folder}; wait for them (they save and end) "
                "or end them"
            )
        yield file.fileno()
