"""Saving while training goes on: a copy in the host's memory, written by a thread with a process group of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from titan_yulan.checkpoint import store
from titan_yulan.checkpoint.layout import TrainerState
from titan_yulan.config.sections import CheckpointSection
from titan_yulan.parallel.process import World


class Saver:
    """Writes a run's checkpoints, one at a time. All ranks make one, and call `save` and `join` alike.

    With `[checkpoint] asynchronous`, `save` returns when the tensors are copied (on CUDA: when the copies are queued
    before whatever comes next in the current stream); the rest is `store.save` in a thread. The thread's messages go
    through a gloo group of their own: in a shared one they would meet the training's. Until `join`, nobody may rely on
    the checkpoint, nor look for the newest one.
    """

    def __init__(self, folder: Path, world: World, section: CheckpointSection, report: Callable[[str], None]) -> None:
        """Collective.

        Args:
            folder: the run's `checkpoints` folder.
            report: gets a line about every checkpoint that was written; is called in the thread.
        """
        group = dist.new_group(backend="gloo")
        if not isinstance(group, dist.ProcessGroup):
            raise RuntimeError(f"rank {world.rank} is not in a group of all ranks")
        self._world = replace(world, host=group)
        self._folder, self._section, self._report = folder, section, report
        self._copies: dict[str, dict[str, Tensor]] = {}
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    @property
    def in_flight(self) -> bool:
        """Whether this rank is still writing; may differ between ranks, so no collective may depend on it."""
        return self._thread is not None and self._thread.is_alive()

    def save(
        self,
        tensors: dict[str, dict[str, Tensor]],
        state: TrainerState,
        config_toml: str,
        losses: Mapping[int, float] | None = None,
    ) -> None:
        """Save `tensors` (section, name) as they are now, after the save before is finished.

        Args:
            losses: see `layout.prune`.

        Raises:
            RunError: on every rank; the save before failed (or this one, if it is not asynchronous).
        """
        begin = time.perf_counter()
        self.join()
        if not self._section.asynchronous:
            self._write(tensors, state, config_toml, losses, None, begin)
            return
        self._copies = _stage(tensors, self._copies)
        staged = None
        if self._world.device.type == "cuda":
            staged = torch.cuda.Event()
            staged.record()
        arguments = (self._copies, state, config_toml, losses, staged, begin)
        # no daemon: an interpreter that ends waits for it
        self._thread = threading.Thread(target=self._run, args=arguments, name="checkpoint")
        self._thread.start()

    def join(self) -> None:
        """Wait for the save in flight, if there is one.

        Raises:
            RunError: on every rank with the same message, if any rank could not write; it is told once.
        """
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _run(self, *arguments: Any) -> None:
        try:
            if self._world.device.type == "cuda":
                torch.cuda.set_device(self._world.device)  # a new thread begins with the first device
            self._write(*arguments)
        except BaseException as error:
            self._failure = error

    def _write(
        self,
        tensors: dict[str, dict[str, Tensor]],
        state: TrainerState,
        config_toml: str,
        losses: Mapping[int, float] | None,
        staged: torch.cuda.Event | None,
        begin: float,
    ) -> None:
        blocked = time.perf_counter() - begin
        if staged is not None:
            staged.synchronize()
        keep = self._section.keep
        path = store.save(self._folder, tensors, state, config_toml, self._world, keep, losses)
        seconds = time.perf_counter() - begin
        blocked = blocked if self._section.asynchronous else seconds
        self._report(f"saved {path}: {seconds:.1f} s, of which training waited {blocked:.1f} s")


@torch.no_grad()
def _stage(tensors: dict[str, dict[str, Tensor]], copies: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Copies of all tensors in the host's memory, laid out alike; memory of former `copies` that fit is used again."""
    staged: dict[str, dict[str, Tensor]] = {}
    for section, content in tensors.items():
        former = copies.get(section, {})
        staged[section] = {}
        for name, tensor in content.items():
            copy = former.get(name)
            if copy is None or not _fits(copy, tensor):
                copy = torch.empty_like(tensor.detach(), device="cpu", pin_memory=tensor.is_cuda)
            _local(copy).copy_(_local(tensor), non_blocking=True)
            staged[section][name] = copy
    return staged


def _fits(copy: Tensor, tensor: Tensor) -> bool:
    if isinstance(copy, DTensor) and isinstance(tensor, DTensor):
        if copy.device_mesh != tensor.device_mesh or copy.placements != tensor.placements:
            return False
    elif isinstance(copy, DTensor) or isinstance(tensor, DTensor):
        return False
    return copy.shape == tensor.shape and copy.dtype == tensor.dtype and _local(copy).is_pinned() == tensor.is_cuda


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
