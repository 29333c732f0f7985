"""The sandbox really stops what it says it stops. Each program is a process of its own."""

from __future__ import annotations

import os
import tempfile
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


def test_a_program_is_the_main_module() -> None:
    programs = [
        "import pickle\nclass A: pass\nassert type(pickle.loads(pickle.dumps(A()))) is A",
        "import sys\nassert vars(sys.modules['__main__']) is globals() and __name__ == '__main__'",
    ]
    assert [run_program(program).reason for program in programs] == ["", ""]


# What a program can see of the guard: the main module, the frames below its own, and those of an exception.
TRIED = "import os\nos.system('true')"
ESCAPES = {
    "import __main__\n__main__.refused = ()": "os.system is not allowed here",
    "import sys\nframe = sys._getframe()\n"
    "while frame:\n    frame.f_globals['refused'] = ()\n    frame = frame.f_back": "os.system is not allowed here",
    "try:\n    __import__('os').system('true')\nexcept PermissionError as error:\n"
    "    frame = error.__traceback__.tb_next.tb_frame\n    assert frame.f_code.co_name == 'guard'\n"
    "    frame.f_globals['refused'] = frame.f_locals['refused'] = ()\n    assert not frame.f_code.co_freevars": (
        "os.system is not allowed here"
    ),
    "import gc\ngc.get_objects()": "gc.get_objects is not allowed here",
    "import __main__, os\nos.write(1, __main__.word.encode())\nos._exit(0)": "has no attribute 'word'",
}


def test_the_guard_is_not_undone_from_within() -> None:
    with ThreadPoolExecutor(2) as pool:
        programs = [f"{escape}\n{TRIED}" for escape in ESCAPES]
        for program, outcome in zip(programs, pool.map(run_program, programs), strict=True):
            reason = ESCAPES[program.removesuffix(f"\n{TRIED}")]
            assert not outcome.passed and reason in outcome.reason, (program, outcome)


def test_no_frame_that_a_program_sees_holds_the_word() -> None:
    program = """
import sys
seen, frame = {}, sys._getframe()
while frame:
    seen |= {**frame.f_globals, **frame.f_locals}
    frame = frame.f_back
assert {name for name in seen if not name.startswith("__")} == {"sys", "seen", "frame"}, list(seen)
"""
    assert run_program(program).reason == ""


def test_no_end_of_a_program_ends_the_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = run_program("import signal\nsignal.raise_signal(40)")  # a signal without a name
    assert outcome.reason == "ended by signal 40"
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def cleanup(folder: tempfile.TemporaryDirectory[str]) -> None:
        raise RecursionError  # as of folders in folders that are deeper than Python's stack

    monkeypatch.setattr(tempfile.TemporaryDirectory, "cleanup", cleanup)
    assert run_program("assert False").reason == "AssertionError"


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
