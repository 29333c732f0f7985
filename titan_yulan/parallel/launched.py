"""What the launcher and the processes it starts agree on, without torch: the kind of device, and a common end."""

from __future__ import annotations

import ctypes
import signal
import sys

# Set by the launcher: the device ("cuda" or "cpu") that its plan and its memory check were made for.
DEVICE_VARIABLE = "TITAN_YULAN_DEVICE"

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent() -> None:
    """Ask the kernel to send this process SIGTERM when its parent dies, however it dies. Linux only; else nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
