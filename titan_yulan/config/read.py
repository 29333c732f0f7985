"""TOML files as trees whose every value knows the file, line and key it was written as; `extends` and merging."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

try:
    import tomllib
except ModuleNotFoundError:
    import tomli as tomllib  # type: ignore[no-redef]

from titan_yulan.errors import UserError

KeyPath = tuple[str | int, ...]

# Tables that a later file replaces instead of merging: a source dropped from a mix would silently stay, and the
# keys of two learning-rate segments would mingle (`lr = {…}` stands for a list of one segment).
_REPLACED_AS_A_WHOLE = ("mix", "lr")

_BARE_KEY = re.compile(r"^[A-Za-z0-9_-]+$")


@dataclass(frozen=True)
class Origin:
    """Where a value was written, and under which dotted key."""

    where: str
    key: str
    path: Path | None = None
    line: int = 0
    text: str | None = None  # an override as typed, before it was read as TOML

    def child(self, key: str | int) -> Origin:
        """The origin to name for a key below this one that has none of its own."""
        return Origin(self.where, dotted((key,), self.key), self.path, self.line)


@dataclass(frozen=True)
class Node:
    """A TOML value: a dict or list of nodes, or a scalar."""

    value: Any
    origin: Origin

    def plain(self) -> Any:
        """The value without origins."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value

    def get(self, key: str) -> Node | None:
        """The node under `key`, or None where there is none or this is no table."""
        return self.value.get(key) if isinstance(self.value, dict) else None


@dataclass(frozen=True)
class ConfigFile:
    """One file: `own` is what it says itself, `base` what the files it extends say."""

    path: Path
    own: Node
    base: Node

    @property
    def resolved(self) -> Node:
        """The file's own tables merged over those it extends."""
        return merge(self.base, self.own)


class Problems:
    """Errors gathered while reading, so that the user sees all of them at once."""

    def __init__(self) -> None:
        self._entries: list[tuple[Origin, str]] = []

    def __bool__(self) -> bool:
        return bool(self._entries)

    def add(self, origin: Origin, text: str) -> None:
        """Note one error; the same error met twice (by two phases that share a table) is noted once."""
        if (origin, text) not in self._entries:
            self._entries.append((origin, text))

    def raise_all(self) -> None:
        """Raise one UserError of one line per error, in the order of files and lines; return if there is none."""
        if not self._entries:
            return
        paths = list(dict.fromkeys(origin.path for origin, _ in self._entries if origin.line))
        ordered = sorted(self._entries, key=lambda e: (paths.index(e[0].path) if e[0].line else len(paths), e[0].line))
        raise UserError("\n".join(dict.fromkeys(_error_line(origin, text) for origin, text in ordered)))


def _error_line(origin: Origin, text: str) -> str:
    if not origin.key or origin.where == f"--{origin.key}":
        return f"{origin.where}: {text}"
    return f"{origin.where}: {origin.key}: {text}"


def dotted(path: KeyPath, start: str = "") -> str:
    """`("data", "sources", "a.b", 0)` -> `data.sources."a.b"[0]`."""
    text = start
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += ("." if text else "") + quoted_key(part)
    return text


def quoted_key(key: str) -> str:
    """A TOML key, in quotes where it needs them."""
    return key if _BARE_KEY.match(key) else toml_string(key)


