"""What the launcher and the processes it starts agree on, without torch: device, start, stopping, a common end."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

# Set by the launcher: the device ("cuda" or "cpu") that its plan and its memory check were made for.
DEVICE_VARIABLE = "TITAN_YULAN_DEVICE"
# Set by the launcher: when it started, in seconds since the epoch; a time limit counts from there across restarts.
STARTED_VARIABLE = "TITAN_YULAN_STARTED"
# In the run folder: a request to save and end.
STOP_FILE = "stop"

# Set by the launcher: the number of the signal that a worker gets when its torchrun dies.
DEATH_VARIABLE = "TITAN_YULAN_DEATH_SIGNAL"

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def death_signal(leaves: bool) -> signal.Signals:
    """What a process gets when its parent dies: a request to save and end, or, on a node that an elastic run can do
    without (`leaves`), an end at once, so that the rest forms a new group instead of ending with it."""
    return signal.SIGKILL if leaves else signal.SIGTERM


def end_with_parent(number: int | None = None) -> None:
    """Ask the kernel to send this process a signal when its parent dies, however it dies. Linux only; else nothing.

    Args:
        number: the signal; without it the one that the launcher chose, else SIGTERM.
    """
    if sys.platform == "linux":
        chosen = int(os.environ.get(DEATH_VARIABLE, signal.SIGTERM)) if number is None else number
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, chosen)
