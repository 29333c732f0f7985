"""Every layout trains as one process does, and reads every other layout's checkpoint. One command makes the table:

    python -m tests.distributed.layouts [--short] [--only TEXT]

A small model of YuLan-Mini's shape (scalars, biases, tied embedding, 6 heads, ragged vocabulary) trains for 10 steps in
float32 on gloo ranks of this machine, in every layout, with every kind of activation checkpointing where it changes
what runs, and compiled. Compared with one process: the largest relative difference of the loss and of the gradient norm
over the steps. `test_layouts.py` runs the short table.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist

from tests.curriculum.making import configuration, phase
from tests.distributed.bodies import OPTIMIZER, state_of
from tests.distributed.ranks import run_ranks
from titan_yulan.checkpoint import store
from titan_yulan.checkpoint.layout import Checkpoint, open_checkpoint
from titan_yulan.config.model import ModelConfig
from titan_yulan.config.sections import (
    ActivationCheckpointSection,
    CompileSection,
    ObjectiveSection,
    ParallelSection,
    RunConfig,
)
from titan_yulan.curriculum.plan import Plan
from titan_yulan.data import hashing
from titan_yulan.data.tape import Tape, TapeSlice
from titan_yulan.learner import Learner
from titan_yulan.model.sharding import local
from titan_yulan.parallel.compile import CompileWatch
from titan_yulan.parallel.parallelize import part_of
from titan_yulan.parallel.process import World

VOCABULARY, LENGTH, BATCH_ROWS, MICRO_BATCH, STEPS = 250, 28, 7, 2, 10
MODEL = ModelConfig(
    vocab_size=VOCABULARY,
    hidden_size=44,
    intermediate_size=90,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=6,
    head_dim=8,
    initializer_range=0.1,
    alpha_base_width=16,
    embedding_scale=2.0,
)
GROUPED = replace(MODEL, num_key_value_heads=2)
LOSS_TOLERANCE, NORM_TOLERANCE = 1e-5, 5e-5  # relative, over 10 steps


@dataclass(frozen=True, eq=False)
class Case:
    """One row of the table: a layout on `world` ranks."""

    world: int
    layout: str
    degrees: dict[str, Any]
    checkpointing: str = "none"
    backend: str = ""  # of torch.compile; empty: eager
    grouped: bool = False

    @property
    def name(self) -> str:
        compiled = f", {self.backend}" if self.backend else ""
        return f"{self.layout}, {self.checkpointing}{compiled}"

    @property
    def keeps(self) -> bool:
        """Whether its checkpoint takes part in the exchange: one a layout."""
        return self.checkpointing == "none" and not self.backend


LAYOUTS: tuple[tuple[int, str, dict[str, Any], bool], ...] = (
    (1, "1 process", {}, False),
    (1, "1 process, grouped", {}, True),
    (2, "FSDP 2", {}, False),
    (3, "FSDP 3", {}, True),
    (4, "FSDP 4", {}, False),
    (4, "HSDP 2 x 2", {"data_replicate": 2}, False),
    (4, "HSDP 2 x 2, reduced last", {"data_replicate": 2, "synchronize": "last"}, False),
    (2, "TP 2", {"tensor": 2}, True),
    (3, "TP 3", {"tensor": 3}, False),
    (4, "FSDP 2 x TP 2", {"tensor": 2}, True),
    (2, "replicas 2", {"data_replicate": 2}, False),
    (2, "FSDP 2, gathered once", {"reshard_after_forward": False}, False),
    (2, "FSDP 2, CPU offload", {"cpu_offload": True}, False),
    (2, "CP 2", {"context": 2}, True),
    (4, "CP 2 x TP 2", {"context": 2, "tensor": 2}, True),
)
# Layouts whose blocks run other code: alone, with exchanged sequences, with exchanged keys, with both.
_FAMILIES = ("FSDP 2", "TP 2", "CP 2", "FSDP 2 x TP 2")
_SHORT = ("FSDP 3", "HSDP 2 x 2", "TP 3", "FSDP 2 x TP 2", "CP 2 x TP 2")


def cases(short: bool) -> list[Case]:
    """The rows of the table; the short one has the layouts that contain the others' code, and no inductor."""
    rows = [Case(world, name, degrees, grouped=grouped) for world, name, degrees, grouped in LAYOUTS]
    if short:
        rows = [row for row in rows if row.world == 1 or row.layout in _SHORT]
        more = [
            replace(row, checkpointing=mode, backend="aot_eager")
            for row in rows
            for layout, mode in (("HSDP 2 x 2", "every"), ("CP 2 x TP 2", "selective"))
            if row.layout == layout
        ]
        return rows + more
    several = [row for row in rows if row.layout in _FAMILIES]
    modes = ("full", "every", "selective")
    rows += [replace(row, checkpointing=mode) for row in several for mode in modes]
    rows += [replace(row, backend="aot_eager") for row in rows if row.world > 1 and row.keeps]
    compilable = [(row, mode) for row in several for mode in modes if mode == "selective" or "TP" not in row.layout]
    rows += [replace(row, checkpointing=mode, backend="aot_eager") for row, mode in compilable]
    return rows + [replace(row, backend="inductor") for row in several]


