"""Requests of an evaluation, and the JSONL files that hold them: one item a line, an object with these keys.

    kind     keys
    choice   context (a string, or one for each choice), choices, gold (place of the right one, from 0);
             unconditional: a context that says nothing of the question, for the choices' own probabilities
    cloze    context, continuation
    text     text
    answer   context, answer (a string, or several that are all looked for); stop, max_new_tokens
    code     context, test (program text after the model's); prefix (before it); stop, max_new_tokens

`id` may name the item; else it is its line. `kind` is told from the keys.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from titan_yulan.errors import UserError

DEFAULT_NEW_TOKENS = 512


@dataclass(frozen=True)
class Choice:
    """Which of `choices` is the likeliest after its context? `contexts` has one for each of them."""

    id: str
    contexts: tuple[str, ...]
    choices: tuple[str, ...]
    gold: int
    unconditional: str | None = None


@dataclass(frozen=True)
class Cloze:
    """How likely is a continuation, and is it what the model itself would write?"""

    id: str
    context: str
    continuation: str


@dataclass(frozen=True)
class Text:
    """How likely is a text? `ids` are its tokens where they are already known, and of those only the ones from place a
    up to b count for each (a, b) of `parts`; None: all of them.
    """

    id: str
    text: str
    ids: tuple[int, ...] | None = None
    parts: tuple[tuple[int, int], ...] | None = None


@dataclass(frozen=True)
class Generation:
    """What does the model write, up to one of `stop`, a token that ends a text, or so many tokens?"""

    id: str
    context: str
    stop: tuple[str, ...]
    max_new_tokens: int


@dataclass(frozen=True)
class Answer(Generation):
    """The writing is compared with `answers`."""

    answers: tuple[str, ...]


@dataclass(frozen=True)
class Code(Generation):
    """The program is `prefix`, the writing, and `test`; it must run to its end."""

    prefix: str
    test: str


def shortened(items: Sequence[Generation], most: int | None) -> list[Generation]:
    """The requests, none of which may write more than `most` tokens; None: as they are."""
    if most is None:
        return list(items)
    return [replace(item, max_new_tokens=min(most, item.max_new_tokens)) for item in items]


Item = Choice | Cloze | Text | Answer | Code
KINDS: dict[str, type] = {"choice": Choice, "cloze": Cloze, "text": Text, "answer": Answer, "code": Code}
_TELLING = {"choices": "choice", "continuation": "cloze", "test": "code", "answer": "answer", "text": "text"}


def kind_of(item: Item) -> str:
    """The name of the item's kind in the table above."""
    return next(name for name, kind in KINDS.items() if isinstance(item, kind))


def read_requests(path: Path, limit: int | None = None) -> list[Item]:
    """The items of a `.jsonl` or `.jsonl.gz` file, the first `limit` of them.

    Raises:
        UserError: names the line that is not as described above, or the file that cannot be read or is empty.
    """
    items = read_lines(path, parse_item, limit)
    if not items:
        raise UserError(f"{path} holds no request")
    kinds = {kind_of(item) for item in items}
    if len(kinds) > 1:
        raise UserError(f"{path} mixes requests of the kinds {', '.join(sorted(kinds))}: give each kind its own file")
    return items


def read_lines(path: Path, parse: Callable[[dict[str, Any], str], Any], limit: int | None = None) -> list[Any]:
    """What `parse(object, id)` makes of the lines of a JSONL file; blank ones are passed over.

    Raises:
        UserError: a line is no object or `parse` raises KeyError, TypeError or ValueError; or the file is unreadable.
    """
    found: list[Any] = []
    for number, line in _lines(path):
        if limit is not None and len(found) >= limit:
            break
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("it is no object")
            found.append(parse(row, str(row.get("id", number))))
        except KeyError as error:
            raise UserError(f"{path}, line {number}: the key {error.args[0]!r} is missing") from None
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}, line {number}: {error}") from None
    return found


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def parse_item(row: dict[str, Any], name: str) -> Item:
    """One line of a request file.

    Raises:
        KeyError: a key is missing.
        ValueError: a value is not what its key stands for.
    """
    kind = next((kind for key, kind in _TELLING.items() if key in row), None)
    if kind is None:
        raise ValueError(f"none of the keys {', '.join(map(repr, _TELLING))} says what is asked")
    if kind == "choice":
        return _choice(row, name)
    if kind == "cloze":
        return Cloze(name, _text(row, "context"), _text(row, "continuation", filled=True))
    if kind == "text":
        return Text(name, _text(row, "text", filled=True))
    tokens = row.get("max_new_tokens", DEFAULT_NEW_TOKENS)
    if type(tokens) is not int or tokens < 1:
        raise ValueError(f"'max_new_tokens' is {tokens!r}, not a number of tokens")
    asked = (name, _text(row, "context"), _strings(row.get("stop", []), "stop"), tokens)
    if kind == "code":
        return Code(*asked, prefix=_text({"prefix": "", **row}, "prefix"), test=_text(row, "test", filled=True))
    answer = row["answer"]
    return Answer(*asked, answers=_strings([answer] if isinstance(answer, str) else answer, "answer", filled=True))


def _choice(row: dict[str, Any], name: str) -> Choice:
    choices = _strings(row["choices"], "choices", filled=True)
    context = row["context"]
    if isinstance(context, list) and len(context) != len(choices):
        raise ValueError(f"'context' has {len(context)} entries for {len(choices)} choices")
    contexts = _strings(context if isinstance(context, list) else [context] * len(choices), "context")
    gold = row["gold"]
    if type(gold) is not int or not 0 <= gold < len(choices) or len(choices) < 2:
        raise ValueError(f"'gold' is {gold!r} among {len(choices)} choices: it is a place, from 0, among at least two")
    unconditional = row.get("unconditional")
    return Choice(name, contexts, choices, gold, None if unconditional is None else _text(row, "unconditional"))


def _text(row: dict[str, Any], key: str, filled: bool = False) -> str:
    return _strings([row[key]], key, filled)[0]


def _strings(values: Sequence[Any], key: str, filled: bool = False) -> tuple[str, ...]:
    if isinstance(values, str) or not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"{key!r} is not text")
    if filled and not (values and all(values)):
        raise ValueError(f"{key!r} is empty")
    return tuple(values)
