"""The run folder at the start of a run's processes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from titan_yulan.checkpoint.layout import remove_leftovers
from titan_yulan.monitor.metrics import write_status
from titan_yulan.parallel.launched import DEVICE_VARIABLE, STOP_FILE


def enter_run_folder(folder: Path, say: Callable[[str], None]) -> None:
    """Make it, say that the run is running, and take away what an earlier start has left; on the main rank alone."""
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    if DEVICE_VARIABLE not in os.environ:
        (folder / STOP_FILE).unlink(missing_ok=True)  # the launcher has done that before it could be asked
    write_status(folder, "running", 1)
    for leftover in remove_leftovers(folder / "checkpoints"):
        say(f"removed {leftover}: a save that did not finish")
