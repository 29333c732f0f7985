"""torchrun with a memory: groups that form, workers that fail and why, are printed and go to `events.jsonl`.

    python -m titan_yulan.monitor.agent RUN_FOLDER TORCHRUN_ARGUMENTS

torchrun keeps to itself who failed until it gives up. Its agent is made to be subclassed, and the methods that are
extended here (of `torch.distributed.elastic.agent.server.SimpleElasticAgent`) are the same from torch 2.11 to 2.13.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch.distributed import run as torchrun
from torch.distributed.elastic.agent.server import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.launcher import api

from titan_yulan.monitor.events import append_event
from titan_yulan.monitor.metrics import read_status, write_status
from titan_yulan.parallel.launched import AGENT_VARIABLE

_IN_VAIN = 5
_SAVE_SECONDS = 120  # for workers that are told to end; no more, for one of them may wait for a dead peer
_SYNC_SECONDS = 1.1  # an agent's view of the rendezvous is never older (torch keeps it for 1 s)
# the line of a traceback that names the exception (torch puts the rank before it), or what C++ says instead
_EXCEPTION = re.compile(r"^(?:\[rank\d+\]:\s*)?((?:\w+\.)*[A-Z]\w*(?:Error|Exception|Interrupt)\b.*|\s*what\(\):.*)$")


class ReportingAgent(LocalElasticAgent):
    """Starts, watches and restarts the workers of one node, and says so."""

    folder = Path()  # of the run
    _progress, _futile = -1, 0

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        super()._rendezvous(worker_group)
        store, node, nodes = worker_group.store, worker_group.group_rank, worker_group.group_world_size
        if store is None or node is None or nodes is None:
            raise RuntimeError("torchrun's rendezvous ended without a group")
        store.set(f"titan_yulan/host/{node}", socket.gethostname())
        if node == 0:  # one for all; torch's own exchange of ranks, just before, waits for the others likewise
            hosts = [store.get(f"titan_yulan/host/{i}").decode() for i in range(nodes)]
            world = worker_group.workers[0].world_size
            restarts = worker_group.spec.max_restarts - self._remaining_restarts
            if restarts or nodes > 1:
                print(
                    f"group of {world} rank(s) on {nodes} node(s): {', '.join(hosts)}; restart {restarts}", flush=True
                )
            _record(self.folder, "group", world=world, nodes=nodes, hosts=hosts, restarts=restarts)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if result.failures:
            self._report(list(result.failures.values()), worker_group)
        if result.state == WorkerState.SUCCEEDED and (worker_group.group_world_size or 1) > 1:
            # A node that joins makes every agent end its workers, which save and end well. If those of another agent
            # were told first, ours have ended with them, and the run is not over.
            time.sleep(_SYNC_SECONDS)
            if worker_group.spec.rdzv_handler.num_nodes_waiting() > 0:
                return RunResult(state=WorkerState.HEALTHY)
        return result

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        if worker_group.state == WorkerState.HEALTHY:
            _record(self.folder, "nodes join", node=worker_group.group_rank)
            print("nodes have come or come back: the group forms anew", flush=True)
            self._stop_workers(worker_group)
            if read_status(self.folder).get("state") == "stopped":
                # "stopped" would send a group that never begins around for ever
                write_status(self.folder, "starting", 1)
        super()._restart_workers(worker_group)

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        # torchrun itself gives workers 30 seconds to save when nodes join, whatever its shutdown time-out
        if self._pcontext:
            self._pcontext.close(signal.SIGTERM, _SAVE_SECONDS)
        super()._stop_workers(worker_group)

    def _report(self, failures: list[ProcessFailure], worker_group: WorkerGroup) -> None:
        # those that torchrun itself ended after the first failure tell nothing
        told = [failure for failure in failures if failure.exitcode != -signal.SIGTERM] or failures
        workers = []
        for failure in sorted(told, key=lambda failure: failure.local_rank):
            rank = worker_group.workers[failure.local_rank].global_rank
            why = explain(failure.exitcode, self._stderr(failure.local_rank))
            workers.append({"rank": rank, "pid": failure.pid, "reason": why})
            print(f"rank {rank} on {socket.gethostname()} failed: {why}", flush=True)
        if self._failed_in_vain():
            print(f"{_IN_VAIN} failures in a row without a new step: no more restarts", flush=True)
            self._remaining_restarts = 0
        print(f"{self._remaining_restarts} restart(s) left", flush=True)
        _record(self.folder, "failure", workers=workers, restarts_left=self._remaining_restarts)

    def _failed_in_vain(self) -> bool:
        """Whether the run came no further than at the failures before; an elastic run has so many restarts that a
        failure which comes every time would keep its machines for hours."""
        step = last_step(self.folder / "metrics.jsonl")
        self._futile = 1 if step > self._progress else self._futile + 1
        self._progress = max(step, self._progress)
        return self._futile >= _IN_VAIN

    def _stderr(self, local_rank: int) -> Path:
        return Path(self._pcontext.stderrs[local_rank]) if self._pcontext else Path(os.devnull)


def _record(folder: Path, kind: str, **details: Any) -> None:
    """An event, where there is room for it: a full disk must not end the agent, which has printed the same."""
    with suppress(OSError):
        append_event(folder, kind, **details)


def last_step(record: Path) -> int:
    """Of `metrics.jsonl`, the step of the last complete line; 0 if there is none."""
    for line in reversed(_tail(record).split("\n")[:-1]):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue
    return 0


def explain(exit_code: int, stderr: Path) -> str:
    """Why a worker ended, in a line.

    Args:
        exit_code: of the process; negative: the signal that ended it.
        stderr: what it wrote; the last exception in it is the reason, if there is one.
    """
    try:
        how = f"signal {signal.Signals(-exit_code).name}" if exit_code < 0 else f"exit code {exit_code}"
    except ValueError:
        how = f"signal {-exit_code}"
    if exit_code == -signal.SIGKILL:
        return f"{how} (killed from outside; perhaps the machine had no memory left)"
    lines = _tail(stderr).splitlines()
    found = next((match[1].strip() for line in reversed(lines) if (match := _EXCEPTION.match(line))), "")
    return f"{found[:300]} ({how})" if found else how


def _tail(path: Path, size: int = 2**16) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - size))
            return file.read(size).decode(errors="replace")
    except OSError:
        return ""


def main() -> None:
    """Run torchrun with our agent in the place of its own."""
    folder, *arguments = sys.argv[1:]
    os.environ[AGENT_VARIABLE] = str(os.getpid())
    ReportingAgent.folder = Path(folder)
    api.LocalElasticAgent = ReportingAgent
    try:
        torchrun.main(arguments)
    except RendezvousError as error:
        reason = f"{type(error).__name__}: {error}"
        _record(Path(folder), "no group", reason=reason)
        sys.exit(
            f"ERROR: no group of nodes could form: the node with NODE_RANK=0, which hosts the rendezvous, is gone or "
            f"cannot be reached, or too few nodes came in time ({reason})"
        )


if __name__ == "__main__":
    main()
