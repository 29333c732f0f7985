"""`--section.key=value` on the command line: parsed like TOML, checked against the known keys."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from titan_yulan.config.bind import is_section, keys_of
from titan_yulan.config.read import Node, Origin, Problems, dotted, merge, tomllib
from titan_yulan.config.sections import MiniatureSection, PhaseSection, RunConfig


def run_sections() -> dict[str, type]:
    """The sections of a run by name: every table of a file but [phase] and those a phase completes."""
    keys = keys_of(RunConfig).values()
    return {key.name: key.type for key in keys if is_section(key.type)}


def phase_sections() -> dict[str, type]:
    """The tables that every phase holds complete, such as [batch]: a file writes them once, [phase.batch] differs."""
    keys = keys_of(PhaseSection).values()
    return {key.name: key.type for key in keys if is_section(key.type)}


def loading_sections() -> dict[str, type]:
    """The tables that act while a file is loaded and are no part of the resolved configuration."""
    return {"miniature": MiniatureSection}


@dataclass(frozen=True)
class Override:
    """One command-line setting; `path` is what follows the dashes, split."""

    path: tuple[str, ...]
    node: Node


def read_overrides(arguments: Sequence[str], problems: Problems) -> list[Override]:
    """Parse `--section.key=value` arguments; what cannot be read or names no key is noted in `problems`."""
    overrides = []
    for argument in arguments:
        flag, equals, text = argument.partition("=")
        path = _split(flag[2:]) if flag.startswith("--") and equals else None
        if path is None:
            problems.add(Origin(argument, ""), "cannot read this; write --section.key=value")
            continue
        name = dotted(path)
        origin = Origin(f"--{name}", name, text=text)
        if not _exists(path):
            problems.add(origin, f"unknown key{_nearest_flag(name)}")
            continue
        overrides.append(Override(path, _value(text, origin)))
    return overrides


def apply(tree: Node, overrides: Sequence[Override]) -> Node:
    """Lay overrides on a tree whose root holds the first part of each path."""
    for override in overrides:
        tree = _set(tree, override.path, override.node)
    return tree


def _set(tree: Node, path: tuple[str, ...], node: Node, name: str = "") -> Node:
    table = dict(tree.value) if isinstance(tree.value, dict) else {}
    first, *rest = path
    if rest:
        below = table.get(first) or Node({}, Origin(node.origin.where, dotted((first,), tree.origin.key)))
        table[first] = _set(below, tuple(rest), node, first)
        return Node(table, tree.origin)
    return merge(Node(table, tree.origin), Node({first: node}, tree.origin), name)


def _split(flag: str) -> tuple[str, ...] | None:
    try:
        rest: Any = tomllib.loads(f"{flag} = 0")
    except tomllib.TOMLDecodeError:
        return None
    path: tuple[str, ...] = ()
    while isinstance(rest, dict) and len(rest) == 1:
        name, rest = next(iter(rest.items()))
        path = (*path, name)
    return path


def _value(text: str, origin: Origin) -> Node:
    try:
        table = tomllib.loads(f"value = {text}")
        value = table["value"] if len(table) == 1 else text
    except tomllib.TOMLDecodeError:
        value = text
    return _nodes(value, origin)


def _nodes(value: Any, origin: Origin) -> Node:
    if isinstance(value, dict):
        return Node({key: _nodes(child, origin.child(key)) for key, child in value.items()}, origin)
    if isinstance(value, list):
        return Node([_nodes(child, origin.child(i)) for i, child in enumerate(value)], origin)
    return Node(value, origin)


def _tables() -> dict[str, type]:
    return {**run_sections(), **phase_sections(), **loading_sections(), "phase": PhaseSection}


def _exists(path: tuple[str, ...]) -> bool:
    kind: Any = _tables().get(path[0])
    for name in path[1:]:
        if typing.get_origin(kind) is dict:
            kind = typing.get_args(kind)[1]
        elif is_section(kind):
            key = keys_of(kind).get(name)
            is_preset = kind is run_sections()["model"] and name == "preset"
            kind = key.type if key else str if is_preset else None
        else:
            return False
    return kind is not None


def _nearest_flag(name: str) -> str:
    known = list(all_keys())
    last = name.rpartition(".")[2]
    # the right key in the wrong section (or in none) is a likelier slip than two wrong letters
    close = [key for key in known if key.rpartition(".")[2] == last][:1] or difflib.get_close_matches(name, known, 1)
    return f"; did you mean '--{close[0]}'?" if close else "; write --section.key=value"


def all_keys() -> Iterator[str]:
    """Every dotted key with a fixed name, such as `optimizer.learning_rate` and `phase.batch.micro_batch_size`."""
    for name, section in _tables().items():
        yield from _keys_below(section, name)
    yield "model.preset"


def _keys_below(section: type, start: str) -> Iterator[str]:
    for key in keys_of(section).values():
        if is_section(key.type):
            yield from _keys_below(key.type, f"{start}.{key.name}")
        else:
            yield f"{start}.{key.name}"
