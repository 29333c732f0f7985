"""A small model learns alike with the kernels on and off: 30 steps of AdamW on real text."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import cast

import torch

from titan_yulan.config.model import PRESETS
from titan_yulan.kernels.linear_cross_entropy import linear_cross_entropy
from titan_yulan.kernels.runtime import Kernels
from titan_yulan.model import Decoder
from titan_yulan.model.initialise import initialise

STEPS, ROWS, LENGTH = 30, 4, 48


def losses(kernels: str) -> list[float]:
    """Mean loss of each step, in float32; bytes of this file's neighbours are the text."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = dataclasses.replace(
        PRESETS["debug"],
        vocab_size=256,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.02,
        kernels=kernels,
    )
    decoder = Decoder(config)
    initialise(decoder, seed=0)
    decoder.to(device)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=3e-3)
    text = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("test_*.py")))
    tokens = torch.tensor(list(text[: STEPS * ROWS * (LENGTH + 1)]), device=device).view(STEPS, ROWS, LENGTH + 1)
    found = []
    for batch in tokens:
        targets = batch[:, 1:].flatten()

        def head(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            weights = torch.full(targets.shape, 1 / targets.numel(), device=device)
            flat = hidden.flatten(0, 1)
            return linear_cross_entropy(flat, weight, targets, weights, 1e-4, kernels=cast(Kernels, kernels))[0]

        loss = decoder(batch[:, :-1], head=partial(head, targets=targets))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def test_thirty_steps_with_the_kernels_and_without() -> None:
    on, off = losses("auto"), losses("reference")
    assert off[-1] < off[0] - 1.0
    torch.testing.assert_close(torch.tensor(on), torch.tensor(off), rtol=1e-4, atol=0)
