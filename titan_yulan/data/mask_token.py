"""The token that stands for a hidden one in masked diffusion."""

from __future__ import annotations

from titan_yulan.config.sections import RunConfig
from titan_yulan.errors import UserError


def mask_token(config: RunConfig, tokenizer_size: int) -> int | None:
    """Its id: `[objective] mask_token_id`, or else the first row of the embedding behind the tokenizer's ids; None for
    an objective without one.

    Args:
        tokenizer_size: number of the tokenizer's ids.

    Raises:
        UserError: the embedding has no such row, or the tokenizer has such a token.
    """
    section, rows = config.objective, config.model.vocab_size
    if section.kind != "masked_diffusion":
        return None
    token = tokenizer_size if section.mask_token_id is None else section.mask_token_id
    if token >= rows:
        raise UserError(
            f"objective.mask_token_id: {token} is no row of the embedding, model.vocab_size = {rows}; masked_diffusion "
            f"needs one row more than the tokenizer's {tokenizer_size} ids: set model.vocab_size to a multiple of 128 "
            "above them"
        )
    if token < tokenizer_size:
        raise UserError(
            f"objective.mask_token_id: {token} is a token of the tokenizer, which has {tokenizer_size} ids; text that "
            "holds it could not be told from hidden text: leave the key out, or name a row behind them"
        )
    return token
