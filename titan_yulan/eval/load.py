"""A trained model in one process, from a run folder or a checkpoint folder."""

from __future__ import annotations

from pathlib import Path

from titan_yulan import config as configuration
from titan_yulan.checkpoint.layout import CONFIG, find_damage, open_checkpoint
from titan_yulan.checkpoint.store import load
from titan_yulan.config.sections import RunConfig
from titan_yulan.errors import RunError
from titan_yulan.model import Decoder


def load_decoder(path: Path) -> tuple[Decoder, RunConfig]:
    """The float32 decoder of a checkpoint (a run folder gives its newest) with the configuration it was trained with.

    Raises:
        RunError: there is no complete checkpoint, or it is damaged.
    """
    checkpoint = open_checkpoint(path)
    if damage := find_damage(checkpoint):
        raise RunError(f"{checkpoint.path} is damaged: {'; '.join(damage)}; name an older step folder with --run")
    config = configuration.load(checkpoint.path / CONFIG).config
    decoder = Decoder(config.model)
    load(checkpoint, {"model": dict(decoder.named_parameters())})
    phase = next(phase for phase in config.phases if phase.name == checkpoint.state().phase)
    decoder.set_rope_theta(phase.rope_theta or config.model.rope_theta)
    return decoder, config
