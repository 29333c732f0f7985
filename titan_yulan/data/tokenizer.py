"""The tokenizer: a tiktoken vocabulary file, read by ourselves, encoded by tiktoken's core.

`Tokenizer.load` also opens a Hugging Face tokenizer.json: see `data/hugging_face_tokenizer.py`.

A file holds one token a line, `<base64 of its bytes> <rank>`. End of text is the id right after the ranks. We do not
use tiktoken's own file reader: it keeps a copy keyed by the path alone, so a vocabulary trained anew at the same path
would silently be the old one.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titan_yulan.data.bpe import PATTERN
from titan_yulan.data.storage import write_atomic
from titan_yulan.errors import UserError

if TYPE_CHECKING:
    import tiktoken

END_OF_TEXT = "<|endoftext|>"

# tiktoken's regular-expression engine aborts on runs of about a million blanks or letters; 400,000 characters pass.
MAX_CHUNK = 100_000


class Tokenizer:
    """Byte-level BPE: every text has ids, and decoding gives the text back."""

    def __init__(self, ranks: dict[bytes, int]) -> None:
        """
        Args:
            ranks: token -> rank; ranks are 0..n-1 and every single byte is a token.

        Raises:
            UserError: the ranks have gaps, or a byte is missing.
        """
        if sorted(ranks.values()) != list(range(len(ranks))):
            raise UserError(f"the ranks of the vocabulary are not 0..{len(ranks) - 1}, each once")
        missing = [value for value in range(256) if bytes([value]) not in ranks]
        if missing:
            raise UserError(f"the vocabulary lacks {len(missing)} of the 256 single bytes (first: {missing[0]:#04x})")
        self.ranks = ranks

    @classmethod
    def load(cls, path: Path | str) -> Tokenizer:
        """Read a vocabulary file; a tokenizer.json, or a folder that holds one, is a Hugging Face tokenizer.

        Raises:
            UserError: the file is missing, or a line of it is damaged.
        """
        path = Path(path)
        if path.is_dir() or path.suffix == ".json":
            from titan_yulan.data.hugging_face_tokenizer import HuggingFaceTokenizer

            return HuggingFaceTokenizer.open(path)
        ranks = _read_ranks(path)
        try:
            return cls(ranks)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    @property
    def eos_id(self) -> int:
        """Id of the end-of-text token."""
        return len(self.ranks)

    @property
    def vocab_size(self) -> int:
        """Number of ids: the ranks and end of text."""
        return len(self.ranks) + 1

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over everything that decides the ids: ranks, pattern, special tokens."""
        content = [f"pattern {PATTERN}\n", f"special {END_OF_TEXT} {self.eos_id}\n"]
        return hashlib.sha256("".join(content).encode() + _lines(self.ranks)).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of a text. Text that looks like a special token is ordinary text; nothing is added.

        Long texts are encoded in pieces of at most 100,000 characters, cut where the pattern ends a pre-token anyway,
        so the ids are those of the whole text. Only a run of 100,000 characters without such a place is cut anyhow.
        """
        if len(text) <= MAX_CHUNK:
            return self._encoding.encode_ordinary(text)
        ids: list[int] = []
        for start, end in _pieces(text):
            ids += self._encoding.encode_ordinary(text[start:end])
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids; end of text reads `<|endoftext|>`, broken UTF-8 (a cut character) the mark U+FFFD.

        Raises:
            UserError: an id is outside the vocabulary.
        """
        tokens = self._tokens
        try:
            return b"".join([tokens[token_id] for token_id in ids]).decode("utf-8", "replace")
        except KeyError as error:
            raise UserError(f"token id {error.args[0]} is outside the vocabulary of {self.vocab_size}") from None

    @cached_property
    def _tokens(self) -> dict[int, bytes]:
        return {rank: token for token, rank in self.ranks.items()} | {self.eos_id: END_OF_TEXT.encode()}

    @cached_property
    def _encoding(self) -> tiktoken.Encoding:
        import tiktoken

        return tiktoken.Encoding("titan_yulan", pat_str=PATTERN, mergeable_ranks=self.ranks, special_tokens={})

    def __getstate__(self) -> dict[str, Any]:
        return {"ranks": self.ranks}


def _read_ranks(path: Path) -> dict[bytes, int]:
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(
            f"cannot read the tokenizer {path} ({error.strerror}): correct [tokenizer] path, or make the file with "
            f"'titan-yulan tokenizer train --vocab-size N --output {path} INPUT...'"
        ) from error
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(lines, start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            message = f"{path}, line {number} is not '<base64> <rank>': the file is damaged or of another kind"
            raise UserError(message) from error
    if len(ranks) != len(lines):
        raise UserError(f"{path}: a token occurs twice in the vocabulary")
    return ranks


def save_ranks(path: Path | str, ranks: dict[bytes, int]) -> None:
    """Write a vocabulary file atomically, ranks in order."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda file: file.write(_lines(ranks)))


def _lines(ranks: dict[bytes, int]) -> bytes:
    ordered = sorted(ranks.items(), key=lambda item: item[1])
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ordered)


def _pieces(text: str) -> list[tuple[int, int]]:
    """(start, end) of pieces of at most MAX_CHUNK characters that encode like the whole."""
    pieces = []
    start = 0
    while len(text) - start > MAX_CHUNK:
        end = _cut(text, start, start + MAX_CHUNK)
        pieces.append((start, end))
        start = end
    pieces.append((start, len(text)))
    return pieces


def _cut(text: str, start: int, end: int) -> int:
    """The last place in (start, end] after a letter and before a blank; no alternative of PATTERN crosses such a place.

    The look-ahead of the pattern sees only blanks, and a piece that ends in a letter ends before one.
    """
    for place in range(end, start, -1):
        if text[place].isspace() and text[place - 1].isalpha():
            return place
    return end
