"""What every objective has in common: the inputs of a micro-batch, the sums of its loss, and how one becomes the other.

An objective decides what a row's inputs, targets and weights are; the loss itself is always a weighted cross-entropy
with z-loss (PaLM, arXiv 2204.02311, section 5; YuLan-Mini uses weight 1e-4).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from titan_yulan.config.sections import ObjectiveSection
from titan_yulan.data.loader import Batch
from titan_yulan.kernels.linear_cross_entropy import linear_cross_entropy
from titan_yulan.kernels.runtime import Kernels


@dataclass(frozen=True)
class Inputs:
    """What the decoder and the loss need of one micro-batch; S is the sequence length.

    input_ids     (rows, S) int64
    targets       (rows, S) int64
    weights       (rows, S) float32: what a target's loss counts; 0 = not a target
    counts        (rows, S) float32: what it counts in the number of tokens that losses are divided by
    position_ids  (rows, S) int64, or None: 0..S-1
    document_ids  (rows, S) int64, or None: attention crosses documents
    visible       (rows, 1, S, S) bool: who sees whom, True where a query (third axis) sees a key; None: as
                  `document_ids` and the objective's `causal` say
    source        (rows,) int64
    denominator   () float32, this micro-batch's part of the global denominator
    """

    input_ids: Tensor
    targets: Tensor
    weights: Tensor
    counts: Tensor
    position_ids: Tensor | None
    document_ids: Tensor | None
    visible: Tensor | None
    source: Tensor
    denominator: Tensor


class LossSums(NamedTuple):
    """Sums of one micro-batch, to be added up over micro-batches and ranks.

    objective      () float32 with gradient: sum of weight * (cross-entropy + z_loss * logsumexp^2) / denominator
    cross_entropy  (sources,) float32: sum of weight * cross-entropy for each source
    tokens         (sources,) float32: sum of counts for each source
    """

    objective: Tensor
    cross_entropy: Tensor
    tokens: Tensor


class Objective(ABC):
    """Base of the objectives; `causal` says whether a token sees only those up to itself."""

    causal = True

    def __init__(
        self,
        section: ObjectiveSection,
        sources: int,
        kernels: Kernels = "auto",
        *,
        seed: int = 0,
        group: ProcessGroup | None = None,
        vocabulary_size: int | None = None,
    ) -> None:
        """
        Args:
            sources: number of sources, for the sums by source.
            kernels: who computes the loss, see `kernels.runtime.choose`.
            seed: of everything that the objective draws.
            group, vocabulary_size: the ranks over which the head's rows are spread, and how many rows there are;
                neither where a rank has all.
        """
        self._section, self._sources, self._kernels, self._seed = section, sources, kernels, seed
        self._vocabulary = {"group": group, "vocabulary_size": None if group is None else vocabulary_size}

    @property
    def validation_samples(self) -> int:
        """How often a held-out row is read, each time as another sample."""
        return 1

    @abstractmethod
    def inputs(self, batch: Batch) -> Inputs:
        """What a micro-batch trains on: a pure function of the rows and their positions in the run."""

    @abstractmethod
    def validation_inputs(self, batch: Batch, sample: int) -> Inputs:
        """What a micro-batch of held-out rows is measured on, without any perturbation of training.

        Args:
            sample: which of `validation_samples`.
        """

    def loss(self, hidden: Tensor, head_weight: Tensor, inputs: Inputs, denominator: Tensor | None = None) -> LossSums:
        """Weighted sums over one micro-batch.

        Args:
            hidden: (rows, S, hidden) final hidden states, scaled for the head.
            head_weight: (vocab, hidden), or this rank's rows of it.
            denominator: () of the whole global batch, divides the objective; None for 1. Dividing here and not behind
                spares 16-bit gradients a rounding.
        """
        objective, cross_entropy = linear_cross_entropy(
            hidden.flatten(0, 1),
            head_weight,
            inputs.targets.flatten(),
            inputs.weights.flatten(),
            self._section.z_loss,
            denominator=denominator,
            kernels=self._kernels,
            **self._vocabulary,
        )
        rows = cross_entropy.view_as(inputs.weights).sum(1)
        by_source = rows.new_zeros(2, self._sources).index_add_(
            1, inputs.source, torch.stack([rows, inputs.counts.sum(1).to(rows.dtype)])
        )
        return LossSums(objective, by_source[0], by_source[1])


def restarted_positions(document_ids: Tensor) -> Tensor:
    """(rows, S) positions that count from 0 in every document (a row's first document counts from the row's start)."""
    places = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return places - torch.where(begins, places, 0).cummax(dim=1).values
