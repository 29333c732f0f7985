"""Preparing in parts: what merging asks for, and kill -9 before any change of the folders."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.data.making import BYTES, content, make, write_files
from titan_yulan import cli
from titan_yulan.data import prepare as prepare_module
from titan_yulan.data import tokenise
from titan_yulan.data.prepare import merge
from titan_yulan.data.source import Source
from titan_yulan.data.tokenizer import save_ranks
from titan_yulan.errors import UserError

OPTIONS = {"shard_tokens": 300, "validation_share": 0.4, "deduplicate": True}


def quiet(line: str) -> None: ...


def contents(folder: Path) -> dict[str, dict[str, bytes]]:
    return {name: content(folder / name) for name in ("out", "val")}


def in_one(inputs: str, folder: Path) -> None:
    make(inputs, folder / "out", validation_output=folder / "val", **OPTIONS)


def in_parts(inputs: str, folder: Path) -> None:
    for part in (1, 2):
        make(inputs, folder / "out", validation_output=folder / "val", part=(part, 2), **OPTIONS)
    merge(folder / "out", workers=1, say=quiet)


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenise, "_GROUP_BYTES", 300)


def killed_at(change: int, work: Callable[[], None]) -> bool:
    """Do the work in a process that kills itself before its n-th change of a folder; was it killed?"""
    child = os.fork()
    if child:
        return os.WIFSIGNALED(os.waitpid(child, 0)[1])
    changes = iter(range(1, 10**6))

    def counting(function: Callable) -> Callable:
        def call(*arguments, **options):
            if next(changes) == change:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    try:
        for name in ("rename", "unlink", "rmdir", "mkdir"):
            setattr(os, name, counting(getattr(os, name)))
        work()
    finally:
        os._exit(0)
    return False


@pytest.mark.parametrize("work", [in_one, in_parts])
def test_killed_before_any_change_of_the_folders(tmp_path: Path, small_groups: None, work: Callable) -> None:
    inputs = write_files(tmp_path / "in", files=4, rows=6)
    (tmp_path / "whole").mkdir()
    in_one(inputs, tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    kills = 0
    for change in range(1, 10**6, 7 if work is in_parts else 5):
        folder = tmp_path / str(change)
        folder.mkdir()
        if not killed_at(change, lambda folder=folder: work(inputs, folder)):
            break
        kills += 1
        work(inputs, folder)
        assert contents(folder) == expected
        assert sorted(os.listdir(folder)) == [".out.lock", "out", "val"]
        shutil.rmtree(folder)
    assert kills > 9


def test_merging_asks_for_all_parts_of_one_request(tmp_path: Path, small_groups: None) -> None:
    inputs, out = write_files(tmp_path / "in", files=5, rows=6), tmp_path / "out"
    with pytest.raises(UserError, match="there is no part in"):
        merge(out, say=quiet)
    report = make(inputs, out, part=(2, 3))
    assert report.part == "2/3" and 0 < report.documents < 30 and "part 2/3" in report.lines()[0]
    with pytest.raises(UserError, match=r"missing: part 1/3 \(0 of 2 groups.*done\), part 3/3 \(0 of 1"):
        merge(out, say=quiet)
    for wrong in ({"seed": 1, "part": (1, 3)}, {"part": (1, 2)}):
        with pytest.raises(UserError, match="part 2/3 of another request"):
            make(inputs, out, **wrong)
    with pytest.raises(UserError, match="part 1/2 of another request"):
        make(inputs, tmp_path / "held", part=(1, 2), validation_output=tmp_path / "v1", validation_share=0.4)
        make(inputs, tmp_path / "held", part=(2, 2), validation_output=tmp_path / "v2", validation_share=0.4)
    for wrong in ((0, 3), (4, 3)):
        with pytest.raises(UserError, match="only parts 1/n to n/n"):
            make(inputs, out, part=wrong)
    for part in (1, 3):
        make(inputs, out, part=(part, 3))
    merged = merge(out, workers=2, say=quiet)
    assert (merged.documents, merged.reused) == (30, False)
    assert merge(out, say=quiet).reused
    assert make(inputs, out, part=(1, 3)).reused and not (tmp_path / "out.parts").exists()


def test_a_merge_that_waited_for_another_finds_its_work_done(
    tmp_path: Path, small_groups: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, out = write_files(tmp_path / "in", files=2, rows=6), tmp_path / "out"
    make(inputs, out, part=(1, 1))
    locked, reports = prepare_module.locked, []

    def after_another(*arguments):
        monkeypatch.setattr(prepare_module, "locked", locked)
        reports.append(merge(out, workers=1, say=quiet))
        return locked(*arguments)

    monkeypatch.setattr(prepare_module, "locked", after_another)
    reports.append(merge(out, workers=1, say=quiet))
    assert [report.reused for report in reports] == [False, True]
    assert sorted(os.listdir(tmp_path)) == [".out.lock", "in", "out"]


def test_parts_of_two_requests_are_not_merged(tmp_path: Path, small_groups: None) -> None:
    inputs, out = write_files(tmp_path / "in", files=5, rows=6), tmp_path / "out"
    make(inputs, out, part=(1, 2))
    make(inputs, tmp_path / "other", part=(2, 2), seed=1)
    shutil.move(tmp_path / "other.parts" / "part-2-of-2", tmp_path / "out.parts")
    with pytest.raises(UserError, match=r"different requests \(1/2, 2/2\)"):
        merge(out, say=quiet)
    recipe = tmp_path / "out.parts" / "part-1-of-2" / "recipe.json"
    recipe.write_text(recipe.read_text().replace('"version": 1', '"version": 0'))
    for work in (lambda: merge(out, say=quiet), lambda: make(inputs, out, part=(1, 2))):
        with pytest.raises(UserError, match="another version"):
            work()


def test_command_line_in_parts(
    tmp_path: Path, small_groups: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_files(tmp_path / "in", files=5, rows=6)
    monkeypatch.chdir(tmp_path)
    save_ranks("v.tiktoken", BYTES.ranks)
    shared = ["--name", "a", "--tokenizer", "v.tiktoken", "--minimum-tokens", "0", "--order=keep", "in"]
    shared += ["--workers", "1"]
    for part in ("1/2", "2/2"):
        assert cli.main(["data", "prepare", *shared, "--output", "x/parts", "--part", part]) == 0
    assert cli.main(["data", "merge", "x/parts"]) == 0
    assert cli.main(["data", "prepare", *shared, "--output", "x/whole"]) == 0
    assert content(tmp_path / "x/parts") == content(tmp_path / "x/whole")
    assert Source.open("x/whole").ordered
    with pytest.raises(SystemExit):
        cli.main(["data", "prepare", *shared, "--output", "x/whole", "--part", "2"])
    assert "'2' is not I/N, such as 2/4" in capsys.readouterr().err
