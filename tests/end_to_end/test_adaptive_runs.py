"""A mixture that follows perplexities, in whole runs: restarted, on another world size, replayed from its log."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from tests.end_to_end import harness
from tests.end_to_end.harness import column, metrics, same_in_every_bit, train
from titan_yulan.checkpoint.layout import find_checkpoints, remove
from titan_yulan.curriculum.adaptive import adjusted_shares
from titan_yulan.monitor.metrics import read_lines

STEPS, EVERY, STOPPED = 30, 8, 14
# a topic that is hardly read, and unlearned while the others are read at a high rate
PHASE = f"""
[[curriculum]]
name = "topics"
length = "{STEPS} steps"
sequence_length = 48
mix = {{ code = 0.49, math = 0.49, prose = 0.02 }}
lr = {{ shape = "constant" }}
[adaptive]
every = "{EVERY} steps"
alpha = 0.5
weights = {{ math = 0.5 }}
"""


@pytest.fixture(scope="session")
def adapted(small_data, tmp_path_factory, worker_id) -> Path:
    """Run folder of an undisturbed adaptive run on 2 ranks, with all its checkpoints."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "adapted"
    with FileLock(f"{folder}.lock"):
        if not (folder / "done").exists():
            folder.mkdir(exist_ok=True)
            config = harness.write_small_config(folder, small_data, folder / "outputs", phases=PHASE)
            result = train(config, 2, "--checkpoint.keep=99")
            assert result.code == 0, result.output
            (folder / "done").touch()
    return folder / "outputs" / "small"


@pytest.fixture
def go_on(tmp_path, small_data, adapted):
    """Go on with a copy of that run that was killed after step 14, as long as it takes."""
    run = tmp_path / "outputs" / "small"
    shutil.copytree(adapted, run)
    for checkpoint in find_checkpoints(run / "checkpoints"):
        if checkpoint.step > STOPPED:
            remove(checkpoint.path)
    config = harness.write_small_config(tmp_path, small_data, tmp_path / "outputs", phases=PHASE)

    def go_on(processes: int, *arguments: str) -> Path:
        result = train(config, processes, *arguments)
        assert result.code == 0, result.output
        assert f"goes on from step {STOPPED}" in result.output
        return run

    return go_on


def mixture(run: Path) -> list[dict]:
    return read_lines(run / "mixture.jsonl")


def test_what_got_worse_is_read_more(adapted):
    history = mixture(adapted)
    assert column(history, "step") == [0, 8, 16, 24]
    assert column(history, "row") == [7 * step for step in (0, 8, 16, 24)]
    names, grown = ["code", "math", "prose"], 0
    for before, now in itertools.pairwise(history):
        shares, old, new = (
            np.array([entry[key][name] for name in names])
            for entry, key in ((before, "shares"), (before, "perplexity"), (now, "perplexity"))
        )
        expected = adjusted_shares(shares, old, new, 0.5, np.array([1.0, 0.5, 1.0]))
        np.testing.assert_allclose([now["shares"][name] for name in names], expected, rtol=1e-12)
        worst = int(np.argmax(new - old))
        if new[worst] > old[worst]:
            grown += 1
            assert now["shares"][names[worst]] > before["shares"][names[worst]]
    assert grown  # at this learning rate some topic gets worse at first
    # the loss of every topic was measured by the very validation that is recorded
    losses = {line["step"]: line["validation_loss"] for line in harness.validations(adapted)}
    for entry in history:
        for name in names:
            assert entry["perplexity"][name] == pytest.approx(np.exp(losses[entry["step"]][name]), rel=1e-12)


def test_a_restart_changes_no_bit(adapted, go_on):
    run = go_on(2)
    assert same_in_every_bit(run, adapted) and mixture(run) == mixture(adapted)


def test_on_another_world_size_rows_are_the_same_up_to_the_next_adjustment(adapted, go_on):
    run = go_on(3)
    lines, expected = column(metrics(run), "batch_fingerprint"), column(metrics(adapted), "batch_fingerprint")
    assert len(lines) == STEPS and lines[: 2 * EVERY] == expected[: 2 * EVERY]
    for ours, theirs in zip(mixture(run), mixture(adapted), strict=True):
        assert ours["shares"] == pytest.approx(theirs["shares"], rel=0.02)  # after that, as close as rounding leaves it


def test_replayed_from_the_log_rows_are_the_same_to_the_end(adapted, go_on):
    run = go_on(3, f"--phase.mixture_history={adapted / 'mixture.jsonl'}")
    assert column(metrics(run), "batch_fingerprint") == column(metrics(adapted), "batch_fingerprint")
    history = find_checkpoints(run / "checkpoints")[-1].state().mixture_history
    assert [entry["row"] for entry in history] == column(mixture(adapted), "row")
