"""What `titan-yulan checkpoint list` and `verify` say."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoint.making import make_checkpoint
from titan_yulan.checkpoint.report import list_checkpoints, verify_checkpoints
from titan_yulan.errors import RunError


def test_list_has_a_line_for_each(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    make_checkpoint(folder, 1)
    make_checkpoint(folder, 20, phase="anneal", phase_finished=True)
    damaged = make_checkpoint(folder, 30)
    (damaged.path / "state.json").write_text("{")
    head, first, last, broken = list_checkpoints(tmp_path)
    assert head.split() == ["step", "tokens", "GiB", "phase"]
    assert first.split() == ["1", "128", "0.000", "a"]
    assert last.split(maxsplit=3) == ["20", "2,560", "0.000", "anneal (end of phase)"]
    assert broken.split()[:2] == ["30", "damaged:"]
    assert list_checkpoints(folder) == [head, first, last, broken]


def test_verify_names_what_is_damaged(tmp_path: Path) -> None:
    made = [make_checkpoint(tmp_path / "checkpoints", step) for step in (1, 2)]
    lines, sound = verify_checkpoints(tmp_path)
    assert sound and [line.split(": ")[1] for line in lines] == ["sound", "sound"]
    (made[0].path / "__0_0.distcp").write_bytes(bytes(1000))
    lines, sound = verify_checkpoints(tmp_path)
    assert not sound and "SHA-256 differs" in lines[0] and lines[1].endswith(": sound")
    assert verify_checkpoints(made[1].path) == ([f"{made[1].path}: sound"], True)
    assert verify_checkpoints(made[0].path)[1] is False


def test_a_folder_without_checkpoints_is_an_error(tmp_path: Path) -> None:
    for report in (list_checkpoints, verify_checkpoints):
        with pytest.raises(RunError, match="holds no complete checkpoint"):
            report(tmp_path)
