"""The bound on the loss of held-out parts under a model of masked diffusion, as validation measures it in training, over
as many rows and samples as are asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from titan_yulan.data.loader import read_rows
from titan_yulan.data.tape import Tape
from titan_yulan.eval.diffusion import Diffusion
from titan_yulan.eval.share import Share
from titan_yulan.eval.validation import HeldOutRows
from titan_yulan.model import Decoder
from titan_yulan.objective.forward import forward
from titan_yulan.objective.masked_diffusion import MaskedDiffusion


@dataclass(frozen=True)
class HeldOut:
    """Rows of one held-out part, of source 0."""

    tape: Tape
    rows: HeldOutRows


@torch.no_grad()
def held_out_bounds(
    decoder: Decoder,
    held_out: HeldOut,
    diffusion: Diffusion,
    batch_tokens: int,
    share: Share,
    device: torch.device,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[tuple[float, float]]:
    """Of each row, on all ranks: bound of the cross-entropy's sum, and number of tokens.

    Args:
        decoder: whole, in the types that it computes in.
        batch_tokens: tokens of a batch, which holds at least one row.
        progress: called with how many rows are done, and of how many.
    """
    rows, done = held_out.rows, 0
    numbers = np.arange(rows.batch_rows)
    section = replace(diffusion.section, validation_samples=diffusion.samples)

    def work(part: np.ndarray) -> dict[int, tuple[float, float]]:
        nonlocal done
        objective = MaskedDiffusion(section, len(part), mask_token_id=diffusion.mask_token_id)
        batch = read_rows(rows, {0: held_out.tape}, part, len(part)).to(device)
        batch = replace(batch, source=torch.arange(len(part), device=device))  # the objective sums by source
        sums = torch.zeros(2, len(part), dtype=torch.float64, device=device)
        for sample in range(diffusion.samples):
            loss = forward(decoder, objective, objective.validation_inputs(batch, sample))
            sums += torch.stack([loss.cross_entropy, loss.tokens])
        done += len(part) * share.size
        progress(min(done, len(numbers)), len(numbers))
        found = (sums / diffusion.samples).t().tolist()
        return {int(number): (loss, tokens) for number, (loss, tokens) in zip(part, found, strict=True)}

    size = max(1, batch_tokens // rows.sequence_length)
    found = share.run([numbers[i : i + size] for i in range(0, len(numbers), size)], work)
    return [found[number] for number in range(len(numbers))]
