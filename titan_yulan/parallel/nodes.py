"""Is every rank as fast as the others? Asked before training (`check_nodes`) and during it (`StepTimes`).

In synchronous training every rank takes as long as the slowest, so the time of a whole step cannot tell whose fault it
is. What is compared is work that waits for nobody: the same matrix product on every rank's own device, and what a rank
does alone in a step.

The product is a Hadamard matrix (Sylvester's) with itself: its entries are +1 and -1 and the result is exactly n times
the identity in every precision and order of summation, so a device that computes wrongly is found as well.
"""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from titan_yulan.errors import RunError
from titan_yulan.parallel.process import World

_SLOW = 1.2  # times the median
# Processes that share a CPU with others differ by half from one moment to the next.
_SLOW_SHARED = 2.0
_MARGIN = 0.01  # seconds of a step: less than that is nothing to a run
_ROUNDS = 5  # the fastest of them counts: what disturbs for a moment is not what makes a device slow


@dataclass(frozen=True)
class _Rank:
    """What one rank found out about itself."""

    host: str
    seconds: float
    problem: str = ""


def check_nodes(world: World, say: Callable[[str], None]) -> None:
    """Time a matrix product on every rank and an all-reduce over all of them, and compare every rank with the median.

    A slow rank is named in a warning. An all-reduce is as slow on all ranks as its slowest link, so its time is told,
    and blamed only on a rank that took longer than the others. Collective.

    Args:
        say: prints a line, on the main rank alone.

    Raises:
        RunError: on every rank, naming the ranks and hosts that failed or computed something wrong.
    """
    products = _time_products(world, warm_up=20)
    exchanges = _gather(world, lambda: _time_all_reduce(world))
    hosts = len({rank.host for rank in products})
    size = _exchanged(world.device).nbytes / 2**20
    say(
        f"nodes: {world.size} rank(s) on {hosts} host(s), matrix product {_describe(products)}, all-reduce of "
        f"{size:.0f} MiB {_describe(exchanges)}"
    )
    for what, ranks in (("matrix product", products), ("all-reduce", exchanges)):
        if slow := _slower(ranks, _limit(world.device)):
            say(f"WARNING: slower than the median in a {what}: {slow}; every step waits for the slowest rank")


class StepTimes:
    """Each rank's own time, step by step; names the ranks that are slower than the median."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._total, self._steps = 0.0, 0

    def add(self, seconds: float) -> None:
        """Count a step.

        Args:
            seconds: what this rank spent alone, such as waiting for rows; time in collectives is the same on all ranks.
        """
        self._total += seconds
        self._steps += 1

    def report(self) -> str:
        """Ranks slower than the median by 20 % or more since the last report, in one line; "" if there are none.

        Compared are the mean of the added seconds, if it is 10 ms above, and a matrix product on
        every device, which takes some milliseconds now (on a CPU, where others compute as well, only twice the median
        counts). Collective over `world.host`: call it at the same steps on all ranks.

        Raises:
            RunError: on every rank, if a device computes something wrong.
        """
        mean = self._total / max(self._steps, 1)
        self._total, self._steps = 0.0, 0
        parts = []
        for what, ranks, limit, margin in (
            ("in its own part of a step", _gather(self._world, lambda: mean), _SLOW, _MARGIN),
            ("in a matrix product", _time_products(self._world), _limit(self._world.device), 0.0),
        ):
            if slow := _slower(ranks, limit, margin):
                parts.append(f"{what}: {slow}")
        return f"slower than the median {'; '.join(parts)}" if parts else ""


def _time_products(world: World, warm_up: int = 1) -> list[_Rank]:
    return _gather(world, lambda: time_product(world.device, warm_up))


def time_product(device: torch.device, warm_up: int = 1) -> float:
    """Seconds that one product of a Hadamard matrix with itself takes; the fastest of a few rounds.

    Args:
        warm_up: rounds before those that count.

    Raises:
        RuntimeError: the result is wrong, or the device reports an error.
    """
    size, repeats = (2048, 20) if device.type == "cuda" else (256, 2)
    matrix = _hadamard(size, device)  # (size, size)
    expected = size * torch.eye(size, dtype=matrix.dtype, device=device)
    fastest = float("inf")
    for number in range(warm_up + _ROUNDS):
        begin = _clock(device)
        result = _multiply(matrix, repeats)
        seconds = (_clock(device) - begin) / repeats
        if number >= warm_up:
            fastest = min(fastest, seconds)
        if not torch.equal(result, expected):
            raise RuntimeError("a matrix product has wrong entries: the device or its memory is broken")
    return fastest


def _multiply(matrix: Tensor, repeats: int) -> Tensor:
    result = matrix @ matrix
    for _ in range(repeats - 1):
        torch.matmul(matrix, matrix, out=result)
    return result


def _hadamard(size: int, device: torch.device) -> Tensor:
    """(size, size) of +1 and -1, symmetric, its rows orthogonal; `size` is a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32, device=device)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def _exchanged(device: torch.device) -> Tensor:
    return torch.ones((64 if device.type == "cuda" else 1) * 2**18, device=device)  # 64 or 1 MiB


def _time_all_reduce(world: World) -> float:
    """Seconds of the fastest of a few; the sum of ones must be the number of ranks."""
    fastest, right = float("inf"), True
    for number in range(1 + _ROUNDS):
        values = _exchanged(world.device)
        dist.barrier(group=world.host)
        begin = _clock(world.device)
        dist.all_reduce(values)
        seconds = _clock(world.device) - begin
        if number:  # the first one connects
            fastest = min(fastest, seconds)
        right = right and bool((values == world.size).all())
    if not right:  # told after the last round: the others are still in it
        raise RuntimeError("an all-reduce of ones does not give the number of ranks: a device or link is broken")
    return fastest


def _clock(device: torch.device) -> float:
    """Now, after everything that the device was given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _gather(world: World, measure: Callable[[], float]) -> list[_Rank]:
    """What `measure` gave on every rank.

    Raises:
        RunError: on every rank, if it failed on any.
    """
    try:
        mine = _Rank(socket.gethostname(), measure())
    except RuntimeError as error:
        mine = _Rank(socket.gethostname(), 0.0, str(error).strip().splitlines()[0])
    ranks = [mine] * world.size
    dist.all_gather_object(ranks, mine, group=world.host)
    failed = [f"rank {i} on {rank.host}: {rank.problem}" for i, rank in enumerate(ranks) if rank.problem]
    if failed:
        raise RunError(f"the check of the nodes failed on {'; '.join(failed)}. Leave such a node out and start again")
    return ranks


def _limit(device: torch.device) -> float:
    return _SLOW if device.type == "cuda" else _SLOW_SHARED


def _describe(ranks: Sequence[_Rank]) -> str:
    seconds = [rank.seconds for rank in ranks]
    median = statistics.median_low(seconds)
    return f"{1000 * median:.2f} ms (slowest {max(seconds) / median:.2f} x)"


def _slower(ranks: Sequence[_Rank], limit: float, margin: float = 0.0) -> str:
    """The ranks that took `limit` times the median or more, and `margin` seconds more; the slowest first."""
    median = statistics.median_low(rank.seconds for rank in ranks)  # of two ranks the faster one
    slow = [i for i, rank in enumerate(ranks) if rank.seconds >= limit * median and rank.seconds > median + margin]
    slow.sort(key=lambda i: -ranks[i].seconds)
    return ", ".join(
        f"rank {i} on {ranks[i].host} ({1000 * ranks[i].seconds:.2f} ms, median {1000 * median:.2f} ms)" for i in slow
    )
