"""The prepared sources that a run will read: which are there, and how to make those that are not. No torch."""

from __future__ import annotations

from pathlib import Path

from titan_yulan.config.sections import RunConfig
from titan_yulan.config.subset import source_limit
from titan_yulan.data.ensure import prepare_command
from titan_yulan.data.source import DESCRIPTION, Source
from titan_yulan.errors import UserError


def is_prepared(path: str) -> bool:
    """Whether a folder holds a prepared source."""
    return (Path(path) / DESCRIPTION).exists()


def prepared_tokens(config: RunConfig) -> dict[str, int]:
    """Tokens that a run can read of every source of the configuration that is prepared.

    Raises:
        RunError: a prepared source is damaged.
    """
    prepared = {name: section.path for name, section in config.data.sources.items() if is_prepared(section.path)}
    limits = {name: source_limit(config, name) for name in prepared}
    sizes = {name: Source.open(Path(path)).tokens for name, path in prepared.items()}
    return {name: min(size, limits[name] or size) for name, size in sizes.items()}


def check_sources_there(config: RunConfig) -> None:
    """Everything that the phases to train read must be prepared, or have text to prepare it from.

    Raises:
        UserError: naming each source that is missing, with the command that makes it, and the tokenizer if it is.
    """
    tokenizer, sections, names = config.tokenizer, config.data.sources, config.sources_to_read
    missing = [name for name in names if not sections[name].text and not is_prepared(sections[name].path)]
    if not missing:
        return
    lines = [f"  {name}: {prepare_command(name, sections[name], tokenizer.path)}" for name in missing]
    if not tokenizer.train_vocab_size and not Path(tokenizer.path).exists():
        lines.insert(0, f"  before them, the vocabulary: there is no file {tokenizer.path} (tokenizer.path)")
    raise UserError(
        f"{len(missing)} of {len(names)} sources are not prepared and have no text to be made from. Make each with the "
        "command after its name, or correct its [data.sources.NAME] path:\n" + "\n".join(lines)
    )
