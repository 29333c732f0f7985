"""The objective that `[objective]` asks for."""

from __future__ import annotations

from torch.distributed import ProcessGroup

from titan_yulan.config.sections import RunConfig
from titan_yulan.errors import UserError
from titan_yulan.kernels.runtime import Kernels
from titan_yulan.objective.masked_diffusion import MaskedDiffusion
from titan_yulan.objective.next_token import NextToken
from titan_yulan.objective.objective import Objective


def build_objective(
    config: RunConfig, sources: int, kernels: Kernels, mask_token_id: int | None, group: ProcessGroup | None = None
) -> Objective:
    """The objective of a run.

    Args:
        sources: number of sources.
        mask_token_id: `data.mask_token.mask_token` of the run.
        group: the ranks over which the head's rows are spread.

    Raises:
        UserError: masked diffusion without a mask token.
    """
    options = {"seed": config.run.seed, "group": group, "vocabulary_size": config.model.vocab_size}
    if config.objective.kind == "autoregressive":
        return NextToken(config.objective, sources, kernels, **options)
    if mask_token_id is None:
        raise UserError("objective.kind = 'masked_diffusion' needs objective.mask_token_id where no tokenizer is read")
    return MaskedDiffusion(config.objective, sources, kernels, mask_token_id=mask_token_id, **options)
