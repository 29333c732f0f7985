"""What a run needs, from the configuration alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from tests.curriculum.making import configuration, phase
from tests.distributed.ranks import run_ranks
from tests.parallel import small_decoder
from titan_yulan.config.model import count_parameters
from titan_yulan.config.presets import PRESETS
from titan_yulan.config.sections import (
    ActivationCheckpointSection,
    BatchSection,
    CheckpointSection,
    ObjectiveSection,
    ParallelSection,
    RunConfig,
)
from titan_yulan.config.values import Duration
from titan_yulan.curriculum.plan import Plan
from titan_yulan.data.loader import Batch
from titan_yulan.errors import UserError
from titan_yulan.model import Decoder
from titan_yulan.model.sharding import local
from titan_yulan.objective.next_token import NextToken
from titan_yulan.parallel.activation_checkpoint import apply_activation_checkpoint
from titan_yulan.parallel.degrees import Degrees
from titan_yulan.parallel.mesh import build_mesh
from titan_yulan.parallel.process import World
from titan_yulan.parallel.sharding import RankSharding
from titan_yulan.parallel.tensor import distribute_parameters
from titan_yulan.plan import memory
from titan_yulan.plan.memory import (
    GIB,
    Activations,
    checkpoint_bytes,
    disk_forecast,
    estimate_memory,
    inspect_machine,
    ranks_that_fit,
)
from titan_yulan.plan.pattern import Pattern
from titan_yulan.plan.trace import LiveBytes

YULAN_MINI = PRESETS["yulan_mini_2b"]
# Of its tied embedding, and of the matrices and biases of a block: q and o, k and v, the MLP.
EMBEDDING = 99_000 * 1920
BLOCK = 2 * 1920 * 1920 + 2 * 384 * 1920 + 3 * 4800 * 1920 + 1920 + 2 * 384
SCALARS_AND_NORMS = 56 * (2 * 1920 + 8) + 1920 + 2


def yulan_mini(rows: int = 1, length: int = 4096, recompute: str = "none", every: int = 1, **layout: Any) -> RunConfig:
    section = phase("a", "9 steps", {"code": 1.0}, sequence_length=length, batch=1008)
    section = replace(
        section,
        parallel=ParallelSection(**layout),
        batch=BatchSection(global_batch_size=1008, micro_batch_size=rows),
        activation_checkpoint=ActivationCheckpointSection(mode=recompute, every=every),
    )
    return replace(configuration(section), model=YULAN_MINI)


def test_state_is_16_bytes_a_parameter_shared_by_the_ranks() -> None:
    assert count_parameters(YULAN_MINI) == EMBEDDING + 56 * BLOCK + SCALARS_AND_NORMS
    assert estimate_memory(yulan_mini(), 1).state == 16 * count_parameters(YULAN_MINI)
    whole = 16 * (EMBEDDING + 56 * BLOCK)
    # 8 divides every size, whatever the names of the 8 ranks are, and the scalars are on each
    for tensor, context in ((1, 1), (2, 1), (1, 2), (2, 2)):
        need = estimate_memory(yulan_mini(tensor=tensor, context=context), 8)
        assert need.state == whole // 8 + 16 * SCALARS_AND_NORMS
    assert estimate_memory(yulan_mini(data_replicate=4), 8).state == whole // 2 + 16 * SCALARS_AND_NORMS


def test_a_shard_is_padded_to_whole_rows() -> None:
    """56 ranks: 1768 rows of 99,000 / 56, 35 of 1920 / 56, 7 of 384 / 56, 86 of 4800 / 56; columns as they are."""
    block = 35 * 1920 * 2 + 7 * 1920 * 2 + 86 * 1920 * 2 + 35 * 4800 + 35 + 2 * 7
    assert estimate_memory(yulan_mini(), 56).state == 16 * (1768 * 1920 + 56 * block + SCALARS_AND_NORMS)


def test_offloaded_state_is_the_hosts() -> None:
    here, away = (estimate_memory(yulan_mini(cpu_offload=offload), 8) for offload in (False, True))
    assert (away.host, away.state) == (2 * (EMBEDDING + 56 * BLOCK), 16 * SCALARS_AND_NORMS)
    assert here.host == 0 and here.total - away.total == away.host
    assert (away.gathered, away.activations, away.working) == (here.gathered, here.activations, here.working)


def test_gathered_weights_and_gradients() -> None:
    def gathered(world: int = 8, **layout: Any) -> int:
        return estimate_memory(yulan_mini(**layout), world).gathered

    assert gathered() == gathered(world=56) == gathered(data_replicate=8) == 2 * (EMBEDDING + 2 * BLOCK)
    assert gathered(compute_dtype="float32") == 4 * (EMBEDDING + 2 * BLOCK)
    assert gathered(reshard_after_forward=False) == 2 * (EMBEDDING + 56 * BLOCK)
    assert gathered(tensor=2) == EMBEDDING + 2 * BLOCK
    assert gathered(synchronize="last") == gathered() + 4 * (EMBEDDING + 56 * BLOCK)
    assert gathered(synchronize="last", reduce_dtype="bfloat16") == gathered() + 2 * (EMBEDDING + 56 * BLOCK)


def test_activations_of_the_whole_decoder() -> None:
    """Recomputed blocks keep their input; rows multiply, context divides, tensor divides what is cut."""

    def kept(world: int = 8, **how: Any) -> int:
        return estimate_memory(yulan_mini(**how), world).activations

    stream = 4096 * 1920 * 2
    assert kept(recompute="full") == (56 + 2) * stream
    assert kept(recompute="full", rows=3) == 3 * kept(recompute="full") == 3 * kept(recompute="full", world=56)
    assert kept(recompute="full", length=28_672) == 7 * kept(recompute="full")
    assert kept(recompute="full", context=2) == 29 * stream
    assert kept(recompute="full", tensor=2) == 28 * stream + stream // 2 + stream
    assert kept(recompute="every", every=1) == kept(recompute="none")
    # blocks 0, 12, 24, 36 and 48 keep all, as published for gradient_checkpointing_step = 12
    block = (kept() - 2 * stream) // 56
    assert kept(recompute="every", every=12) == 5 * block + 51 * stream + 2 * stream
    assert kept(recompute="full") < kept(recompute="every", every=2) < kept(recompute="selective") < kept()
    assert kept(tensor=2) < 0.6 * kept() and kept(context=2) < 0.6 * kept()


def test_the_working_memory_is_that_of_the_loss_a_block_or_the_last_gradients() -> None:
    def working(**how: Any) -> int:
        return estimate_memory(yulan_mini(**how), 8).working

    logits = 4096 * 99_000 * 2
    assert working() == 4 * EMBEDDING + logits
    assert working(tensor=2) == (4 * EMBEDDING + logits) // 2
    # 1024 tokens: the cast gradient of the head is larger than their logits
    assert working(length=1024) == (4 + 2) * EMBEDDING
    # 32 rows: a block's activations, computed again, are larger than a chunk of logits
    assert working(rows=32, recompute="full") > 32 * 4096 * 2 * 5 * 4800
    untied = replace(yulan_mini(length=16), model=replace(YULAN_MINI, tie_word_embeddings=False, embedding_scale=1.0))
    need = estimate_memory(untied, 8)
    assert need.activations + need.working == (2 + 4) * 2 * EMBEDDING


def test_the_total_is_that_of_the_device() -> None:
    need = estimate_memory(yulan_mini(cpu_offload=True), 8)
    assert need.total == need.state + need.gathered + need.activations + need.working


def test_drawn_masks_live_through_a_step() -> None:
    """A byte for each pair of tokens, for all rows that a rank reads in a step, and what it takes to draw them."""
    rows, length = 4, 512
    config = yulan_mini(rows=rows, length=length)
    plain = estimate_memory(config, 8)
    drawn = estimate_memory(replace(config, objective=ObjectiveSection(token_mask_share=0.5)), 8)
    masked = estimate_memory(replace(config, objective=ObjectiveSection(document_mask=True)), 8)
    assert (plain.inputs, masked.inputs, drawn.inputs) == (0, 0, 32 * rows * length**2)  # 1008 / 8 rows, by 4
    # a block keeps keys and values repeated, and the mask; not queries, keys and values as they were projected
    more = 2 * (length + 1920 - 3 * 384)
    assert drawn.activations == masked.activations == plain.activations + 56 * rows * length * more
    assert drawn.total == drawn.state + drawn.gathered + drawn.activations + drawn.inputs + drawn.working
    objective, size = NextToken(ObjectiveSection(token_mask_share=0.5), 1), (rows, length + 1)
    batch = Batch(
        tokens=torch.zeros(size, dtype=torch.int64),
        document_ids=torch.zeros(size, dtype=torch.int64),
        loss_mask=torch.ones(size, dtype=torch.bool),
        source=torch.zeros(rows, dtype=torch.int64),
        position=torch.arange(rows),
        weight=torch.ones(rows),
    )
    with LiveBytes() as live:
        made = objective.inputs(batch).visible
    assert made is not None and made.nbytes * 32 == drawn.inputs
    # where a step keeps next to nothing, drawing is a moment of its own
    tiny = replace(yulan_mini(rows=rows, length=length, recompute="full"), model=small_decoder.CONFIG)
    moments = estimate_memory(replace(tiny, objective=ObjectiveSection(token_mask_share=0.5)), 8)
    assert dict(moments.moments)["drawing masks"] + moments.activations == pytest.approx(live.peak, rel=0.02)


def activations(degrees: Degrees, rows: int, length: int, size: int, masked: bool = False) -> Activations:
    pattern = Pattern(ObjectiveSection(document_mask=masked))
    return Activations(small_decoder.CONFIG, degrees, rows, length, size, pattern)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("mode", ["none", "selective", "every", "full"])
def test_activations_are_what_autograd_keeps(mode: str, masked: bool) -> None:
    section, ids = ActivationCheckpointSection(mode=mode, every=2), small_decoder.make_ids()
    decoder = small_decoder.make_decoder()
    apply_activation_checkpoint(decoder.model.layers, section)
    documents = torch.zeros_like(ids) if masked else None
    measured = kept_bytes(decoder, ids, documents)
    expected = activations(Degrees(1, 1, 1, 1), ids.shape[0], ids.shape[1], 8, masked).kept(section)
    assert expected == pytest.approx(measured, rel=0.05)


def kept_bytes(decoder: Decoder, ids: Tensor, documents: Tensor | None) -> int:
    """Bytes that autograd holds of the decoder's pass, the hidden states as the head gets them included."""
    with small_decoder.Storages() as storages:
        loss = decoder(ids, document_ids=documents, head=lambda hidden, _: hidden.square().mean())
    weights = {StorageWeakRef(local(parameter).untyped_storage()) for parameter in decoder.parameters()}
    kept = sum(size for ref, size in storages.bytes.items() if not ref.expired() and ref not in weights)
    loss.backward()
    return kept


