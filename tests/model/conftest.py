"""Models for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from titan_yulan.config.model import ModelConfig
from titan_yulan.model.decoder import Decoder


@pytest.fixture(scope="session")
def random_decoder() -> Callable[..., Decoder]:
    """(config, seed) -> a float64 decoder with every parameter drawn at random, so that none is neutral."""

    def make(config: ModelConfig, seed: int = 0) -> Decoder:
        decoder = Decoder(config).double()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in decoder.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                is_gain = name.endswith(("_alpha", "norm.weight")) or ".norms." in name
                parameter.copy_(1 + 0.3 * noise if is_gain else 0.3 * noise)
        return decoder

    return make
