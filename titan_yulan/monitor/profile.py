"""Traces and memory snapshots of the steps that `[monitor]` names, for every rank a file.

RUN/traces/step-20-24/rank-0.json.gz         Chrome's trace format: https://ui.perfetto.dev opens it
RUN/traces/step-20-24/breakdown.json         seconds by category of the main rank's trace
RUN/traces/step-20-24/memory-rank-0.pickle   https://pytorch.org/memory_viz opens it
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from titan_yulan.config.sections import RunConfig
from titan_yulan.config.values import parse_steps
from titan_yulan.curriculum.plan import PhasePlan
from titan_yulan.errors import UserError
from titan_yulan.monitor.breakdown import COMMUNICATION, Breakdown, Sizes, breakdown, read_trace
from titan_yulan.monitor.metrics import write_atomically
from titan_yulan.parallel.process import World

_EVENTS = 1_000_000  # allocations of which a snapshot remembers where they came from


class Profile:
    """Call `next_step` before every step and `close` at the end. A run that goes on inside a range takes what is left
    of it; what is broken off leaves no file."""

    def __init__(self, config: RunConfig, folder: Path, world: World, tell: Callable[[str], None]) -> None:
        """
        Args:
            folder: the run folder.
            tell: gets a line about what was written.

        Raises:
            UserError: memory snapshots of a CPU.
        """
        self._model, self._folder, self._world, self._tell = config.model, folder / "traces", world, tell
        self._trace = parse_steps(config.monitor.profile_steps)
        self._snapshot = parse_steps(config.monitor.memory_snapshot_steps)
        if self._snapshot and world.device.type != "cuda":
            raise UserError("monitor.memory_snapshot_steps: PyTorch records allocations only on GPUs; remove the key")
        self._profiler: torch.profiler.profile | None = None
        self._first = 0  # of the steps that are traced
        self._recording = 0  # first step of the allocations that are recorded; 0: none are

    def due(self, step: int) -> bool:
        """Whether `next_step` has something to do before this step."""
        return self._profiler is not None or step + 1 in self._trace or bool(self._snapshot)

    def ends(self, step: int) -> bool:
        """Whether a trace ends before this step."""
        return self._profiler is not None and step == self._trace.stop

    def next_step(self, step: int, phase: PhasePlan) -> Breakdown | None:
        """Begin and end what is due before `step`; takes seconds where a trace ends.

        Args:
            step: from 1.
            phase: of the step before.

        Returns:
            where the time went, on the main rank, when a trace has ended.
        """
        if self._snapshot:
            self._record_allocations(step)
        if self._profiler is not None:
            ends = self.ends(step)
            self._profiler.step()
            return self._end_trace(phase) if ends else None
        if step + 1 in self._trace:  # the step before the first one warms the profiler up
            self._begin_trace(step + 1)
        return None

    def drop(self) -> None:
        """Forget what has begun: the run ends, or goes back."""
        if self._profiler is not None:
            self._profiler.on_trace_ready = None
            self._profiler.stop()
            self._profiler = None
        if self._recording:
            torch.cuda.memory._record_memory_history(enabled=None)
            self._recording = 0

    def _begin_trace(self, first: int) -> None:
        cuda = [ProfilerActivity.CUDA] if self._world.device.type == "cuda" else []
        self._first = first
        self._profiler = torch.profiler.profile(
            activities=[ProfilerActivity.CPU, *cuda],
            schedule=torch.profiler.schedule(wait=0, warmup=1, active=self._trace.stop - first, repeat=1),
            record_shapes=True,
            on_trace_ready=self._write_trace,
        )
        self._profiler.start()

    def _write_trace(self, profiler: torch.profiler.profile) -> None:
        profiler.export_chrome_trace(str(self._path(self._first, self._trace, "rank-{}.json.gz")))

    def _end_trace(self, phase: PhasePlan) -> Breakdown | None:
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None
        path = self._path(self._first, self._trace, "rank-{}.json.gz")
        self._tell(f"traced steps {self._first}-{self._trace.stop - 1}: {path.parent}")
        if not self._world.is_main:
            return None
        tokens = phase.section.batch.micro_batch_size * phase.sequence_length // phase.section.parallel.context
        found = breakdown(
            read_trace(path), Sizes.of(self._model, tokens, phase.section.parallel.tensor), "ProfilerStep"
        )
        write_atomically(path.with_name("breakdown.json"), json.dumps(asdict(found), indent=2))
        return found

    def _record_allocations(self, step: int) -> None:
        if self._recording and step == self._snapshot.stop:
            self._write_snapshot()
        elif not self._recording and step in self._snapshot:
            torch.cuda.memory._record_memory_history(max_entries=_EVENTS)
            self._recording = step

    def _write_snapshot(self) -> None:
        """What was recorded so far, and the recording's end."""
        path = self._path(self._recording, self._snapshot, "memory-rank-{}.pickle")
        torch.cuda.memory._dump_snapshot(str(path))
        torch.cuda.memory._record_memory_history(enabled=None)
        self._recording = 0
        self._tell(f"recorded the allocations of step {path.parent.name.removeprefix('step-')}: {path.parent}")

    def out_of_memory(self) -> None:
        """Write what is recorded, if anything is, when memory has run out."""
        if self._recording:
            self._write_snapshot()

    def _path(self, first: int, steps: range, name: str) -> Path:
        folder = self._folder / f"step-{first}-{steps.stop - 1}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / name.format(self._world.rank)


def communication_share(found: Breakdown) -> float:
    """Percent of the traced time in which ranks exchanged something and computed nothing."""
    return 100 * found.seconds[COMMUNICATION] / found.window
