"""A small random model in which all tokens of a row see one another, over bytes, an end of text and a mask token."""

from __future__ import annotations

from dataclasses import replace

from tests.eval.small_models import MODEL
from tests.eval.test_generate_cache import random_decoder
from titan_yulan.config.sections import ObjectiveSection
from titan_yulan.eval.diffusion import Diffusion
from titan_yulan.model import Decoder

MASK = 257  # the first row behind the ids of `tests.data.making.BYTES`


def bidirectional_decoder(vocab_size: int = MODEL.vocab_size) -> Decoder:
    """In float64; what a token sees of others is small beside itself unless embeddings are."""
    decoder = random_decoder(replace(MODEL, vocab_size=vocab_size)).double()
    decoder.model.embed_tokens.weight.data.mul_(0.3)
    return decoder


def diffusion(mask_token_id: int = MASK, **options) -> Diffusion:
    return Diffusion(ObjectiveSection(kind="masked_diffusion"), mask_token_id, **options)
