"""The decoder and its configuration."""

from titan_yulan.config.model import ModelConfig
from titan_yulan.config.presets import PRESETS
from titan_yulan.model.decoder import Decoder

__all__ = ["PRESETS", "Decoder", "ModelConfig"]
