"""Faults for a run under test; Python imports this by itself where the folder is on PYTHONPATH.

`TEST_FAULTS` is a JSON list of {"step": N, "what": ..., "times": T}, T counted per process (missing: always):
    a number (or "nan")  the objective of the step's last micro-batch is multiplied by it, on the last rank
    "hang"               the last rank stays for ever in that micro-batch
    "stop"               the last rank gets SIGTERM in the middle of the step
    "stop validation"    the same in the middle of the validation before step N
    "stop compile"       the same while torch.compile is at work before step N
    "stop save"          the same at the beginning of the save of step N
    "kill save"          the main rank is killed when the tensors of step N are written and nothing is committed
    "full disk"          the file "path" takes what is left of its file system at the beginning of the save of step N

A fault with "mark", a path, happens once in all processes and starts, at the first chance at or after its step, and
makes that file. `TEST_HISTORY` is a file that gets every line that is ever written to a `metrics.jsonl`.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import os
import signal
import sys
import threading
import time
from contextlib import suppress

FAULTS = json.loads(os.environ.get("TEST_FAULTS", "[]"))
HISTORY = os.environ.get("TEST_HISTORY")
LAST_RANK = os.environ.get("RANK") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1)


def take(step: int, kinds) -> list:
    """The faults that are to happen now, at this step."""
    due = []
    for fault in FAULTS:
        if not kinds(fault["what"]):
            continue
        if "mark" in fault:
            if step >= fault["step"] and _mark(fault["mark"]):
                due.append(fault)
        elif step == fault["step"] and fault.get("times", 1) > 0:
            if "times" in fault:
                fault["times"] -= 1
            due.append(fault)
    return due


def _mark(path: str) -> bool:
    """Whether nobody was here before."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def wrap_learner(learner) -> None:
    """Replace what a step, a validation and a rehearsal are made of."""
    forward, (train_step, validate, rehearse) = (
        learner.forward,
        (learner.Learner.train_step, learner.Learner.validate, learner.Learner.rehearse),
    )
    current = {"step": 0, "left": 0}

    def faulty_forward(*arguments):
        sums = forward(*arguments)
        current["left"] -= 1
        if LAST_RANK and current["left"] == 0:
            for fault in take(current["step"], lambda what: what == "nan" or not isinstance(what, str)):
                sums = sums._replace(objective=sums.objective * float(fault["what"]))
            if take(current["step"], lambda what: what == "hang"):
                threading.Event().wait()
        return sums

    def faulty_step(self, step, batches, between):
        current.update(step=step + 1, left=len(batches))

        def stopping(what):
            if LAST_RANK and take(step + 1, lambda what: what == "stop"):
                os.kill(os.getpid(), signal.SIGTERM)
            between(what)

        return train_step(self, step, batches, stopping)

    def faulty_validate(self, held_out, tapes, between):
        def stopping(what):
            if LAST_RANK and take(current["step"] + 1, lambda what: what == "stop validation"):
                os.kill(os.getpid(), signal.SIGTERM)
            between(what)

        return validate(self, held_out, tapes, stopping)

    def faulty_rehearse(self, step):
        current["step"] = step
        if LAST_RANK and any(fault["what"] == "stop compile" for fault in FAULTS):
            threading.Thread(target=_stop_when_compiling, args=(step + 1, threading.get_ident()), daemon=True).start()
        rehearse(self, step)

    learner.forward, learner.Learner.train_step, learner.Learner.validate = faulty_forward, faulty_step, faulty_validate
    learner.Learner.rehearse = faulty_rehearse


def _stop_when_compiling(step: int, thread: int) -> None:
    """Signal this process as soon as that thread stands in torch's compiler."""
    while True:
        frame = sys._current_frames().get(thread)
        while frame is not None:
            if "convert_frame" in frame.f_code.co_filename:
                if take(step, lambda what: what == "stop compile"):
                    os.kill(os.getpid(), signal.SIGTERM)
                return
            frame = frame.f_back
        time.sleep(0.002)


def wrap_store(store) -> None:
    """Replace the beginning of a save, what makes its folder, and its commit."""
    save, prepare, commit = store.save, store._prepare, store.layout.commit

    def step_of(path) -> int:
        return int(path.name.removeprefix("step-"))

    def faulty_save(folder, tensors, state, *others):
        if LAST_RANK and take(state.step, lambda what: what == "stop save"):
            os.kill(os.getpid(), signal.SIGTERM)
        return save(folder, tensors, state, *others)

    def faulty_prepare(path):
        prepare(path)
        for fault in take(step_of(path), lambda what: what == "full disk"):
            with suppress(OSError), open(fault["path"], "wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))

    def faulty_commit(path, *others):
        if take(step_of(path), lambda what: what == "kill save"):
            os.kill(os.getpid(), signal.SIGKILL)
        return commit(path, *others)

    store.save, store._prepare, store.layout.commit = faulty_save, faulty_prepare, faulty_commit


def wrap_metrics(metrics) -> None:
    """Keep what is written, also what is dropped later."""
    write = metrics.JsonLines.write

    def kept_write(self, lines):
        lines = list(lines)
        write(self, lines)
        if HISTORY and self._path.name == "metrics.jsonl":
            text = "".join(json.dumps(metrics._without_nan(line)) + "\n" for line in lines)
            with open(HISTORY, "a", buffering=1 << 20) as file:
                file.write(text)

    metrics.JsonLines.write = kept_write


WRAPPERS = {
    "titan_yulan.learner": wrap_learner,
    "titan_yulan.checkpoint.store": wrap_store,
    "titan_yulan.monitor.metrics": wrap_metrics,
}


class _Wrapping(importlib.machinery.SourceFileLoader):
    def exec_module(self, module):
        super().exec_module(module)
        WRAPPERS[module.__name__](module)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name not in WRAPPERS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.origin:
            spec.loader = _Wrapping(name, spec.origin)
        return spec


if FAULTS or HISTORY:
    sys.meta_path.insert(0, _Finder())
