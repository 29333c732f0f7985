"""A Hugging Face tokenizer.json, through the optional package tokenizers.

The end of text is the `eos_token` of tokenizer_config.json beside it, or else the one `eos_token_id` of
generation_config.json. What the file says about truncation and padding is left out, and nothing is added to a text.
Texts are not cut: the library takes millions of characters in linear time, and with a pattern of its own, or none, no
place is known at which cutting would change no id.

Text that reads like a special token stays ordinary text (`encode_special_tokens` of the library). That attribute works
on the step that looks for added tokens; a Unigram model could still find the same piece in its vocabulary, so we try it
on the end of text when a tokenizer is opened, and refuse one that would end documents in their middle.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from titan_yulan.data.tokenizer import Tokenizer
from titan_yulan.errors import UserError


class HuggingFaceTokenizer(Tokenizer):
    """Any model the library knows. Decoding gives the text back only where the file's own rules do."""

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