RANKS = [(layout, mode) for layout in ("tensor", "context") for mode in ("none", "selective", "every", "full")]


def measure_on_ranks(world: World) -> list[int]:
    found = []
    for layout, mode in RANKS:
        mesh = build_mesh(degrees_of(layout, world.size), "cpu")
        with torch.device("meta"):
            decoder = Decoder(small_decoder.CONFIG)
        decoder.model.sharding = RankSharding(mesh, small_decoder.VOCABULARY)
        if mesh.tensor is not None:
            distribute_parameters(decoder, mesh.tensor)
        apply_activation_checkpoint(decoder.model.layers, ActivationCheckpointSection(mode=mode, every=2))
        decoder.to_empty(device="cpu")
        ids = small_decoder.make_ids(rows=2, length=64)
        # Without a mask, context parallelism runs other code on a CPU than on a GPU.
        documents = torch.zeros_like(ids) if layout == "context" else None
        ids = decoder.model.sharding.slice_context(ids)
        # A thread of gloo's may hold the last collective's tensors for a moment longer: the least of five passes.
        found.append(min(kept_bytes(decoder, ids, documents) for _ in range(5)))
    return found


def degrees_of(layout: str, ranks: int) -> Degrees:
    return replace(Degrees(1, 1, 1, 1), **{layout: ranks})


