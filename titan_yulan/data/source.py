"""A source on disk: token ids in shards, and `source.json`, whose presence makes the folder a source.

    shard-00000.tokens.npy      token ids of all its documents, one after the other, each ending in end of text
    shard-00000.offsets.npy     int64, where each document starts, and at the end the number of tokens
    shard-00000.loss_mask.npy   bool, is this token a target of the loss; only when some document masks a part
    source.json                 counts, sizes, hashes, tokenizer; written last

The files are plain `.npy`, read by memory mapping. `fingerprint` covers what decides the tokens and their order; two
sources with equal fingerprints give the same training stream. The name and the place are no part of it.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from titan_yulan.data.storage import save_array, sha256_file, write_atomic
from titan_yulan.errors import RunError, UserError

FORMAT_VERSION = 1
DESCRIPTION = "source.json"


@dataclass(frozen=True)
class StoredFile:
    """Size in bytes and SHA-256 of a file of a shard."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Shard:
    """Counts of one shard and its files by name."""

    tokens: int
    documents: int
    files: Mapping[str, StoredFile]


@dataclass(frozen=True)
class Source:
    """An opened source. Arrays are mapped when asked for; nothing is read before."""

    path: Path
    name: str
    dtype: np.dtype  # uint16 or uint32
    tokenizer_fingerprint: str
    vocab_size: int
    eos_id: int
    ordered: bool  # the order of the documents is part of the content: never shuffle
    has_loss_mask: bool
    text_bytes: int  # UTF-8 bytes of the text; 0 when made from token ids
    shards: tuple[Shard, ...]
    made_from: Mapping[str, Any] = field(hash=False)

    @property
    def tokens(self) -> int:
        """Tokens of all shards, ends of text included."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over dtype, tokenizer, order and the hashes of all shards."""
        tokenizer = [self.tokenizer_fingerprint, self.vocab_size, self.eos_id]
        content = [FORMAT_VERSION, self.dtype.name, *tokenizer, self.ordered]
        hashes = [[shard.files[name].sha256 for name in sorted(shard.files)] for shard in self.shards]
        return hashlib.sha256(json.dumps([content, hashes]).encode()).hexdigest()

    @classmethod
    def open(cls, path: Path | str) -> Source:
        """Open a source and check the sizes of its files (not their content; see `verify`).

        Raises:
            UserError: the folder is no source, or of a newer format.
            RunError: a file is missing, or its size is not the one in source.json.
        """
        path = Path(path)
        source = _from_description(path, _read_description(path))
        for shard in source.shards:
            for name, stored in shard.files.items():
                file = path / name
                size = file.stat().st_size if file.is_file() else None
                if size != stored.size:
                    found = "is missing" if size is None else f"has {size} bytes instead of {stored.size}"
                    raise RunError(f"{file} {found}: copy it again from where it is whole, or {_remedy(path)}")
        return source

    def verify(self) -> None:
        """Read every file and compare its hash.

        Raises:
            RunError: names the files whose content is not the one that was written.
        """
        self._verify(self.shards)

    def verify_shard(self, shard: int) -> None:
        """Compare the hashes of one shard's files.

        Raises:
            RunError: names the damaged files.
        """
        self._verify(self.shards[shard : shard + 1])

    def _verify(self, shards: Sequence[Shard]) -> None:
        stored = [(name, file) for shard in shards for name, file in shard.files.items()]
        damaged = [str(self.path / name) for name, file in stored if sha256_file(self.path / name) != file.sha256]
        if damaged:
            raise RunError(f"damaged: {', '.join(damaged)}: copy again from where it is whole, or {_remedy(self.path)}")

    def shard_tokens(self, shard: int) -> np.ndarray:
        """(tokens,) read-only ids of the shard's documents, in stored order."""
        return self._map(shard, "tokens")

    def shard_offsets(self, shard: int) -> np.ndarray:
        """(documents + 1,) int64: document d of the shard is tokens[offsets[d]:offsets[d + 1]]."""
        return self._map(shard, "offsets")

    def shard_loss_mask(self, shard: int) -> np.ndarray | None:
        """(tokens,) bool, or None when every token of the source is a target."""
        return self._map(shard, "loss_mask") if self.has_loss_mask else None

    def _map(self, shard: int, what: str) -> np.ndarray:
        file = self.path / file_name(shard, what)
        try:
            return np.asarray(np.load(file, mmap_mode="r", allow_pickle=False))
        except (OSError, ValueError) as error:
            raise RunError(f"cannot map {file} ({error}): copy it again, or {_remedy(self.path)}") from error


