"""Run a program that a model wrote, in a process of its own that can do little.

Kept from it: processor time, real time, memory, the size of files and of its output; writing outside its temporary
folder and TCP connections (Landlock, Linux 5.13 and 6.7); from Python code also starting processes, any socket, and
changing modes, owners or times of files (an audit hook). It gets no variables of the environment and no input.

Not kept from it: making many small files, reading files that the user can read, using bugs of the interpreter or the
kernel, and, from native code that it loads and Python's own modules of it, what the audit hook refuses. One that reads
its own memory (/proc/self/mem) can find the word by which its end is known. A model that may be hostile belongs into a
virtual machine.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass

from titan_yulan.errors import UserError

SECONDS = 10.0
MEMORY = 1 << 30  # bytes of addresses
_FILE_SIZE = 1 << 20
_SHOWN = 500  # characters of an error
_CREATE_RULESET = 444  # the number of the system call, on every architecture

# Runs in the new interpreter. Its standard input holds a word and the program; the word is printed only when the
# program has run to its end, so that a program that leaves early has not passed.
_GUARD = r"""
import ctypes, os, resource, sys
from collections import deque
from functools import partial
from operator import call
folder, seconds, memory, file_size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
word, _, program = sys.stdin.read().partition("\n")
libc = ctypes.CDLL(None, use_errno=True)
abi = libc.syscall(444, None, 0, 1)
if abi < 1:
    sys.exit("no Landlock")
# write, remove and make files of all kinds; from later versions on also moving, truncating and device calls
writes = sum(1 << bit for bit in (1, *range(4, 13)))
writes |= (1 << 13 if abi >= 2 else 0) | (1 << 14 if abi >= 3 else 0) | (1 << 15 if abi >= 5 else 0)
rules = (ctypes.c_uint64 * 3)(writes, 3 if abi >= 4 else 0, 3 if abi >= 6 else 0)
size = 24 if abi >= 6 else 16 if abi >= 4 else 8
ruleset = libc.syscall(444, rules, size, 0)
class Below(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("access", ctypes.c_uint64), ("descriptor", ctypes.c_int32)]
below = Below(writes, os.open(folder, os.O_PATH))
done = ruleset >= 0 and libc.syscall(445, ruleset, 1, ctypes.byref(below), 0) == 0
done = done and libc.prctl(38, 1, 0, 0, 0) == 0 and libc.syscall(446, ruleset, 0) == 0
if not done:
    sys.exit(f"Landlock refuses: {os.strerror(ctypes.get_errno())}")
for name, value in (("CPU", seconds), ("AS", memory), ("FSIZE", file_size), ("CORE", 0), ("NOFILE", 64)):
    resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
refused = ("os.fork", "os.forkpty", "os.exec", "os.posix_spawn", "os.system", "os.kill", "subprocess.", "socket.",
           "pty.", "ctypes.", "resource.", "os.chmod", "os.chown", "os.utime", "os.setxattr", "os.removexattr",
           "gc.get_")  # which finds the guard and the word
if abi < 3:
    refused += ("os.truncate",)  # before, Landlock does not keep files from being emptied
# A default is not a global, nor a cell, which the frame of an exception would let the program write to.
def guard(event, arguments, refused=refused):
    if event.startswith(refused):
        raise PermissionError(f"{event} is not allowed here")
import _posixsubprocess
def refuse(*arguments):
    raise PermissionError("starting processes is not allowed here")
_posixsubprocess.fork_exec = refuse  # it raises no audit event of its own
printed = os.dup(1)
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
os.chdir(folder)
sys.setrecursionlimit(2000)
del sys.argv[1:]
main = sys.modules["__main__"] = type(sys)("__main__")
program = compile(program, "program", "exec")
sys.addaudithook(guard)
# The steps are held by no name, and no frame that the program can see holds them: nor can it see the word.
deque(map(call, (
    partial(globals().clear),
    partial(exec, program, vars(main)),
    sys.stdout.flush,
    partial(os.write, printed, b"\n" + word.encode()),
)), maxlen=0)
"""


@dataclass(frozen=True)
class Outcome:
    """Whether a program ran to its end, and if not, why."""

    passed: bool
    reason: str = ""


def check_sandbox() -> None:
    """See that programs can be kept in.

    Raises:
        UserError: this system has no Landlock, or it is switched off.
    """
    version = -1
    if sys.platform == "linux":
        version = ctypes.CDLL(None).syscall(_CREATE_RULESET, None, 0, 1)
    if version < 1:
        raise UserError(
            "this system cannot keep programs that a model writes from writing files (it needs Linux 5.13 or newer "
            "with Landlock): evaluate HumanEval and MBPP where it can, or leave them out"
        )


def run_program(program: str, seconds: float = SECONDS, memory: int = MEMORY) -> Outcome:
    """Whether `program` (Python) runs to its end within `seconds` and `memory` bytes; see the head of this file."""
    folder = tempfile.TemporaryDirectory(prefix="titan-yulan-program-", ignore_cleanup_errors=True)
    try:
        return _run(program, folder.name, seconds, memory)
    finally:
        with contextlib.suppress(RecursionError):  # a folder in a folder in a folder ...: it stays
            folder.cleanup()


def _run(program: str, folder: str, seconds: float, memory: int) -> Outcome:
    word = secrets.token_hex(16)
    arguments = [folder, str(int(seconds) + 1), str(memory), str(_FILE_SIZE)]
    with open(os.path.join(folder, "printed"), "w+b") as printed, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _GUARD, *arguments],
            stdin=subprocess.PIPE,
            stdout=printed,
            stderr=errors,
            cwd=folder,
            env={"PATH": os.defpath, "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        try:
            process.communicate(f"{word}\n{program}".encode(errors="replace"), timeout=seconds)
        except subprocess.TimeoutExpired:
            return Outcome(False, f"not done after {seconds:g} s")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and whatever it has left behind
            process.wait()
        printed.seek(max(0, printed.seek(0, os.SEEK_END) - len(word)))
        if process.returncode == 0 and printed.read() == word.encode():
            return Outcome(True)
        errors.seek(0)
        lines = errors.read(_FILE_SIZE).decode(errors="replace").strip().splitlines()
    if process.returncode < 0:
        names = {int(known): known.name for known in signal.Signals}
        return Outcome(False, f"ended by {names.get(-process.returncode, f'signal {-process.returncode}')}")
    return Outcome(False, lines[-1][:_SHOWN] if lines else "it left before its end")
