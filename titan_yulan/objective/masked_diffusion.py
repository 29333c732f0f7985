"""Masked diffusion (arXiv 2507.15857; Sahoo et al., arXiv 2406.07524): tokens are hidden and predicted from the others.

    t ~ U[0, 1) for each row,  p = (1 - eps) t + eps,  each token is hidden with probability p
    loss = sum over hidden tokens of -log P(token | the row with its hidden tokens replaced by the mask) / p
           divided by the number of all tokens

which in expectation over t and the hidden places bounds the negative log-likelihood per token from above. Attention
is bidirectional, the labels are not shifted, the model is not told t. The last token of a row is left out, so that rows
are as long as those of next-token training.

What is hidden is a pure function of the seed and the row's position in the run: any number of ranks, any micro-batch
and every restart hides the same.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from titan_yulan.config.sections import ObjectiveSection
from titan_yulan.data import hashing
from titan_yulan.data.loader import Batch
from titan_yulan.data.tensor_hashing import bits, uniform
from titan_yulan.kernels.runtime import Kernels
from titan_yulan.objective.objective import Inputs, Objective, restarted_positions

# The fractional parts of its multiples are spread over [0, 1) with the least gaps (Weyl's sequence).
GOLDEN_RATIO = 0.6180339887498949


class MaskedDiffusion(Objective):
    """Predict hidden tokens from all others."""

    causal = False

    def __init__(
        self,
        section: ObjectiveSection,
        sources: int,
        kernels: Kernels = "auto",
        *,
        mask_token_id: int,
        seed: int = 0,
        group: ProcessGroup | None = None,
        vocabulary_size: int | None = None,
    ) -> None:
        """See `Objective`; mask_token_id: what stands in the place of a hidden token."""
        super().__init__(section, sources, kernels, seed=seed, group=group, vocabulary_size=vocabulary_size)
        self.mask_token_id = mask_token_id

    @property
    def validation_samples(self) -> int:
        return self._section.validation_samples

    def inputs(self, batch: Batch) -> Inputs:
        """Hidden tokens and their weights."""
        section, position = self._section, batch.position
        time = uniform(hashing.key(self._seed, "diffusion time"), position)
        if section.low_noise_rows:
            time = torch.where(position < section.low_noise_rows, time / 2, time)
        ratio = self._ratio(time)
        hidden = self._draw(hashing.key(self._seed, "diffusion mask"), batch, ratio)
        if section.left_to_right_share:
            chosen = uniform(hashing.key(self._seed, "left to right"), position) < section.left_to_right_share
            hidden = torch.where(chosen[:, None], _last(hidden, batch.loss_mask[:, :-1]), hidden)
        return self._inputs(batch, hidden, ratio)

    def validation_inputs(self, batch: Batch, sample: int) -> Inputs:
        """Sample `sample` of the bound. The times of a row are spread evenly, and those of neighbouring rows apart
        from one another; the same for every run, so that runs can be compared."""
        start = uniform(hashing.key("validation", "diffusion time"), torch.zeros(1, dtype=torch.int64))
        offset = start.to(batch.position.device) + batch.position * GOLDEN_RATIO + sample / self.validation_samples
        ratio = self._ratio(offset.remainder(1.0))
        return self._inputs(batch, self._draw(hashing.key("validation", "diffusion mask", sample), batch, ratio), ratio)

    def _ratio(self, time: Tensor) -> Tensor:
        """(rows,) -> (rows,) the share of hidden tokens at a time."""
        least = self._section.minimum_mask_ratio
        return (1 - least) * time + least

    def _draw(self, key: int, batch: Batch, ratio: Tensor) -> Tensor:
        """(rows, S) bool: which tokens are hidden; of chats only the answers are."""
        rows = bits(key, batch.position)[:, None]
        places = torch.arange(batch.tokens.shape[1] - 1, device=ratio.device)
        return (uniform(rows, places) < ratio[:, None]) & batch.loss_mask[:, :-1]

    def _inputs(self, batch: Batch, hidden: Tensor, ratio: Tensor) -> Inputs:
        labels, documents = batch.tokens[:, :-1], batch.document_ids[:, :-1]
        counts = batch.loss_mask[:, :-1] * batch.weight[:, None]
        return Inputs(
            input_ids=torch.where(hidden, self.mask_token_id, labels),
            targets=labels,
            weights=(hidden * counts / ratio[:, None]).to(counts.dtype),
            counts=counts,
            position_ids=restarted_positions(documents) if self._section.restart_positions else None,
            document_ids=documents if self._section.document_mask else None,
            visible=None,
            source=batch.source,
            denominator=counts.sum(),
        )


def _last(hidden: Tensor, targets: Tensor) -> Tensor:
    """(rows, S) bool: in each row as many hidden tokens, the last of those that may be; none where none was hidden."""
    from_the_end = targets.flip(1).cumsum(1).flip(1)
    return targets & (from_the_end <= hidden.sum(1, keepdim=True))
