"""Sweep files: what they expand into, every mistake in them, what became of the runs, and the job array."""

from __future__ import annotations

import fcntl
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoint.making import make_checkpoint, make_state
from tests.config.config_texts import BASE, write
from titan_yulan.cli import main
from titan_yulan.config import load, to_toml
from titan_yulan.errors import UserError
from titan_yulan.monitor.metrics import write_status
from titan_yulan.sweep import local
from titan_yulan.sweep.expand import Expanded, expand
from titan_yulan.sweep.runs import SweepRun, load_runs, table_lines, write_arguments
from titan_yulan.sweep.slurm import write_array

PHASE = '[phase]\nname = "one"\nsequence_length = 128\nunique_tokens = "100K"\nepochs = 2\nmix = {code = 1}\n'
GRID = """
config = "base.toml"
name = "{size}-{kind}-{phase.epochs}-{shape}"
[set]
run.seed = 7
checkpoint.keep = 1
[grid]
"objective.kind" = ["autoregressive", "masked_diffusion"]
size = [{ size = "s", model.num_hidden_layers = 2 }, { size = "l", model.num_hidden_layers = 3, checkpoint.keep = 2 }]
phase.epochs = [1, 2.5]
lr = [{ shape = "flat", phase.lr = [{ shape = "constant", from = 0.5 }] }]
"""


def sweep_of(folder: Path, text: str, *overrides: str) -> Expanded:
    write(folder, "base.toml", BASE + PHASE)
    return expand(write(folder, "sweep.toml", text), folder, [f"--run.output_dir={folder / 'out'}", *overrides])


def test_every_combination_is_a_run_with_its_settings(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, GRID)
    assert list(sweep.runs)[:3] == ["s-autoregressive-1-flat", "s-autoregressive-2.5-flat", "l-autoregressive-1-flat"]
    assert len(sweep.runs) == 8
    [run] = load_runs(sweep, ["l-masked*-2.5-*"])
    config = run.config
    assert (config.model.num_hidden_layers, config.checkpoint.keep, config.run.seed) == (3, 2, 7)
    assert (config.objective.kind, config.phases[0].epochs) == ("masked_diffusion", 2.5)
    assert [(segment.shape, segment.from_, segment.to) for segment in config.phases[0].lr] == [("constant", 0.5, 0.5)]
    assert config.run.name == run.name and run.folder == tmp_path / "out" / run.name
    assert (run.epochs, run.state, run.flops) == (run.tokens / 100_000, "not begun", 6.0 * run.parameters * run.tokens)
    assert load(Path(run.arguments[1]), run.arguments[2:]).config == config
    [late] = load_runs(sweep_of(tmp_path, GRID, "--phase.epochs=9"), ["l-masked*-2.5-*"])
    assert late.config.phases[0].epochs == 9


