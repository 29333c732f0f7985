"""Where the wall time between two printed lines went, and the memory that was needed.

Times are the host's. Every second counts once: what nothing else took is `compute`. A wait for the device belongs to
the steps that it waits for, because a checkpoint and a validation begin with a flush of the record.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch

from titan_yulan.config.model import ModelConfig
from titan_yulan.curriculum.plan import PhasePlan, Plan
from titan_yulan.monitor.flops import device_peak, flops_per_token
from titan_yulan.parallel.process import World

# data_wait   the loop waited for rows
# checkpoint  copying and writing checkpoints, as far as training waited
# validation  validation, benchmarks, the sample at the end
# setup       the dry run, changing the layout, going back, beginning and writing a trace
# compute     the rest: steps, with what ranks exchange in them
Kind = Literal["data_wait", "checkpoint", "validation", "setup", "compute"]

# In traces, before the kind: the beginning of names of ranges that are no part of a step. `setup` has none, for
# traces themselves begin and end there.
BETWEEN_STEPS = "between steps: "


@dataclass(frozen=True)
class Interval:
    """The time since the interval before.

    steps           in it
    seconds         of wall time by `Kind`
    tokens_per_s    of all ranks, over data_wait and compute; None without a step
    mfu_percent     the same against the devices' peak; None where that is not known
    memory          GiB of this rank: peak_gib and reserved_gib, the most of this interval that tensors needed and that
                    PyTorch held, on GPUs; host_gib, the most that the process ever had of the host's
    """

    steps: int
    seconds: dict[Kind, float]
    tokens_per_s: float | None
    mfu_percent: float | None
    memory: dict[str, float]

    def line(self, step: int, tokens: int) -> dict[str, Any]:
        """Of `intervals.jsonl`; `tokens`: consumed by the run after `step`."""
        rates = {"tokens_per_s": self.tokens_per_s, "mfu_percent": self.mfu_percent}
        known = {name: value for name, value in rates.items() if value is not None}
        return {
            "step": step,
            "tokens": tokens,
            "steps": self.steps,
            "seconds": self.seconds,
            **known,
            "memory": self.memory,
        }

    def scalars(self) -> dict[str, float]:
        """Curves by tag."""
        seconds, wall = self.seconds, max(sum(self.seconds.values()), 1e-9)
        values = {f"perf/share_{kind}_percent": 100 * spent / wall for kind, spent in seconds.items()}
        values["data/wait_percent"] = 100 * seconds["data_wait"] / max(seconds["data_wait"] + seconds["compute"], 1e-9)
        if self.tokens_per_s is not None:
            values["perf/tokens_per_s"] = self.tokens_per_s
        if self.mfu_percent is not None:
            values["perf/mfu_percent"] = self.mfu_percent
        return values | {f"memory/{name}": value for name, value in self.memory.items()}


class Intervals:
    """Measures from its making on."""

    def __init__(self, model: ModelConfig, world: World) -> None:
        self._model, self._world = model, world
        cuda = world.device.type == "cuda"
        self._peak = device_peak(torch.cuda.get_device_name()) if cuda else None
        self._inside = False
        self._begin(time.perf_counter())

    def _begin(self, now: float) -> None:
        self._began, self._steps, self._tokens, self._flops = now, 0, 0, 0
        self._spent: dict[Kind, float] = {"data_wait": 0.0, "checkpoint": 0.0, "validation": 0.0, "setup": 0.0}
        if self._world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def step(self, phase: PhasePlan, waited: float) -> None:
        """Count a step; `waited`: seconds that the loop waited for its rows."""
        tokens = phase.batch_rows * phase.sequence_length
        self._steps += 1
        self._tokens += tokens
        self._flops += tokens * flops_per_token(self._model, phase.sequence_length)
        self._spent["data_wait"] += waited

    @contextmanager
    def spending(self, kind: Kind) -> Iterator[None]:
        """Within `with`, time is of this kind; of several around one another, the outermost counts."""
        if self._inside:
            yield
            return
        self._inside, begin = True, time.perf_counter()
        try:
            with nullcontext() if kind == "setup" else torch.profiler.record_function(BETWEEN_STEPS + kind):
                yield
        finally:
            self._inside = False
            self._spent[kind] += time.perf_counter() - begin

    def close(self) -> Interval:
        """What was measured since the last call; the next interval begins."""
        now = time.perf_counter()
        compute = now - self._began - sum(self._spent.values())
        training = max(compute + self._spent["data_wait"], 1e-9)
        mfu = 100 * self._flops / training / (self._peak * self._world.size) if self._peak else None
        found = Interval(
            self._steps,
            {**self._spent, "compute": compute},
            self._tokens / training if self._steps else None,
            mfu if self._steps else None,
            _memory(self._world.device),
        )
        self._begin(now)
        return found


def _memory(device: torch.device) -> dict[str, float]:
    # kilobytes, but bytes on a Mac
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    host = {"host_gib": held / 2**30}
    if device.type != "cuda":
        return host
    peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return {"peak_gib": peak / 2**30, "reserved_gib": reserved / 2**30, **host}


def trained_flops(model: ModelConfig, plan: Plan, step: int) -> int:
    """Model FLOPs of the plan's steps up to `step`, without recomputation (`flops.flops_per_token`)."""
    total = 0
    for phase in plan.phases:
        steps = max(0, min(step, phase.end.step) - phase.start.step)
        tokens = steps * phase.batch_rows * phase.sequence_length
        total += tokens * flops_per_token(model, phase.sequence_length)
    return total
