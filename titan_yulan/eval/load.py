"""A trained model in one process, from a run folder or a checkpoint folder."""

from __future__ import annotations

from pathlib import Path

from titan_yulan import config as configuration
from titan_yulan.checkpoint.layout import CONFIG, find_damage, open_checkpoint
from titan_yulan.checkpoint.store import load
from titan_yulan.config.sections import RunConfig
from titan_yulan.data.tokenizer import Tokenizer
from titan_yulan.errors import RunError, UserError
from titan_yulan.eval.generate import generate
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


def continue_text(path: Path, prompt: str, *, new_tokens: int, temperature: float, top_k: int, seed: int) -> str:
    """The continuation of `prompt`, without it.

    Raises:
        UserError: there is nothing to continue, or nothing to choose from.
    """
    if not prompt or top_k < 1 or new_tokens < 1 or temperature < 0:
        raise UserError("--prompt needs some text, --top-k and --new-tokens at least 1, --temperature at least 0")
    decoder, config = load_decoder(path)
    tokenizer = Tokenizer.load(Path(config.tokenizer.path))
    ids = generate(
        decoder,
        tokenizer.encode(prompt),
        new_tokens=new_tokens,
        eos_id=tokenizer.eos_id,
        vocab_size=tokenizer.vocab_size,
        context=config.phases[-1].sequence_length,
        temperature=temperature,
        top_k=top_k,
        seed=seed,
    )
    return tokenizer.decode(ids)
