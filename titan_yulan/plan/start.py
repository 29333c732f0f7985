"""How many processes on how many nodes, and the torchrun command and environment that start them on one node."""

from __future__ import annotations

import math
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from titan_yulan.config.sections import RecoverySection
from titan_yulan.errors import UserError
from titan_yulan.parallel.launched import (
    DEATH_VARIABLE,
    DEVICE_VARIABLE,
    STARTED_VARIABLE,
    WORKERS_VARIABLE,
    death_signal,
    workers_lock,
)
from titan_yulan.plan.memory import Machine

# What torchrun (2.12 or newer; before, it is 30) gives its workers to save and end when it is signalled itself, beyond
# the longest stretch in which they may not look.
_SHUTDOWN_MARGIN = 60
# A node counts as lost when it has not been heard of for 5 s; a group that has its least number of nodes waits 3 s for
# more. torchrun's own settings take three quarters of a minute. Nodes may start 300 s before the one that hosts the
# rendezvous, and wait 600 s for each other.
_RENDEZVOUS = "join_timeout=600,last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=5,read_timeout=300"


@dataclass(frozen=True)
class Launch:
    """How many processes on how many nodes; from the environment of `run_train.sh`."""

    processes: int
    min_nodes: int
    max_nodes: int
    node_rank: int
    endpoint: str
    max_restarts: int
    log_rank: str

    @classmethod
    def from_environment(cls, machine: Machine) -> Launch:
        """NPROC (default: the GPUs, else 2), NNODES, NODE_RANK, RDZV_ENDPOINT, MAX_RESTARTS, LOG_RANK.

        Raises:
            UserError: a variable is not what it should be.
        """
        nodes = os.environ.get("NNODES", "1")
        endpoint = os.environ.get("RDZV_ENDPOINT", "")
        found = re.fullmatch(r"([1-9]\d*)(?::([1-9]\d*))?", nodes)
        least, most = (int(found[1]), int(found[2] or found[1])) if found else (0, -1)
        if most < least:
            raise UserError(f"NNODES={nodes}: write a number, or MIN:MAX for an elastic run")
        if most > 1 and not endpoint:
            raise UserError(f"NNODES={nodes} needs RDZV_ENDPOINT=HOST:PORT, the same on every node")
        return cls(
            processes=_whole_number("NPROC", machine.accelerators or 2, 1),
            min_nodes=least,
            max_nodes=most,
            node_rank=_whole_number("NODE_RANK", 0, 0),
            endpoint=endpoint,
            # a node that is lost costs a restart, and a run of weeks on preemptible nodes loses many
            max_restarts=_whole_number("MAX_RESTARTS", 100 if least < most else 3, 0),
            log_rank=os.environ.get("LOG_RANK", "0"),
        )

    @property
    def world(self) -> int:
        """Ranks with the smallest allowed number of nodes."""
        return self.processes * self.min_nodes

    @property
    def elastic(self) -> bool:
        """Whether the run goes on when nodes leave or join."""
        return self.min_nodes < self.max_nodes

    @property
    def hosts(self) -> bool:
        """Whether this node hosts the rendezvous; it speaks for the run, and the run does not outlive it."""
        return self.node_rank == 0

    @property
    def nodes(self) -> str:
        return f"{self.min_nodes}:{self.max_nodes}" if self.elastic else str(self.min_nodes)


def _whole_number(name: str, default: int, least: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdigit() or int(text) < least:
        raise UserError(f"{name}={text}: write a whole number, at least {least}")
    return int(text)


def torchrun_command(
    start: Launch, name: str, resolved: Path, folder: Path, allow_changes: Sequence[str], debug: bool
) -> list[str]:
    """The command line of one node: torchrun with an agent of ours, which writes the run's events."""
    command = [sys.executable, "-m", "titan_yulan.monitor.agent", str(folder), f"--nproc-per-node={start.processes}"]
    if start.max_nodes == 1:
        command += ["--standalone"]
    else:
        command += [
            f"--nnodes={start.nodes}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={start.endpoint}",
            f"--rdzv-id={name}",
            f"--rdzv-conf=is_host={'true' if start.hosts else 'false'},{_RENDEZVOUS}",
        ]
    command += [
        f"--max-restarts={start.max_restarts}",
        "--monitor-interval=0.2",
        f"--log-dir={folder / 'logs'}",
        "--tee=3",
        f"--local-ranks-filter={start.log_rank}",
        "--module",
        "titan_yulan.train",
        f"--config={resolved}",
    ]
    command += [f"--allow-change={key}" for key in allow_changes]
    return command + (["--debug"] if debug else [])


def shutdown_seconds(recovery: RecoverySection) -> int:
    """How long workers that were told to end may take: what lasts longer without progress, their watchdog has ended."""
    return math.ceil(max(recovery.first_step_timeout, recovery.step_timeout)) + _SHUTDOWN_MARGIN


def worker_environment(
    start: Launch, machine: Machine, recovery: RecoverySection, folder: Path, given: Mapping[str, str]
) -> dict[str, str]:
    """The environment of torchrun and its workers: `given`, with defaults below it and our own above it."""
    # memory in segments that can grow, or phases of several shapes leave holes that nothing fits into; the other name
    # is the setting's older one
    allocator = {} if "PYTORCH_CUDA_ALLOC_CONF" in given else {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    defaults = {
        **(allocator if machine.accelerators else {}),
        "OMP_NUM_THREADS": str(max(1, machine.cores // start.processes)),
        # an NCCL error or time-out ends the process without the clean-up, which itself can hang
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
        # the last collectives of every rank, for the report of a hang
        "TORCH_FR_BUFFER_SIZE": "2000",
    }
    ours = {
        "PYTHONUNBUFFERED": "1",
        DEVICE_VARIABLE: "cuda" if machine.accelerators else "cpu",
        STARTED_VARIABLE: str(time.time()),
        DEATH_VARIABLE: str(int(death_signal(start.elastic and not start.hosts))),
        WORKERS_VARIABLE: str(workers_lock(folder, start.node_rank)),
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(shutdown_seconds(recovery)),
        # every restart gets a fresh store: in a shared one, ranks find the addresses of the ranks before the restart
        # and hang when they connect (pytorch issue 135712)
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        # an empty template would mean torchrun's own, longer one
        "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": " " if start.log_rank.isdigit() else "[rank ${rank}] ",
    }
    return {**defaults, **given, **ours}