def toml_string(text: str) -> str:
    """A TOML basic string. JSON's escapes are all valid TOML; only DEL must be escaped in addition."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007F")


def merge(base: Node, over: Node, name: str = "") -> Node:
    """`over` laid on `base`: tables merge key by key; everything else, `mix` and `lr` replace."""
    if not (isinstance(base.value, dict) and isinstance(over.value, dict)):
        return over
    merged = dict(base.value)
    for key, node in over.value.items():
        # a source may be called "mix": below `sources` the names are the user's
        whole = key in _REPLACED_AS_A_WHOLE and name != "sources"
        merged[key] = node if whole or key not in merged else merge(merged[key], node, key)
    return Node(merged, over.origin)


class Reader:
    """Reads files and what they extend, each once; origins name files relative to `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tables: dict[Path, Node] = {}

    def read(self, path: Path, asked_by: Origin | None = None, parents: tuple[Path, ...] = ()) -> ConfigFile:
        """Read a file and all it extends.

        Args:
            path: the file.
            asked_by: the key that names the file (`extends`, `after`, `curriculum`), for the error if it is missing.
            parents: the files whose `extends` led here.

        Raises:
            UserError: a file is missing, is not TOML, or extends itself.
        """
        path = path.resolve()
        if asked_by and path in parents:
            cycle = " -> ".join(self.label(p) for p in (*parents[parents.index(path) :], path))
            raise UserError(f"{asked_by.where}: {asked_by.key}: cycle {cycle}; remove one of these links")
        if path not in self._tables:
            self._tables[path] = _read_toml(path, self.label(path), asked_by)
        table = self._tables[path]
        own = Node({key: node for key, node in table.value.items() if key != "extends"}, table.origin)
        base = Node({}, own.origin)
        for link in _links(table.get("extends")):
            base = merge(base, self.read(path.parent / link.value, link.origin, (*parents, path)).resolved)
        return ConfigFile(path, own, base)

    def label(self, path: Path) -> str:
        """How errors and origins call a file."""
        return os.path.relpath(path, self.folder)


def _links(extends: Node | None) -> list[Node]:
    if extends is None:
        return []
    links = extends.value if isinstance(extends.value, list) else [extends]
    if not all(isinstance(link.value, str) for link in links):
        found = f"{extends.origin.where}: extends: found {extends.plain()!r}"
        raise UserError(f"{found}; allowed: a file name or a list of them")
    return links


def _read_toml(path: Path, label: str, asked_by: Origin | None) -> Node:
    prefix = f"{asked_by.where}: {asked_by.key}: " if asked_by else ""
    try:
        text = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except FileNotFoundError:
        remedy = "; write its path relative to this file" if asked_by and asked_by.path else ""
        raise UserError(f"{prefix}{label} does not exist ({path}){remedy}") from None
    except OSError as error:
        raise UserError(f"{prefix}{label} cannot be read: {error.strerror} ({path})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{label}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(_syntax_error(label, text, str(error))) from None
    return _with_origins(table, (), key_lines(text), Origin(f"{label}:1", "", path, 1), label)


def _syntax_error(label: str, text: str, message: str) -> str:
    found = re.search(r" \((?:at line (\d+), column (\d+)|at end of document)\)$", message)
    if not found:
        return f"{label}: not valid TOML: {message}"
    line = found.group(1) or str(text.rstrip("\n").count("\n") + 1)
    column = f" (column {found.group(2)})" if found.group(2) else " (at the end of the file)"
    return f"{label}:{line}: not valid TOML: {message[: found.start()]}{column}"


def _with_origins(value: Any, path: KeyPath, lines: Mapping[KeyPath, int], above: Origin, label: str) -> Node:
    line = lines.get(path, above.line)
    origin = Origin(f"{label}:{line}", dotted(path), above.path, line)
    if isinstance(value, dict):
        return Node({k: _with_origins(v, (*path, k), lines, origin, label) for k, v in value.items()}, origin)
    if isinstance(value, list):
        return Node([_with_origins(v, (*path, i), lines, origin, label) for i, v in enumerate(value)], origin)
    return Node(value, origin)


def key_lines(text: str) -> dict[KeyPath, int]:
    """The line (from 1) on which each key of a valid TOML document is set; elements of a list are its indices.

    Statements are told apart by the TOML parser itself: lines are gathered until they parse.
    """
    lines: dict[KeyPath, int] = {}
    arrays: dict[KeyPath, int] = {}
    table: KeyPath = ()
    statement, start = "", 0
    for number, line in enumerate(text.split("\n"), 1):
        bare = line.strip()
        if not statement:
            if not bare or bare.startswith("#"):
                continue
            if bare.startswith("["):
                table = _enter_table(bare, number, lines, arrays)
                continue
            start = number
        statement += line + "\n"
        if number > start and bare.endswith((",", "[", "{")) and "#" not in bare:
            continue  # no statement ends like this; spares long lists a parse per line
        try:
            parsed = tomllib.loads(statement)
        except tomllib.TOMLDecodeError:
            continue
        _mark(parsed, table, start, lines)
        statement = ""
    return lines


def _enter_table(header: str, number: int, lines: dict[KeyPath, int], arrays: dict[KeyPath, int]) -> KeyPath:
    """The path that `[table]` or `[[array of tables]]` opens; `arrays` counts the elements of each array."""
    path: KeyPath = ()
    rest: Any = tomllib.loads(header)
    while rest:
        name, rest = next(iter(rest.items()))
        path = (*path, name)
        lines.setdefault(path, number)
        if isinstance(rest, list):
            arrays[path] = arrays.get(path, 0) + 1
            rest = rest[0]
        if path in arrays:
            path = (*path, arrays[path] - 1)
            lines.setdefault(path, number)
    return path


def _mark(value: Any, path: KeyPath, number: int, lines: dict[KeyPath, int]) -> None:
    if path:
        lines.setdefault(path, number)
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        _mark(child, (*path, key), number, lines)
