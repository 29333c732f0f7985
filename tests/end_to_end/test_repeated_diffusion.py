"""Masked diffusion on data that is read eight times over: killed on 2 ranks, ended on 1 by its kill switch, finished
on 3. The rows are those of the plan, and what validated best is kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.end_to_end import harness
from tests.end_to_end.harness import column, metrics, validations
from tests.end_to_end.miniature import read_stream
from titan_yulan import config as configuration
from titan_yulan.checkpoint.layout import find_checkpoints, open_checkpoint
from titan_yulan.curriculum.plan import Plan
from titan_yulan.monitor.best import mean_validation_losses
from titan_yulan.monitor.events import read_events

STEPS = 32  # many, because the kill switch is looked for once a second
PHASES = """
[[curriculum]]
name = "repeated"
sequence_length = 48
mix = { code = 2, math = 1, prose = 1 }
unique_tokens = 1344 # 4 steps of 7 rows
epochs = 8
"""
KEYS = (
    "--model.vocab_size=1088",  # rows behind the vocabulary, the first of them for the mask
    "--model.hidden_dropout=0.1",
    "--objective.kind=masked_diffusion",
    "--checkpoint.every=28 rows",
    "--checkpoint.keep=1",
    "--checkpoint.keep_best=true",
    "--eval.every=672 tokens",  # 2 steps
)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, small_data: Path):
    folder = tmp_path_factory.mktemp("diffusion")
    switch = folder / "switch"
    keys = (*KEYS, f"--run.kill_switch={switch}")
    path = harness.write_small_config(folder, small_data, folder / "outputs", phases=PHASES)
    results = [
        harness.train(path, 2, *keys, at_line="step 6/", action=harness.kill_all),
        harness.train(path, 1, *keys, at_line="step 9/", action=lambda pid: switch.touch()),
        harness.train(path, 1, *keys),
    ]
    switch.unlink()
    results.append(harness.train(path, 3, *keys))
    return folder / "outputs" / "small", configuration.load(path, keys).config, results


def test_the_kill_switch_ends_a_run_and_refuses_a_start(report) -> None:
    _, config, (_, stopped, refused, finished) = report
    assert [result.code for result in (stopped, refused, finished)] == [75, 2, 0], stopped.output + finished.output
    assert f"kill switch {config.run.kill_switch}, to be removed before the next start" in stopped.output
    assert f"run.kill_switch: {config.run.kill_switch} is there, so nothing is started; remove it" in refused.output


def test_every_step_has_the_rows_of_the_plan_on_any_number_of_ranks(report) -> None:
    run, config, results = report
    plan = Plan(config)
    prints, streams = read_stream(plan)
    lines = metrics(run)
    assert column(lines, "step") == list(range(1, STEPS + 1)), results[-1].output
    assert column(lines, "batch_fingerprint") == prints
    assert [event["world"] for event in read_events(run) if event["event"] == "group"] == [2, 1, 3]
    # each source its share of the unique tokens, again and again
    for name, tokens in (("code", 672), ("math", 336), ("prose", 336)):
        stream = streams[name]
        assert abs(len(stream) - 8 * tokens) <= 48
        epochs = stream[: len(stream) // tokens * tokens].reshape(-1, tokens)
        assert len(epochs) >= 7 and all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)


def test_the_best_checkpoint_is_kept_and_found(report) -> None:
    run, config, results = report
    losses = mean_validation_losses(run, config)
    assert column(validations(run), "step") == list(range(0, STEPS + 1, 2)), results[-1].output
    best = min((step for step in losses if step), key=lambda step: losses[step])
    found = open_checkpoint(run / "checkpoints" / "best")
    assert found.step == best < STEPS and found.state().step == best
    assert [checkpoint.step for checkpoint in find_checkpoints(run / "checkpoints")] == [best, STEPS]
