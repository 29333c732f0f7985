"""Every layout trains as one process does, and reads every other layout's checkpoint. One command makes the table:

    python -m tests.distributed.layouts [--short] [--only TEXT]

Small models of YuLan-Mini's shape (scalars, biases, 6 heads, ragged vocabulary; tied, with grouped heads, and untied
with norms of queries, keys and the embedding) train for 10 steps on gloo ranks of this machine, in every layout, with
every kind of activation checkpointing where it changes what runs, and compiled. Compared with one process: the largest
relative difference of the loss and of the gradient norm over the steps, and of the validation loss after them; and
the text that the model then writes. `layout_cases.py` has the rows, `test_layouts.py` runs the short table.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.distributed.bodies import state_of
from tests.distributed.layout_cases import LENGTH, STEPS, TAPES, VOCABULARY, Case, cases, make_learner, with_one_process
from tests.distributed.ranks import run_ranks
from titan_yulan.checkpoint import store
from titan_yulan.checkpoint.layout import Checkpoint, open_checkpoint
from titan_yulan.eval.generate import generate
from titan_yulan.eval.validation import HeldOutRows
from titan_yulan.learner import Learner
from titan_yulan.model.sharding import local
from titan_yulan.parallel.compile import CompileWatch
from titan_yulan.parallel.fsdp import reshard
from titan_yulan.parallel.parallelize import part_of
from titan_yulan.parallel.process import World

# Largest relative difference of the loss and of the gradient norm. In bfloat16 every layout rounds other partial sums,
# by up to 2^-9 of each: about one such rounding is left of them in a norm, less in a mean over many tokens. One process
# in bfloat16 differs from float32 by as much, and is a row of its own, so that the limits are seen to be no wider than
# the type.
TOLERANCES = {"float32": (1e-5, 5e-5), "bfloat16": (2.0**-10, 2.0**-9)}


Pairs = list[tuple[str, str, list[str]]]  # the case that reads, the case that wrote, tensors that differ


def run_case(case: Case, world: World, folder: Path) -> dict[str, Any]:
    """Ten steps: loss, gradient norm, fingerprint and sums by source of each; a checkpoint; validation and a text."""
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
    found: dict[str, Any] = {"steps": steps, "recompiled": late}
    if case.keeps:
        store.save(folder / case.name, learner.tensors(), state_of(STEPS), "", world, keep=9)
        dist.barrier()
        found["differs"] = differences(learner, open_checkpoint(folder / case.name))
    held_out = HeldOutRows(dict(enumerate(TAPES)), rows=5, sequence_length=LENGTH)
    sums, tokens = learner.validate(held_out, list(TAPES), lambda what: None)
    found["validation"] = [*sums.tolist(), *tokens.tolist()]
    found["text"] = generate(
        learner.decoder, [3, 5, 7, 11, 13], new_tokens=8, eos_id=-1, vocab_size=VOCABULARY - 5, context=9
    )
    reshard(learner.decoder)
    return found | {"seconds": time.perf_counter() - begin}


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


def train_all(world: World, rows: list[Case], written: list[Case], folder: Path) -> tuple[list[dict[str, Any]], Pairs]:
    """Train every case, then let each read what they all wrote and what fewer ranks wrote before."""
    return [run_case(case, world, folder) for case in rows], exchange(world, rows, written, folder)


def exchange(world: World, rows: list[Case], written: list[Case], folder: Path) -> Pairs:
    """Every pair of the same model."""
    found = []
    for case in kept(rows):
        learner = make_learner(case, world, seed=8)
        for other in written:
            if other.model == case.model and other.name != case.name:
                checkpoint = open_checkpoint(folder / other.name)
                store.load(checkpoint, learner.tensors(), world.host)
                found.append((case.name, other.name, differences(learner, checkpoint)))
    return found


@dataclass(frozen=True)
class Row:
    """A case beside one process."""

    case: Case
    loss: float  # largest relative difference, of the whole loss and of each source's sums
    norm: float
    validation: float
    same_rows: bool
    same_text: bool
    differs: list[str]  # tensors that were saved wrongly
    recompiled: list[str]
    seconds: float
    steps: list[tuple]  # of the first rank: loss, gradient norm, fingerprint, sums by source

    @property
    def close(self) -> bool:
        loss, norm = TOLERANCES[self.case.compute_dtype]
        return self.loss <= loss and self.validation <= loss and self.norm <= norm

    @property
    def good(self) -> bool:
        same = self.same_rows and (self.same_text or self.case.compute_dtype != "float32")
        return self.close and same and not self.differs and not self.recompiled


def kept(rows: list[Case]) -> list[Case]:
    return [case for case in rows if case.keeps]


def measure(rows: list[Case], every_pair: bool) -> tuple[list[Row], Pairs]:
    """Run all cases and the exchange of checkpoints.

    Args:
        every_pair: also start processes again for fewer ranks that read what more ranks wrote. Without it a checkpoint
            is read by its equals, by more ranks, and as one process reads it (`differences`).
    """
    ranks: dict[Case, list[dict[str, Any]]] = {}
    pairs: Pairs = []
    by_world = {world: [case for case in rows if case.world == world] for world in sorted({c.world for c in rows})}
    with tempfile.TemporaryDirectory() as name:
        folder, written = Path(name), kept(rows)
        for world, mine in by_world.items():
            readable = [case for case in written if case.world <= world]
            for results, read in run_ranks(train_all, world, mine, readable, folder, limit=1800):
                pairs += read
                for case, result in zip(mine, results, strict=True):
                    ranks.setdefault(case, []).append(result)
        for world, mine in by_world.items():
            larger = [case for case in written if case.world > world]
            if every_pair and larger:
                for read in run_ranks(exchange, world, mine, larger, folder, limit=1800):
                    pairs += read
    single = {case.name: ranks[case][0] for case in rows if case.world == 1}
    return [compare(case, ranks[case], single[case.reference.name]) for case in rows], pairs


def _relative(found: float, expected: float) -> float:
    """Infinite if either is not a finite number: comparisons with NaN would pass, or be dropped by `max`."""
    if not (math.isfinite(found) and math.isfinite(expected)):
        return math.inf
    return abs(found - expected) / (abs(expected) or 1.0)


def compare(case: Case, ranks: list[dict[str, Any]], one: dict[str, Any]) -> Row:
    """What `run_case` found on each rank beside what it found on one."""
    losses, norms, validations = [], [], []
    for part in ranks:
        for found, expected in zip(part["steps"], one["steps"], strict=True):
            losses.append(_relative(found[0], expected[0]))
            losses += map(_relative, found[3], expected[3])
            norms.append(_relative(found[1], expected[1]))
        validations += map(_relative, part["validation"], one["validation"])
    return Row(
        case=case,
        loss=max(losses),
        norm=max(norms),
        validation=max(validations),
        same_rows=all([step[2] for step in part["steps"]] == [step[2] for step in one["steps"]] for part in ranks),
        same_text=all(part["text"] == one["text"] for part in ranks),
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
    chosen = [case for case in cases(options.short) if case.world > 1 and options.only in case.name]
    begin = time.perf_counter()
    rows, pairs = measure(with_one_process(chosen), every_pair=not options.short)
    print(f"torch {torch.__version__}, gloo, {STEPS} steps, {len(rows)} cases\n")
    print("| layout, model, checkpointing, compiler | ranks | loss | gradient norm | validation | text | s |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        numbers = f"{row.loss:.1e} | {row.norm:.1e} | {row.validation:.1e}"
        text = "same" if row.same_text else "other"
        verdict = "" if row.good else f"WRONG {row.differs[:2]} {row.recompiled[:1]}"
        print(f"| {row.case.name} | {row.case.world} | {numbers} | {text} | {row.seconds:.1f} | {verdict}")
    wrong = [pair for pair in pairs if pair[2]]
    print(f"\ncheckpoints read in another layout: {len({p[:2] for p in pairs})} pairs, {len(wrong)} wrong {wrong[:3]}")
    for dtype in TOLERANCES:
        mine = [row for row in rows if row.case.compute_dtype == dtype]
        if mine:
            loss, norm = max(max(row.loss, row.validation) for row in mine), max(row.norm for row in mine)
            print(f"largest difference in {dtype}: loss {loss:.1e}, gradient norm {norm:.1e}")
    print(f"{time.perf_counter() - begin:.0f} s")
    sys.exit(0 if all(row.good for row in rows) and not wrong else 1)


if __name__ == "__main__":
    main()
