"""Runs one body on several gloo processes of this machine."""

from __future__ import annotations

import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.multiprocessing

from titan_yulan.parallel import process


def run_ranks(function: Callable[..., Any], world: int, *arguments: Any, limit: float = 100) -> list[Any]:
    """What `function(world: World, *arguments)` returned on each of `world` ranks.

    Args:
        function: of a module (the processes import it); may return anything that torch can save.
        limit: seconds after which the processes are killed.

    Raises:
        AssertionError: with the traceback of every rank that raised, or the names of those that hung.
    """
    context = torch.multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        variables = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # gloo ranks, also where there is a GPU
        before = {name: os.environ.get(name) for name in variables}
        os.environ.update(variables)
        try:
            ranks = [
                context.Process(target=_run, args=(function, rank, world, folder, arguments), daemon=True)
                for rank in range(world)
            ]
            for rank in ranks:
                rank.start()
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
        hung = _join(ranks, limit)
        problems = [f"rank {i} hung and was killed" for i in hung]
        for i, rank in enumerate(ranks):
            error = Path(folder, f"{i}.error")
            if error.exists():
                problems.append(f"rank {i} of {world}:\n{error.read_text()}")
            elif i not in hung and rank.exitcode != 0:
                problems.append(f"rank {i} ended with code {rank.exitcode}")
        if problems:
            raise AssertionError("\n".join(problems))
        return [torch.load(Path(folder, f"{rank}.result"), weights_only=False) for rank in range(world)]


def _join(ranks: list[Any], limit: float) -> list[int]:
    """Wait for the processes; after the first failure the others, which may wait for it, have 5 seconds more."""
    end = time.monotonic() + limit
    while running := [rank for rank in ranks if rank.is_alive()]:
        if any(rank.exitcode for rank in ranks):
            end = min(end, time.monotonic() + 5)
        if time.monotonic() > end:
            break
        wait([rank.sentinel for rank in running], timeout=max(0.0, min(1.0, end - time.monotonic())))
    hung = [i for i, rank in enumerate(ranks) if rank.is_alive()]
    for i in hung:
        ranks[i].kill()
    for rank in ranks:
        rank.join()
    return hung


def _run(function: Callable[..., Any], rank: int, world: int, folder: str, arguments: tuple) -> NoReturn:
    code = 1
    try:
        torch.set_num_threads(1)
        store = dist.FileStore(os.path.join(folder, "store"), world)
        timeout = timedelta(seconds=60)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timeout)
        torch.save(function(process.start(timeout), *arguments), Path(folder, f"{rank}.result"))
        process.leave()
        code = 0
    except BaseException:
        Path(folder, f"{rank}.error").write_text(traceback.format_exc())
    process.exit_process(code)
