"""Whole runs through the launcher, torchrun and real gloo ranks: killed, stopped, damaged, continued elsewhere."""

from __future__ import annotations

import fcntl
import math
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.end_to_end import harness
from tests.end_to_end.harness import column, metrics, same_in_every_bit, train, validations
from titan_yulan.checkpoint.layout import find_checkpoints
from titan_yulan.monitor.metrics import read_status

STEPS = 38
PHASES = ("stable", "mix", "anneal")


@pytest.fixture
def start(tmp_path, small_data):
    """Start (or go on with) a run of the small configuration in this test's own folder."""
    config = harness.write_small_config(tmp_path, small_data, tmp_path / "outputs")

    def start(processes: int, *arguments: str, **options) -> harness.Result:
        return train(config, processes, *arguments, **options)

    return start


@pytest.fixture
def run(tmp_path) -> Path:
    return tmp_path / "outputs" / "small"


def test_reference_has_one_line_per_step_and_learns(reference):
    lines = metrics(reference)
    assert column(lines, "step") == list(range(1, STEPS + 1))
    required = {"step", "tokens", "loss", "gradient_norm", "learning_rate", "batch_fingerprint"}
    assert all(required <= line.keys() for line in lines)
    assert all(len(line["batch_fingerprint"]) == 16 for line in lines)
    first, last = validations(reference)[0], validations(reference)[-1]
    assert last["step"] == STEPS
    assert all(last["validation_loss"][name] < loss - 0.4 for name, loss in first["validation_loss"].items())


def test_the_ledger_is_what_the_steps_read(reference):
    state = find_checkpoints(reference / "checkpoints")[-1].state()
    lines = metrics(reference)
    for name, entry in state.ledger.items():
        read = {phase: sum(line["source_tokens"][name] for line in lines if line["phase"] == phase) for phase in PHASES}
        assert entry["tokens"] == state.tapes[name] == sum(read.values())
        assert entry["phase_tokens"] == read["anneal"] == 96 * entry["phase_rows"]
        assert entry["rows"] == (read["stable"] + read["mix"]) // 48 + entry["phase_rows"]
        assert 0 < entry["epochs"] < 1


def test_the_same_command_on_a_complete_run_ends_at_once(reference, start, run):
    shutil.copytree(reference, run)
    result = start(2)
    assert result.code == 0
    assert "is complete" in result.output
    assert "dry run" not in result.output


def test_kill_9_of_a_worker_changes_no_bit_with_accumulated_gradients_and_rows_read_ahead(start, run, reference):
    result = start(2, at_line="step 20/", action=harness.kill_worker)
    assert result.code == 0, result.output
    assert result.output.count("in 2 micro-batch(es)") == 3  # of every phase
    assert "\nprefetch = 2\n" in (run / "config.toml").read_text()
    assert "resumed from" in result.output
    assert same_in_every_bit(run, reference)


@pytest.mark.parametrize("processes", [1, 3])
def test_another_world_size_sees_the_same_rows(processes, start, run, reference):
    result = start(processes)
    assert result.code == 0, result.output
    lines, expected = metrics(run), metrics(reference)
    assert column(lines, "batch_fingerprint") == column(expected, "batch_fingerprint")
    for line, other in zip(lines[:20], expected[:20], strict=True):
        assert math.isclose(line["loss"], other["loss"], rel_tol=1e-5)
    for name, loss in validations(reference)[-1]["validation_loss"].items():
        assert abs(validations(run)[-1]["validation_loss"][name] - loss) < 0.02


def test_stopped_in_phase_two_and_continued_on_three_ranks_then_one(start, run, reference):
    stopped = start(2, at_line="step 18/", action=harness.stop)
    assert stopped.code == 75, stopped.output
    assert "Traceback" not in stopped.output
    after_first = metrics(run)[-1]["step"]
    assert 18 <= after_first < STEPS
    stopped = start(3, at_line=f"step {after_first + 2}/", action=harness.stop)
    assert stopped.code == 75, stopped.output
    assert f"step {after_first} of {STEPS}" in stopped.output
    finished = start(1)
    assert finished.code == 0, finished.output
    assert column(metrics(run), "step") == list(range(1, STEPS + 1))
    assert column(metrics(run), "batch_fingerprint") == column(metrics(reference), "batch_fingerprint")


