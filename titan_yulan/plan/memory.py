"""How much memory and disk a run will need, from the configuration alone, and what this machine has. No torch."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from titan_yulan.config.model import count_parameters
from titan_yulan.config.sections import RunConfig
from titan_yulan.curriculum.plan import Plan

GIB = 2**30
_STATE_BYTES = 16  # float32 weight, gradient and Adam's two moments
_CHECKPOINT_BYTES = 12  # float32 weight and Adam's two moments


@dataclass(frozen=True)
class Machine:
    """What this machine offers to one start of a run."""

    accelerators: int
    device: str
    memory: int  # bytes that all ranks on this machine share (CPU) or that one rank has (GPU)
    cores: int


def inspect_machine() -> Machine:
    """Ask the driver's tool and the kernel, without importing torch."""
    cores = len(os.sched_getaffinity(0))
    if tool := shutil.which("nvidia-smi"):
        query = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
        answer = subprocess.run(query, capture_output=True, text=True, check=False)
        lines = [line.rsplit(",", 1) for line in answer.stdout.splitlines() if "," in line]
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if visible is not None:
            lines = lines[: len([index for index in visible.split(",") if index.strip() not in ("", "-1")])]
        if answer.returncode == 0 and lines:
            return Machine(len(lines), lines[0][0].strip(), int(lines[0][1]) * 2**20, cores)
    pages = os.sysconf("SC_AVPHYS_PAGES") + _reclaimable_pages()
    return Machine(0, "CPU", pages * os.sysconf("SC_PAGE_SIZE"), cores)


def _reclaimable_pages() -> int:
    """Page cache that the kernel gives back on demand; 0 where it cannot be known."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        available = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 0
    return max(0, available // os.sysconf("SC_PAGE_SIZE") - os.sysconf("SC_AVPHYS_PAGES"))


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank."""

    state: int
    gathered: int
    activations: int

    @property
    def total(self) -> int:
        return self.state + self.gathered + self.activations


def estimate_memory(config: RunConfig, world: int) -> Memory:
    """Memory of one rank in the phase that needs most.

    state: 16 bytes a parameter, sharded over the ranks. gathered: the embedding and two blocks in the compute type,
    plus the full gradient of the embedding. activations: what autograd keeps of every block without checkpointing
    (about 12 hidden-sized and 4 intermediate-sized tensors a token), and one chunk of logits.
    """
    model = config.model
    parameters = count_parameters(model)
    embedding = model.vocab_size * model.hidden_size
    embedding *= 1 if model.tie_word_embeddings else 2  # the head is gathered and has a gradient as well
    block = (parameters - embedding) // model.num_hidden_layers
    worst = Memory(0, 0, 0)
    for phase in config.phases[config.first_phase :]:
        size = 2 if phase.parallel.compute_dtype == "bfloat16" else 4
        tokens = phase.batch.micro_batch_size * phase.sequence_length
        per_token = model.num_hidden_layers * (12 * model.hidden_size + 4 * model.intermediate_size)
        memory = Memory(
            state=_STATE_BYTES * parameters // world,
            gathered=size * (embedding + 2 * block) + 4 * embedding,
            activations=size * tokens * per_token + 3 * 4 * min(tokens * model.vocab_size, 1 << 21),
        )
        worst = max(worst, memory, key=lambda m: m.total)
    return worst


def ranks_that_fit(config: RunConfig, memory: int) -> int | None:
    """The smallest number of devices with `memory` bytes each that the run fits on; None if none does."""
    for world in range(1, 4097):
        if estimate_memory(config, world).total <= memory:
            return world
    return None


def checkpoint_bytes(config: RunConfig) -> int:
    """Size of one checkpoint."""
    return _CHECKPOINT_BYTES * count_parameters(config.model)


def disk_forecast(config: RunConfig, plan: Plan) -> tuple[int, int]:
    """(number of checkpoints on disk at the worst moment, their bytes): the ends of phases, the newest `keep`, and
    the one being written."""
    phases = len(plan.phases) - config.first_phase
    most = phases + (config.checkpoint.keep if config.checkpoint.every else 0) + 1
    return most, most * checkpoint_bytes(config)
