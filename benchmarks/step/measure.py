"""How the step benchmark measures: times of steps, peak memory, and a profile of a few more steps."""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from titan_yulan.monitor.breakdown import Breakdown, Sizes, breakdown, read_trace

_STEP = "train_step"


class Training(Protocol):
    """A model with its optimizer; `step` makes one step of micro-batches and returns the loss on the device."""

    def step(self, batches: list[Tensor]) -> Tensor: ...


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def warm_up(training: Training, batches: list[Tensor], steps: int, device: torch.device) -> float:
    """Seconds of the first step, which compiles; then `steps` - 1 more.

    Raises:
        ValueError: the loss is not finite, so that there is nothing worth timing.
    """
    synchronize(device)
    begin = time.perf_counter()
    loss = training.step(batches)
    synchronize(device)
    first = time.perf_counter() - begin
    for _ in range(steps - 1):
        loss = training.step(batches)
    if not bool(loss.isfinite()):
        raise ValueError(f"the loss is {float(loss)} after {steps} steps")
    return first


@dataclass(frozen=True)
class Turn:
    """Some steps in a row: seconds of each, and processor seconds of this process for one step. On a GPU the latter are
    what the host needs to launch a step; on a CPU they hardly grow when others use the machine."""

    seconds: list[float]
    processor: float


def take_turn(training: Training, batches: list[Tensor], steps: int, device: torch.device) -> Turn:
    """`steps` steps that follow each other without a wait between them, after one that does not count. Garbage is
    collected before and not during them."""
    gc.collect()
    gc.disable()
    try:
        training.step(batches)
        synchronize(device)
        processor = time.process_time()
        seconds = (_on_gpu if device.type == "cuda" else _on_cpu)(training, batches, steps)
        return Turn(seconds, (time.process_time() - processor) / steps)
    finally:
        gc.enable()


def _on_cpu(training: Training, batches: list[Tensor], steps: int) -> list[float]:
    marks = [time.perf_counter()]
    for _ in range(steps):
        training.step(batches)
        marks.append(time.perf_counter())
    return [end - start for start, end in pairwise(marks)]


def _on_gpu(training: Training, batches: list[Tensor], steps: int) -> list[float]:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    events[0].record()
    for event in events[1:]:
        training.step(batches)
        event.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in pairwise(events)]


def allocated(device: torch.device) -> int:
    """Bytes that PyTorch holds on a GPU now; 0 on a CPU, where it does not count them."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


class PeakMemory:
    """Bytes at the worst moment since it was made: on a GPU of its allocator, else the process's resident set (0 where
    /proc does not tell)."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        elif (clear := Path("/proc/self/clear_refs")).exists():
            clear.write_text("5")  # the peak is forgotten

    def bytes(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        status = Path("/proc/self/status")
        lines = status.read_text().splitlines() if status.exists() else []
        return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def profiled(
    training: Training, batches: list[Tensor], steps: int, sizes: Sizes, device: torch.device, keep: Path | None
) -> Breakdown:
    """Seconds by category of one step, the mean of `steps`, under the profiler (which slows the host).

    Args:
        sizes: of the model and the micro-batch.
        keep: file that the trace is kept in.
    """
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with tempfile.TemporaryDirectory() as folder:
        path = keep or Path(folder) / "trace.json"
        with profile(activities=activities):  # the profiler's own start
            training.step(batches)
            synchronize(device)
        with profile(activities=activities, record_shapes=True) as profiler, record_function(_STEP):
            for _ in range(steps):
                training.step(batches)
            synchronize(device)
        profiler.export_chrome_trace(str(path))
        found = breakdown(read_trace(path), sizes, _STEP)
    seconds = {name: value / steps for name, value in found.seconds.items()}
    return Breakdown(found.window / steps, seconds, found.communication / steps)


def quartiles(seconds: Sequence[float]) -> tuple[float, float, float, float]:
    """Least, lower quartile, median and upper quartile."""
    ordered = torch.tensor(sorted(seconds), dtype=torch.float64)
    low, middle, high = torch.quantile(ordered, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
    return float(ordered[0]), low, middle, high
