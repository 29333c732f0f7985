"""Traces and memory snapshots of the steps that `[monitor]` names, for every rank a file.

RUN/traces/step-20-24/rank-0.json.gz         Chrome's trace format: https://ui.perfetto.dev opens it
RUN/traces/step-20-24/breakdown.json         seconds by category of the main rank's trace
RUN/traces/step-20-24/memory-rank-0.pickle   https://pytorch.org/memory_viz opens it
"""

from __future__ import annotations

import gzip
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from titan_yulan.config.sections import RunConfig
from titan_yulan.config.values import parse_steps
from titan_yulan.curriculum.plan import PhasePlan
from titan_yulan.errors import UserError
from titan_yulan.monitor.breakdown import COMMUNICATION, Breakdown, Sizes, breakdown, read_trace
from titan_yulan.monitor.intervals import BETWEEN_STEPS
from titan_yulan.monitor.metrics import write_atomically
from titan_yulan.parallel.process import World

_EVENTS = 1_000_000  # allocations of which a snapshot remembers where they came from


class Profile:
    """Call `limit` at the start, `next_step` before every step and after the last, and `drop` at the end. A run that
    goes on inside a range takes what is left of it; what is broken off leaves no file, and what cannot be written is
    told of: a run never ends because of either."""

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

    def limit(self, step: int, end: int) -> None:
        """Let the ranges end with the run, and tell what of them this start cannot take.

        Args:
            step: finished steps where this start begins.
            end: the run's last step.
        """
        # one step warms the profiler up
        self._trace = self._within("profile_steps", self._trace, step + 2, end)
        self._snapshot = self._within("memory_snapshot_steps", self._snapshot, step + 1, end)

    def _within(self, key: str, steps: range, first: int, end: int) -> range:
        taken = range(max(steps.start, first), min(steps.stop, end + 1))
        if first <= end and len(taken) < len(steps):
            what = f"only {taken.start}-{taken[-1]} are recorded" if taken else "none of them is recorded"
            told = f"this start can record steps {first}-{end}: {what}"
            self._tell(f"note: monitor.{key} = {steps.start}-{steps.stop - 1}: {told}")
        return range(steps.start, min(steps.stop, end + 1))  # going back may lead to steps before this start

    def due(self, step: int) -> bool:
        """Whether `next_step` has something to do before this step."""
        return self._profiler is not None or step + 1 in self._trace or bool(self._snapshot)

    def begins(self, step: int) -> bool:
        """Whether a trace's first step is this one: what was before it only warmed the profiler up."""
        return self._profiler is not None and step == self._first

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
            if self._world.device.type == "cuda" and (ends or self.begins(step)):
                torch.cuda.synchronize()  # every stream, so that no kernel is counted in a step that is not its own
            self._profiler.step()
            return self._end_trace(self._profiler, phase) if ends else None
        if step + 1 in self._trace:  # the step before the first one warms the profiler up
            self._begin_trace(step + 1)
        return None

    def drop(self) -> None:
        """Forget what has begun, and say so: the run ends, or goes back."""
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None
            self._tell(f"WARNING: no trace of steps {self._first}-{self._trace.stop - 1}: it was broken off")
        if self._recording:
            torch.cuda.memory._record_memory_history(enabled=None)
            steps = f"{self._recording}-{self._snapshot.stop - 1}"
            self._recording = 0
            self._tell(f"WARNING: no record of the allocations of steps {steps}: it was broken off")

    def _begin_trace(self, first: int) -> None:
        cuda = [ProfilerActivity.CUDA] if self._world.device.type == "cuda" else []
        self._first = first
        self._profiler = torch.profiler.profile(
            activities=[ProfilerActivity.CPU, *cuda],
            schedule=torch.profiler.schedule(wait=0, warmup=1, active=self._trace.stop - first, repeat=1),
            record_shapes=True,
        )
        self._profiler.start()

    def _end_trace(self, profiler: torch.profiler.profile, phase: PhasePlan) -> Breakdown | None:
        self._profiler = None
        profiler.stop()
        path = self._path(self._first, self._trace, "rank-{}.json.gz")
        steps, found = f"steps {self._first}-{self._trace.stop - 1}", None
        with self._optional(f"trace of {steps}", path, f"traced {steps}: {path.parent}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(path))
            _check_whole(path)
            if self._world.is_main:
                tokens = phase.section.batch.micro_batch_size * phase.sequence_length // phase.section.parallel.context
                sizes = Sizes.of(self._model, tokens, phase.section.parallel.tensor)
                found = breakdown(read_trace(path), sizes, "ProfilerStep", aside=BETWEEN_STEPS)
        if found is not None:
            path = path.with_name("breakdown.json")
            with self._optional(f"breakdown of {steps}", path):
                write_atomically(path, json.dumps(asdict(found), indent=2))
        return found

    @contextmanager
    def _optional(self, what: str, path: Path, made: str = "") -> Iterator[None]:
        """A file that fails is told of and not left in parts; one that is `made` is told of in these words."""
        try:
            yield
        except (OSError, ValueError, EOFError) as error:
            with suppress(OSError):
                path.unlink(missing_ok=True)
            tell = self._tell if self._world.is_main else print
            tell(f"WARNING: rank {self._world.rank}: no {what}: {error}")
        else:
            if made:
                self._tell(made)

    def _record_allocations(self, step: int) -> None:
        if self._recording and step == self._snapshot.stop:
            self._write_snapshot()
        elif not self._recording and step in self._snapshot:
            torch.cuda.memory._record_memory_history(max_entries=_EVENTS)
            self._recording = step

    def _write_snapshot(self) -> None:
        """What was recorded so far, and the recording's end."""
        path = self._path(self._recording, self._snapshot, "memory-rank-{}.pickle")
        what = f"the allocations of steps {path.parent.name.removeprefix('step-')}"
        self._recording = 0
        with self._optional(f"record of {what}", path, f"recorded {what}: {path.parent}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.cuda.memory._dump_snapshot(str(path))
        torch.cuda.memory._record_memory_history(enabled=None)

    def out_of_memory(self) -> None:
        """Write what is recorded, if anything is, when memory has run out."""
        if self._recording:
            self._write_snapshot()

    def _path(self, first: int, steps: range, name: str) -> Path:
        return self._folder / f"step-{first}-{steps.stop - 1}" / name.format(self._world.rank)


def _check_whole(path: Path) -> None:
    """A trace must end as JSON does: PyTorch does not raise where its temporary file found no room.

    Raises:
        ValueError: it does not.
        OSError: it cannot be read.
    """
    end = b""
    with gzip.open(path) as file:
        while part := file.read(1 << 20):
            end = (end + part)[-16:]
    if not end.rstrip().endswith(b"}"):
        raise ValueError(f"what PyTorch wrote is cut off; is the disk of {tempfile.gettempdir()} full?")


def communication_share(found: Breakdown) -> float:
    """Percent of the traced time in which ranks exchanged something and computed nothing."""
    return 100 * found.seconds[COMMUNICATION] / found.window
