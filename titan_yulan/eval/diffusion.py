"""How models of masked diffusion are evaluated, and where they cannot be."""

from __future__ import annotations

from dataclasses import dataclass

from titan_yulan.config.sections import ObjectiveSection
from titan_yulan.errors import UserError
from titan_yulan.eval.open_model import TrainedModel

LIKELIHOOD, SAMPLES = "left_to_right", 32


@dataclass(frozen=True)
class Diffusion:
    """What an evaluation must know of such a model.

    section: the objective that it was trained for.
    mask_token_id: what stands for a hidden token.
    likelihood: of answers, "left_to_right" or "bound" (`eval.diffusion_likelihood`); texts always have the bound.
    samples: forward passes for a bound.
    """

    section: ObjectiveSection
    mask_token_id: int
    likelihood: str = LIKELIHOOD
    samples: int = SAMPLES


def diffusion_of(model: TrainedModel, likelihood: str | None = None, samples: int | None = None) -> Diffusion | None:
    """That of a model; None: it predicts the next token.

    Args:
        likelihood, samples: what was asked for; None: the defaults.

    Raises:
        UserError: something was asked for that such a model does not have.
    """
    if model.mask_token_id is None:
        if likelihood is not None or samples is not None:
            name = "--samples" if likelihood is None else "--likelihood"
            raise UserError(
                f"{name} is for models of objective.kind = 'masked_diffusion'; this one predicts the next token, and "
                "its likelihoods are exact: leave it out"
            )
        return None
    return Diffusion(
        model.objective, model.mask_token_id, LIKELIHOOD if likelihood is None else likelihood, samples or SAMPLES
    )


def refuse_diffusion(model: TrainedModel, what: str, remedy: str) -> None:
    """Refuse a model whose tokens see those behind them.

    Args:
        what: what reads from left to right alone.
        remedy: what can be done instead.

    Raises:
        UserError: it is one of masked diffusion.
    """
    if model.mask_token_id is not None:
        raise UserError(
            f"{what} reads from left to right, and this model was trained with objective.kind = 'masked_diffusion', in "
            f"which tokens also see those behind them: its numbers would be wrong; {remedy}"
        )
