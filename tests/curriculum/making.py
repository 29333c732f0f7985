"""Configurations for the tests of everything that plans, without files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from titan_yulan.config.presets import PRESETS
from titan_yulan.config.sections import (
    BatchSection,
    DataSection,
    LearningRateSegment,
    OptimizerSection,
    ParallelSection,
    PhaseSection,
    RunConfig,
    RunSection,
    SourceSection,
    TokenizerSection,
)
from titan_yulan.config.values import Duration, Tokens


def segment(shape: str, from_: float = 1.0, to: float = 1.0, over: str = "", hold_at: str = "") -> LearningRateSegment:
    """A learning-rate segment; durations as text, empty for none."""
    return LearningRateSegment(
        shape=shape,
        from_=from_,
        to=to,
        over=Duration.parse(over) if over else None,
        hold_at=Duration.parse(hold_at) if hold_at else None,
    )


def phase(
    name: str,
    length: str | None,
    mix: Mapping[str, float | Tokens],
    *,
    sequence_length: int = 16,
    batch: int | Tokens = 8,
    lr: tuple[LearningRateSegment, ...] = (),
    **more: Any,
) -> PhaseSection:
    """A phase of `batch` rows a step; its length as text."""
    options: dict[str, Any] = {"parallel": ParallelSection(compute_dtype="float32"), **more}
    return PhaseSection(
        name=name,
        sequence_length=sequence_length,
        mix=dict(mix),
        length=Duration.parse(length) if length else None,
        lr=lr,
        batch=BatchSection(global_batch_size=batch, micro_batch_size=1),
        **options,
    )


def configuration(*phases: PhaseSection, sources: Mapping[str, SourceSection] | None = None, **more: Any) -> RunConfig:
    """A run of the debug model with these phases; by default the sources are those that the phases mix."""
    names = sorted({name for section in phases for name in section.mix})
    sections: dict[str, Any] = {
        "run": RunSection(name="test", seed=7),
        "optimizer": OptimizerSection(learning_rate=1.0),
        "tokenizer": TokenizerSection(path="tokenizer"),
        **more,
    }
    return RunConfig(
        model=PRESETS["debug"],
        data=DataSection(
            sources=dict(sources) if sources else {name: SourceSection(path=f"data/{name}") for name in names}
        ),
        phases=phases,
        **sections,
    )
