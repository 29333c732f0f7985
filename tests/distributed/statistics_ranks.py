"""What the ranks of `test_statistics_ranks.py` run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tests.distributed.bodies import full, parameters
from tests.distributed.layout_cases import TAPES, Case, disturb, run_config
from titan_yulan.config.sections import MonitorSection, RunConfig
from titan_yulan.curriculum.plan import Plan
from titan_yulan.learner import Learner
from titan_yulan.monitor import magnitudes
from titan_yulan.monitor.statistics import Statistics
from titan_yulan.parallel.compile import CompileWatch
from titan_yulan.parallel.process import World

ROWS, LAYERS, EVERY = 4, 2, 2

# A length that tensor parallelism fills up; the others read 7 rows as 4 + 3 and one of no weight.
CASES = {
    "FSDP 2": (Case(2, "FSDP 2", model="grouped", document_mask=True), 28),
    "replicas 2": (Case(2, "replicas 2", {"data_replicate": 2}), 28),
    "TP 2": (Case(2, "TP 2", {"tensor": 2}, model="norms", document_mask=True), 27),
    "CP 2": (Case(2, "CP 2", {"context": 2}, model="grouped"), 28),
}
COMPILED = Case(2, "FSDP 2", model="grouped", checkpointing="selective", backend="aot_eager")


def statistics_config(case: Case, length: int, every: int = EVERY) -> RunConfig:
    config = run_config(case, seed=7)
    section = config.phases[0]
    section = replace(section, sequence_length=length, batch=replace(section.batch, micro_batch_size=ROWS))
    monitor = MonitorSection(statistics_every=every, statistics_rows=ROWS, statistics_layers=LAYERS)
    return replace(config, phases=(section,), monitor=monitor)


def make_learner(config: RunConfig, world: World) -> Learner:
    learner = Learner(config, Plan(config), world, "auto", lambda line: None)
    learner.build(learner.plan.phases[0])
    disturb(learner.decoder, 7)
    return learner


def by_name(statistics: Statistics | None) -> dict[str, float]:
    assert statistics is not None
    return dict(zip(statistics.names, statistics.values.tolist(), strict=True))


def observe_step(world: World, case: Case, length: int) -> dict[str, Any]:
    """Two steps, of which the second is observed: its statistics, and the whole weights before and after it."""
    learner = make_learner(statistics_config(case, length), world)
    found: dict[str, Any] = {}
    with learner.loader(0, TAPES) as loader:
        for step, batches in zip(range(2), loader, strict=False):
            found["before"] = full(parameters(learner.decoder))
            values = learner.train_step(step, batches)
            found.setdefault("first", values.statistics)
    found["after"] = full(parameters(learner.decoder))
    found["norm"] = float(values.gradient_norm)
    found["statistics"] = by_name(values.statistics)
    # the moments are those of the step; had it been left out, nothing would have moved
    found["refused"] = by_name(learner.observation.after_update(torch.ones(())))
    return found


def train(world: World, every: int) -> tuple[list[float], dict[str, Tensor], list[str]]:
    """Three compiled steps: losses, weights, and what was compiled after the first."""
    learner, watch = make_learner(statistics_config(COMPILED, 28, every), world), CompileWatch()
    losses, late = [], []
    with learner.loader(0, TAPES) as loader:
        for step, batches in zip(range(3), loader, strict=False):
            values = learner.train_step(step, batches)
            losses.append(float(values.totals[0] / values.denominator))
            if step == 0:
                watch.settle()
            else:
                late += watch.recompiled()
            assert (values.statistics is not None) == (every > 0 and (step + 1) % every == 0)
    return losses, full(parameters(learner.decoder)), late


def body(world: World) -> dict[str, Any]:
    magnitudes._ELEMENTS = 600  # so that some parameters share a bucket, and some are cut
    found: dict[str, Any] = {name: observe_step(world, case, length) for name, (case, length) in CASES.items()}
    return found | {"off": train(world, 0), "on": train(world, 2)}
