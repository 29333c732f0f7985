"""What a decoder with kept keys and values computes is what it computes of the whole text."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.checkpoint.hugging_face_folders import LLAMA, YULAN
from titan_yulan.config.model import ModelConfig
from titan_yulan.eval.attending import attending
from titan_yulan.eval.cache import KeyValueCache
from titan_yulan.model import Decoder

MODELS = {
    "plain": replace(LLAMA, num_key_value_heads=6),
    "grouped": LLAMA,
    "qk norm": replace(YULAN, qk_layer_norm=True),
    "yulan": YULAN,
}
PADS = [0, 4, 6]
LENGTH = 15


def random_decoder(model: ModelConfig) -> Decoder:
    decoder = Decoder(model)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            one = name.endswith(("_alpha", "norm.weight"))
            parameter.copy_(float(one) + 0.3 * torch.randn(parameter.shape, generator=generator))
    return decoder


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("pads", [[0, 0], PADS], ids=["equal", "padded"])
@pytest.mark.parametrize("reads", [[9, 1, 1, 1, 1, 1, 1], [7, 4, 1, 3]], ids=["token by token", "in pieces"])
def test_logits_are_those_of_the_whole_text(name: str, pads: list[int], reads: list[int]) -> None:
    decoder = random_decoder(MODELS[name])
    ids = torch.randint(0, LLAMA.vocab_size, (len(pads), LENGTH), generator=torch.Generator().manual_seed(3))
    cache = KeyValueCache(pads, LENGTH, torch.device("cpu"))
    found = []
    with attending(decoder, cache):
        for new in reads:
            positions = cache.begin(new)
            found.append(decoder(ids[:, cache.read - new : cache.read], position_ids=positions))
    for row, pad in enumerate(pads):
        whole = decoder(ids[row : row + 1, pad:])[0]  # with the decoder's own attention
        torch.testing.assert_close(torch.cat(found, dim=1)[row, pad:], whole, rtol=1e-5, atol=1e-5)


def test_a_full_cache_takes_no_more() -> None:
    cache = KeyValueCache([0], 3, torch.device("cpu"))
    cache.begin(2)
    with pytest.raises(ValueError, match="room for 3 places, not for 2"):
        cache.begin(2)
