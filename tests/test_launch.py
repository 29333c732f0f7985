"""The launcher without a run: what it reads from the environment, how many nodes fit, which code it ends with."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.curriculum.making import configuration, phase
from titan_yulan import launch as launcher
from titan_yulan.config.sections import ParallelSection, RecoverySection
from titan_yulan.curriculum.plan import Plan
from titan_yulan.errors import RunError, UserError
from titan_yulan.launch import check_disk, check_layout, exit_code_elsewhere
from titan_yulan.monitor.metrics import read_status, write_status
from titan_yulan.parallel import launched
from titan_yulan.parallel.launched import (
    AGENT_VARIABLE,
    DEATH_VARIABLE,
    DEVICE_VARIABLE,
    STARTED_VARIABLE,
    WORKERS_VARIABLE,
    StopSignals,
    only_start,
    wait_for_workers,
    workers_lock,
)
from titan_yulan.plan.memory import Machine, disk_forecast
from titan_yulan.plan.start import Launch, torchrun_command, worker_environment

ROOT = Path(__file__).resolve().parent.parent
MACHINE = Machine(accelerators=8, device="GPU", memory=2**36, cores=64)


@pytest.fixture
def start(monkeypatch):
    """`Launch` from these variables alone."""

    def start(**variables: str) -> Launch:
        for name in ("NPROC", "NNODES", "NODE_RANK", "RDZV_ENDPOINT", "MAX_RESTARTS", "LOG_RANK"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return Launch.from_environment(MACHINE)

    return start


def test_one_node_is_the_default(start) -> None:
    launch = start()
    assert (launch.processes, launch.nodes, launch.world, launch.max_restarts) == (8, "1", 8, 3)
    assert launch.hosts and not launch.elastic
    command = torchrun_command(launch, "run", Path("c.toml"), Path("folder"), ["run.seed"], debug=True)
    assert "--standalone" in command and not any("rdzv" in word for word in command)
    assert command[-3:] == ["--config=c.toml", "--allow-change=run.seed", "--debug"]


def test_an_elastic_run(start) -> None:
    launch = start(NNODES="2:4", RDZV_ENDPOINT="node0:29500", NODE_RANK="3", NPROC="4")
    assert (launch.nodes, launch.world, launch.elastic, launch.hosts) == ("2:4", 8, True, False)
    assert launch.max_restarts == 100  # each node that is lost costs one
    assert start(NNODES="2:4", RDZV_ENDPOINT="node0:29500", MAX_RESTARTS="7").max_restarts == 7
    command = torchrun_command(launch, "run", Path("c.toml"), Path("folder"), [], debug=False)
    (settings,) = [word.removeprefix("--rdzv-conf=") for word in command if word.startswith("--rdzv-conf=")]
    values = dict(pair.split("=") for pair in settings.split(","))
    assert values["is_host"] == "false"
    silence = int(values["keep_alive_interval"]) * int(values["keep_alive_max_attempt"])
    assert silence + int(values["last_call_timeout"]) <= 10  # seconds until the rest goes on
    assert {"--nnodes=2:4", "--rdzv-backend=c10d", "--rdzv-endpoint=node0:29500", "--rdzv-id=run"} <= set(command)


@pytest.mark.parametrize("nodes", ["", "0", "0:2", "3:2", "2:", ":2", "1:2:3", "two", "1.5", "-1"])
def test_what_is_no_number_of_nodes_is_refused(nodes: str, start) -> None:
    with pytest.raises(UserError, match=r"write a number, or MIN:MAX"):
        start(NNODES=nodes, RDZV_ENDPOINT="node0:29500")


def test_several_nodes_need_to_know_where_they_meet(start) -> None:
    with pytest.raises(UserError, match="NNODES=1:2 needs RDZV_ENDPOINT"):
        start(NNODES="1:2")
    assert start(NNODES="1:1").nodes == "1"


@pytest.mark.parametrize(
    ("nodes", "rank", "number"), [("1", "0", 15), ("1:2", "0", 15), ("1:2", "1", 9), ("2", "1", 15)]
)
def test_only_a_node_that_can_be_spared_ends_at_once(nodes: str, rank: str, number: int, start) -> None:
    launch = start(NNODES=nodes, NODE_RANK=rank, RDZV_ENDPOINT="node0:1")
    assert worker_environment(launch, MACHINE, RecoverySection(), Path("run"), {})[DEATH_VARIABLE] == str(number)


def test_the_environment_keeps_what_the_user_set_and_adds_what_workers_need(start) -> None:
    begin = time.time()
    given = {"OMP_NUM_THREADS": "5", "HOME": "/h", STARTED_VARIABLE: "1"}
    found = worker_environment(start(NPROC="4"), MACHINE, RecoverySection(), Path("run"), given)
    assert found["OMP_NUM_THREADS"] == "5" and found["HOME"] == "/h" and found[DEVICE_VARIABLE] == "cuda"
    assert begin <= float(found[STARTED_VARIABLE]) <= time.time()  # of this start, not of one before
    assert int(found["TORCH_FR_BUFFER_SIZE"]) > 0
    assert worker_environment(start(NPROC="4"), MACHINE, RecoverySection(), Path("run"), {})["OMP_NUM_THREADS"] == "16"


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_allocator_is_set_on_gpus_unless_the_user_has_set_it(name: str, start) -> None:
    def environment(machine: Machine, given: dict[str, str]) -> dict[str, str]:
        found = worker_environment(start(), machine, RecoverySection(), Path("run"), given)
        return {key: value for key, value in found.items() if "ALLOC" in key}

    assert environment(MACHINE, {}) == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    assert environment(MACHINE, {name: "max_split_size_mb:64"}) == {name: "max_split_size_mb:64"}
    assert environment(Machine(accelerators=0, device="CPU", memory=2**36, cores=64), {}) == {}


def plan(batch: int = 8, data_replicate: int = 1, data_shard: int = -1) -> Plan:
    section = ParallelSection(compute_dtype="float32", data_replicate=data_replicate, data_shard=data_shard)
    return Plan(configuration(phase("a", "3 steps", {"x": 1.0}, batch=batch, parallel=section)))


def test_every_number_of_nodes_in_between_must_fit(start) -> None:
    def elastic(nodes: str) -> Launch:
        return start(NNODES=nodes, NPROC="2", RDZV_ENDPOINT="node0:1")

    assert check_layout(plan(), elastic("1:4"), 0)["a"].ranks == 2
    with pytest.raises(
        UserError, match=r"NNODES=1:4 allows a group of 1 node\(s\), but: .*data_replicate = 4.* legal are 2, 4"
    ):
        check_layout(plan(data_replicate=4), elastic("1:4"), 0)
    with pytest.raises(UserError, match=r"group of 3 node\(s\), but: batch.global_batch_size.* legal are 1, 2$"):
        check_layout(plan(batch=4), elastic("1:4"), 0)
    with pytest.raises(UserError, match="no number of nodes in between fits"):
        check_layout(plan(data_shard=3), elastic("1:2"), 0)
    with pytest.raises(UserError, match=r"^batch.global_batch_size"):  # nothing about a choice where there is none
        check_layout(plan(batch=4), elastic("3"), 0)
    assert check_layout(plan(batch=1), elastic("1:4"), 3) == {}  # the phase is over


def test_too_small_a_disk_is_refused_with_the_forecast(tmp_path, monkeypatch) -> None:
    folder, run = tmp_path / "not" / "yet", plan()
    count, size = disk_forecast(run.config, run)

    def leave(free: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))

    leave(size)
    check_disk(run.config, run, folder)
    leave(size - 1)
    with pytest.raises(UserError, match=rf"^run.output_dir: {count} checkpoints of .* but {tmp_path} has .* free"):
        check_disk(run.config, run, folder)
    held = folder / "checkpoints" / "step-00000001" / "__0_0.distcp"
    held.parent.mkdir(parents=True)
    held.write_bytes(bytes(1))  # makes room when it is replaced
    check_disk(run.config, run, folder)


@pytest.mark.parametrize(
    ("before", "after", "torchrun", "stopped", "code"),
    [
        ("running", "finished", 0, False, 0),
        ("running", "stopped", 0, False, 75),
        ("starting", "failed", 0, False, 1),
        ("running", "running", 1, False, 1),  # left a run that goes on
        ("running", "running", 1, True, 75),
        ("stopped", "stopped", 1, False, 1),  # never met the others: what it read is of the start before
        ("stopped", "stopped", 0, False, 75),
    ],
)
def test_another_node_tells_what_the_run_says_and_never_speaks_for_it(
    before: str, after: str, torchrun: int, stopped: bool, code: int, tmp_path
) -> None:
    codes = {"running": 1, "starting": 1, "finished": 0, "stopped": 75, "failed": 1}
    write_status(tmp_path, before, codes[before])
    earlier = read_status(tmp_path)
    write_status(tmp_path, after, codes[after])
    assert exit_code_elsewhere(tmp_path, earlier, torchrun, stopped) == code
    assert read_status(tmp_path)["state"] == after


# What torchrun does here: it finds itself safe from SIGUSR1, and has its launcher signalled twice within a moment.
_TORCHRUN = """
import os, signal, sys
assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN
os.kill(os.getppid(), signal.SIGUSR1)
while not os.path.exists(sys.argv[1]):
    pass
