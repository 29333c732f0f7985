"""An elastic run of two agents: one is lost with signal 9, the other goes on alone, a new one joins.

    python -m tests.end_to_end.elastic OUTPUT_DIR

trains the small configuration that way and undisturbed, compares the rows of every step, and prints how long the group
was without a step. The same is part of the test suite (`test_elastic.py`).
"""

from __future__ import annotations

import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tests.end_to_end import harness
from titan_yulan.monitor.events import read_events

_PATIENCE = 60  # seconds without a line of output that end a test


@dataclass(frozen=True)
class Line:
    """A line of an agent's output, and when it came."""

    agent: int
    seconds: float
    text: str


class Agents:
    """Launchers of one elastic run on this machine, a process each, and their output in the order of its coming."""

    def __init__(self, config: Path, nodes: str = "1:2") -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._command = [sys.executable, "-m", "titan_yulan.cli", "train", "--config", str(config)]
        self._environment = {
            **os.environ,
            "NNODES": nodes,
            "NPROC": "1",
            "RDZV_ENDPOINT": f"127.0.0.1:{port}",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        self._coming: queue.Queue[Line] = queue.Queue()
        self._processes: dict[int, subprocess.Popen[str]] = {}
        self.lines: list[Line] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for agent in self._processes:
            self.lose(agent)

    def start(self, agent: int) -> None:
        process = subprocess.Popen(
            self._command,
            cwd=harness.ROOT,
            env={**self._environment, "NODE_RANK": str(agent)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._processes[agent] = process
        threading.Thread(target=self._read, args=(agent, process), daemon=True).start()

    def _read(self, agent: int, process: subprocess.Popen[str]) -> None:
        for text in process.stdout or ():
            self._coming.put(Line(agent, time.monotonic(), text))

    def wait_for(self, pattern: str) -> Line:
        """The next line of any agent in which the regular expression `pattern` is found.

        Raises:
            AssertionError: it does not come; with all output.
        """
        while True:
            try:
                line = self._coming.get(timeout=_PATIENCE)
            except queue.Empty:
                raise AssertionError(f"{pattern!r} did not come:\n{self.output}") from None
            self.lines.append(line)
            if re.search(pattern, line.text):
                return line

    def torchrun(self, agent: int) -> int:
        (pid,) = harness.children(self._processes[agent].pid)
        return pid

    def worker(self, agent: int) -> int:
        (pid,) = harness.children(self.torchrun(agent))
        return pid

    def lose(self, agent: int) -> None:
        """What is left when a machine is lost: nothing. Torchrun first; its worker is for the kernel to end."""
        process = self._processes[agent]
        if process.poll() is None:
            for pid in (*harness.children(process.pid), process.pid):
                os.kill(pid, signal.SIGKILL)
        process.wait()

    def end(self, agent: int) -> int:
        """The exit code, when it is over."""
        return self._processes[agent].wait(_PATIENCE)

    @property
    def output(self) -> str:
        return "".join(f"[agent {line.agent}] {line.text}" for line in self.lines)


@dataclass(frozen=True)
class Report:
    """What became of the run."""

    codes: tuple[int, int]
    worlds: list[int]
    seconds_after_loss: float
    seconds_after_joining: float
    output: str


def lose_one_and_let_one_join(config: Path, run: Path) -> Report:
    """Two agents; the second is lost after step 12; after step 20 a new one joins; the run ends."""
    with Agents(config) as agents:
        agents.start(0)
        agents.start(1)
        agents.wait_for("step 12/")
        lost = time.monotonic()
        agents.lose(1)
        agents.wait_for(r"group of 1 rank")
        alone = agents.wait_for(r"step \d+/")
        agents.wait_for("step 20/")
        # so that the run does not end while the new agent is starting
        worker = agents.worker(0)
        os.kill(worker, signal.SIGSTOP)
        agents.start(1)
        joining = agents.wait_for("nodes have come")
        os.kill(worker, signal.SIGCONT)
        agents.wait_for(r"group of 2 rank")
        together = agents.wait_for(r"step \d+/")
        codes = agents.end(0), agents.end(1)
        worlds = [event["world"] for event in read_events(run) if event["event"] == "group"]
        return Report(codes, worlds, alone.seconds - lost, together.seconds - joining.seconds, agents.output)


def main(output: Path) -> int:
    """Run both; returns 0 if the rows of all steps are equal."""
    run = output / "small"
    output.mkdir(parents=True, exist_ok=True)
    report = lose_one_and_let_one_join(harness.write_small_config(output, output / "data", output), run)
    (output / "undisturbed").mkdir(exist_ok=True)
    undisturbed = harness.write_small_config(output / "undisturbed", output / "data", output / "undisturbed")
    harness.train(undisturbed, 2)
    rows, expected = (
        harness.column(harness.metrics(folder), "batch_fingerprint")
        for folder in (run, output / "undisturbed" / "small")
    )
    print(f"exit codes {report.codes}, ranks of the groups {report.worlds}")
    print(f"{report.seconds_after_loss:.1f} s from the loss of an agent to the next step")
    print(f"{report.seconds_after_joining:.1f} s from the arrival of an agent to the next step")
    print(f"{len(rows)} steps, fingerprints {'equal' if rows == expected else 'DIFFER'}")
    return int(rows != expected or report.codes != (0, 0))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
