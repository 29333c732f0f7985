"""What one call of preparing asks for, and the fingerprint that recognises it again.

A `Recipe` is everything that decides the bytes of the result, without the input itself: small, kept with unfinished
work as JSON, and enough to assemble tokenised groups of files on a machine that does not see the input.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from titan_yulan.data.documents import InputFile
from titan_yulan.data.holdout import HoldOut
from titan_yulan.data.source import FORMAT_VERSION, token_dtype
from titan_yulan.data.storage import write_atomic
from titan_yulan.data.tokenizer import Tokenizer
from titan_yulan.errors import UserError

SHUFFLE, KEEP = "shuffle", "keep"
# Of unfinished work. Raise it when the grouping of files, or what is stored of a group, changes: work of another
# version cannot be gone on with.
_VERSION = 1
_SAMPLE = 65536  # bytes
_READERS = 16  # threads; they wait for the disk


@dataclass(frozen=True)
class Recipe:
    """How a source is made; the options are those of `prepare.prepare`."""

    name: str
    inputs: tuple[str, ...]
    input_files: int
    units: int  # groups of files
    tokenizer_fingerprint: str
    vocab_size: int
    eos_id: int
    held_out_by: str
    validation_share: float
    order: str
    split_by: str
    minimum_tokens: int
    deduplicate: bool
    seed: int
    shard_tokens: int
    max_documents: int | None  # of the training part, the first of the input; None: all
    max_tokens: int | None
    fingerprint: str  # SHA-256 over all that decides the content, the files' content among it

    @property
    def ordered(self) -> bool:
        return self.order != SHUFFLE

    @property
    def limited(self) -> bool:
        return self.max_documents is not None or self.max_tokens is not None

    @property
    def order_column(self) -> str:
        """The column that the documents are sorted by; empty: none."""
        return "" if self.order in (SHUFFLE, KEEP) else self.order.removeprefix("-")

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns to read besides the text."""
        return tuple(dict.fromkeys(column for column in (self.order_column, self.split_by) if column))

    @property
    def hold_out(self) -> HoldOut:
        return HoldOut(self.held_out_by, self.validation_share)

    @property
    def dtype(self) -> np.dtype:
        return token_dtype(self.vocab_size)


def make_recipe(
    name: str,
    inputs: Sequence[str],
    files: Sequence[InputFile],
    units: int,
    tokenizer: Tokenizer,
    validation_share: float,
    **options: Any,
) -> Recipe:
    """The recipe of a request, with its fingerprint.

    Args:
        name: name of the source.
        inputs: the inputs as they were given.
        files: the input files in order; they are read (large ones in samples).
        units: groups that the files make.
        tokenizer: makes the ids.
        validation_share: share to hold out, 0 to 1.
        options: order, split_by, minimum_tokens, deduplicate, seed, shard_tokens, max_documents, max_tokens.

    Raises:
        UserError: an option cannot be, or a file cannot be read.
    """
    if not options["order"].removeprefix("-"):
        raise UserError(f"source {name}: order {options['order']!r} is none of shuffle, keep, COLUMN, -COLUMN")
    if options["minimum_tokens"] < 0:
        raise UserError(f"source {name}: minimum_tokens {options['minimum_tokens']}: at least 0")
    limits = {key: options[key] for key in ("max_documents", "max_tokens") if options[key] is not None}
    for key, limit in limits.items():
        if limit < 1:
            raise UserError(f"source {name}: {key} {limit}: at least 1")
    if not 0 <= validation_share < 1:
        raise UserError(f"source {name}: validation_share {validation_share}: at least 0 and below 1, such as 0.02")
    hold_out = HoldOut.choose(files, validation_share)
    others = sorted(options.keys() - {"max_documents", "max_tokens"})
    # without limits as it was before there were any, so that sources made then are still found
    rule = [hold_out.by, hold_out.share, *(options[key] for key in others), *([limits] if limits else [])]
    with ThreadPoolExecutor(_READERS) as readers:
        hashes = readers.map(_fingerprints, files)
        contents = [[file.name, file.kind, *content] for file, content in zip(files, hashes, strict=True)]
    content = json.dumps([FORMAT_VERSION, tokenizer.fingerprint, rule, contents])
    return Recipe(
        name=name,
        inputs=tuple(inputs),
        input_files=len(files),
        units=units,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        held_out_by=hold_out.by,
        validation_share=hold_out.share,
        fingerprint=hashlib.sha256(content.encode()).hexdigest(),
        **options,
    )


def save_recipe(path: Path, recipe: Recipe, **more: Any) -> None:
    """Write a recipe as JSON, atomically, with further values beside it; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"version": _VERSION, **asdict(recipe), **more}, indent=1, ensure_ascii=False) + "\n"
    write_atomic(path, lambda file: file.write(text.encode()))


def read_recipe(path: Path) -> tuple[Recipe, dict[str, Any]] | None:
    """The recipe and the values stored beside it; None when the file is missing or of another version."""
    try:
        content = json.loads(path.read_bytes())
        if content.pop("version") != _VERSION:
            return None
        fields: dict[str, Any] = {name: content.pop(name) for name in Recipe.__dataclass_fields__}
    except (FileNotFoundError, KeyError, ValueError, AttributeError):
        return None
    fields["inputs"] = tuple(fields["inputs"])
    return Recipe(**fields), content


def _fingerprints(file: InputFile) -> list[tuple[int, str]]:
    return [_file_fingerprint(path) for path in file.paths]


def _file_fingerprint(path: Path) -> tuple[int, str]:
    """Size and a hash: of all bytes up to 1 MiB, of 16 evenly spaced samples of a larger file.

    Reading terabytes only to find that nothing changed would cost more than it protects; time stamps would call a
    copied file another one.
    """
    digest = hashlib.sha256()
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            if size <= 16 * _SAMPLE:
                digest.update(file.read())
            else:
                for sample in range(16):
                    file.seek(sample * (size - _SAMPLE) // 15)
                    digest.update(file.read(_SAMPLE))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; correct its rights, or leave it out") from error
    return size, digest.hexdigest()
