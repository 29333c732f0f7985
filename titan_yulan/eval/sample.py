"""The continuation that a run writes at its end, to look at."""

from __future__ import annotations

import torch

from titan_yulan.config.sections import RunConfig
from titan_yulan.data.mask_token import mask_token
from titan_yulan.data.tokenizer import Tokenizer
from titan_yulan.eval.generate import generate
from titan_yulan.eval.unmask import writing
from titan_yulan.model import Decoder


def continue_prompt(decoder: Decoder, tokenizer: Tokenizer, config: RunConfig, device: torch.device) -> str:
    """What the model writes after `[eval] prompt`, looking back as far as in the last phase; all ranks together."""
    ids = generate(
        decoder,
        tokenizer.encode(config.eval.prompt),
        new_tokens=config.eval.new_tokens,
        eos_id=tokenizer.eos_id,
        vocab_size=tokenizer.vocab_size,
        context=config.phases[-1].sequence_length,
        seed=config.run.seed,
        device=device,
        write=writing(mask_token(config, tokenizer.vocab_size)),
    )
    return tokenizer.decode(ids)
