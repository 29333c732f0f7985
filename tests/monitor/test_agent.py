"""torchrun with our agent on toy workers: who failed and why is printed and written down."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed.elastic.agent.server import RunResult, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from titan_yulan.monitor import agent
from titan_yulan.monitor.agent import ReportingAgent, explain, last_step
from titan_yulan.monitor.events import read_events

# attempt 0: rank 1 raises; attempt 1: rank 0 is killed; attempt 2: both end well
_WORKER = """
import os, signal, sys
attempt, rank = os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]
if attempt == "0" and rank == "1":
    print("a warning after which nothing bad happens", file=sys.stderr)
    raise ValueError("rows 3\\nand 4 are wrong")
if attempt == "1" and rank == "0":
    os.kill(os.getpid(), signal.SIGKILL)
if attempt < "2":
    signal.pause()
"""


def torchrun(
    folder: Path, worker: str, restarts: int, processes: int, *rendezvous: str
) -> subprocess.CompletedProcess[str]:
    script = folder / "worker.py"
    script.write_text(worker)
    arguments = [
        *(rendezvous or ["--standalone"]),
        f"--nproc-per-node={processes}",
        f"--max-restarts={restarts}",
        "--monitor-interval=0.1",
    ]
    command = [sys.executable, "-m", "titan_yulan.monitor.agent", folder, *arguments, f"--log-dir={folder}", "--tee=3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return subprocess.run([*command, script], env=environment, capture_output=True, text=True, timeout=60)


def test_groups_and_failures_are_told_and_written_down(tmp_path) -> None:
    result = torchrun(tmp_path, _WORKER, restarts=3, processes=2)
    assert result.returncode == 0, result.stderr
    events = read_events(tmp_path)
    assert [event["event"] for event in events] == ["group", "failure", "group", "failure", "group"]
    assert [(event["world"], event["nodes"], event["restarts"]) for event in events[::2]] == [
        (2, 1, i) for i in range(3)
    ]
    reasons = [[(worker["rank"], worker["reason"]) for worker in event["workers"]] for event in events[1::2]]
    assert reasons[0] == [(1, "ValueError: rows 3 (exit code 1)")]
    assert reasons[1] == [(0, "signal SIGKILL (killed from outside; perhaps the machine had no memory left)")]
    assert "failed: ValueError: rows 3 (exit code 1)" in result.stdout
    assert events[1]["restarts_left"] == 3


def test_a_failure_that_comes_every_time_uses_up_no_hundred_restarts(tmp_path) -> None:
    result = torchrun(tmp_path, "raise SystemExit(3)", restarts=100, processes=1)
    assert result.returncode == 1
    failures = [event for event in read_events(tmp_path) if event["event"] == "failure"]
    assert [event["workers"][0]["reason"] for event in failures] == ["exit code 3"] * 5
    assert failures[-1]["restarts_left"] == 0
    assert "5 failures in a row without a new step" in result.stdout


def test_a_host_that_is_not_there_is_named_in_a_line(tmp_path) -> None:
    with socket.socket() as probe:  # a port where nobody answers
        probe.bind(("127.0.0.1", 0))
        endpoint = f"--rdzv-endpoint=127.0.0.1:{probe.getsockname()[1]}"
        settings = ("--nnodes=1:2", "--rdzv-backend=c10d", endpoint, "--rdzv-conf=is_host=false,read_timeout=1")
        result = torchrun(tmp_path, "", 0, 1, *settings)
    assert result.returncode == 1
    assert "ERROR: no group of nodes could form: the node with NODE_RANK=0" in result.stderr
    assert [event["event"] for event in read_events(tmp_path)] == ["no group"]


@pytest.mark.parametrize(
    ("exit_code", "stderr", "reason"),
    [
        (1, "Traceback\n  File\nValueError: no\n", "ValueError: no (exit code 1)"),
        (
            1,
            "[rank3]: torch.OutOfMemoryError: CUDA out\nsome warning\n",
            "torch.OutOfMemoryError: CUDA out (exit code 1)",
        ),
        (1, "ValueError: first\nduring that:\nKeyError: 'x'\n", "KeyError: 'x' (exit code 1)"),
        (-6, "terminate called\n  what():  NCCL error\n", "what():  NCCL error (signal SIGABRT)"),
        (-11, "nothing of use\n", "signal SIGSEGV"),
        (-64, "", "signal SIGRTMAX"),
        (-200, "", "signal 200"),
        (
            -9,
            "ValueError: of another time\n",
            "signal SIGKILL (killed from outside; perhaps the machine had no memory left)",
        ),
        (2, "", "exit code 2"),
        (
            1,
            "x" * 100_000 + "\nRuntimeError: at the end of a long file",
            "RuntimeError: at the end of a long file (exit code 1)",
        ),
    ],
)
def test_the_reason_in_a_line(exit_code: int, stderr: str, reason: str, tmp_path) -> None:
    (tmp_path / "stderr.log").write_text(stderr)
    assert explain(exit_code, tmp_path / "stderr.log") == reason


def test_no_output_is_no_error(tmp_path) -> None:
    assert explain(1, tmp_path / "missing.log") == "exit code 1"


@pytest.mark.parametrize(
    ("nodes", "waiting", "state"),
    [
        (2, 1, WorkerState.HEALTHY),  # ended by the other agent, which lets a node in: restarted, not over
        (2, 0, WorkerState.SUCCEEDED),
        (1, 1, WorkerState.SUCCEEDED),  # nobody else could have ended them
    ],
)
def test_workers_that_ended_because_a_node_joins_are_not_the_end_of_the_run(nodes, waiting, state, monkeypatch) -> None:
    monkeypatch.setattr(LocalElasticAgent, "_monitor_workers", lambda *_: RunResult(state=WorkerState.SUCCEEDED))
    monkeypatch.setattr(agent.time, "sleep", lambda _: None)
    handler = SimpleNamespace(num_nodes_waiting=lambda: waiting)
    group: Any = SimpleNamespace(group_world_size=nodes, spec=SimpleNamespace(rdzv_handler=handler))
    assert object.__new__(ReportingAgent)._monitor_workers(group).state == state


def test_progress_is_the_step_reached_not_the_length_of_what_was_written(tmp_path) -> None:
    """Losses have other digits at every attempt, and what is left after the last complete line does not count."""
    watching, record = object.__new__(ReportingAgent), tmp_path / "metrics.jsonl"
    watching.folder = tmp_path
    losses = iter((3.25, 3.125, 0.1, 1 / 3, 7.0, 0.5, 2 / 7, 1e-9, 1.5, 2.5))

    def fails_at(step: int) -> bool:
        lines = [json.dumps({"step": done, "loss": next(losses)}) + "\n" for done in (step - 1, step) if done > 0]
        record.write_text("".join(lines) + json.dumps({"step": step + 1})[:-1])
        return watching._failed_in_vain()

    assert [fails_at(step) for step in (12, 12, 12, 9, 12)] == [False, False, False, False, True]
    losses = iter([0.1] * 20)
    assert [fails_at(step) for step in (13, 13, 13, 13, 14, 14, 14, 14, 14)] == [False] * 8 + [True]


@pytest.mark.parametrize(
    ("text", "step"),
    [
        ("", 0),
        ('{"step": 7}', 0),
        ('{"step": 7}\n', 7),
        ('{"step": 7}\n{"st\n{"step": 9', 7),
        ('{"step": 7}\n[]\n{}\n', 7),
        ('{"step": 1, "note": "' + "x" * 100_000 + '"}\n{"step": 2}\n', 2),
    ],
)
def test_the_last_step_is_that_of_the_last_complete_line(text: str, step: int, tmp_path) -> None:
    (tmp_path / "metrics.jsonl").write_text(text)
    assert last_step(tmp_path / "metrics.jsonl") == step
    assert last_step(tmp_path / "missing") == 0


def test_a_full_disk_does_not_end_the_agent(tmp_path, capsys) -> None:
    watching = object.__new__(ReportingAgent)
    watching.folder, watching._pcontext, watching._remaining_restarts = tmp_path / "missing", None, 3
    group: Any = SimpleNamespace(workers=[SimpleNamespace(global_rank=4)])
    watching._report([ProcessFailure(local_rank=0, pid=1, exitcode=3, error_file=os.devnull)], group)
    assert "rank 4" in (said := capsys.readouterr().out) and "3 restart(s) left" in said
