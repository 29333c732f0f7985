"""The process group: start, agreement between ranks, and a clean end."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist

from titan_yulan.errors import UserError
from titan_yulan.parallel.launched import DEVICE_VARIABLE


@dataclass(frozen=True)
class World:
    """This process's place among all ranks. `host` is a gloo group for messages between the hosts' Python code."""

    rank: int
    size: int
    device: torch.device
    host: dist.ProcessGroup

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def agree(self, value: int) -> int:
        """The largest `value` of all ranks; never waits for the device."""
        tensor = torch.tensor(value)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.host)
        return int(tensor)


def start(timeout: timedelta = timedelta(minutes=30)) -> World:
    """Join the process group that torchrun describes in the environment, or make one of this process alone.

    Raises:
        UserError: the launcher's plan was made for another kind of device.
    """
    cuda = torch.cuda.is_available()
    planned = os.environ.get(DEVICE_VARIABLE)
    if planned is not None and (planned == "cuda") != cuda:
        why = "sees a GPU" if cuda else "cannot use the GPUs: is it a CPU build, or the driver too old?"
        raise UserError(
            f"the plan was made for {planned}, but this PyTorch ({torch.__version__}) {why}; install the PyTorch that "
            "fits the driver, or hide the GPUs (CUDA_VISIBLE_DEVICES=) to train on the CPU"
        )
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            store = dist.FileStore(os.path.join(tempfile.mkdtemp(), "store"), 1)
            dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    host = dist.new_group(backend="gloo", timeout=timeout)
    if not isinstance(host, dist.ProcessGroup):
        raise RuntimeError(f"rank {dist.get_rank()} is not in a group of all ranks")
    return World(dist.get_rank(), dist.get_world_size(), device, host)


def set_timeout(world: World, seconds: float) -> None:
    """Let collectives that begin from now on fail after `seconds`, in every group that this process is in.

    A new group has its backend's own limit, 10 minutes for NCCL, whatever `start` was given: call this after building
    a mesh. Longer than the watchdog's limits, so that stacks are written before a collective gives up.
    """
    groups = dist.distributed_c10d._world.pg_map  # as below: torch has nothing public for this up to 2.13
    for group in (*groups, world.host):
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def all_arrive(timeout: timedelta = timedelta(seconds=5)) -> bool:
    """Whether all ranks come to this point within the time; True if there is no group yet."""
    if not dist.is_initialized():
        return True
    try:
        group = dist.new_group(backend="gloo", timeout=timeout)  # of its own: others may be busy in the usual one
        if isinstance(group, dist.ProcessGroup):
            dist.monitored_barrier(group, timeout=timeout)
    except RuntimeError:
        return False
    return True


def leave() -> None:
    """Leave the process group after all ranks are done; only on a clean end (after an error others may be waiting in
    a collective, and joining them here would hang)."""
    dist.barrier()
    dist.destroy_process_group()
    # gloo's threads outlive the group while a DeviceMesh is alive; an interpreter that ends under them aborts
    # (pytorch issue 190489)
    time.sleep(0.15)


def exit_process(code: int) -> NoReturn:
    """End without Python's finalisation, which aborts at random when gloo's threads are alive (see `leave`)."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
