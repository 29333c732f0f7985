"""Saving while training goes on, on two ranks; and a process that is killed in the middle of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import background
from tests.distributed.ranks import run_ranks
from titan_yulan import cli
from titan_yulan.checkpoint.layout import find_checkpoints, find_damage, remove_leftovers, step_folder

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("background")


@pytest.fixture(scope="module")
def saved(folder: Path) -> list[dict[str, Any]]:
    return run_ranks(background.in_the_background, 2, folder)


def test_training_goes_on_while_a_checkpoint_that_does_not_exist_yet_is_written(saved: list[dict[str, Any]]) -> None:
    for rank in saved:
        assert rank["snapshot"]["in flight"] == (True, [])
        assert rank["snapshot"]["joined"] == (False, [1])


def test_the_content_is_that_of_the_moment_of_the_save_to_the_last_bit(saved: list[dict[str, Any]]) -> None:
    for rank in saved:
        background_hashes, waited_hashes = rank["snapshot"]["hashes"]
        assert background_hashes == waited_hashes
        assert {name for name in background_hashes if name.endswith(".distcp")} >= {"__0_0.distcp", "__1_0.distcp"}
        for loaded, expected in zip(rank["snapshot"]["loaded"], rank["snapshot"]["expected"], strict=True):
            assert loaded.keys() == expected.keys()
            assert all(torch.equal(loaded[name], expected[name]) for name in expected)
        before, after = rank["snapshot"]["expected"]
        moments = [name for name in before if name.endswith("exp_avg_sq")]
        assert moments and not any(torch.equal(before[name], after[name]) for name in moments)  # it did train


def test_copies_are_laid_out_as_the_tensors_in_every_layout(tmp_path: Path) -> None:
    for rank in run_ranks(background.layouts, 4, tmp_path):
        assert rank.keys() == background.LAYOUTS.keys()
        for in_the_background, waited_for in rank.values():
            assert in_the_background == waited_for


def test_the_memory_of_the_copies_is_used_again(saved: list[dict[str, Any]]) -> None:
    for rank in saved:
        first, second = rank["snapshot"]["memory"]
        assert first == second


def test_every_checkpoint_is_reported_with_the_time_that_training_waited(saved: list[dict[str, Any]]) -> None:
    for rank in saved:
        lines = rank["snapshot"]["lines"]
        assert len(lines) == 3 and all(line.startswith("saved ") and "training waited" in line for line in lines)


def test_a_save_begins_after_the_one_before_is_finished(saved: list[dict[str, Any]]) -> None:
    for rank in saved:
        assert rank["order"] == ["waiting", "1 saved", "2 begins", "2 saved"]


@pytest.mark.parametrize("limited", [0, 1])
def test_a_failure_on_one_rank_is_the_same_error_on_all_at_the_next_join(
    saved: list[dict[str, Any]], limited: int
) -> None:
    first, second = (rank["failures"][limited] for rank in saved)
    assert first["messages"] == second["messages"]
    joined, next_save, waited, again, repeated = first["messages"]
    assert joined.startswith("the checkpoint of step 2 could not be written to") and "File too large" in joined
    assert joined == next_save == waited
    assert again == repeated == ""
    assert first["after"] == [1, 2]


@pytest.mark.parametrize("limited", [0, 1])
def test_nothing_of_a_failed_save_stays(saved: list[dict[str, Any]], limited: int) -> None:
    for rank in saved:
        assert rank["failures"][limited]["left"] == (False, [1])


def test_old_checkpoints_that_cannot_be_deleted_are_an_error_on_every_rank(saved: list[dict[str, Any]]) -> None:
    for rank in saved:
        message, steps = rank["prune"]
        assert "step-00000002 was written, but" in message and "Permission denied" in message
        assert steps == [1, 2]


def test_diff_names_what_differs(saved: list[dict[str, Any]], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b, c, same = (str(folder / "different" / name) for name in ("a", "b", "c", "same"))
    assert cli.main(["checkpoint", "diff", a, same]) == 0
    assert capsys.readouterr().out == ""
    assert cli.main(["checkpoint", "diff", a, b]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["configuration", "state", "state", "tensor", "tensor", lines[-1]]
    assert lines[0].startswith("configuration: run.seed: ")
    assert lines[1:3] == ["state: step: 1 -> 2", "state: row: 7 -> 14"]
    assert lines[3] == "tensor: model.alpha: differs by up to 0.25, with values up to 1.5"
    assert lines[4].startswith("tensor: model.w: differs by up to 1e+03, with values up to ")
    assert lines[5] == "2 of 2 tensors of the same shape differ"
    assert cli.main(["checkpoint", "diff", a, c]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" in ")[0] for line in lines[:2]] == [
        "tensor: model.beta: only",
        "tensor: model.w: only",
    ]
    assert lines[2:] == ["tensor: model.alpha: float32 (1,) -> float32 (2,)"]


def test_diff_of_a_damaged_checkpoint_is_refused(
    saved: list[dict[str, Any]], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    c = folder / "different" / "c"
    file = step_folder(c, 1) / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-1])
    assert cli.main(["checkpoint", "diff", str(folder / "different" / "a"), str(c)]) == 1
    assert "is damaged: " in capsys.readouterr().err


def test_a_process_killed_while_it_writes_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    program = "import sys; from tests.distributed.background import *; die_while_saving(Path(sys.argv[1]))"
    command = [sys.executable, "-c", program, str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert {child.stdout.readline(), child.stdout.readline()} == {"writing\n", "training\n"}
        child.kill()
    half = step_folder(tmp_path, 2)
    assert (half / "__0_0.distcp").stat().st_size > 0
    assert [checkpoint.step for checkpoint in find_checkpoints(tmp_path)] == [1]
    assert find_damage(find_checkpoints(tmp_path)[0]) == []
    assert remove_leftovers(tmp_path) == [half] and not half.exists()
