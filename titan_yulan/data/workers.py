"""A function over many items in several processes, results in order."""

from __future__ import annotations

import itertools
import multiprocessing
import multiprocessing.connection
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from titan_yulan.errors import RunError

Item = TypeVar("Item")
Result = TypeVar("Result")

_AHEAD = 1000  # items handed out before the first of them is done: memory does not grow with the number of items
_function: Callable[[Any], Any]  # in a worker: what it does with each item


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
    # The function goes to each worker once, not with each item: it may hold a vocabulary of megabytes.
    executor = ProcessPoolExecutor(
        min(workers, len(items)), mp_context=context, initializer=_start_worker, initargs=(function,)
    )
    waiting: deque[Future[Result]] = deque()
    rest = iter(items)
    try:
        while True:
            waiting.extend(executor.submit(_call, item) for item in itertools.islice(rest, _AHEAD - len(waiting)))
            if not waiting:
                return
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise RunError(
            "a worker process died, perhaps for lack of memory: run the same command again (it goes on where it "
            "stopped), with fewer workers if it happens again"
        ) from error
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _start_worker(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function
    _end_with_parent()


def _call(item: Any) -> Any:
    return _function(item)


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
