"""`deploy/slurm.sh` in real bash, with stand-ins for sbatch, srun, scontrol and run_train.sh."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "deploy" / "slurm.sh"

# Runs a copy, as Slurm does, and again as long as it was queued again.
_SBATCH = """#!/usr/bin/env bash
cp "$1" "$CLUSTER/spool.sh"; shift
export SLURM_SUBMIT_DIR="$PWD" SLURM_JOB_ID=7 SLURM_JOB_NODELIST='node[1-2]' SLURM_JOB_NUM_NODES=2
while :; do
    rm -f "$CLUSTER/queued"
    (cd / && exec bash "$CLUSTER/spool.sh" "$@") &
    echo "batch $!"
    wait $!; code=$?
    [ -e "$CLUSTER/queued" ] || exit $code
done
"""
# A task on each node; passes signals on; the highest exit code, as srun says.
_SRUN = """#!/usr/bin/env bash
[ "$1" = --kill-on-bad-exit=0 ] || exit 99
shift
echo "cpus per task: ${SRUN_CPUS_PER_TASK-not said}"
SLURM_NODEID=0 "$@" & a=$!
SLURM_NODEID=1 "$@" & b=$!
trap 'kill -USR1 $a $b' USR1
highest=0
for task in $a $b; do
    wait $task; code=$?
    while kill -0 $task 2>/dev/null; do wait $task; code=$?; done
    [ $code -le $highest ] || highest=$code
done
exit $highest
"""
_SCONTROL = """#!/usr/bin/env bash
case "$1 $2" in
    "show hostnames") printf 'node1\\nnode2\\n' ;;
    "requeue 7") [ -z "${NO_REQUEUE:-}" ] && touch "$CLUSTER/queued" ;;
    *) exit 98 ;;
esac
"""
# Ends with the next of this node's codes; "wait": with 75 when it is told to stop.
_RUN_TRAIN = """
import os, signal, sys
node = os.environ["NODE_RANK"]
path = os.path.join(os.environ["CLUSTER"], "codes" + node)
code, *rest = open(path).read().split()
open(path, "w").write(" ".join(rest))
words = ["node", node, os.environ["NNODES"], os.environ["RDZV_ENDPOINT"], *sys.argv[1:]]
os.write(1, " ".join(words).encode() + b"\\n")  # at once: two nodes write into one file
if code == "wait":
    signal.signal(signal.SIGUSR1, lambda *_: os._exit(75))
    print("ready", flush=True)
    signal.pause()
if code == "killed":
    os.kill(os.getpid(), 9)