class HashedTape:
    """An endless tape of hashed tokens in documents of 11; some tokens are no targets."""

    def __init__(self, source: int) -> None:
        self.source = source

    def read(self, start: int, count: int) -> TapeSlice:
        places = np.arange(start, start + count)
        bits = hashing.bits(self.source, places)
        # few distinct tokens, so that there is something to learn
        tokens = (bits % np.uint64(17) * np.uint64(13) + np.uint64(self.source)).astype(np.int32)
        return TapeSlice(tokens, places // 11, bits % np.uint64(5) > 0, 0)


TAPES = cast(Sequence[Tape], [HashedTape(0), HashedTape(1)])


def run_config(case: Case) -> RunConfig:
    section = phase(
        "a",
        f"{STEPS} steps",
        {"x": 0.6, "y": 0.4},
        sequence_length=LENGTH,
        batch=BATCH_ROWS,
        parallel=ParallelSection(compute_dtype="float32", **case.degrees),
        activation_checkpoint=ActivationCheckpointSection(mode=case.checkpointing, every=2),
    )
    section = replace(section, batch=replace(section.batch, micro_batch_size=MICRO_BATCH))
    config = configuration(
        section,
        optimizer=OPTIMIZER,
        objective=ObjectiveSection(z_loss=0.01, document_mask=case.grouped),
        compile=CompileSection(enabled=bool(case.backend), backend=case.backend or "inductor"),
    )
    return replace(config, model=GROUPED if case.grouped else MODEL)


def make_learner(case: Case, world: World, seed: int = 7) -> Learner:
    config = run_config(case)
    config = replace(config, run=replace(config.run, seed=seed))
    learner = Learner(config, Plan(config), world, "auto", lambda line: None)
    learner.build(learner.plan.phases[0])
    return learner


def run_case(case: Case, world: World, folder: Path) -> dict[str, Any]:
    """Ten steps: loss, gradient norm, fingerprint and sums by source of each, and a checkpoint."""
    begin = time.perf_counter()
    torch.compiler.reset()
    learner = make_learner(case, world)
    compilations = CompileWatch()
    steps, late = [], []
    with learner.loader(0, TAPES) as loader:
        for step, batches in enumerate(loader):
            values = learner.train_step(step, batches)
            loss = float(values.totals[0] / values.denominator)
            steps.append((loss, float(values.gradient_norm), int(values.fingerprint), values.totals[1:].tolist()))
            if step == 1:
                compilations.settle()
            elif step > 1:
                late += compilations.recompiled()
    found = {"steps": steps, "seconds": time.perf_counter() - begin, "recompiled": late}
    if case.keeps:
        store.save(folder / case.layout, learner.tensors(), state_of(STEPS), "", world, keep=9)
        dist.barrier()
        found["differs"] = differences(learner, open_checkpoint(folder / case.layout))
    return found


def differences(learner: Learner, checkpoint: Checkpoint) -> list[str]:
    """Names of this rank's tensors that are not their part of what the checkpoint holds, read by one process."""
    tensors = learner.tensors()
    wholes = {
        section: {name: torch.full(tensor.shape, torch.nan) for name, tensor in content.items()}
        for section, content in tensors.items()
    }
    store.load(checkpoint, wholes)
    return [
        f"{section}.{name}"
        for section, content in tensors.items()
        for name, tensor in content.items()
        if not torch.equal(local(tensor.detach()), part_of(wholes[section][name], tensor))
    ]


def train_all(world: World, rows: list[Case], folder: Path) -> list[dict[str, Any]]:
    return [run_case(case, world, folder) for case in rows]


def exchange(world: World, rows: list[Case], written: list[Case], folder: Path) -> list[tuple[str, str, list[str]]]:
    """(layout that reads, layout that wrote, tensors that differ) for every pair of the same model."""
    found = []
    for case in rows:
        learner = make_learner(case, world, seed=8)
        for other in written:
            if other.grouped == case.grouped and other.layout != case.layout:
                checkpoint = open_checkpoint(folder / other.layout)
                store.load(checkpoint, learner.tensors(), world.host)
                found.append((case.layout, other.layout, differences(learner, checkpoint)))
    return found


@dataclass(frozen=True)
class Row:
    """A case beside one process."""

    case: Case
    loss: float  # largest relative difference
    norm: float
    same_rows: bool
    differs: list[str]  # tensors that were saved wrongly
    recompiled: list[str]
    seconds: float
    steps: list[tuple]  # of the first rank: loss, gradient norm, fingerprint, sums by source

    @property
    def good(self) -> bool:
        close = self.loss <= LOSS_TOLERANCE and self.norm <= NORM_TOLERANCE
        return close and self.same_rows and not self.differs and not self.recompiled


def measure(rows: list[Case]) -> tuple[list[Row], list[tuple[str, str, list[str]]]]:
    """Run all cases and the exchange of checkpoints."""
    ranks: dict[Case, list[dict[str, Any]]] = {}
    pairs = []
    with tempfile.TemporaryDirectory() as name:
        folder, written = Path(name), [case for case in rows if case.keeps]
        worlds = sorted({case.world for case in rows})
        for world in worlds:
            mine = [case for case in rows if case.world == world]
            found = run_ranks(train_all, world, mine, folder, limit=1800)
            ranks |= {case: [part[index] for part in found] for index, case in enumerate(mine)}
        for world in worlds:
            mine = [case for case in written if case.world == world]
            for part in run_ranks(exchange, world, mine, written, folder, limit=1800):
                pairs += part
    single = {case.grouped: ranks[case][0] for case in rows if case.world == 1 and case.keeps}
    return [_row(case, ranks[case], single[case.grouped]["steps"]) for case in rows], pairs


def _row(case: Case, ranks: list[dict[str, Any]], expected: list[tuple]) -> Row:
    losses, norms = [], []
    for part in ranks:
        for (loss, norm, *_), (other_loss, other_norm, *_) in zip(part["steps"], expected, strict=True):
            losses.append(abs(loss - other_loss) / other_loss)
            norms.append(abs(norm - other_norm) / other_norm)
    return Row(
        case=case,
        loss=max(losses),
        norm=max(norms),
        same_rows=all([step[2] for step in part["steps"]] == [step[2] for step in expected] for part in ranks),
        differs=[name for part in ranks for name in part.get("differs", [])],
        recompiled=[line for part in ranks for line in part["recompiled"]],
        seconds=max(part["seconds"] for part in ranks),
        steps=ranks[0]["steps"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="the table of the test suite")
    parser.add_argument("--only", default="", help="rows whose name contains this, and one process")
    options = parser.parse_args()
    chosen = [case for case in cases(options.short) if case.world == 1 or options.only in case.name]
    begin = time.perf_counter()
    rows, pairs = measure(chosen)
    print(f"torch {torch.__version__}, gloo, float32, {STEPS} steps, {len(rows)} cases\n")
    print("| layout, checkpointing, compiler | ranks | loss | gradient norm | s | |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        verdict = "" if row.good else f"WRONG {row.differs[:2]} {row.recompiled[:1]}"
        print(
            f"| {row.case.name} | {row.case.world} | {row.loss:.1e} | {row.norm:.1e} | {row.seconds:.1f} | {verdict} |"
        )
    wrong = [pair for pair in pairs if pair[2]]
    print(f"\ncheckpoints read in another layout: {len({p[:2] for p in pairs})} pairs, {len(wrong)} wrong {wrong[:3]}")
    largest = max(row.loss for row in rows), max(row.norm for row in rows)
    print(f"largest difference: loss {largest[0]:.1e}, gradient norm {largest[1]:.1e}")
    print(f"{time.perf_counter() - begin:.0f} s")
    sys.exit(0 if all(row.good for row in rows) and not wrong else 1)


if __name__ == "__main__":
    main()
