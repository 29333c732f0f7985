"""Training of a small model, for the tests that compare it with the kernels on and off."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from titan_yulan.config.presets import PRESETS
from titan_yulan.kernels.linear_cross_entropy import linear_cross_entropy
from titan_yulan.kernels.runtime import Kernels
from titan_yulan.model import Decoder
from titan_yulan.model.initialise import initialise


def train(
    kernels: str, steps: int, rows: int, length: int, hidden: int, intermediate: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """AdamW on bytes of this folder's tests, in float32: each step's mean loss, the first step's gradients."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = dataclasses.replace(
        PRESETS["debug"],
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        initializer_range=0.02,
        kernels=kernels,
    )
    decoder = Decoder(config)
    initialise(decoder, seed=0)
    decoder.to(device)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=3e-3)
    text = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("test_*.py")))
    tokens = torch.tensor(list(text[: steps * rows * (length + 1)]), device=device).view(steps, rows, length + 1)
    losses, gradients = [], {}

    def head(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        weights = torch.full(targets.shape, 1 / targets.numel(), device=device)
        flat = hidden.flatten(0, 1)
        return linear_cross_entropy(flat, weight, targets, weights, 1e-4, kernels=cast(Kernels, kernels))[0]

    for batch in tokens:
        loss = decoder(batch[:, :-1], head=partial(head, targets=batch[:, 1:].flatten()))
        loss.backward()
        if not losses:
            gradients = {name: p.grad.clone() for name, p in decoder.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses), gradients