sys.exit(int(code))
"""


@dataclass
class Job:
    """What became of a job: how many times it was started, how it ended."""

    starts: int
    code: int
    output: str


@pytest.fixture
def submit(tmp_path) -> Callable[..., Job]:
    """Submit the script from a checkout; node 0 and 1 end with the codes given, start by start."""
    programs, checkout = tmp_path / "programs", tmp_path / "checkout"
    programs.mkdir()
    checkout.mkdir()
    run_train = f'#!/bin/sh\nexec {sys.executable} {tmp_path}/run_train.py "$@"\n'
    (tmp_path / "run_train.py").write_text(_RUN_TRAIN)
    for path, text in (
        (programs / "sbatch", _SBATCH),
        (programs / "srun", _SRUN),
        (programs / "scontrol", _SCONTROL),
        (checkout / "run_train.sh", run_train),
    ):
        path.write_text(text)
        path.chmod(0o755)

    def submit(node0: str, node1: str | None = None, **environment: str) -> Job:
        (tmp_path / "codes0").write_text(node0)
        (tmp_path / "codes1").write_text(node0 if node1 is None else node1)
        process = subprocess.Popen(
            ["sbatch", SCRIPT, "--config", "my file.toml"],
            cwd=checkout,
            env={**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "CLUSTER": str(tmp_path), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        lines = []
        for line in process.stdout or ():
            lines.append(line)
            if lines.count("ready\n") == 2 and line == "ready\n":  # the scheduler's signal, to the batch shell alone
                os.kill(int([line for line in lines if line.startswith("batch")][-1].split()[1]), signal.SIGUSR1)
        starts = sum(line.startswith("batch") for line in lines)
        return Job(starts, process.wait(), "".join(lines))

    return submit


def test_a_finished_run_ends_the_job(submit, tmp_path) -> None:
    job = submit("0", SLURM_CPUS_PER_TASK="64")
    assert (job.starts, job.code) == (1, 0), job.output
    assert "cpus per task: 64\n" in job.output
    assert "node 0 2 node1:20007 --config my file.toml" in job.output
    assert "node 1 2 node1:20007 --config my file.toml" in job.output
    assert not list((tmp_path / "checkout" / "slurm-state").iterdir())


def test_a_stopped_run_is_queued_again_however_often(submit) -> None:
    job = submit("75 75 75 75 0")
    assert (job.starts, job.code) == (5, 0), job.output


def test_a_wrong_configuration_is_not(submit) -> None:
    job = submit("2", SLURM_CPUS_PER_TASK="")
    assert (job.starts, job.code) == (1, 2), job.output
    assert "ERROR: refused, for the reason above; not queued again" in job.output
    assert "cpus per task: not said\n" in job.output


def test_a_failure_is_tried_again_three_times_in_a_row(submit) -> None:
    job = submit("1 1 1 0")
    assert (job.starts, job.code) == (3, 1), job.output
    assert "failed 3 times in a row (last exit code 1)" in job.output
    assert submit("1 1 1 0", MAX_FAILURES="1").starts == 1
    job = submit("1 1 75 1 1 0")  # a stop in between is progress
    assert (job.starts, job.code) == (6, 0), job.output


def test_the_signal_before_the_time_limit_reaches_the_run_and_the_job_is_queued_again(submit) -> None:
    job = submit("wait 0")
    assert (job.starts, job.code) == (2, 0), job.output
    assert "exit code 75: queued again" in job.output


def test_the_first_node_speaks_for_an_elastic_run(submit) -> None:
    job = submit("0", "killed", NNODES="1:2")
    assert (job.starts, job.code) == (1, 0), job.output
    assert "node 0 1:2 " in job.output


def test_the_loss_of_the_first_node_is_a_failure(submit) -> None:
    job = submit("killed 0", "1 0")
    assert (job.starts, job.code) == (2, 0), job.output
    assert "exit code 137: queued again" in job.output


def test_where_queueing_again_is_forbidden_the_code_says_what_to_do(submit) -> None:
    job = submit("75", NO_REQUEUE="yes")
    assert (job.starts, job.code) == (1, 75), job.output
    assert "the same sbatch command goes on" in job.output


def test_outside_slurm_and_outside_the_checkout_it_refuses(tmp_path) -> None:
    environment = {"PATH": os.environ["PATH"]}
    outside = subprocess.run(["bash", SCRIPT], env=environment, capture_output=True, text=True, timeout=20)
    assert outside.returncode != 0 and "this file is for sbatch" in outside.stderr
    environment |= {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "7"}
    elsewhere = subprocess.run(["bash", SCRIPT], env=environment, capture_output=True, text=True, timeout=20)
    assert elsewhere.returncode == 2 and "call sbatch in the root of the checkout" in elsewhere.stderr


def test_what_slurm_is_asked_for() -> None:
    text = SCRIPT.read_text()
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", text, re.MULTILINE))
    assert asked["signal"].startswith("B:USR1@") and "requeue" in asked and asked["open-mode"] == "append"
    assert asked["ntasks-per-node"] == "1" and int(asked["nodes"]) > 1
    to_fill = re.findall(r"^##SBATCH --([\w-]+)=", text, re.MULTILINE)
    assert {"constraint", "mail-type", "mail-user"} <= set(to_fill)