def test_a_killed_launcher_takes_its_run_down_in_order(start, run, reference):
    """kill -9 of the launcher: the kernel tells torchrun, the workers save and end, and another start goes on."""
    killed = start(2, at_line="step 12/", action=lambda pid: os.kill(pid, signal.SIGKILL))
    assert killed.code == -signal.SIGKILL  # its output was read to the end: nothing of the run is alive any more
    assert read_status(run)["state"] == "stopped", killed.output
    finished = start(2)
    assert finished.code == 0, finished.output
    assert same_in_every_bit(run, reference)


def test_a_second_start_on_the_same_folder_is_refused(start, run):
    run.mkdir(parents=True)
    with open(run / ".lock-0", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        result = start(2)
    assert result.code == 2
    assert f"another start is training in {run}" in result.output


def test_a_damaged_checkpoint_is_named_and_passed_over(start, run, reference):
    stopped = start(2, at_line="step 23/", action=harness.stop)
    assert stopped.code == 75, stopped.output
    newest, before = find_checkpoints(run / "checkpoints")[-1], find_checkpoints(run / "checkpoints")[-2]
    file = max(newest.path.glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    finished = start(2)
    assert finished.code == 0, finished.output
    assert f"{newest.path} is damaged and passed over: {file} is damaged" in finished.output
    assert f"resumed from {before.path}" in finished.output
    assert same_in_every_bit(run, reference)


@pytest.mark.parametrize("name", ["state.json", "config.toml"])
def test_a_damaged_small_file_is_passed_over_before_anything_starts(name, start, run, reference):
    shutil.copytree(reference, run)
    newest = find_checkpoints(run / "checkpoints")[-1]
    file = newest.path / name
    file.write_text(file.read_text().replace("42", "43").replace('"step": 38', '"step": 37'))
    finished = start(2)
    assert finished.code == 0, finished.output
    assert f"{newest.path} is damaged and passed over: {file} is damaged" in finished.output
    assert same_in_every_bit(run, reference)


def test_a_phase_with_a_layout_of_its_own_is_rebuilt_from_its_boundary(run, reference, tmp_path, small_data):
    """Not resharding changes no number, but it is another layout, and validation leaves its weights gathered."""
    layout = 'name = "mix"\nparallel = { reshard_after_forward = false }'
    phases = harness.PHASES.replace('name = "mix"', layout).replace('name = "anneal"', layout.replace("mix", "anneal"))
    config = harness.write_small_config(tmp_path, small_data, tmp_path / "outputs", phases=phases)
    result = train(config, 2)
    assert result.code == 0, result.output
    assert same_in_every_bit(run, reference)
    again = train(config, 2)
    assert "is complete" in again.output


def test_phases_on_other_meshes_see_the_same_rows(run, reference, tmp_path, small_data):
    """Weights cut over two ranks, then matrices, then sequences; stopped, refused on three ranks, ended on four."""
    mix = 'name = "mix"\nparallel = { tensor = 2 }\nactivation_checkpoint = { mode = "selective" }'
    anneal = 'name = "anneal"\nparallel = { context = 2 }\nactivation_checkpoint = { mode = "full" }'
    phases = harness.PHASES.replace('name = "mix"', mix).replace('name = "anneal"', anneal)
    config = harness.write_small_config(tmp_path, small_data, tmp_path / "outputs", phases=phases)
    stopped = train(config, 2, at_line="step 32/", action=harness.stop)
    assert stopped.code == 75, stopped.output
    for line in ("2 shards x 1 context x 1 tensor", "1 shard x 1 context x 2 tensor", "1 shard x 2 context x 1 tensor"):
        assert f"mesh: 2 ranks = 1 replica x {line}" in stopped.output
    refused = train(config, 3)
    assert refused.code == 2
    assert "parallel.context = 2 does not divide the 3 ranks" in refused.output
    finished = train(config, 4)
    assert finished.code == 0, finished.output
    lines, expected = metrics(run), metrics(reference)
    assert column(lines, "step") == column(expected, "step")
    assert column(lines, "batch_fingerprint") == column(expected, "batch_fingerprint")
    for line, other in zip(lines[:30], expected[:30], strict=True):
        assert math.isclose(line["loss"], other["loss"], rel_tol=2e-5)
    for name, loss in validations(reference)[-1]["validation_loss"].items():
        assert abs(validations(run)[-1]["validation_loss"][name] - loss) < 0.02


def test_start_from_a_checkpoint_of_another_run_goes_on_with_its_rows(reference, run, tmp_path, small_data):
    start_from = f'name = "mix"\nstart_from = "{reference}/checkpoints/step-00000016"\nlr = {{ shape = "linear", '
    start_from += 'from = 0.81, to = 1.0, over = "4 steps" }'  # where the first run's warm-up of 20 steps stood
    phases = harness.PHASES.split("[[curriculum]]")
    tail = "[[curriculum]]" + "[[curriculum]]".join(phases[2:])
    config = harness.write_small_config(
        tmp_path, small_data, tmp_path / "outputs", phases=tail.replace('name = "mix"', start_from)
    )
    result = train(config, 2)
    assert result.code == 0, result.output
    assert column(metrics(run), "step") == list(range(17, STEPS + 1))
    expected = metrics(reference)[16:]
    assert column(metrics(run), "batch_fingerprint") == column(expected, "batch_fingerprint")
    assert math.isclose(metrics(run)[0]["loss"], expected[0]["loss"], rel_tol=1e-9)
    other_model = train(config, 2, "--model.embedding_scale=3.0", "--run.name=other")
    assert other_model.code == 2
    assert "model.embedding_scale: 10.0 -> 3.0" in other_model.output
    other_seed = train(config, 2, "--run.seed=1", "--run.name=other")
    assert other_seed.code == 2
    assert "run.seed: 42 -> 1" in other_seed.output
    assert "kernels:" not in other_model.output + other_seed.output  # refused before any worker was started


def test_the_last_phase_can_be_made_longer_after_the_end(reference, start, run, tmp_path, small_data):
    shutil.copytree(reference, run)
    longer = harness.PHASES.replace('length = "8 steps"', 'length = "12 steps"')
    longer = longer.replace('over = "8 steps"', 'over = "12 steps"')
    config = harness.write_small_config(tmp_path, small_data, tmp_path / "outputs", phases=longer)
    result = train(config, 2)
    assert result.code == 0, result.output
    assert column(metrics(run), "step") == list(range(1, STEPS + 5))
    assert metrics(run)[:STEPS] == metrics(reference)


def test_a_changed_past_is_refused_with_every_difference(reference, start, run):
    shutil.copytree(reference, run)
    result = start(2, "--run.seed=7", "--phase.length=50 steps")
    assert result.code == 2
    assert "run.seed: 42 -> 7" in result.output
    assert "phase.stable.length" in result.output
    assert "--allow-change" in result.output
    assert "Traceback" not in result.output
    assert metrics(run) == metrics(reference)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 12 MiB, small enough to fill."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a small file system")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_disk_at_a_save_loses_nothing(small_disk, tmp_path, small_data, reference):
    config = harness.write_small_config(tmp_path, small_data, small_disk)
    filler = small_disk / "filler"

    def fill(_: int) -> None:
        descriptor = os.open(filler, os.O_CREAT | os.O_WRONLY)
        with pytest.raises(OSError, match="No space left"):
            while True:
                os.write(descriptor, bytes(4096))
        os.close(descriptor)

    failed = train(config, 2, at_line="step 11/", action=fill)
    assert failed.code == 1, failed.output
    assert "is full; free some space" in failed.output
    assert "Traceback" not in failed.output
    assert [checkpoint.step for checkpoint in find_checkpoints(small_disk / "small" / "checkpoints")] == [7]
    filler.unlink()
    finished = train(config, 2)
    assert finished.code == 0, finished.output
    assert same_in_every_bit(small_disk / "small", reference)
