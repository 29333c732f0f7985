"""What `layouts.py` measures: the models, the layouts, and the rows of its table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from tests.curriculum.making import configuration, phase
from tests.distributed.bodies import OPTIMIZER
from titan_yulan.config.model import ModelConfig
from titan_yulan.config.sections import (
    ActivationCheckpointSection,
    CompileSection,
    ObjectiveSection,
    ParallelSection,
    RunConfig,
)
from titan_yulan.curriculum.plan import Plan
from titan_yulan.data import hashing
from titan_yulan.data.tape import Tape, TapeSlice
from titan_yulan.learner import Learner
from titan_yulan.parallel.fsdp import is_replicated
from titan_yulan.parallel.parallelize import part_of
from titan_yulan.parallel.process import World

VOCABULARY, LENGTH, BATCH_ROWS, MICRO_BATCH, STEPS = 250, 28, 7, 2, 10
_PLAIN = ModelConfig(
    vocab_size=VOCABULARY,
    hidden_size=44,
    intermediate_size=90,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=6,
    head_dim=8,
    initializer_range=0.1,
    alpha_base_width=16,
    embedding_scale=2.0,
)
MODELS = {
    "plain": _PLAIN,
    "grouped": replace(_PLAIN, num_key_value_heads=2),
    # also with positions that restart in every document (`run_config`)
    "norms": replace(
        _PLAIN,
        qk_layer_norm=True,
        tie_word_embeddings=False,
        embedding_scale=1.0,
        embedding_norm="layer_norm",
        lm_head_alpha=3.0,  # with 1 it learns little in 10 steps
    ),
}
_NOISE = 0.2  # standard deviation of what is added to alphas, norm weights and biases, so that none is 0 or 1


@dataclass(frozen=True, eq=False)
class Case:
    """One row of the table: a layout on `world` ranks."""

    world: int
    layout: str
    degrees: dict[str, Any] = field(default_factory=dict)
    model: str = "plain"  # of MODELS
    document_mask: bool = False
    checkpointing: str = "none"
    backend: str = ""  # of torch.compile; empty: eager
    compute_dtype: str = "float32"
    objective: str = ""  # diffusion: masked diffusion, also validated; perturbed: in orders and with hidden tokens

    @property
    def name(self) -> str:
        parts = (
            self.layout,
            self.model,
            self.objective,
            "documents" if self.document_mask else "",
            self.compute_dtype if self.compute_dtype != "float32" else "",
            self.checkpointing if self.checkpointing != "none" else "",
            self.backend,
        )
        return ", ".join(part for part in parts if part)

    @property
    def reference(self) -> Case:
        """The one process that it is compared with; one process in bfloat16 is compared with float32."""
        dtype = self.compute_dtype if self.world > 1 else "float32"
        return Case(
            1,
            "1 process",
            model=self.model,
            document_mask=self.document_mask,
            compute_dtype=dtype,
            objective=self.objective,
        )

    @property
    def keeps(self) -> bool:
        """Whether its checkpoint takes part in the exchange."""
        plain = self.compute_dtype == "float32" and not self.objective
        return self.checkpointing == "none" and not self.backend and plain


_FSDP_3 = Case(3, "FSDP 3", model="grouped", document_mask=True)
_HSDP = Case(4, "HSDP 2 x 2", {"data_replicate": 2})
_TENSOR_3 = Case(3, "TP 3", {"tensor": 3}, model="norms", document_mask=True)
_FSDP_TENSOR = Case(4, "FSDP 2 x TP 2", {"tensor": 2}, model="grouped", document_mask=True)
_CONTEXT = Case(2, "CP 2", {"context": 2}, model="grouped")
_CONTEXT_TENSOR = Case(4, "CP 2 x TP 2", {"context": 2, "tensor": 2}, model="grouped")
_CONTEXT_TENSOR_NORMS = replace(_CONTEXT_TENSOR, model="norms", document_mask=True)
# Layouts whose blocks run other code: alone, with exchanged sequences, with exchanged keys, with both.
_FAMILIES = (
    Case(2, "FSDP 2"),
    Case(2, "TP 2", {"tensor": 2}, model="grouped", document_mask=True),
    _CONTEXT,
    _FSDP_TENSOR,
)
_LAYOUTS = (
    *_FAMILIES,
    _FSDP_3,
    Case(4, "FSDP 4"),
    _HSDP,
    Case(4, "HSDP 2 x 2, reduced last", {"data_replicate": 2, "synchronize": "last"}),
    Case(3, "TP 3", {"tensor": 3}),
    Case(2, "replicas 2", {"data_replicate": 2}),
    Case(2, "FSDP 2, gathered once", {"reshard_after_forward": False}),
    Case(2, "FSDP 2, CPU offload", {"cpu_offload": True}),
    replace(_CONTEXT, document_mask=True),
    _CONTEXT_TENSOR,
    Case(2, "FSDP 2", model="norms", document_mask=True),
    _TENSOR_3,
    _CONTEXT_TENSOR_NORMS,
)


def cases(short: bool) -> list[Case]:
    """The rows of the table, one process first. The short table has the layouts that contain the others' code."""
    if short:
        rows = [_FSDP_3, _HSDP, _TENSOR_3, _FSDP_TENSOR, _CONTEXT_TENSOR_NORMS]
        rows += [replace(_CONTEXT_TENSOR, checkpointing="selective", backend="aot_eager")]
        unmasked = replace(_FSDP_3, document_mask=False)  # the reference of the last one
        rows += [replace(row, objective="diffusion") for row in (unmasked, _TENSOR_3, _CONTEXT_TENSOR)]
        rows += [replace(_CONTEXT_TENSOR, objective="perturbed")]
        return with_one_process(rows)
    modes = ("full", "every", "selective")
    rows = list(_LAYOUTS)
    rows += [replace(row, checkpointing=mode) for row in _FAMILIES for mode in modes]
    rows += [replace(row, backend="aot_eager") for row in _LAYOUTS]
    compilable = [(row, mode) for row in _FAMILIES for mode in modes if mode == "selective" or "TP" not in row.layout]
    rows += [replace(row, checkpointing=mode, backend="aot_eager") for row, mode in compilable]
    rows += [replace(row, backend="inductor") for row in _FAMILIES]
    rows += [replace(row, objective=objective) for row in _FAMILIES for objective in ("diffusion", "perturbed")]
    half = [replace(row, compute_dtype="bfloat16") for row in (_FSDP_TENSOR, _CONTEXT)]
    return with_one_process(rows + half)


