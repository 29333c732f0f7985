"""The sandbox really stops what it says it stops. Each program is a process of its own."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from titan_yulan.errors import UserError
from titan_yulan.eval.sandbox import check_sandbox, run_program

SECONDS = 4.0


@pytest.fixture(autouse=True)
def sandbox() -> None:
    try:
        check_sandbox()
    except UserError as error:
        pytest.skip(str(error))


def test_programs_that_pass_and_fail() -> None:
    cases = {
        "assert 1 + 1 == 2": (True, ""),
        "print('x')\nprint('y' * 9000)": (True, ""),
        "import math, typing, collections, re, heapq\nassert math.comb(4, 2) == 6": (True, ""),
        "open('a', 'w').write('x')\nassert open('a').read() == 'x'": (True, ""),
        "import os\nassert set(os.environ) <= {'PATH', 'LANG', 'OMP_NUM_THREADS', 'LC_CTYPE'}": (True, ""),
        "assert 1 + 1 == 3": (False, "AssertionError"),
        "def f(:": (False, "SyntaxError"),
        "def f(): f()\nf()": (False, "RecursionError"),
        "import sys\nsys.exit(0)": (False, "it left before its end"),
        "import os\nos._exit(0)": (False, "it left before its end"),
        "input()": (False, "EOFError"),
        "print('x' * 10**8)": (False, "File too large"),
        "open('big', 'w').write('x' * 10**8)": (False, "File too large"),
        "x = [0] * 10**10": (False, "MemoryError"),
        "x = []\nwhile True: x.append(bytes(10**8))": (False, "MemoryError"),
    }
    with ThreadPoolExecutor(2) as pool:
        for program, outcome in zip(cases, pool.map(run_program, cases), strict=True):
            passed, reason = cases[program]
            assert outcome.passed == passed and reason in outcome.reason, (program, outcome)


def test_an_endless_loop_and_a_sleeper_are_ended() -> None:
    begin = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        programs = ["while True: pass", "import time\ntime.sleep(1000)"]
        outcomes = list(pool.map(lambda program: run_program(program, seconds=2.0), programs))
    assert [outcome.reason for outcome in outcomes] == ["not done after 2 s"] * 2
    assert time.monotonic() - begin < 30


def test_nothing_outside_the_folder_is_changed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("whole")
    mode = victim.stat().st_mode
    programs = [
        f"open({str(victim)!r}, 'w')",
        f"open({str(victim)!r}, 'a').write('x')",
        f"open({str(tmp_path / 'new')!r}, 'w')",
        f"import os\nos.remove({str(victim)!r})",
        f"import os\nos.truncate({str(victim)!r}, 0)",
        f"import os\nos.rename({str(victim)!r}, 'mine')",
        f"import os\nos.mkdir({str(tmp_path / 'folder')!r})",
        f"import os\nos.symlink('x', {str(tmp_path / 'link')!r})",
        f"import os\nos.chmod({str(victim)!r}, 0)",
        f"import os\nos.link({str(victim)!r}, 'mine')",
    ]
    with ThreadPoolExecutor(2) as pool:
        for program, outcome in zip(programs, pool.map(run_program, programs), strict=True):
            denied = any(word in outcome.reason for word in ("PermissionError", "OSError", "not allowed"))
            assert not outcome.passed and denied, (program, outcome)
    assert victim.read_text() == "whole" and victim.stat().st_mode == mode
    assert os.listdir(tmp_path) == ["victim"]


def test_no_processes_and_no_sockets() -> None:
    programs = [
        "import subprocess\nsubprocess.run(['true'])",
        "import os\nos.fork()",
        "import os\nos.system('true')",
        "import os\nos.kill(os.getppid(), 9)",
        "import socket\nsocket.socket()",
        "import ctypes\nctypes.CDLL(None)",
        "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (-1, -1))",
    ]
    with ThreadPoolExecutor(2) as pool:
        for program, outcome in zip(programs, pool.map(run_program, programs), strict=True):
            assert not outcome.passed and "is not allowed here" in outcome.reason, (program, outcome)


def test_without_landlock_nothing_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    with pytest.raises(UserError, match="this system cannot keep programs that a model writes from writing"):
        check_sandbox()
