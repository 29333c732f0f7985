"""What `titan-yulan checkpoint list`, `verify` and `prune` say and do."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoint.making import make_checkpoint
from titan_yulan import cli
from titan_yulan.checkpoint.layout import find_checkpoints, point_at_best
from titan_yulan.checkpoint.report import list_checkpoints, prune_checkpoints, verify_checkpoints
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


def steps(folder: Path) -> list[int]:
    return [checkpoint.step for checkpoint in find_checkpoints(folder / "checkpoints")]


def test_the_best_one_is_named_and_kept(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    made = [make_checkpoint(folder, step) for step in (1, 2, 3)]
    point_at_best(folder, made[1])
    assert [line.endswith("a (lowest validation loss)") for line in list_checkpoints(tmp_path)[1:]] == [0, 1, 0]
    lines = prune_checkpoints(tmp_path, 1, delete=True)
    assert steps(tmp_path) == [2, 3] and lines[1].endswith("kept, lowest validation loss")
    (alone,) = list_checkpoints(folder / "best")[1:]
    assert alone.split()[0] == "2"


def test_prune_deletes_only_when_told_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in range(1, 6):
        make_checkpoint(tmp_path / "checkpoints", step, phase_finished=step == 2)
    for options, verb, left in (([], "would be deleted", [1, 2, 3, 4, 5]), (["--yes"], "deleted", [2, 4, 5])):
        assert cli.main(["checkpoint", "prune", str(tmp_path), "--keep", "2", *options]) == 0
        said = [line.split(": ", 1)[1] for line in capsys.readouterr().out.splitlines()]
        assert said == [verb, "kept, end of phase 'a'", verb, "kept, sound", "kept, sound"]
        assert steps(tmp_path) == left


def test_prune_counts_only_sound_checkpoints(tmp_path: Path) -> None:
    """Else the last one that can be loaded would go, and a damaged one stay in its place."""
    made = [make_checkpoint(tmp_path / "checkpoints", step) for step in range(1, 6)]
    (made[4].path / "__0_0.distcp").write_bytes(bytes(1000))
    (made[3].path / "manifest.json").write_text("{")
    (made[0].path / "state.json").write_text("{")
    lines = prune_checkpoints(tmp_path, keep=1, delete=True)
    assert [line.split(": ")[1] for line in lines] == [
        "kept, damaged",
        "deleted",
        "kept, sound",
        "kept, damaged",
        "kept, damaged",
    ]
    assert steps(tmp_path) == [1, 3, 4, 5]


def test_prune_keeps_at_least_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_checkpoint(tmp_path / "checkpoints", 1)
    assert cli.main(["checkpoint", "prune", str(tmp_path), "--keep", "0", "--yes"]) == 2
    assert "--keep 0: at least 1" in capsys.readouterr().err
    assert steps(tmp_path) == [1]


def test_checkpoint_verbs_refuse_addresses(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["list"], ["verify"], ["prune", "--keep", "1"], ["diff", "s3://bucket/other"]):
        assert cli.main(["checkpoint", arguments[0], "s3://bucket/run", *arguments[1:]]) == 2
        assert "s3:// addresses are not supported" in capsys.readouterr().err
