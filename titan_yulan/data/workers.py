"""A function over many items in several processes, results in order."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from titan_yulan.errors import RunError

Item = TypeVar("Item")
Result = TypeVar("Result")


def default_workers() -> int:
    """The processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ordered_map(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int
) -> Generator[Result, None, None]:
    """`map` in `workers` processes; in this process when one is enough.

    Args:
        function: picklable (a top-level function, or a `functools.partial` of one).
        items: picklable.
        workers: number of processes.

    Raises:
        RunError: a worker died (killed, out of memory).
        Exception: what the function raised, for the first item that failed.
    """
    if min(workers, len(items)) <= 1:
        yield from map(function, items)
        return
    # Forking is fast, and safe only while no library of this process runs threads of its own.
    threaded = {"torch", "pyarrow", "datasets"} & sys.modules.keys()
    context = multiprocessing.get_context("spawn" if threaded else "fork")
    executor = ProcessPoolExecutor(min(workers, len(items)), mp_context=context, initializer=_end_with_parent)
    try:
        yield from executor.map(function, items)
    except BrokenProcessPool as error:
        raise RunError(
            "a worker process died, perhaps for lack of memory: run the same command again (it goes on where it "
            "stopped), with fewer workers if it happens again"
        ) from error
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _end_with_parent() -> None:
    """In a worker: end when the parent is gone, however it ended.

    A worker that outlived a killed parent would wait for work forever, and a forked one would hold the parent's locks.
    """
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            multiprocessing.connection.wait([parent.sentinel])
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
