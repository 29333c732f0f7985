"""Drawing the next token: temperature, top-k, top-p (Holtzman et al., arXiv 1904.09751)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from titan_yulan.data import hashing
from titan_yulan.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """What can be drawn, and how.

    temperature: divides the logits; 0 takes the likeliest token.
    top_k: only the k likeliest tokens can be drawn; 0: all.
    top_p: of those, only the likeliest ones that together reach this share of their probability; at least one.

    Raises:
        UserError: a value is out of its range.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"--temperature {self.temperature}: 0 (the likeliest token) or more")
        if self.top_k < 0:
            raise UserError(f"--top-k {self.top_k}: at least 1, or 0 for all tokens")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p {self.top_p}: above 0, and 1 for all tokens")

    def numbers(self, prompt: Sequence[int], count: int) -> np.ndarray:
        """One number from 0 to 1 for each new token; they depend on the seed, the prompt's ids and its place alone."""
        key = hashing.key(self.seed, "generate", " ".join(map(str, prompt)))
        return hashing.uniform(key, np.arange(count))

    def choose(self, logits: Tensor, numbers: Sequence[float]) -> list[int]:
        """A token for each row of logits (rows, vocabulary), by a number from 0 to 1 for each row."""
        if self.temperature == 0:
            return logits.argmax(-1).tolist()
        values, candidates = logits.float().topk(min(self.top_k or logits.shape[-1], logits.shape[-1]))
        # on the host: a few candidates, and CUDA has no deterministic cumulative sum
        values, candidates = values.double().cpu(), candidates.cpu()
        shares = ((values - values[:, :1]) / self.temperature).softmax(-1)
        sums = shares.cumsum(-1)
        kept = (sums - shares < self.top_p * sums[:, -1:]).sum(-1, keepdim=True)  # the first always is
        ends = sums.gather(1, kept - 1)
        chosen = (sums < torch.tensor(numbers, dtype=torch.float64)[:, None] * ends).sum(-1, keepdim=True)
        return candidates.gather(1, chosen)[:, 0].tolist()
