"""What a run needs, from the configuration alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.curriculum.making import configuration, phase
from titan_yulan.config.model import PRESETS, count_parameters
from titan_yulan.config.sections import BatchSection, CheckpointSection, ParallelSection, RunConfig
from titan_yulan.config.values import Duration
from titan_yulan.curriculum.plan import Plan
from titan_yulan.plan import memory
from titan_yulan.plan.memory import (
    GIB,
    checkpoint_bytes,
    disk_forecast,
    estimate_memory,
    inspect_machine,
    ranks_that_fit,
)


def yulan_mini(**batch: int) -> RunConfig:
    section = phase("a", "9 steps", {"code": 1.0}, sequence_length=4096, batch=1008)
    section = replace(
        section,
        parallel=ParallelSection(compute_dtype="bfloat16"),
        batch=BatchSection(global_batch_size=1008, **{"micro_batch_size": 1, **batch}),
    )
    return replace(configuration(section), model=PRESETS["yulan_mini_2b"])


def test_state_is_16_bytes_a_parameter_shared_by_the_ranks() -> None:
    parameters = count_parameters(PRESETS["yulan_mini_2b"])
    for world in (1, 8, 56):
        assert estimate_memory(yulan_mini(), world).state == 16 * parameters // world


def test_total_is_the_sum_and_falls_with_more_ranks() -> None:
    few, many = estimate_memory(yulan_mini(), 1), estimate_memory(yulan_mini(), 8)
    assert few.total == few.state + few.gathered + few.activations
    assert (few.gathered, few.activations) == (many.gathered, many.activations) and few.total > many.total


def test_activations_grow_with_the_rows() -> None:
    one, two = (estimate_memory(yulan_mini(micro_batch_size=rows), 8) for rows in (1, 2))
    chunk = 3 * 4 * (1 << 21)
    assert two.activations - chunk == 2 * (one.activations - chunk)


def test_the_phase_that_needs_most_decides_and_finished_phases_do_not_count() -> None:
    short = phase("short", "9 steps", {"code": 1.0}, sequence_length=64)
    long = phase("long", "9 steps", {"code": 1.0}, sequence_length=512)
    both = configuration(long, short)
    assert estimate_memory(both, 1) == estimate_memory(configuration(long), 1)
    assert estimate_memory(replace(both, first_phase=1), 1) == estimate_memory(configuration(short), 1)


def test_ranks_that_fit_is_the_smallest_number() -> None:
    config = yulan_mini()
    ranks = ranks_that_fit(config, 40 * GIB)
    assert ranks is not None and ranks > 1
    assert estimate_memory(config, ranks).total <= 40 * GIB < estimate_memory(config, ranks - 1).total
    assert ranks_that_fit(config, GIB) is None
    assert ranks_that_fit(configuration(phase("a", "9 steps", {"code": 1.0})), 8 * GIB) == 1


@pytest.mark.parametrize(("every", "first_phase", "most"), [(None, 0, 4), ("5 steps", 0, 8), ("5 steps", 2, 6)])
def test_disk_at_the_worst_moment(every: str | None, first_phase: int, most: int) -> None:
    """The ends of three phases, four more, and the one that is being written."""
    phases = [phase(name, "9 steps", {"code": 1.0}) for name in "abc"]
    section = CheckpointSection(every=Duration.parse(every) if every else None, keep=4)
    config = replace(configuration(*phases, checkpoint=section), first_phase=first_phase)
    assert disk_forecast(config, Plan(config)) == (most, most * checkpoint_bytes(config))
    assert checkpoint_bytes(config) == 12 * count_parameters(config.model)


def fake_driver(folder: Path, lines: str, code: int = 0) -> str:
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\nprintf '{lines}'\nexit {code}\n")
    tool.chmod(0o755)
    return str(tool)


def test_accelerators_are_those_that_the_driver_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = fake_driver(tmp_path, r"NVIDIA H100 80GB HBM3, 81559\nNVIDIA H100 80GB HBM3, 81559\n")
    monkeypatch.setattr(memory.shutil, "which", lambda _: tool)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    machine = inspect_machine()
    assert (machine.accelerators, machine.device, machine.memory) == (2, "NVIDIA H100 80GB HBM3", 81559 * 2**20)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert inspect_machine().accelerators == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert (inspect_machine().accelerators, inspect_machine().device) == (0, "CPU")


def test_a_driver_that_fails_means_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = fake_driver(tmp_path, r"NVIDIA-SMI has failed, no driver\n", 9)
    monkeypatch.setattr(memory.shutil, "which", lambda _: tool)
    machine = inspect_machine()
    assert machine.accelerators == 0 and machine.memory > 0 and machine.cores >= 1
