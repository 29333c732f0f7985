"""What a run needs before it starts: its tokenizer and its sources, made on first use where the configuration says how.

Nothing here imports torch, so that worker processes can be forked.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from titan_yulan.config.sections import RunConfig, SourceSection
from titan_yulan.config.values import amount
from titan_yulan.data.prepare import prepare
from titan_yulan.data.report import Say, say_now
from titan_yulan.data.source import DESCRIPTION, Source
from titan_yulan.data.tokenizer import Tokenizer
from titan_yulan.data.train_tokenizer import train_tokenizer
from titan_yulan.errors import UserError


def ensure_prepared(config: RunConfig, say: Say = say_now) -> list[str]:
    """Make what is missing and check what is there. Processes that start together wait for one another.

    Args:
        config: the resolved configuration; paths are relative to the working directory.
        say: gets each line as it happens.

    Returns:
        the lines.

    Raises:
        UserError: something is missing that the configuration does not say how to make, or a source was made with
            another tokenizer or does not fit the model's vocabulary.
        RunError: a prepared file is damaged, or the disk is full.
    """
    lines: list[str] = []

    def say_and_keep(line: str) -> None:
        lines.append(line)
        say(line)

    # those that only finished phases mixed may be gone
    sections = {name: config.data.sources[name] for name in config.sources_to_read}
    for name, section in sections.items():
        _check_can_be_there(name, section, config.tokenizer.path)
    tokenizer = _ensure_tokenizer(config, say_and_keep)
    for name, section in sections.items():
        if _is_complete(section):
            for line in _other_wishes(name, section):
                say_and_keep(line)
        else:
            for line in _prepare_source(name, section, tokenizer, say_and_keep):
                say_and_keep(line)
        paths = {"path": section.path, "validation_path": section.validation_path}
        for key, path in paths.items():
            if path:
                _check_source(f"data.sources.{name}.{key}", Source.open(path), tokenizer, config)
    return lines


def _is_source(path: str) -> bool:
    return (Path(path) / DESCRIPTION).exists()


def _is_complete(section: SourceSection) -> bool:
    return _is_source(section.path) and (not section.validation_path or _is_source(section.validation_path))


def _other_wishes(name: str, section: SourceSection) -> list[str]:
    """A warning for each key that says how to make a source otherwise than it was made."""
    if not section.text:
        return []
    made_from = Source.open(section.path).made_from
    wanted: dict[str, tuple[str, object]] = {
        "text": ("inputs", list(section.text)),
        "order": ("order", section.order),
        "minimum_tokens": ("minimum_tokens", section.minimum_tokens),
        "deduplicate": ("deduplicate", section.deduplicate),
        "max_documents": ("max_documents", section.max_documents),
        "max_tokens": ("max_tokens", _max_tokens(section)),
    }
    if section.validation_path:
        wanted["validation_share"] = ("validation_share", section.validation_share)
    return [
        f"WARNING: data.sources.{name}.{key} is {value!r}, but {section.path} was made with {made_from[made]!r} and is "
        "used as it is; delete that folder to make it anew"
        for key, (made, value) in wanted.items()
        if made in made_from and made_from[made] != value
    ]


def _max_tokens(section: SourceSection) -> int | None:
    return None if section.max_tokens is None else int(amount(section.max_tokens))


def _check_can_be_there(name: str, section: SourceSection, tokenizer_path: str) -> None:
    if section.text:
        return
    for key, path in (("path", section.path), ("validation_path", section.validation_path)):
        if path and not _is_source(path):
            raise UserError(
                f"data.sources.{name}.{key}: there is no prepared source at {path}, and data.sources.{name}.text does "
                f"not say what to make it from. Set text, or run: {prepare_command(name, section, tokenizer_path)}"
            )


def prepare_command(name: str, section: SourceSection, tokenizer_path: str) -> str:
    """The command line that makes a source as its section describes it, but for the input."""
    words = ["titan-yulan", "data", "prepare", "--name", name, "--tokenizer", tokenizer_path, "--output", section.path]
    if section.validation_path:
        words += ["--validation-output", section.validation_path, "--validation-share", str(section.validation_share)]
    if section.order != "shuffle":
        words.append(f"--order={section.order}")
    if section.minimum_tokens != SourceSection(path="").minimum_tokens:
        words += ["--minimum-tokens", str(section.minimum_tokens)]
    if section.deduplicate:
        words.append("--deduplicate")
    if section.max_documents is not None:
        words += ["--max-documents", str(section.max_documents)]
    if (max_tokens := _max_tokens(section)) is not None:
        words += ["--max-tokens", str(max_tokens)]
    return f"{shlex.join(words)} INPUT..."


def _ensure_tokenizer(config: RunConfig, say: Say) -> Tokenizer:
    path, vocab_size = config.tokenizer.path, config.tokenizer.train_vocab_size
    if Path(path).exists() or not vocab_size:
        tokenizer = Tokenizer.load(path)
    else:
        groups = [section.text for section in config.data.sources.values() if section.text]
        if not groups:
            raise UserError(
                f"tokenizer.path: {path} is missing, and no source has text to train it on: correct the path, or set "
                "data.sources.NAME.text"
            )
        tokenizer = train_tokenizer(groups, path, vocab_size, say=say)
    if vocab_size and tokenizer.vocab_size != vocab_size:
        raise UserError(
            f"tokenizer.train_vocab_size is {vocab_size}, but {path} holds {tokenizer.vocab_size} entries: correct the "
            "number, or delete the file and the sources made with it"
        )
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"model.vocab_size is {config.model.vocab_size}, but the tokenizer {path} has {tokenizer.vocab_size} "
            f"entries (end of text included): set model.vocab_size to at least {tokenizer.vocab_size}"
        )
    return tokenizer


def _prepare_source(name: str, section: SourceSection, tokenizer: Tokenizer, say: Say) -> list[str]:
    held_out = bool(section.validation_path)
    if held_out and not section.validation_share:
        raise UserError(
            f"data.sources.{name}.validation_share is 0, but validation_path {section.validation_path} is to be made: "
            "set a share above 0, or leave validation_path out"
        )
    report = prepare(
        name,
        section.text,
        section.path,
        tokenizer,
        validation_output=section.validation_path or None,
        validation_share=section.validation_share if held_out else 0.0,
        order=section.order,
        minimum_tokens=section.minimum_tokens,
        deduplicate=section.deduplicate,
        max_documents=section.max_documents,
        max_tokens=_max_tokens(section),
        say=say,
    )
    return report.lines()


def _check_source(key: str, source: Source, tokenizer: Tokenizer, config: RunConfig) -> None:
    if source.tokenizer_fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"{key}: {source.path} was made with another tokenizer than {config.tokenizer.path} (fingerprints "
            f"{source.tokenizer_fingerprint[:12]} and {tokenizer.fingerprint[:12]}): correct tokenizer.path, or delete "
            "the folder and prepare it again"
        )
    if source.vocab_size > config.model.vocab_size:
        raise UserError(
            f"{key}: {source.path} has a vocabulary of {source.vocab_size}, model.vocab_size is only "
            f"{config.model.vocab_size}: raise model.vocab_size"
        )
