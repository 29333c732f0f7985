"""Processes that hang in every way the watchdog is there for; `python -m tests.monitor.hanging FOLDER` runs them all at
once and prints {scenario: exit codes of its ranks} as JSON. Each scenario has a run folder of its own below FOLDER."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from titan_yulan.monitor import watchdog
from titan_yulan.monitor.watchdog import Watchdog

LONG = 600.0


def wait_for_lock() -> None:
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def wait_for_peer() -> None:
    with contextlib.suppress(RuntimeError):  # the peer has ended: this process must be about to end by itself
        dist.all_reduce(torch.ones(1))
    wait_for_lock()


def join(folder: Path, rank: int) -> None:
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))


def stay_away(folder: Path, rank: int) -> None:
    """Rank 0 waits in a collective for rank 1, which waits for a lock that nobody gives back. Not the first hang."""
    join(folder, rank)
    (folder / watchdog.HANGS / "3").mkdir(parents=True, exist_ok=True)
    dist.barrier()
    vars(torch._C._distributed_c10d)["_dump_nccl_trace"] = lambda: b"of rank %d" % rank  # CPU builds have none
    watch = Watchdog(folder, rank, first=1.0, steady=LONG)
    watch.start()
    watch.beat("step 7")
    wait_for_lock() if rank else wait_for_peer()


def follow(folder: Path, rank: int) -> None:
    """Only rank 0's limit can pass; rank 1 has to learn of it. There is no recorder of collectives, as on the CPU."""
    join(folder, rank)
    watch = Watchdog(folder, rank, first=LONG if rank else 1.0, steady=1.0)
    watch.start()
    wait_for_lock() if rank else wait_for_peer()


def beat_for_long(folder: Path, rank: int) -> None:
    """Beats for three limits, then no more."""
    watch = Watchdog(folder, rank, first=1.0, steady=LONG)
    watch.start()
    end = time.monotonic() + 3
    while time.monotonic() < end:
        watch.beat("alive")
    watch.beat("stuck")
    wait_for_lock()


def be_patient(folder: Path, rank: int) -> None:
    """Three steady limits long within `patient`; then the steady limit holds again."""
    watch = Watchdog(folder, rank, first=LONG, steady=0.8)
    watch.start()
    watch.settle()
    with watch.patient("saving"):
        threading.Event().wait(2.4)
    wait_for_lock()


def stop_watching(folder: Path, rank: int) -> None:
    watch = Watchdog(folder, rank, first=0.5, steady=0.5)
    watch.start()
    watch.stop()
    threading.Event().wait(1.5)


def hold_interpreter(folder: Path, rank: int) -> None:
    """Waits in C with the interpreter's lock held: no other Python thread can run."""
    watchdog._GRACE = 1.0
    watch = Watchdog(folder, rank, first=1.0, steady=LONG)
    watch.start()
    threading.Event().wait(0.3)
    ctypes.PyDLL(None).sleep(30)


def fill_disk(folder: Path, rank: int) -> None:
    """Nothing can be written below `hangs`."""
    (folder / watchdog.HANGS).touch()
    watch = Watchdog(folder, rank, first=0.5, steady=LONG)
    watch.start()
    wait_for_lock()


SCENARIOS: dict[Callable[[Path, int], None], int] = {
    stay_away: 2,
    follow: 2,
    beat_for_long: 1,
    be_patient: 1,
    stop_watching: 1,
    hold_interpreter: 1,
    fill_disk: 1,
}


def child(scenario: Callable[[Path, int], None], folder: Path, rank: int) -> int:
    """The process number of a fork that goes through the scenario, with its standard error in `stderr-RANK`."""
    if number := os.fork():
        return number
    with open(folder / f"stderr-{rank}", "wb") as file:
        os.dup2(file.fileno(), 2)
    try:
        scenario(folder, rank)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    os._exit(99)


def main(root: Path) -> None:
    numbers = {}
    for scenario, ranks in SCENARIOS.items():
        folder = root / scenario.__name__
        folder.mkdir()
        numbers[scenario.__name__] = [child(scenario, folder, rank) for rank in range(ranks)]
    codes: dict[str, list[int]] = {name: [] for name in numbers}
    for name, children in numbers.items():
        for number in children:
            codes[name].append(os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]))
    print(json.dumps(codes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
