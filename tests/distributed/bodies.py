"""What the ranks run. One body does everything for its number of ranks, because starting processes takes seconds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tests.curriculum.making import configuration, phase
from titan_yulan.checkpoint import store
from titan_yulan.checkpoint.layout import TrainerState, open_checkpoint
from titan_yulan.config.model import ModelConfig
from titan_yulan.config.sections import (
    ActivationCheckpointSection,
    CompileSection,
    ObjectiveSection,
    OptimizerSection,
    ParallelSection,
    RunConfig,
)
from titan_yulan.curriculum.plan import Plan
from titan_yulan.data import hashing
from titan_yulan.data.loader import Loader
from titan_yulan.data.tape import Tape, TapeSlice
from titan_yulan.learner import Learner
from titan_yulan.objective.forward import forward
from titan_yulan.optimizer.adamw import optimizer_state
from titan_yulan.parallel.degrees import resolve_degrees
from titan_yulan.parallel.fsdp import ShardedDecoder, sum_replicated_gradients
from titan_yulan.parallel.mesh import build_mesh
from titan_yulan.parallel.parallelize import build_decoder
from titan_yulan.parallel.process import World

# No size divides by 2 or 3, and of the keys' 4 rows the third of three ranks gets none.
MODEL = ModelConfig(
    vocab_size=13,
    hidden_size=10,
    intermediate_size=7,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    initializer_range=0.3,
    embedding_scale=1.0,
    q_proj_alpha=0.034503,
)
STEPS, BATCH_ROWS, MICRO_BATCH, LENGTH = 3, 7, 2, 8
PARALLEL = ParallelSection(compute_dtype="float32")
# a large epsilon: else Adam divides gradients near zero by themselves and shows nothing but their rounding
OPTIMIZER = OptimizerSection(learning_rate=0.02, base_width=5, eps=1e-2, max_gradient_norm=0.5)


class HashedTape:
    """An endless tape of hashed tokens; some are no targets."""

    def __init__(self, source: int) -> None:
        self.source = source

    def read(self, start: int, count: int) -> TapeSlice:
        bits = hashing.bits(self.source, np.arange(start, start + count))
        return TapeSlice((bits % np.uint64(13)).astype(np.int32), np.zeros(count, np.int64), bits % np.uint64(5) > 0, 0)


TAPES = cast(Sequence[Tape], [HashedTape(0), HashedTape(1)])


def run_config() -> RunConfig:
    section = phase(
        "a", f"{STEPS} steps", {"x": 0.6, "y": 0.4}, sequence_length=LENGTH, batch=BATCH_ROWS, parallel=PARALLEL
    )
    config = configuration(section, optimizer=OPTIMIZER, objective=ObjectiveSection(z_loss=0.01))
    return replace(config, model=MODEL)


def make_decoder(section: ParallelSection, world: World, seed: int) -> ShardedDecoder:
    mesh = build_mesh(resolve_degrees(section, world.size, MODEL, LENGTH), "cpu")
    plain = ActivationCheckpointSection(), CompileSection()
    return build_decoder(MODEL, section, mesh, seed, world.device, *plain)


def make_learner(world: World, seed: int) -> Learner:
    """`seed` is that of the weights; the rows stay the same."""
    config = run_config()
    weights = replace(config, run=replace(config.run, seed=seed))
    learner = Learner(weights, Plan(config), world, "auto", lambda line: None)
    learner.build(learner.plan.phases[0])
    return learner


def full(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The whole tensors, whatever part this rank holds."""
    return {n: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for n, t in tensors.items()}


def parameters(decoder: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.data for name, parameter in decoder.named_parameters()}


def steps_from(learner: Learner, first: int, world: World):
    options = {"first_step": first, "rank": world.rank, "world": world.size, "prefetch": 2}
    return Loader(learner.plan.phases[0], TAPES, micro_batch_size=MICRO_BATCH, **options)


def gradients(learner: Learner, world: World) -> dict[str, Tensor]:
    """Of the first global batch, before clipping."""
    with steps_from(learner, 0, world) as loader:
        inputs = [learner.objective.inputs(batch) for batch in next(loader)]
    denominator = torch.stack([part.denominator for part in inputs]).sum()
    torch.distributed.all_reduce(denominator)
    for part in inputs:
        forward(learner.decoder, learner.objective, part, denominator).objective.backward()
    sum_replicated_gradients(learner.decoder)
    found = full({n: p.grad for n, p in learner.decoder.named_parameters() if p.grad is not None})
    learner.optimizer.zero_grad()
    return found


