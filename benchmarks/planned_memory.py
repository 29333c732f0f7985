"""The memory that the plan predicts beside the memory that a step takes, on a CPU.

    python benchmarks/planned_memory.py [--config debug.toml] [--steps 2] [--section.key=value ...]

For each shape of batch in the configuration a process of its own builds the model and its optimizer and makes steps on
made-up rows, alone. Measured are the bytes that PyTorch's allocator has given out at the worst moment (torch.profiler),
and how far the process's resident memory grew above what it was after the imports (the kernel's VmHWM).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

CPU_LOGITS = 1 << 21  # that the loss holds at a time on a CPU (kernels/linear_cross_entropy.py)
MIB = 2**20


@dataclass(frozen=True)
class Measured:
    """Bytes of one phase's shape: predicted in parts, allocated at the worst moment, and grown of resident memory."""

    phase: str
    rows: int
    length: int
    state: int
    activations: int
    predicted: int
    allocated: int
    resident: int


def measure(config: Any, index: int, steps: int) -> Measured:
    """One phase, in this process, which must be a fresh one for `resident` to mean something."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from titan_yulan.curriculum.plan import Plan
    from titan_yulan.data.loader import Batch
    from titan_yulan.learner import Learner
    from titan_yulan.parallel import process
    from titan_yulan.plan.memory import phase_memory

    plan, world = Plan(config), process.start()
    phase = plan.phases[index]
    rows, length = phase.section.batch.micro_batch_size, phase.sequence_length
    size = (rows, length + 1)
    batch = Batch(
        tokens=torch.zeros(size, dtype=torch.int64),
        document_ids=torch.zeros(size, dtype=torch.int64),
        loss_mask=torch.ones(size, dtype=torch.bool),
        source=torch.zeros(rows, dtype=torch.int64),
        position=torch.zeros(rows, dtype=torch.int64),
        weight=torch.ones(rows),
    )
    before = resident("VmRSS")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        learner = Learner(config, plan, world, config.model.kernels, lambda line: None)
        learner.build(phase)
        for step in range(steps):
            learner.train_step(phase.start.step + step, [batch])
    need = phase_memory(config, phase.section, 1, chunk_tokens=CPU_LOGITS // config.model.vocab_size)
    return Measured(
        phase=phase.name,
        rows=rows,
        length=length,
        state=need.state,
        activations=need.activations,
        predicted=need.total,
        allocated=most_allocated(profiler),
        resident=resident("VmHWM") - before,
    )


def most_allocated(profiler: Any) -> int:
    """Bytes that were given out and not given back, at the worst moment of a profile."""
    live = most = 0
    events = (event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]")
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (the most so far) of this process, bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def distinct(config: Any) -> list[int]:
    """The first phase of every shape and layout."""
    seen: dict[Any, int] = {}
    for index, phase in enumerate(config.phases):
        shape = phase.batch.micro_batch_size, phase.sequence_length, phase.parallel, phase.activation_checkpoint
        seen.setdefault(shape, index)
    return list(seen.values())


def table(found: list[Measured]) -> str:
    """Markdown, MiB."""
    lines = [
        "| phase | rows x length | state | activations | predicted | allocated | ratio | resident grew by |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for one in found:
        figures = (one.state, one.activations, one.predicted, one.allocated)
        cells = " | ".join(f"{figure / MIB:.1f}" for figure in figures)
        ratio = one.predicted / one.allocated
        shape = f"{one.rows} x {one.length}"
        lines.append(f"| {one.phase} | {shape} | {cells} | {ratio:.2f} | {one.resident / MIB:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Predicted beside measured memory of a step on a CPU.")
    parser.add_argument("--config", default="debug.toml")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--index", type=int, help=argparse.SUPPRESS)
    options, keys = parser.parse_known_args()

    from titan_yulan import config as configuration

    config = configuration.load(configuration.find(options.config, ROOT), keys).config
    if options.index is not None:
        print(json.dumps(asdict(measure(config, options.index, options.steps))))
        return
    found = []
    for index in distinct(config):
        command = [sys.executable, __file__, *sys.argv[1:], f"--index={index}"]
        answer = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        found.append(Measured(**json.loads(answer.stdout.splitlines()[-1])))
    print(table(found))


if __name__ == "__main__":
    main()
