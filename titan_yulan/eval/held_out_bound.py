"""The bound on the loss of held-out parts under a model of masked diffusion, as validation measures it in training,
over as many rows and samples as are asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from titan_yulan.data.loader import read_rows
from titan_yulan.data.tape import Tape
from titan_yulan.data.tokenizer import Tokenizer
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
    tokenizer: Tokenizer,
    batch_tokens: int,
    share: Share,
    device: torch.device,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[tuple[float, int, int]]:
    """Of each row, on all ranks: bound of the cross-entropy's sum; the tokens that count, ends of text among them; and
    the UTF-8 bytes of the text that they are.

    Args:
        decoder: whole, in the types that it computes in.
        batch_tokens: tokens of a batch, which holds at least one row.
        progress: called with how many rows are done, and of how many.
    """
    rows, done = held_out.rows, 0
    numbers = np.arange(rows.batch_rows)
    section = replace(diffusion.section, validation_samples=diffusion.samples)

    def work(part: np.ndarray) -> dict[int, tuple[float, int, int]]:
        nonlocal done
        objective = MaskedDiffusion(section, len(part), mask_token_id=diffusion.mask_token_id)
        batch = read_rows(rows, {0: held_out.tape}, part, len(part)).to(device)
        batch = replace(batch, source=torch.arange(len(part), device=device))  # the objective sums by source
        losses = torch.zeros(len(part), dtype=torch.float64, device=device)
        for sample in range(diffusion.samples):
            losses += forward(decoder, objective, objective.validation_inputs(batch, sample)).cross_entropy
        done += len(part) * share.size
        progress(min(done, len(numbers)), len(numbers))
        texts = [
            ids[counts].tolist() for ids, counts in zip(batch.tokens[:, :-1], batch.loss_mask[:, :-1], strict=True)
        ]
        return {
            int(number): (loss / diffusion.samples, len(ids), _size(tokenizer, ids))
            for number, loss, ids in zip(part, losses.tolist(), texts, strict=True)
        }

    size = max(1, batch_tokens // rows.sequence_length)
    found = share.run([numbers[i : i + size] for i in range(0, len(numbers), size)], work)
    return [found[number] for number in range(len(numbers))]


def _size(tokenizer: Tokenizer, ids: list[int]) -> int:
    """Bytes of a text besides its ends."""
    return len(tokenizer.decode([token for token in ids if token != tokenizer.eos_id]).encode())
