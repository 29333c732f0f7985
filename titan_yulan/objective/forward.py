"""One micro-batch through a decoder and an objective, whatever ranks share it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from titan_yulan.model import Decoder
from titan_yulan.objective.objective import Inputs, LossSums, Objective


def forward(decoder: Decoder, objective: Objective, inputs: Inputs, denominator: Tensor | None = None) -> LossSums:
    """The sums of this rank's part of a micro-batch; the loss runs inside the decoder's forward pass.

    Args:
        inputs: whole rows, on every rank that shares them.
        denominator: see `Objective.loss`.
    """
    part = _slice(decoder, inputs)
    return decoder(
        part.input_ids,
        position_ids=part.position_ids,
        document_ids=inputs.document_ids,
        visible=part.visible,
        causal=objective.causal,
        head=partial(objective.loss, inputs=part, denominator=denominator),
    )


def _slice(decoder: Decoder, inputs: Inputs) -> Inputs:
    """The part of each row that this context-parallel rank works on."""
    sharding = decoder.model.sharding
    positions = inputs.position_ids
    if positions is None:
        positions = torch.arange(inputs.input_ids.shape[1], device=inputs.input_ids.device)
    return replace(
        inputs,
        input_ids=sharding.slice_context(inputs.input_ids),
        targets=sharding.slice_context(inputs.targets),
        weights=sharding.slice_context(inputs.weights),
        counts=sharding.slice_context(inputs.counts),
        visible=None if inputs.visible is None else sharding.slice_context(inputs.visible, dim=2),
        position_ids=sharding.slice_context(positions, dim=positions.ndim - 1),
    )
