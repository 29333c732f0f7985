"""Distances in tokens, rows and steps; the best checkpoint and the kill switch."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.config.config_texts import BASE, phase, write
from titan_yulan.config import load
from titan_yulan.curriculum.plan import Plan
from titan_yulan.errors import UserError

EVERY = ("checkpoint.every", "eval.every", "eval.task_every")


@pytest.mark.parametrize("key", EVERY)
@pytest.mark.parametrize(
    ("text", "steps"), [("5000 rows", 625), ("5004 rows", 625), ("20K", 19), ("20480 tokens", 20), ("7 steps", 7)]
)
def test_every_distance_takes_rows_tokens_and_steps(tmp_path: Path, key: str, text: str, steps: int) -> None:
    """A step is 8 rows of 128 tokens."""
    config = load(write(tmp_path, "a.toml", BASE + phase("a")), [f"--{key}={text}"]).config
    section, name = key.split(".")
    assert Plan(config).phases[0].steps_in(getattr(getattr(config, section), name)) == steps


@pytest.mark.parametrize("key", EVERY)
@pytest.mark.parametrize(("text", "message"), [("5%", "a share belongs to a phase"), ("1.5 rows", "a whole number of")])
def test_other_distances_are_refused(tmp_path: Path, key: str, text: str, message: str) -> None:
    with pytest.raises(UserError, match=rf"{key}: found '{text}'.*{message}"):
        load(write(tmp_path, "a.toml", BASE + phase("a")), [f"--{key}={text}"])


def test_a_best_checkpoint_needs_validations(tmp_path: Path) -> None:
    path = write(tmp_path, "a.toml", BASE + phase("a"))
    keys = ["--checkpoint.keep_best=true", "--eval.every=9 rows", "--data.sources.math.validation_path=data/held_out"]
    assert load(path, keys).config.checkpoint.keep_best
    with pytest.raises(UserError, match=r"checkpoint.keep_best: .* set eval.every"):
        load(path, [keys[0], keys[2]])
    with pytest.raises(UserError, match=r"checkpoint.keep_best: no source has a held-out part"):
        load(path, keys[:2])


def test_a_kill_switch_is_a_file_of_this_machine(tmp_path: Path) -> None:
    path = write(tmp_path, "a.toml", BASE + phase("a"))
    with pytest.raises(UserError, match=r"run.kill_switch: s3:// addresses are not supported"):
        load(path, ["--run.kill_switch=s3://bucket/stop"])
