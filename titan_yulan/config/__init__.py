"""The configuration of a run: TOML in, one frozen, typed, checked `RunConfig` out; standard library only."""

from titan_yulan.config.find import find
from titan_yulan.config.load import Loaded, load
from titan_yulan.config.model import ModelConfig
from titan_yulan.config.presets import PRESETS
from titan_yulan.config.schema import schema
from titan_yulan.config.sections import (
    BatchSection,
    CheckpointSection,
    DataSection,
    EvalSection,
    LearningRateSegment,
    MonitorSection,
    ObjectiveSection,
    OptimizerSection,
    ParallelSection,
    PhaseSection,
    RunConfig,
    RunSection,
    SourceSection,
    TokenizerSection,
)
from titan_yulan.config.show import Difference, diff, show, to_toml
from titan_yulan.config.values import Duration, Tokens

__all__ = [
    "PRESETS",
    "BatchSection",
    "CheckpointSection",
    "DataSection",
    "Difference",
    "Duration",
    "EvalSection",
    "LearningRateSegment",
    "Loaded",
    "ModelConfig",
    "MonitorSection",
    "ObjectiveSection",
    "OptimizerSection",
    "ParallelSection",
    "PhaseSection",
    "RunConfig",
    "RunSection",
    "SourceSection",
    "TokenizerSection",
    "Tokens",
    "diff",
    "find",
    "load",
    "schema",
    "show",
    "to_toml",
]