def train(learner: Learner, first: int, world: World) -> list[tuple[float, float, list[float], int]]:
    """(loss, gradient norm, sums by source, fingerprint) of every step."""
    recorded = []
    with steps_from(learner, first, world) as loader:
        for step, batches in enumerate(loader, first):
            values = learner.train_step(step, batches)
            loss = float(values.totals[0] / values.denominator)
            recorded.append((loss, float(values.gradient_norm), values.totals[1:].tolist(), int(values.fingerprint)))
    return recorded


def everything(learner: Learner) -> dict[str, Tensor]:
    return {f"{part}.{n}": t for part, tensors in learner.tensors().items() for n, t in full(tensors).items()}


def refused(learner: Learner, world: World) -> dict[str, Any]:
    """What two bad steps change: NaN gradients on the last rank, then a loss alone that is not a number; and what a
    good step changes afterwards."""
    with steps_from(learner, 0, world) as loader:
        batches = next(loader)
    loss, before = learner.objective.loss, everything(learner)
    found: dict[str, Any] = {"verdicts": [], "changed": []}
    for part in ("objective", "loss alone", "nothing"):

        def spoiled(*arguments: Any, part: str = part, **named: Any) -> Any:
            sums = loss(*arguments, **named)
            if world.rank < world.size - 1 or part == "nothing":
                return sums
            # adding NaN to a value that gradients do not pass leaves them sound
            objective = sums.objective * torch.nan if part == "objective" else sums.objective + torch.nan
            return sums._replace(objective=objective)

        learner.objective.loss = spoiled  # type: ignore[method-assign]
        values = learner.train_step(0, batches)
        found["verdicts"].append((int(values.verdict), bool(values.gradient_norm.isfinite())))
        found["changed"].append([name for name, t in everything(learner).items() if not torch.equal(t, before[name])])
    learner.objective.loss = loss  # type: ignore[method-assign]
    found["all"] = sorted(before)
    broken = math.nan if world.rank == world.size - 1 else 3.0  # a rank that computes something else than the rest
    found["worst"] = int(learner.guard.judge(torch.tensor(broken), torch.tensor(1.0))[0])
    return found


def state_of(step: int, phase_finished: bool = False) -> TrainerState:
    return TrainerState(
        step=step,
        row=step * BATCH_ROWS,
        token=0,
        phase="a",
        phase_finished=phase_finished,
        tapes={},
        sources={},
        tokenizer="",
        versions={},
        origin={},
    )


def training(world: World, folder: Path) -> dict[str, Any]:
    """Gradients, steps, and the checkpoint that two ranks write and any number reads."""
    agreed = [world.agree(value) for value in (0, world.rank, 3 * (world.rank == 0))]
    learner = make_learner(world, seed=3)
    found: dict[str, Any] = {"rank": world.rank, "agreed": agreed, "bfloat16": bfloat16(world)}
    found["initial"] = full(parameters(learner.decoder))
    found["gradients"] = gradients(learner, world)
    found["steps"] = train(learner, 0, world)
    replicated = {n: p for n, p in learner.decoder.named_parameters() if not isinstance(p, DTensor)}
    found["replicated"] = {name: parameter.detach().clone() for name, parameter in replicated.items()}
    found["trained"] = full(learner.tensors()["model"]) | full(optimizer_state(learner.decoder, learner.optimizer))
    if world.size == 2:
        store.save(folder, learner.tensors(), state_of(STEPS), "", world, keep=3)
    other = make_learner(world, seed=4)
    store.load(open_checkpoint(folder), other.tensors(), world.host)
    found["loaded"] = full(other.tensors()["model"]) | full(optimizer_state(other.decoder, other.optimizer))
    found["refused"] = refused(make_learner(world, seed=5), world)
    if world.size == 2:
        found["continued"] = [train(t, 0, world) for t in (learner, other)]
    return found


def bfloat16(world: World) -> dict[str, Any]:
    """What the forward pass sees under a compute type of bfloat16."""
    decoder = make_decoder(ParallelSection(compute_dtype="bfloat16"), world, seed=3)
    seen: dict[str, Any] = {}

    def look(module: nn.Module, *_: object) -> None:
        for name, parameter in module.named_parameters():
            seen[name] = (parameter.dtype, type(parameter.data) is Tensor, parameter.detach().clone())

    decoder.model.layers[0].register_forward_pre_hook(look)
    hidden = decoder(torch.zeros(1, 4, dtype=torch.int64), head=lambda hidden, weight: hidden)
    hidden.float().sum().backward()
    sum_replicated_gradients(decoder)
    grads = {n: p.grad.dtype for n, p in decoder.named_parameters() if p.grad is not None}
    return {"seen": seen, "hidden": hidden.dtype, "gradients": grads}
