"""What the plan's formulas say of thousands of ranks is what the model's code does there, counted without numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.curriculum.making import configuration, phase
from titan_yulan import cli
from titan_yulan.config.presets import PRESETS
from titan_yulan.config.sections import (
    ActivationCheckpointSection,
    BatchSection,
    ObjectiveSection,
    ParallelSection,
    RunConfig,
)
from titan_yulan.plan.memory import CHUNK_TOKENS, phase_memory
from titan_yulan.plan.trace import LiveBytes, trace
from titan_yulan.plan.trace_picture import expected_kept, expected_traffic

LAYERS = 3
# as wide as YuLan-Mini, so that the ranks divide what they divide there; a smaller vocabulary leaves blocks their share
MODEL = replace(PRESETS["yulan_mini_2b"], num_hidden_layers=LAYERS, vocab_size=9_000)

CASES: list[tuple[int, str, dict[str, Any]]] = [
    (8, "none", {}),
    (8, "full", {"tensor": 2}),
    (56, "every", {"reshard_after_forward": False}),
    (56, "none", {"data_replicate": 7, "synchronize": "last"}),
    (1024, "none", {"data_replicate": 128, "context": 2}),
    (1024, "selective", {"data_replicate": 64, "context": 2, "tensor": 2}),
]


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """Another test's process group would be in the way."""
    if dist.is_initialized():
        dist.destroy_process_group()
    yield
    assert not dist.is_initialized()


def config_of(mode: str, layout: dict[str, Any]) -> RunConfig:
    section = replace(
        phase("a", "9 steps", {"code": 1.0}, sequence_length=CHUNK_TOKENS, batch=1024),
        parallel=ParallelSection(**layout),
        batch=BatchSection(global_batch_size=1024, micro_batch_size=2),
        activation_checkpoint=ActivationCheckpointSection(mode=mode, every=2),
    )
    return replace(configuration(section), model=MODEL)


DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
OTHERS: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ("none", {"context": 2}, {"kind": "masked_diffusion"}, DROPOUT),
    ("none", {}, {"token_mask_share": 0.5, "document_mask": True}, {}),
    ("full", {"context": 2}, {"token_mask_share": 0.5}, {}),
    ("full", {}, {"document_mask": True, "orders": 2}, {}),
    ("every", {"tensor": 2}, {"orders": 2}, DROPOUT),
    ("selective", {}, {}, DROPOUT),
]


@pytest.mark.parametrize(("mode", "layout", "objective", "model"), OTHERS)
def test_other_objectives_and_dropout(
    mode: str, layout: dict[str, Any], objective: dict[str, Any], model: dict[str, Any]
) -> None:
    config = config_of(mode, layout)
    compare(replace(config, objective=ObjectiveSection(**objective), model=replace(MODEL, **model)), 8)


@pytest.mark.parametrize(("world", "mode", "layout"), CASES)
def test_a_rank_does_what_is_calculated(world: int, mode: str, layout: dict[str, Any]) -> None:
    compare(config_of(mode, layout), world)


def compare(config: RunConfig, world: int) -> None:
    section = config.phases[0]
    mode = section.activation_checkpoint.mode
    memory = phase_memory(config, section, world)
    found = trace(config, section, world, dict(memory.moments)["head and loss"])
    expected = expected_traffic(config, section, world, found.micro_batches)
    assert found.calls == {kind: calls for kind, (calls, _) in expected.items()}
    assert found.received == {kind: received for kind, (_, received) in expected.items()}
    assert found.micro_batches == (2 if section.parallel.synchronize == "last" else 1)
    # Adam's step counts are scalars beside the moments
    assert found.state == pytest.approx(memory.state, rel=1e-3)
    kept = expected_kept(config, section, world)
    assert found.kept == pytest.approx(kept, rel=0.05)
    # The plan takes the worst of everything at once, which weighs more where there are few blocks; when the second of
    # three is computed again, all of the third is gone.
    # A trace has one drawn mask beside it, a step one for each micro-batch.
    total = memory.total - memory.inputs + (2 * CHUNK_TOKENS**2 if memory.inputs else 0)
    drawing = dict(memory.moments).get("drawing masks", 0) == memory.working  # is before the pass that is traced
    assert found.peak <= total <= (1.6 if mode == "every" or drawing else 1.3) * found.peak


def test_live_bytes_follow_what_is_made_freed_and_resized() -> None:
    before = torch.zeros(1000, dtype=torch.uint8)
    with LiveBytes() as memory:
        memory.add([before])
        made = torch.ones(500, dtype=torch.uint8)
        view = made[:100]
        assert memory.live == 1500
        del made
        assert memory.live == 1500, "a view keeps its memory"
        del view
        assert memory.live == 1000
        before.untyped_storage().resize_(0)
        assert memory.live == 0
        before.untyped_storage().resize_(300)
        assert (memory.live, memory.peak) == (300, 1500)
        memory.beside(2000)
        assert (memory.live, memory.peak) == (300, 2300)


def test_the_command_prints_both(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--gpus=64", "--device=h100", "--trace", "--phase=stable", "--batch.global_batch_size=64"]
    assert cli.main(["plan", "debug.toml", *arguments, "--parallel.data_replicate=8"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    for kind in ("all-gather", "reduce-scatter", "all-reduce"):
        (found,) = [line for line in lines if line[:1] == [kind] and len(line) == 5]
        assert found[1:3] == found[3:5], kind


def test_memory_of_a_real_step_on_a_cpu() -> None:
    """The debug model, whole: predicted is what PyTorch's allocator gave out at the worst moment, within a fifth."""
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "benchmarks/planned_memory.py", "--index=0", "--steps=2"]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    found = json.loads(answer.stdout.splitlines()[-1])
    assert found["predicted"] == pytest.approx(found["allocated"], rel=0.2)
    # the process has libraries and the profile's own records beside it
    assert found["resident"] > 0.9 * found["allocated"]