def with_one_process(rows: list[Case]) -> list[Case]:
    """Before the rows, the cases of one process that they are compared with."""
    first = {row.reference.name: row.reference for row in rows}
    second = {row.reference.name: row.reference for row in first.values()}
    return list((second | first).values()) + rows


class HashedTape:
    """An endless tape of hashed tokens in documents of 11; some tokens are no targets."""

    def __init__(self, source: int) -> None:
        self.source = source
        self.length = (5 - source) * LENGTH + 1  # as a held-out part: 5 and 4 rows

    def read(self, start: int, count: int) -> TapeSlice:
        places = np.arange(start, start + count)
        bits = hashing.bits(self.source, places)
        # few distinct tokens, so that there is something to learn
        tokens = (bits % np.uint64(17) * np.uint64(13) + np.uint64(self.source)).astype(np.int32)
        return TapeSlice(tokens, places // 11, bits % np.uint64(5) > 0, 0)


TAPES = cast(Sequence[Tape], [HashedTape(0), HashedTape(1)])


def run_config(case: Case, seed: int) -> RunConfig:
    section = phase(
        "a",
        f"{STEPS} steps",
        {"x": 0.6, "y": 0.4},
        sequence_length=LENGTH,
        batch=BATCH_ROWS,
        parallel=ParallelSection(compute_dtype=case.compute_dtype, **case.degrees),
        activation_checkpoint=ActivationCheckpointSection(mode=case.checkpointing, every=2),
    )
    section = replace(section, batch=replace(section.batch, micro_batch_size=MICRO_BATCH))
    restart = case.model == "norms"
    diffusion, perturbed = case.objective == "diffusion", case.objective == "perturbed"
    objective = ObjectiveSection(
        kind="masked_diffusion" if diffusion else "autoregressive",
        z_loss=0.01,
        document_mask=case.document_mask,
        restart_positions=restart,
        validation_samples=2 if diffusion else 1,
        orders=3 if perturbed else 1,
        token_mask_share=0.4 if perturbed else 0.0,
    )
    config = configuration(
        section,
        optimizer=OPTIMIZER,
        objective=objective,
        compile=CompileSection(enabled=bool(case.backend), backend=case.backend or "inductor"),
    )
    return replace(config, model=MODELS[case.model], run=replace(config.run, seed=seed))


def make_learner(case: Case, world: World, seed: int = 7) -> Learner:
    config = run_config(case, seed)
    learner = Learner(config, Plan(config), world, "auto", lambda line: None, mask_token_id=VOCABULARY - 1)
    learner.build(learner.plan.phases[0])
    disturb(learner.decoder, seed)
    return learner


@torch.no_grad()
def disturb(decoder: torch.nn.Module, seed: int) -> None:
    """Noise, the same in every layout, on all that starts at 0 or 1: a bias that is added twice, or a norm's weight
    that is left out, would not show there."""
    for name, parameter in decoder.named_parameters():
        if is_replicated(name) or name.endswith("bias"):
            generator = torch.Generator().manual_seed(hashing.key(seed, name) % 2**63)
            noise = _NOISE * torch.randn(parameter.shape, generator=generator)
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            local.add_(part_of(noise, parameter).to(local.device))