def test_grids_one_after_the_other_and_names_without_a_template(tmp_path: Path) -> None:
    text = 'config = "base.toml"\n[[grid]]\nphase.epochs = [1, 2]\nphase.unique_tokens = ["50K"]\n'
    text += "[[grid]]\noptimizer.learning_rate = [1e-3]\nnote = [{ note = 'deep', model.num_hidden_layers = 3 }]\n"
    assert sweep_of(tmp_path, text).runs == {
        "1-50K": ("--phase.epochs=1", "--phase.unique_tokens=50K"),
        "2-50K": ("--phase.epochs=2", "--phase.unique_tokens=50K"),
        "0.001-deep": ("--optimizer.learning_rate=0.001", "--model.num_hidden_layers=3"),
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[grid]\na.b = [1]", r"sweep\.toml:1: config is missing"),
        ('config = "base.toml"', r"sweep\.toml:1: no \[grid\] here"),
        ('config = "base.toml"\nnaem = "x"\n[grid]\nrun.seed = [1]', r"sweep\.toml:2: naem: unknown key; did you mean"),
        ('config = "base.toml"\n[grid]\nrun.seed = 1', r"sweep\.toml:3: grid\.run\.seed: found 1; allowed: a list"),
        ('config = "base.toml"\n[grid]\nsize = [1]', r"sweep\.toml:3: grid\.size\[0\]: found 1; allowed: a table"),
        ('config = "base.toml"\n[grid]\nrun.name = ["x"]', r"3: grid\.run\.name\[0\]: a sweep sets it itself"),
        ('config = "base.toml"\nname = "x"\n[grid]\nrun.seed = [1, 2]', r"'x' would be the name of two runs"),
        ('config = "base.toml"\nname = "{sed}"\n[grid]\nrun.seed = [1]', r"asks for \{sed\}, which is no setting"),
        ('config = "base.toml"\nname = "{seed}"\n[grid]\nrun.seed = [1]\nx = [{epochs = 2}]', r"epochs is no key"),
        ('config = "base.toml"\n[grid]\nrun.seed = [1]\nx = [{run.seed = 2}]', r"run\.seed stands in two lists"),
        ('config = 3\n[grid]\nrun.seed = [1]', r"sweep\.toml:1: config: found 3; allowed: a text"),
        ('config = "bas.toml"\n[grid]\nrun.seed = [1]', r"--config bas\.toml: no such file"),
    ],
)  # fmt: skip
def test_mistakes_in_the_file(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        sweep_of(tmp_path, text)


def test_all_mistakes_of_all_runs_come_at_once(tmp_path: Path) -> None:
    text = 'config = "base.toml"\n[grid]\nrun.seed = [1, -1]\noptimizer.learning_rat = [1, 2, 3]\n'
    sweep = sweep_of(tmp_path, text)
    with pytest.raises(UserError) as refused:
        load_runs(sweep)
    assert "runs 1-1, 1-2, 1-3 and 3 more: --optimizer.learning_rat: unknown key; did you mean" in str(refused.value)
    assert "runs -1-1, -1-2, -1-3: --run.seed: found -1" in str(refused.value)
    with pytest.raises(UserError, match=r"--only x-\*: no run has such a name; the first is 1-1"):
        load_runs(sweep, ["x-*"])
    with pytest.raises(UserError, match="a sweep names its runs itself"):
        sweep_of(tmp_path, text, "--run.name=x")
    with pytest.raises(UserError, match=r"runs .*1 of 1 sources are not prepared and have no text"):
        load_runs(sweep_of(tmp_path, 'config = "base.toml"\n[grid]\nrun.seed = [1, 2]\n'), check_data=True)


def reach(run: SweepRun, step: int) -> None:
    """Let a run have come to a step, with the arguments that a sweep writes."""
    write_arguments(run)
    place = run.plan.position(step)
    tapes = dict(zip(run.plan.sources, run.plan.phases[0].tapes(place.row), strict=True))
    last = place == run.plan.end
    state = make_state(step, row=place.row, token=place.token, phase="one", tapes=tapes, phase_finished=last)
    make_checkpoint(run.folder / "checkpoints", step, to_toml(run.config), state)


def test_what_became_of_the_runs(tmp_path: Path) -> None:
    text = 'config = "base.toml"\nname = "{seed}"\n[set]\nbatch.micro_batch_size = 4\n[grid]\nrun.seed = [1, 2, 3, 4]\n'
    text += "optimizer.learning_rate = [0.25]\n"
    done, half, failed, _ = load_runs(sweep_of(tmp_path, text))
    end = done.plan.end.step
    reach(done, end)
    reach(half, 5)
    write_status(failed.folder, "failed", 1)
    runs = load_runs(sweep_of(tmp_path, text.replace("size = 4", "size = 2")))  # decides nothing
    states = ["finished", f"at step 5 of {end}", f"failed at step 0 of {end}", "not begun"]
    assert [run.state for run in runs] == states
    assert [(run.finished, run.begun, run.failed) for run in runs] == [
        (True, True, False),
        (False, True, False),
        (False, True, True),
        (False, False, False),
    ]
    cost = (3 - 5 / end) * runs[0].flops
    assert list(table_lines(runs))[-1] == f"4 runs, 1 finished, {cost:.3g} FLOPs to go"
    with pytest.raises(UserError, match=r"run 1: .*\n  model.num_hidden_layers: 4 -> 3\n.*\nrun 2: "):
        load_runs(sweep_of(tmp_path, text, "--model.num_hidden_layers=3"))
    script = write_array(tmp_path / "sweep.toml", tmp_path / "out", runs).read_text()
    assert "#SBATCH --array=1-3\n" in script and "\n    0)" not in script
    with pytest.raises(UserError, match=r"all 1 runs of .* are finished"):
        write_array(tmp_path / "sweep.toml", tmp_path / "out", runs[:1])


@pytest.mark.parametrize(
    ("key", "old", "new"),
    [
        ("optimizer.learning_rate", "0.25", "0.5"),
        ("objective.token_mask_share", "0.0", "0.1"),
        ("phase.one.unique_tokens", '"100K"', '"120K"'),
    ],
)
def test_a_run_that_has_begun_keeps_its_configuration(tmp_path: Path, key: str, old: str, new: str) -> None:
    grid = 'config = "base.toml"\nname = "{seed}"\n[grid]\nrun.seed = [1, 2]\n'
    before = grid + "optimizer.learning_rate = [0.25]\n"
    first, second = load_runs(sweep_of(tmp_path, before))
    reach(first, first.plan.end.step)
    reach(second, 1)
    moved = grid + f"[set]\noptimizer.learning_rate = 0.25\n{key.replace('one.', '')} = {new}\n"
    if key == "optimizer.learning_rate":  # from the grid to all runs, with another value
        moved = moved.replace("optimizer.learning_rate = 0.25\n", "")
    differs = re.escape(f"{key}: {old} -> {new}")
    with pytest.raises(
        UserError, match=rf"(?s)another configuration than this one.*\n  {differs}\nBring the old"
    ) as no:
        load_runs(sweep_of(tmp_path, moved))
    assert str(no.value).startswith("runs 1, 2: begun with") and str(no.value).count(" -> ") == 1
    runs = load_runs(sweep_of(tmp_path, before, "--activation_checkpoint.mode=full", "--monitor.log_every=3"))
    layout = 'phase.one.activation_checkpoint.mode: "none" -> "full"'
    assert list(table_lines(runs))[3:5] == [
        f"run 1: changed since step {first.plan.end.step}: {layout}",
        f"run 2: changed since step 1: {layout}",
    ]


def test_phases_and_sources_may_follow(tmp_path: Path) -> None:
    text = 'config = "base.toml"\nname = "{seed}"\n[grid]\nrun.seed = [1]\n'
    [run] = load_runs(sweep_of(tmp_path, text))
    reach(run, run.plan.end.step)
    sweep = sweep_of(tmp_path, text)
    late = BASE + '[data.sources.late]\npath = "late"\norder = "keep"\n'
    write(tmp_path, "one.toml", late + PHASE)
    write(tmp_path, "base.toml", late + PHASE.replace('"one"', '"two"\nafter = "one.toml"'))
    [run] = load_runs(sweep)
    assert not run.finished and run.step == run.plan.phases[0].end.step


def test_the_table_and_the_job_array(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep_of(tmp_path, GRID)
    command = ["sweep", str(tmp_path / "sweep.toml"), f"--run.output_dir={tmp_path / 'my runs'}"]
    assert main(command) == 0
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 10 and table[0].split() == ["run", "parameters", "tokens", "epochs", "6", "N", "D", "state"]
    assert table[1].split()[3:] == ["0.99", table[1].split()[4], "not", "begun"]
    assert table[-1].startswith("8 runs, 0 finished, ")
    text = (tmp_path / "base.toml").read_text()
    (tmp_path / "base.toml").write_text(text.replace("[data.sources.code]", '[data.sources.code]\ntext = ["x.md"]'))
    assert main([*command, "--slurm"]) == 0
    told = capsys.readouterr()
    [_, path] = shlex.split(told.out)
    assert told.err == ""
    script = Path(path)
    assert main([*command, "--slurm"]) == 0
    assert "cancel the old array first" in capsys.readouterr().err
    assert "#SBATCH --array=0-7\n" in script.read_text() and "#SBATCH --requeue\n" in script.read_text()
    (tmp_path / "deploy").mkdir()
    (tmp_path / "deploy" / "slurm.sh").write_text('printf "%s\\n" "$@"\n')
    environment = {"SLURM_SUBMIT_DIR": str(tmp_path), "PATH": "/usr/bin:/bin"}
    for task, code in (("3", 0), ("8", 2)):
        told = subprocess.run(
            ["bash", str(script)],
            env={**environment, "SLURM_ARRAY_TASK_ID": task},
            capture_output=True,
            text=True,
            check=False,
        )
        assert told.returncode == code
        if code == 0:
            arguments = told.stdout.splitlines()
            assert load(Path(arguments[1]), arguments[2:]).config.run.name == "l-autoregressive-2.5-flat"


def test_the_job_array_asks_for_what_a_single_job_asks_for(tmp_path: Path) -> None:
    runs = seeds(tmp_path, 1)
    array = write_array(tmp_path / "my grid, née 2.toml", tmp_path / "out", runs).read_text()
    single = (Path(__file__).resolve().parents[2] / "deploy" / "slurm.sh").read_text()

    def asked(text: str) -> dict[str, str]:
        return dict(re.findall(r"^#SBATCH --([\w-]+)(.*)$", text, re.MULTILINE))

    own = {"job-name": "=my-grid-n-e-2", "array": "=0", "nodes": "=1", "output": "=slurm-%A_%a.out"}
    assert asked(array) == asked(single) | own


FAKE = """
import fcntl, os, signal, sys
given = dict(word[2:].split("=", 1) for word in sys.argv if word.startswith("--run."))
name = given["run.name"]
print(name, os.environ["OMP_NUM_THREADS"], flush=True)
if name == "5":  # the sweep is told to stop while this one trains
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    os.kill(os.getppid(), signal.SIGUSR1)
    signal.sigwait([signal.SIGTERM])
    sys.exit(75)
if name == "6":  # as a launcher does
    try:
        fcntl.flock(open(given["run.output_dir"] + "/6/.lock-0", "w"), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(2)
sys.exit({"6": 0, "1": 0, "2": 1, "3": 0, "4": 75}[name])
"""


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trainer that does nothing but end in a way that depends on the run's name."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path}/fake.py "$@"\n')
    python.chmod(0o755)
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setattr(local.sys, "executable", str(python))
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.setattr(local, "_LOOK_SECONDS", 0.02)


def seeds(folder: Path, *names: int) -> list[SweepRun]:
    """Runs that are called by their seeds."""
    return load_runs(sweep_of(folder, f'config = "base.toml"\n[grid]\nrun.seed = {list(names)}\n'))


@pytest.mark.usefixtures("trainer")
def test_a_signal_is_passed_on_and_no_other_run_is_begun(tmp_path: Path) -> None:
    said: list[str] = []
    runs = seeds(tmp_path, 5, 1)
    assert local.run_all(runs, 1, said.append) == 75
    assert said[2:] == ["5: stopped; the same command goes on"] and not runs[1].folder.exists()
    before = signal.getsignal(signal.SIGUSR1)
    assert local.run_all(runs[1:], 1, said.append) == 0
    assert signal.getsignal(signal.SIGUSR1) == before == signal.SIG_DFL


@pytest.mark.usefixtures("trainer")
@pytest.mark.parametrize("at_a_time", [1, 3])
def test_runs_are_trained_and_failures_do_not_end_the_others(tmp_path: Path, at_a_time: int) -> None:
    said: list[str] = []
    runs = seeds(tmp_path, 1, 2, 3, 4)
    assert local.run_all(runs, at_a_time, said.append) == 1
    assert [(run.folder / "sweep.log").read_text() for run in runs] == [f"{seed} 5\n" for seed in (1, 2, 3, 4)]
    assert said[0] == f"0 of 4 runs are finished, 4 to train, {at_a_time} at a time"
    assert {line.split(" (")[0] for line in said[1:] if ": begins" not in line} == {
        "1: finished",
        "2: FAILED",
        "  2 5",
        "3: finished",
        "4: stopped; the same command goes on",
    }
    (tmp_path / "out" / "1" / ".lock-0").touch()
    holder = subprocess.Popen(["flock", str(tmp_path / "out" / "1" / ".lock-0"), "sleep", "0.5"])
    while local._is_free(runs[0]) and holder.poll() is None:
        pass
    assert local.run_all([runs[0], runs[3]], 1, said.append) == 75
    assert holder.poll() == 0
    assert said[-1] == "1: finished" and f"1: another start is training in {runs[0].folder}" in "\n".join(said)
    assert local.run_all([runs[0]], 1, said.append) == 0
    with pytest.raises(UserError, match="--run 0: at least 1"):
        local.run_all(runs, 0, said.append)


@pytest.mark.usefixtures("trainer")
def test_a_run_that_another_start_takes_first_waits_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [run] = seeds(tmp_path, 6)
    said: list[str] = []
    other: list[int] = []
    lock = local.try_lock

    def try_lock(descriptor: int) -> bool:
        assert fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR  # NFS demands it
        return lock(descriptor)

    def say(line: str) -> None:
        if "6: begins" in line and not other:  # the sweep has found the lock free
            other.append(os.open(run.folder / ".lock-0", os.O_CREAT | os.O_RDWR))
            fcntl.flock(other[0], fcntl.LOCK_EX)
        if "another start is training" in line:
            os.close(other[0])
        said.append(line.split(" (")[0].split(",")[0])

    monkeypatch.setattr(local, "try_lock", try_lock)
    assert local.run_all([run], 1, say) == 0
    waits = f"6: another start is training in {run.folder}"
    assert said[1:] == ["6: begins", waits, "6: begins", "6: finished"]


def test_gpus_are_dealt_out(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = local.Machine(8, "H100", 2**36, 64)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert local._slots(3, machine) == [{"CUDA_VISIBLE_DEVICES": devices} for devices in ("0,1", "2,3", "4,5")]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,5")
    pair = local.Machine(2, "H100", 2**36, 64)
    assert local._slots(2, pair) == [{"CUDA_VISIBLE_DEVICES": "7"}, {"CUDA_VISIBLE_DEVICES": "5"}]
    with pytest.raises(UserError, match=r"--run 3: this machine has 2 GPU\(s\)"):
        local._slots(3, pair)
