"""Preparing that is killed, repeated, started twice, or runs out of disk."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.data.making import content, documents, make, write_files
from titan_yulan.data import prepare as prepare_module
from titan_yulan.data import tokenise, work
from titan_yulan.data.report import Report
from titan_yulan.data.source import Source
from titan_yulan.errors import RunError, UserError


class Killed(BaseException):
    """Stands for the end of the process; no handler of ours catches it."""


@pytest.mark.parametrize("where", ["tokenise_unit", "arrange", "write_bucket", "write_description"])
@pytest.mark.parametrize("calls", [1, 3])
def test_interrupted_anywhere_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, calls: int
) -> None:
    monkeypatch.setattr(tokenise, "_GROUP_BYTES", 2000)
    inputs = write_files(tmp_path / "in")
    options = {"shard_tokens": 1000, "validation_share": 0.2}
    make(inputs, tmp_path / "a", validation_output=tmp_path / "av", **options)
    module = prepare_module if where == "tokenise_unit" else work
    original, count = getattr(module, where), iter(range(1000))
    calls = {"write_description": min(calls, 2), "arrange": 1}.get(where, calls)

    def interrupted(*arguments):
        result = original(*arguments)
        if next(count) + 1 >= calls:
            raise Killed
        return result

    with monkeypatch.context() as patch:
        patch.setattr(module, where, interrupted)
        with pytest.raises(Killed):
            make(inputs, tmp_path / "b", validation_output=tmp_path / "bv", **options)
    assert not (tmp_path / "b").exists() and not (tmp_path / "bv").exists()
    done: list[int] = []
    monkeypatch.setattr(
        prepare_module, "tokenise_unit", lambda job, unit: done.append(unit.index) or tokenise.tokenise_unit(job, unit)
    )
    make(inputs, tmp_path / "b", validation_output=tmp_path / "bv", **options)
    assert done == list(range(calls, max(done) + 1)) if where == "tokenise_unit" else done == []
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert content(tmp_path / "av") == content(tmp_path / "bv")
    assert not list(tmp_path.glob("*.partial"))


PREPARE_AND_DIE = """
import os, signal, sys
from pathlib import Path
from titan_yulan.data import assemble, prepare as module, tokenise
from titan_yulan.data.tokenizer import Tokenizer
tokenise._GROUP_BYTES = 2000
def die(folder, *shard):  # in a worker, with the unit's files written but not in place, or before a shard is written
    if folder.name == "00004.tmp" or shard[:1] == (3,):
        os.kill(os.getpid() if sys.argv[3] == "worker" else os.getppid(), signal.SIGKILL)
    original(folder, *shard)
if sys.argv[4] == "units":
    original, tokenise.sync_files = tokenise.sync_files, die
else:
    original, assemble.write_shard = assemble.write_shard, die
tokenizer = Tokenizer({bytes([value]): value for value in range(256)})
module.prepare("test", [sys.argv[1]], sys.argv[2], tokenizer, workers=2, shard_tokens=1000, minimum_tokens=0)
"""


@pytest.mark.parametrize("half", ["units", "shards"])
@pytest.mark.parametrize("victim", ["worker", "parent"])
def test_killed_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: str, half: str) -> None:
    inputs = write_files(tmp_path / "in")
    command = [sys.executable, "-c", PREPARE_AND_DIE, inputs, str(tmp_path / "b"), victim, half]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert not (tmp_path / "b").exists()
    if victim == "worker":
        assert "RunError: a worker process died" in run.stderr
    else:
        assert run.returncode == -signal.SIGKILL
    monkeypatch.setattr(tokenise, "_GROUP_BYTES", 2000)
    lines: list[str] = []
    make(inputs, tmp_path / "b", shard_tokens=1000, say=lines.append)
    assert "going on" in lines[0]
    make(inputs, tmp_path / "a", shard_tokens=1000)
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_same_request_is_reused_and_another_refused(tmp_path: Path) -> None:
    inputs = write_files(tmp_path / "in", files=3)
    make(inputs, tmp_path / "out")
    before = content(tmp_path / "out")
    assert make(inputs, tmp_path / "out").reused
    with pytest.raises(UserError, match="delete the folder"):
        make(inputs, tmp_path / "out", order="keep")
    (tmp_path / "in" / "001.jsonl").write_text('{"text": "changed"}')
    with pytest.raises(UserError, match="delete the folder"):
        make(inputs, tmp_path / "out")
    assert content(tmp_path / "out") == before


def test_unfinished_work_of_another_request_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = write_files(tmp_path / "in", files=3)
    with monkeypatch.context() as patch:
        patch.setattr(work, "arrange", lambda *arguments: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            make(inputs, tmp_path / "out")
    (tmp_path / "in" / "001.jsonl").write_text('{"text": "changed"}')
    lines: list[str] = []
    make(inputs, tmp_path / "out", say=lines.append)
    assert "removing" in lines[0]
    assert "changed" in documents(Source.open(tmp_path / "out"))


def test_rows_that_an_earlier_start_skipped_are_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\nbroken\n')
    with monkeypatch.context() as patch:
        patch.setattr(work, "arrange", lambda *arguments: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            make(str(tmp_path / "a.jsonl"), tmp_path / "out")
    for folder in ("out.partial", "out"):
        with pytest.raises(UserError, match=f"{folder} was made with --on-bad-row skip, which left out 1 bad rows"):
            make(str(tmp_path / "a.jsonl"), tmp_path / "out", on_bad_row="fail")
        make(str(tmp_path / "a.jsonl"), tmp_path / "out")


def test_two_starts_wait_for_each_other(tmp_path: Path) -> None:
    inputs = write_files(tmp_path / "in", files=3)
    reports: list[Report] = []
    lines: list[str] = []
    entered, second_waits = threading.Event(), threading.Event()

    def first_says(line: str) -> None: ...

    def second_says(line: str) -> None:
        lines.append(line)
        second_waits.set()

    def second() -> None:
        entered.wait(20)
        reports.append(make(inputs, tmp_path / "out", say=second_says))

    thread = threading.Thread(target=second)
    thread.start()
    with prepare_module.locked(tmp_path / ".out.lock", first_says):
        entered.set()
        assert second_waits.wait(20)
        assert not (tmp_path / "out").exists()
    thread.join(20)
    assert "waiting for another process" in lines[0]
    assert [report.reused for report in reports] == [False]


def test_full_disk_is_explained_and_leaves_nothing_visible(tmp_path: Path) -> None:
    inputs = write_files(tmp_path / "in", files=30)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (4000, 10_000):  # while tokenising, while writing a shard
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
        try:
            with pytest.raises(RunError, match="no space left"):
                make(inputs, tmp_path / "out")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.rglob("*.tmp"))
    make(inputs, tmp_path / "out")
    assert Source.open(tmp_path / "out").documents == 300
