"""Masked diffusion with dropout over data that is read three times, for `bodies.training`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from tests.curriculum.making import configuration, phase
from tests.distributed import bodies
from tests.distributed.bodies import BATCH_ROWS, LENGTH, MICRO_BATCH, MODEL, OPTIMIZER, PARALLEL, state_of
from titan_yulan.checkpoint import store
from titan_yulan.checkpoint.layout import Checkpoint, step_folder
from titan_yulan.config.sections import BatchSection, ObjectiveSection
from titan_yulan.curriculum.plan import Plan
from titan_yulan.data import hashing
from titan_yulan.data.tape import Tape, TapeSlice
from titan_yulan.learner import Learner
from titan_yulan.parallel.process import World

MASK, UNIQUE_ROWS, EPOCHS, STOP = 12, 10, 3, 2
Step = tuple[float, float, int]  # loss, gradient norm, fingerprint


class RepeatedTape:
    """Some hashed tokens, again and again."""

    length = UNIQUE_ROWS * LENGTH

    def read(self, start: int, count: int) -> TapeSlice:
        places = np.arange(start, start + count)
        tokens = (hashing.bits(3, places % self.length) % np.uint64(MASK)).astype(np.int32)
        return TapeSlice(tokens, places // 5, None, 0)


def make_learner(world: World, seed: int) -> Learner:
    """`seed` is that of the weights; rows, masks and dropout stay the same."""
    section = phase(
        "a",
        None,
        {"x": 1.0},
        sequence_length=LENGTH,
        batch=BATCH_ROWS,
        parallel=PARALLEL,
        unique_tokens=UNIQUE_ROWS * LENGTH,
        epochs=float(EPOCHS),
    )
    section = replace(section, batch=BatchSection(global_batch_size=BATCH_ROWS, micro_batch_size=MICRO_BATCH))
    objective = ObjectiveSection(kind="masked_diffusion", z_loss=0.0)
    config = configuration(section, optimizer=OPTIMIZER, objective=objective)
    config = replace(config, model=replace(MODEL, attention_dropout=0.2, hidden_dropout=0.1))
    learner = Learner(config, Plan(config), world, "auto", lambda line: None, MASK)
    learner.build(learner.plan.phases[0])
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in learner.decoder.parameters():
            parameter.mul_(float(torch.rand((), generator=generator)) + 0.5)
    return learner


def train(learner: Learner, first: int, last: int | None) -> tuple[list[Step], dict[int, list[bool]]]:
    """What the steps gave, and which tokens of this rank's rows were hidden, by the row's position in the run."""
    steps, hidden = [], {}
    with learner.loader(first, cast(Sequence[Tape], [RepeatedTape()]), last) as loader:
        for step, batches in enumerate(loader, first):
            values = learner.train_step(step, batches)
            loss = float(values.totals[0] / values.denominator)
            steps.append((loss, float(values.gradient_norm), int(values.fingerprint)))
            for batch in batches:
                masks = (learner.objective.inputs(batch).input_ids == MASK).tolist()
                real = (batch.weight > 0).tolist()
                hidden |= {p: m for p, m, r in zip(batch.position.tolist(), masks, real, strict=True) if r}
    return steps, hidden


def repeated(world: World, folder: Path) -> dict[str, Any]:
    """Two ranks train all and leave a checkpoint behind; any number goes on from that one."""
    found: dict[str, Any] = {}
    if world.size == 2:
        learner = make_learner(world, seed=1)
        before, hidden = train(learner, 0, STOP)
        store.save(folder, learner.tensors(), state_of(STOP), "", world, keep=1)
        after, hidden_after = train(learner, STOP, None)
        found["undisturbed"] = before + after
        found["undisturbed hidden"] = hidden | hidden_after
    other = make_learner(world, seed=2)
    other.load(Checkpoint(step_folder(folder, STOP), STOP))
    found["continued"], found["hidden"] = train(other, STOP, None)
    return found


def training_and_repeated(world: World, folder: Path, other: Path) -> dict[str, Any]:
    """Both bodies in one launch."""
    return bodies.training(world, folder) | {"repeated": repeated(world, other)}
