"""Faults for a run under test; Python imports this by itself where the folder is on PYTHONPATH.

`TEST_FAULTS` is a JSON list of {"step": N, "what": ..., "times": T}, T counted per process (missing: always):
    a number (or "nan")  the objective of the step's last micro-batch is multiplied by it, on the last rank
    "stop"               the last rank gets SIGTERM in the middle of the step
    "stop validation"    the same in the middle of the validation before step N
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import os
import signal
import sys

FAULTS = json.loads(os.environ.get("TEST_FAULTS", "[]"))


def wrap(learner) -> None:
    """Replace what a step and a validation are made of."""
    forward, train_step, validate = learner.forward, learner.Learner.train_step, learner.Learner.validate
    current = {"step": 0, "left": 0}
    last_rank = os.environ.get("RANK") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1)

    def take(step: int, kinds) -> list:
        """What is to happen at this step."""
        due = [f for f in FAULTS if f["step"] == step and kinds(f["what"]) and f.get("times", 1) > 0]
        for fault in due:
            if "times" in fault:
                fault["times"] -= 1
        return [fault["what"] for fault in due]

    def faulty_forward(*arguments):
        sums = forward(*arguments)
        current["left"] -= 1
        if last_rank and current["left"] == 0:
            for factor in take(current["step"], lambda what: not str(what).startswith("stop")):
                sums = sums._replace(objective=sums.objective * float(factor))
        return sums

    def faulty_step(self, step, batches, between):
        current.update(step=step + 1, left=len(batches))

        def stopping(what):
            if last_rank and take(step + 1, lambda what: what == "stop"):
                os.kill(os.getpid(), signal.SIGTERM)
            between(what)

        return train_step(self, step, batches, stopping)

    def faulty_validate(self, held_out, tapes, between):
        def stopping(what):
            if last_rank and take(current["step"] + 1, lambda what: what == "stop validation"):
                os.kill(os.getpid(), signal.SIGTERM)
            between(what)

        return validate(self, held_out, tapes, stopping)

    learner.forward, learner.Learner.train_step, learner.Learner.validate = faulty_forward, faulty_step, faulty_validate


class _Wrapping(importlib.machinery.SourceFileLoader):
    def exec_module(self, module):
        super().exec_module(module)
        wrap(module)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "titan_yulan.learner":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.origin:
            spec.loader = _Wrapping(name, spec.origin)
        return spec


if FAULTS:
    sys.meta_path.insert(0, _Finder())
