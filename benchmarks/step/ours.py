"""`learner.Learner`, which is what the trainer runs, on rows that were made up."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from titan_yulan.config.model import ModelConfig
from titan_yulan.config.sections import (
    ActivationCheckpointSection,
    BatchSection,
    CompileSection,
    DataSection,
    OptimizerSection,
    ParallelSection,
    PhaseSection,
    RunConfig,
    RunSection,
    SourceSection,
    TokenizerSection,
)
from titan_yulan.config.values import Duration
from titan_yulan.curriculum.plan import Plan
from titan_yulan.data.loader import Batch
from titan_yulan.learner import Learner
from titan_yulan.parallel.process import World


def without_wesar(config: ModelConfig) -> ModelConfig:
    """The same sizes without trained scalars, initialised as an ordinary transformer."""
    return replace(config, wesar=False, initialization=None, initializer_range=0.02)


def run_config(
    model: ModelConfig, length: int, rows: int, micro_batches: int, dtype: str, recompute: str, compiled: bool
) -> RunConfig:
    """A run of one endless phase on one rank.

    Args:
        rows: of a micro-batch.
        micro_batches: of a step.
        dtype: of products, "bfloat16" or "float32".
        recompute: `[activation_checkpoint] mode`.
    """
    phase = PhaseSection(
        name="benchmark",
        sequence_length=length,
        mix={"made_up": 1.0},
        length=Duration.parse("1000000 steps"),
        batch=BatchSection(global_batch_size=rows * micro_batches, micro_batch_size=rows),
        parallel=ParallelSection(compute_dtype=dtype),
        activation_checkpoint=ActivationCheckpointSection(mode=recompute),
    )
    return RunConfig(
        run=RunSection(name="benchmark"),
        model=model,
        tokenizer=TokenizerSection(path="none"),
        data=DataSection(sources={"made_up": SourceSection(path="none")}),
        phases=(phase,),
        optimizer=OptimizerSection(learning_rate=1e-4),
        compile=CompileSection(enabled=compiled),
    )


class OurTraining:
    """The trainer's step: data excluded; loss, statistics by source, guard, fingerprints and optimizer included."""

    def __init__(self, config: RunConfig, world: World) -> None:
        self._learner = Learner(config, Plan(config), world, config.model.kernels, lambda line: None)  # type: ignore[arg-type]
        self._learner.build(self._learner.plan.phases[0])
        self._steps = 0

    def step(self, batches: list[Tensor]) -> Tensor:
        """One step for micro-batches of (rows, seq + 1) ids; returns the () mean loss, with its z-loss."""
        values = self._learner.train_step(self._steps, [_batch(tokens) for tokens in batches])
        self._steps += 1
        return values.totals[0] / values.denominator


def _batch(tokens: Tensor) -> Batch:
    rows, device = tokens.shape[0], tokens.device
    return Batch(
        tokens=tokens,
        document_ids=torch.zeros_like(tokens),
        loss_mask=torch.ones(tokens.shape, dtype=torch.bool, device=device),
        source=torch.zeros(rows, dtype=torch.int64, device=device),
        position=torch.arange(rows, device=device),
        weight=torch.ones(rows, device=device),
    )