def file_name(shard: int, what: str) -> str:
    """Name of a shard's file; `what` is tokens, offsets or loss_mask."""
    return f"shard-{shard:05d}.{what}.npy"


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest type that holds every id of a vocabulary."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def write_shard(folder: Path, shard: int, arrays: Mapping[str, np.ndarray]) -> None:
    """Write the arrays of a shard ("tokens", "offsets", perhaps "loss_mask"), each file atomically."""
    for what, array in arrays.items():
        write_atomic(folder / file_name(shard, what), functools.partial(save_array, array=array))


def describe_shard(folder: Path, shard: int, has_loss_mask: bool) -> Shard:
    """Counts, sizes and hashes of a shard that is on disk."""
    names = [file_name(shard, what) for what in ("tokens", "offsets", "loss_mask")[: 3 if has_loss_mask else 2]]
    files = {name: StoredFile((folder / name).stat().st_size, sha256_file(folder / name)) for name in names}
    offsets = np.load(folder / names[1], mmap_mode="r", allow_pickle=False)
    return Shard(tokens=int(offsets[-1]), documents=len(offsets) - 1, files=files)


def write_description(source: Source) -> None:
    """Write `source.json` into `source.path`: from here on the folder is a source."""
    content = {
        "format_version": FORMAT_VERSION,
        "name": source.name,
        "fingerprint": source.fingerprint,
        "documents": source.documents,
        "tokens": source.tokens,
        "text_bytes": source.text_bytes,
        "dtype": source.dtype.name,
        "ordered": source.ordered,
        "has_loss_mask": source.has_loss_mask,
        "tokenizer_fingerprint": source.tokenizer_fingerprint,
        "vocab_size": source.vocab_size,
        "eos_id": source.eos_id,
        "made_from": dict(source.made_from),
        "shards": [_shard_as_json(shard) for shard in source.shards],
    }
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    write_atomic(source.path / DESCRIPTION, lambda file: file.write(text.encode()))


def _shard_as_json(shard: Shard) -> dict[str, Any]:
    files = {name: {"size": file.size, "sha256": file.sha256} for name, file in shard.files.items()}
    return {"tokens": shard.tokens, "documents": shard.documents, "files": files}


def _read_description(path: Path) -> dict[str, Any]:
    file = path / DESCRIPTION
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        if within := sorted(file.parent.name for file in path.glob(f"*/{DESCRIPTION}")):
            raise UserError(
                f"{path} is not one source but holds {len(within)}, one for each value of a column: name one of them, "
                f"such as {path / within[0]}"
            ) from None
        raise UserError(
            f"{path} is not a prepared source (it has no {DESCRIPTION}): correct the path, or make it with "
            f"'{_command(path)}'"
        ) from None
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error
    except ValueError as error:
        raise RunError(f"{file} is damaged ({error}): {_remedy(path)}") from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(f"{file} has format version {version}, this program reads {FORMAT_VERSION}: {_remedy(path)}")
    return content


def _from_description(path: Path, content: dict[str, Any]) -> Source:
    try:
        source = Source(
            path=path,
            name=content["name"],
            dtype=np.dtype(content["dtype"]),
            tokenizer_fingerprint=content["tokenizer_fingerprint"],
            vocab_size=content["vocab_size"],
            eos_id=content["eos_id"],
            ordered=content["ordered"],
            has_loss_mask=content["has_loss_mask"],
            text_bytes=content["text_bytes"],
            shards=_shards_from_json(content["shards"]),
            made_from=content["made_from"],
        )
        stored = content["fingerprint"]
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{path / DESCRIPTION} is damaged ({error!r}): {_remedy(path)}") from error
    if source.fingerprint != stored:
        raise RunError(f"{path / DESCRIPTION} was edited: its fingerprint does not fit its content; {_remedy(path)}")
    return source


def _shards_from_json(shards: Sequence[Mapping[str, Any]]) -> tuple[Shard, ...]:
    return tuple(
        Shard(
            tokens=shard["tokens"],
            documents=shard["documents"],
            files={name: StoredFile(file["size"], file["sha256"]) for name, file in shard["files"].items()},
        )
        for shard in shards
    )


def _remedy(path: Path) -> str:
    return f"delete the folder and make it with '{_command(path)}'"


def _command(path: Path) -> str:
    return f"titan-yulan data prepare --name N --tokenizer FILE --output {path} INPUT..."
