"""Saving on two ranks: failures, damage, and what is kept. The body is `saving.protocol`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import saving
from tests.distributed.ranks import run_ranks

Saved = list[dict[str, Any]]


def test_hashes_taken_while_writing_are_those_of_the_files(saved: Saved) -> None:
    assert saved[0]["sound"] == [[], [], [], []]


@pytest.mark.parametrize("failing", [0, 1])
def test_a_save_that_fails_on_one_rank_is_an_error_on_every_rank_and_leaves_nothing(saved: Saved, failing: int) -> None:
    for rank in saved:
        outcome = rank["failures"][1 - failing]
        assert outcome["message"].startswith("the checkpoint of step 2 could not be written to")
        assert "File too large" in outcome["message"]  # the system's own word, not torch's
        assert outcome["visible"] == [1] and not outcome["left"]


def test_damaged_checkpoints_are_named_and_passed_over(saved: Saved) -> None:
    for rank in saved:
        chosen, lines = rank["chosen"]
        assert chosen == 2 and len(lines) == 2
        assert "step-00000004 is damaged and passed over" in lines[0]
        assert "__1_0.distcp is damaged (its SHA-256 differs" in lines[0]
        assert "step-00000003" in lines[1] and "manifest.json cannot be read" in lines[1]


def test_sizes_alone_do_not_find_a_flipped_bit_and_the_ranks_agree(saved: Saved) -> None:
    assert [rank["chosen by size"] for rank in saved] == [4, 4]


def test_an_index_that_is_not_the_manifest_s_is_never_unpickled(saved: Saved) -> None:
    for rank in saved:
        message, unpickled = rank["planted"]
        assert ".metadata is damaged (its SHA-256 differs" in message
        assert not unpickled


def test_a_step_whose_checkpoint_is_damaged_is_saved_anew(saved: Saved) -> None:
    """Else the run would go back to the checkpoint before at every start."""
    assert dict(saved[0]["after 4"]) == {3: False, 4: False}


def test_a_step_that_is_saved_already_is_left_as_it_is(saved: Saved) -> None:
    for rank in saved:
        assert rank["again"]["as it is"] == (True, True, [".metadata"])


def test_what_one_rank_cannot_read_of_it_is_saved_anew_by_all(saved: Saved) -> None:
    for rank in saved:
        assert rank["again"]["unreadable state"] == (False, True, [".metadata"])


def test_a_file_that_cannot_be_deleted_is_no_hindrance(saved: Saved) -> None:
    """NFS keeps a file that is open elsewhere under another name, and with it the folder."""
    for rank in saved:
        assert rank["again"]["a file that stays"] == (False, True, [".metadata", ".nfs0001"])


def test_damaged_checkpoints_of_later_steps_take_no_place_of_those_kept(saved: Saved) -> None:
    assert saved[0]["after 3"] == [(3, False), (4, True)]


def test_what_is_loaded_is_what_was_saved(saved: Saved) -> None:
    for rank in saved:
        loaded, expected = rank["loaded"]
        assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


def test_another_model_is_refused_by_name_and_shape(saved: Saved) -> None:
    for rank in saved:
        shape, missing = rank["wrong"]
        assert "belongs to another model: w has shape (60001,) there and (7,) here" in shape
        assert "other has shape missing there and (1,) here" in missing


def test_an_empty_folder_holds_no_checkpoint(saved: Saved) -> None:
    assert [rank["nothing"] for rank in saved] == [None, None]


def test_a_rank_killed_while_loading_is_a_crash_of_the_others(tmp_path: Path) -> None:
    """No word against the checkpoint: a `RunError` would end the run for good; a crash lets torchrun start again."""
    with pytest.raises(AssertionError, match="rank 1 ended with code 7"):
        run_ranks(saving.die_while_loading, 2, tmp_path)
    assert (tmp_path / "met").read_text() == "RuntimeError"