os.kill(os.getppid(), signal.SIGTERM)
os.kill(os.getppid(), signal.SIGINT)
sys.exit(7)
"""
_LAUNCHER = """
import os, sys
from pathlib import Path
from titan_yulan.config.sections import RecoverySection
from titan_yulan.launch import _run
from titan_yulan.parallel.launched import StopSignals
from titan_yulan.plan.memory import Machine
from titan_yulan.plan.start import Launch
machine = Machine(0, "CPU", 1, 1)
folder = Path(sys.argv[1])
command = [sys.executable, "-c", sys.argv[2], str(folder / "stop")]
start = Launch.from_environment(machine)
with StopSignals() as signals:
    signals.answer_in(folder)
    print(_run(command, start, machine, RecoverySection(), folder, os.open(folder, os.O_RDONLY), signals))
"""


def test_a_signal_that_comes_twice_is_one_request(tmp_path) -> None:
    command = [sys.executable, "-c", _LAUNCHER, str(tmp_path), _TORCHRUN]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=30, cwd=ROOT, env={**os.environ, "NNODES": "1"}
    )
    assert result.stdout == "(7, True)\n", result.stderr  # not -SIGTERM
    assert (tmp_path / "stop").exists()


# A worker as torchrun starts it: it joins before anything else, and lives until its standard input ends.
_WORKER = """
import sys
from titan_yulan.parallel.launched import join_launch
join_launch()
assert "torch" not in sys.modules
print("joined", flush=True)
sys.stdin.read()
"""


def test_workers_that_outlive_their_torchrun_keep_the_next_start_out(tmp_path, monkeypatch, capsys) -> None:
    lock = workers_lock(tmp_path, 0)
    assert wait_for_workers(lock, 0)
    environment = {**os.environ, WORKERS_VARIABLE: str(lock), AGENT_VARIABLE: str(os.getpid())}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", _WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, env=environment
        )
        for _ in range(2)
    ]
    for worker in workers:
        assert worker.stdout and worker.stdout.readline() == b"joined\n"  # together: the lock is shared
    workers[0].communicate(timeout=30)
    monkeypatch.setattr(launched, "_EARLIER_SECONDS", 0.1)
    signals = StopSignals()
    with pytest.raises(RunError, match="earlier start still live"), only_start(tmp_path, 0, signals):
        pass
    assert "still live without torchrun" in capsys.readouterr().out
    with only_start(tmp_path, 1, signals):  # another node has its own workers
        pass
    assert wait_for_workers(lock, 60, give_up=lambda: bool(workers[1].communicate(timeout=30)[0]))  # while it waits
    with only_start(tmp_path, 0, signals), pytest.raises(UserError, match="another start is training"):
        with only_start(tmp_path, 0, signals):
            pass


def test_a_worker_whose_torchrun_is_gone_ends_at_once(tmp_path) -> None:
    environment = {**os.environ, AGENT_VARIABLE: str(os.getpid() + 1)}
    result = subprocess.run(
        [sys.executable, "-c", _WORKER], input="", capture_output=True, text=True, timeout=30, cwd=ROOT, env=environment
    )
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr == "ERROR: the process that started this one is gone\n"


def test_a_file_system_without_locks_is_told_once_and_trained_on(tmp_path, monkeypatch, capsys) -> None:
    def refuse(number: int) -> None:
        def flock(descriptor: int, operation: int) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", flock)

    for number in (errno.ENOSYS, errno.EOPNOTSUPP):
        launched._warn_without_locks.cache_clear()
        refuse(number)
        for _ in range(2):
            with only_start(tmp_path, 0, StopSignals()):
                pass
        assert capsys.readouterr().out.count("WARNING: the file system of the run folder has no locks") == 1
    refuse(errno.EIO)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)), only_start(tmp_path, 0, StopSignals()):
        pass


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_while_data_is_prepared_ends_with_75_at_the_next_line(number, tmp_path, monkeypatch, capsys) -> None:
    done = []

    def prepare(config, say) -> None:
        os.kill(os.getpid(), number)
        done.append("before")
        say("the first source is there")
        done.append("after")

    monkeypatch.setattr(launcher, "ensure_prepared", prepare)
    before = signal.getsignal(number)
    arguments = [f"--run.output_dir={tmp_path}", "--monitor.tensorboard=false", "--model.num_hidden_layers=1"]
    assert launcher.launch("debug.toml", arguments, [], debug=False) == 75
    assert done == ["before"] and not (tmp_path / "debug").exists()
    assert "the same command goes on" in capsys.readouterr().out.splitlines()[-1]
    assert signal.getsignal(number) == before
