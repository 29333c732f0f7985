"""The tokenizer: a tiktoken vocabulary file, GPT-2's vocab.json and merges.txt, or a Hugging Face tokenizer.json.

A vocabulary file holds one token a line, `<base64 of its bytes> <rank>`. End of text is the id right after the ranks.
We read it ourselves and encode with tiktoken's core: tiktoken's own reader keeps a copy keyed by the path alone, so a
vocabulary trained anew at the same path would silently be the old one.

A tokenizer.json is read by the optional package tokenizers. The end of text is the `eos_token` of tokenizer_config.json
beside it, or else the one `eos_token_id` of generation_config.json. What the file says about truncation and padding is
left out, and nothing is added to a text. Texts are not cut: the library takes millions of characters in linear time,
and where its pattern would let us cut is not known.

Text that reads like a special token stays ordinary text, in a tokenizer.json by `encode_special_tokens` of the library.
That acts on the step that looks for added tokens; a Unigram model could still find the same piece in its vocabulary. We
try it on the end of text when a tokenizer is opened, and refuse one that would end documents in their middle.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titan_yulan.data import gpt2
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

    def __init__(self, ranks: dict[bytes, int], pattern: str = PATTERN) -> None:
        """
        Args:
            ranks: token -> rank; ranks are 0..n-1 and every single byte is a token.
            pattern: of the pre-tokens. None of its alternatives may cross from a letter to a blank.

        Raises:
            UserError: the ranks have gaps, or a byte is missing.
        """
        if sorted(ranks.values()) != list(range(len(ranks))):
            raise UserError(f"the ranks of the vocabulary are not 0..{len(ranks) - 1}, each once")
        missing = [value for value in range(256) if bytes([value]) not in ranks]
        if missing:
            raise UserError(f"the vocabulary lacks {len(missing)} of the 256 single bytes (first: {missing[0]:#04x})")
        self.ranks, self.pattern = ranks, pattern

    @classmethod
    def load(cls, path: Path | str) -> Tokenizer:
        """Read a vocabulary file, or GPT-2's two files in a folder; a tokenizer.json, or a folder that holds one, is a
        Hugging Face tokenizer.

        Raises:
            UserError: the file is missing, or a line of it is damaged.
        """
        path = Path(path)
        if gpt2.is_gpt2(path):
            return cls(gpt2.read_gpt2(path), gpt2.PATTERN)
        if path.is_dir() or path.suffix == ".json":
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
        content = [f"pattern {self.pattern}\n", f"special {END_OF_TEXT} {self.eos_id}\n"]
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

        return tiktoken.Encoding("titan_yulan", pat_str=self.pattern, mergeable_ranks=self.ranks, special_tokens={})

    def __getstate__(self) -> dict[str, Any]:
        return {"ranks": self.ranks, "pattern": self.pattern}


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json of any model that the library knows; decoding gives the text back where the file's rules do."""

    def __init__(self, content: str, eos_id: int) -> None:
        """
        Args:
            content: the text of a tokenizer.json.
            eos_id: id of its end-of-text token.
        """
        self.content = content
        self._eos_id = eos_id

    @classmethod
    def open(cls, path: Path) -> HuggingFaceTokenizer:
        """Read a tokenizer.json, or the one in a folder, and its end of text from the files beside it.

        Raises:
            UserError: a file is missing or damaged, no end of text is named or text can contain it, the ids would be
                random (BPE dropout), or the package tokenizers is not installed.
        """
        file = path / "tokenizer.json" if path.is_dir() else path
        try:
            import tokenizers
        except ImportError as error:
            raise UserError(
                f"reading the tokenizer {file} needs the package tokenizers: pip install 'titan-yulan[huggingface]'"
            ) from error
        try:
            content = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"cannot read the tokenizer {file} ({error}): correct [tokenizer] path; it names a tiktoken file, a "
                "tokenizer.json, or a folder that holds one"
            ) from error
        try:
            core = tokenizers.Tokenizer.from_str(content)
        except Exception as error:  # the library raises no narrower class
            raise UserError(f"{file} is no tokenizer.json, or damaged: {error}") from error
        if getattr(core.model, "dropout", None):
            raise UserError(f'{file} has BPE dropout, with which ids are random: set its "dropout" to null')
        tokenizer = cls(content, _end_of_text(file, core))
        text = str(core.id_to_token(tokenizer.eos_id))
        if tokenizer.eos_id in tokenizer.encode(text):
            raise UserError(
                f"{file} takes {text!r} in ordinary text for the end of text, which would end documents in their "
                "middle: use another tokenizer, or prepare from input_ids"
            )
        return tokenizer

    @property
    def eos_id(self) -> int:
        """Id of the end-of-text token."""
        return self._eos_id

    @cached_property
    def vocab_size(self) -> int:
        """The largest id and one: added tokens count, and so do ids that no token has."""
        return max(self._core.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over everything that decides the ids."""
        rules = {key: value for key, value in json.loads(self.content).items() if key not in ("truncation", "padding")}
        content = json.dumps(["hugging face", rules, self.eos_id], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of a text. Text that looks like a special token is ordinary text; nothing is added."""
        return self._core.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids, special tokens written out.

        Raises:
            UserError: an id has no token.
        """
        missing = [token_id for token_id in ids if token_id < 0 or self._core.id_to_token(token_id) is None]
        if missing:
            raise UserError(f"token id {missing[0]} is outside the vocabulary of {self.vocab_size}")
        return self._core.decode(list(ids), skip_special_tokens=False)

    @cached_property
    def _core(self) -> Any:
        import tokenizers

        core = tokenizers.Tokenizer.from_str(self.content)
        core.no_truncation()
        core.no_padding()
        core.encode_special_tokens = True
        return core

    def __getstate__(self) -> dict[str, Any]:
        return {"content": self.content, "_eos_id": self._eos_id}


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
    """The last place in (start, end] after a letter and before a blank; no alternative of the pattern crosses such a
    place.

    The look-ahead of the pattern sees only blanks, and a piece that ends in a letter ends before one.
    """
    for place in range(end, start, -1):
        if text[place].isspace() and text[place - 1].isalpha():
            return place
    return end


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


def _end_of_text(file: Path, core: Any) -> int:
    config = file.with_name("tokenizer_config.json")
    token = _read(config).get("eos_token")
    if isinstance(token, dict):
        token = token.get("content")
    if token is not None:
        token_id = core.token_to_id(token) if isinstance(token, str) else None
        if token_id is None:
            raise UserError(f"{config}: eos_token is {token!r}, which is no token of {file.name}")
        return token_id
    generation = file.with_name("generation_config.json")
    token_id = _read(generation).get("eos_token_id")
    if isinstance(token_id, list) and len(token_id) == 1:
        token_id = token_id[0]
    if type(token_id) is not int or core.id_to_token(token_id) is None:
        found = "" if token_id is None else f" (eos_token_id of {generation.name}: {token_id})"
        raise UserError(f'{file} has no end of text: write {{"eos_token": "..."}} into {config}{found}')
    return token_id


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one where there is no such file."""
    try:
        content = json.loads(path.read_bytes()) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object")
    return content