def test_activations_of_ranks_that_share_a_row() -> None:
    for measured in run_ranks(measure_on_ranks, 2):
        for (layout, mode), kept in zip(RANKS, measured, strict=True):
            counted = activations(degrees_of(layout, 2), 2, 64, 4, masked=layout == "context")
            section = ActivationCheckpointSection(mode=mode, every=2)
            assert counted.kept(section) == pytest.approx(kept, rel=0.1), (layout, mode)


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


def test_ranks_that_fit_passes_over_numbers_that_the_layout_excludes() -> None:
    config = yulan_mini(tensor=3, data_replicate=2)
    with pytest.raises(UserError, match=r"parallel\.tensor = 3"):
        estimate_memory(config, 8)
    assert ranks_that_fit(config, 80 * GIB) == 6
    # with 8 GiB each, six ranks are too few, and the next number that 2 x 3 divides is 12
    enough = estimate_memory(config, 12).total
    assert estimate_memory(config, 6).total > enough and ranks_that_fit(config, enough) == 12


def test_ranks_that_fit_needs_a_row_for_each() -> None:
    config = yulan_mini()
    small = replace(config.phases[0], batch=BatchSection(global_batch_size=4, micro_batch_size=1))
    enough = estimate_memory(config, 8).total
    assert ranks_that_fit(config, enough) == 8
    assert ranks_that_fit(replace(config, phases=(small,)), enough) is None
    shared = replace(small, parallel=ParallelSection(context=2))
    assert ranks_that_fit(replace(config, phases=(shared,)), enough) is not None


@pytest.mark.parametrize(("every", "first_phase", "most"), [(None, 0, 4), ("5 steps", 0, 8), ("5 steps", 2, 6)])
def test_disk_at_the_worst_moment(every: str | None, first_phase: int, most: int) -> None:
    """The ends of three phases, four more, and the one that is being written."""
    phases = [phase(name, "9 steps", {"code": 1.0}) for name in "abc"]
    section = CheckpointSection(every=Duration.parse(every) if every else None, keep=4)
    config = replace(configuration(*phases, checkpoint=section), first_phase=first_phase)
    assert disk_forecast(config, Plan(config)) == (most, most * checkpoint_bytes(config))
    assert checkpoint_bytes(config) == 12 * count_parameters(config.model)
    # the best one too, which saves without `every` as well
    config = replace(config, checkpoint=replace(section, keep_best=True))
    assert disk_forecast(config, Plan(config))[0] == 3 - first_phase + 4 + 1 + 1


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
