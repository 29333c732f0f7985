"""From one row of JSONL or Parquet to a document.

A row is read by the first of these that it has a value for, whatever else it holds:

    input_ids                     a list of token ids, kept as they are
    messages                      a chat, a list of {"role", "content"}; only the assistant's words are trained on
    text                          a string
    question, answer              a pair, as one text with a blank line between them, all of it trained on
    instruction, [input,] output  the same; an empty or missing `input` is left out

A row that has none, or holds something else, is bad.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from titan_yulan.errors import UserError

_PAIRS = (("question", "answer"), ("instruction", "input", "output"))
KEYS = ("input_ids", "messages", "text", "question", "answer", "instruction", "input", "output")
_ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Document:
    """Either text, as (text, is it trained on) parts, or token ids. `text` joins the parts.

    `columns` holds the values of the further columns that the reader was asked for.
    """

    parts: tuple[tuple[str, bool], ...] = ()
    token_ids: np.ndarray | None = field(default=None, compare=False)
    columns: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def text(self) -> str:
        return "".join(part for part, _ in self.parts)


@dataclass(frozen=True)
class BadRow:
    """A row that gives no document: where it is (file and line or row, from 1) and why."""

    place: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


class DamagedFile(UserError):
    """The content of an input file cannot be read, or contradicts the file beside it; other files may be sound."""


def parse_row(row: Any, columns: Sequence[str] = ()) -> Document:
    """One row of JSONL or Parquet as a document.

    Args:
        row: a mapping; anything else is bad.
        columns: further keys whose values the document shall carry.

    Raises:
        ValueError: the row has none of the known keys, or its value is not what the key stands for; or one of
            `columns` has no value in it.
    """
    if not isinstance(row, dict):
        raise ValueError("not an object with the key 'text'")
    document = _content(row)
    if not columns:
        return document
    missing = [column for column in columns if row.get(column) is None]
    if missing:
        raise ValueError(f"the column {missing[0]!r} has no value")
    return replace(document, columns={column: row[column] for column in columns})


def _content(row: dict[str, Any]) -> Document:
    if row.get("input_ids") is not None:
        return Document(token_ids=token_ids(row["input_ids"], "'input_ids'"))
    if row.get("messages") is not None:
        return Document(_chat_parts(row["messages"]))
    if row.get("text") is not None:
        return Document(((_checked_text(row["text"], "'text'"), True),))
    for pair in _PAIRS:
        if row.get(pair[0]) is not None:
            return Document(((_pair_text(row, pair), True),))
    keys = ", ".join(map(repr, list(row)[:8])) or "none"
    raise ValueError(
        f"none of the keys 'text', 'messages', 'input_ids', 'question', 'instruction' has a value (keys: {keys})"
    )


def _pair_text(row: dict[str, Any], keys: Sequence[str]) -> str:
    parts = []
    for key in keys:
        part = row.get(key)
        if part:
            parts.append(_checked_text(part, repr(key)))
        elif key != "input":
            raise ValueError(f"a question without an answer, or an answer without a question: {key!r} has no value")
    return "\n\n".join(parts)


def _checked_text(value: Any, what: str) -> str:
    try:
        if isinstance(value, bytes):  # a Parquet column that is not marked as text
            value = value.decode("utf-8")
        if not isinstance(value, str):
            raise ValueError(f"{what} is a {type(value).__name__}, not a string")
        value.encode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} is not UTF-8 (byte {error.start})") from None
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} holds half of a surrogate pair (character {error.start})") from None
    return value


def token_ids(value: Any, what: str) -> np.ndarray:
    """Whole, non-negative numbers as int64 (a copy); the upper limit depends on the vocabulary and is checked later.

    Raises:
        ValueError: `what` (its name in the message) is something else.
    """
    try:
        ids = np.asarray(value)
    except (ValueError, OverflowError):
        raise ValueError(f"{what} is not a flat list of whole numbers") from None
    if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
        raise ValueError(f"{what} is not a flat list of whole numbers")
    if ids.size and int(ids.min()) < 0:
        raise ValueError(f"{what} holds the negative id {ids.min()}")
    if ids.size and int(ids.max()) >= 2**63:
        raise ValueError(f"{what} holds {ids.max()}, which is no token id")
    return ids.astype(np.int64)


def _chat_parts(messages: Any) -> tuple[tuple[str, bool], ...]:
    """A chat as text, with a header before every message; only what the assistant says is trained on.

    Each part is all text up to where that changes, so that a prompt is encoded in training as it is when it is asked.

    ### User            (no)
                        (no)
    What is 2 + 2?      (no)
                        (no)
    ### Assistant       (no)
                        (no)
    4                   (yes, and the blank line or end of text after it, which is how the answer ends)
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError("'messages' is not a list of messages")
    parts: list[tuple[str, bool]] = []
    for place, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            raise ValueError(f"message {place} has no role of {', '.join(_ROLES)}")
        content = _checked_text(message.get("content"), f"the content of message {place}")
        answers = message["role"] == "assistant"
        if place > 1:
            parts.append(("\n\n", parts[-1][1]))
        parts.append((f"### {message['role'].capitalize()}\n\n", False))
        parts.append((content, answers))
    if not any(trained for _, trained in parts):
        raise ValueError("the chat has no message of the assistant to train on")
    runs = itertools.groupby(parts, key=lambda part: part[1])
    return tuple(("".join(text for text, _ in run), trained) for trained, run in runs)
