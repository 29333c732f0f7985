"""From a tree of TOML values to the section dataclasses: types, limits, choices, unknown and missing keys.

Binding never stops at an error: a value that cannot be used becomes `INVALID`, so that the checks across sections can
still look at everything that is sound.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import operator
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard, Union

from titan_yulan.config.read import KeyPath, Node, Origin, Problems, dotted
from titan_yulan.config.values import Duration, Tokens


class _Invalid:
    """The type of INVALID."""

    def __repr__(self) -> str:
        return "INVALID"


INVALID: Any = _Invalid()

_LARGEST_WHOLE = 10**300  # above this a whole number does not fit a float

NONE_TEXT = "none"  # what a file writes to unset an optional key


@dataclasses.dataclass(frozen=True)
class Key:
    """One key of a section: the field behind it and the type it holds."""

    name: str
    field: dataclasses.Field[Any]
    type: Any
    optional: bool  # None is allowed and written "none"

    @property
    def required(self) -> bool:
        """Whether a file must set it."""
        return self.field.default is dataclasses.MISSING and self.field.default_factory is dataclasses.MISSING

    @property
    def default(self) -> Any:
        """The value of an unset key that is not required."""
        factory = self.field.default_factory
        return self.field.default if factory is dataclasses.MISSING else factory()


@functools.cache
def keys_of(section: type) -> dict[str, Key]:
    """The keys of a section class by the name a file uses (the field `from_` is the key `from`)."""
    hints = typing.get_type_hints(section)
    keys = {}
    for field in dataclasses.fields(section):
        kind, optional = _without_none(hints[field.name])
        name = field.name.removesuffix("_")
        keys[name] = Key(name, field, kind, optional)
    return keys


def _without_none(kind: Any) -> tuple[Any, bool]:
    rest = [member for member in union_members(kind) if member is not types.NoneType]
    return functools.reduce(operator.or_, rest), len(rest) < len(union_members(kind))


def union_members(kind: Any) -> tuple[Any, ...]:
    """The alternatives of `A | B`; a plain type is its own single alternative."""
    return typing.get_args(kind) if typing.get_origin(kind) in (Union, types.UnionType) else (kind,)


def is_section(kind: Any) -> TypeGuard[type]:
    """Whether values of this type are tables (a duration is a dataclass too, but written as text)."""
    return dataclasses.is_dataclass(kind) and kind not in (Duration, Tokens)


def describe(kind: Any, limits: Mapping[str, Any]) -> str:
    """What a value may be, in words: `a whole number >= 1`."""
    if limits.get("choices"):
        return ", ".join(repr(choice) for choice in limits["choices"])
    return " or ".join(_describe_one(member, limits) for member in union_members(kind))


def _describe_one(kind: Any, limits: Mapping[str, Any]) -> str:
    simple = {bool: "true or false", str: "a string", Duration: "a duration like '40B' or '1000 steps'"}
    if kind in simple:
        return simple[kind]
    if kind in (int, float, Tokens):
        signs = (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))
        bounds = " and ".join(f"{sign} {limits[name]}" for name, sign in signs if limits.get(name) is not None)
        text = {int: "a whole number", float: "a number", Tokens: "an amount of tokens like '1.2B'"}[kind]
        return f"{text} {bounds}" if bounds and kind is not Tokens else text
    if typing.get_origin(kind) is tuple:
        element, *more = typing.get_args(kind)
        if is_section(element):
            return "a table or a list of tables"
        count = "" if more == [Ellipsis] else f"{len(more) + 1} values, "
        return f"a list of {count}each {describe(element, limits)}"
    return "a table"


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known name closest to `name`, or nothing when none is close."""
    close = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def found(value: Any) -> str:
    """What was found, as an error shows it: `'abc' (a string)`."""
    if isinstance(value, bool):
        return str(value).lower()
    kinds = {int: "a whole number", float: "a number", str: "a string", dict: "a table", list: "a list"}
    shown = repr(value) if type(value) in kinds else str(value)
    if len(shown) > 40:
        shown = shown[:36] + " ..."
    return f"{shown} ({kinds.get(type(value), 'a date or time')})"


class Binder:
    """Binds trees to section classes; remembers in `places` where each resolved key was written."""

    def __init__(self, problems: Problems) -> None:
        self.problems = problems
        self.places: dict[KeyPath, Origin] = {}

    def at(self, path: KeyPath) -> Origin:
        """Where a resolved key was written; for an unset key, the nearest table above it."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.places:
                place = self.places[path[:end]]
                return dataclasses.replace(place, key=dotted(path[end:], place.key))
        return Origin("configuration", dotted(path))

    def section(self, section: type, node: Node, path: KeyPath, partial: bool = False) -> Any:
        """Bind a table. The instance has every field, each sound or INVALID.

        `partial`: more keys were to come from where an error has been noted already; those not here become INVALID.
        """
        self.places[path] = node.origin
        table = node.value
        if not isinstance(table, dict):
            self.problems.add(node.origin, f"found {found(node.plain())}; allowed: a table")
            table = None
        keys = keys_of(section)
        for name, child in (table or {}).items():
            if name not in keys:
                hint = nearest(name, keys) or f"; known here: {', '.join(keys)}"
                self.problems.add(child.origin, f"unknown key{hint}")
        values = {
            key.field.name: INVALID
            if partial and not (table and key.name in table)
            else self._key(key, table, node.origin, (*path, key.name))
            for key in keys.values()
        }
        if not any(value is INVALID for value in values.values()):
            return section(**values)
        broken = object.__new__(section)
        for name, value in values.items():
            object.__setattr__(broken, name, value)
        return broken

    def _key(self, key: Key, table: dict[str, Node] | None, above: Origin, path: KeyPath) -> Any:
        if table is not None and key.name in table:
            return self._value(key.type, table[key.name], path, key.field.metadata, key.optional)
        if is_section(key.type):
            return self.section(key.type, Node({}, above.child(key.name)), path, partial=table is None)
        if not key.required:
            return key.default
        if table is not None:
            self.problems.add(above.child(key.name), f"missing; required: {describe(key.type, key.field.metadata)}")
        return INVALID

    def _value(self, kind: Any, node: Node, path: KeyPath, limits: Mapping[str, Any], optional: bool = False) -> Any:
        if is_section(kind):
            return self.section(kind, node, path)
        self.places[path] = node.origin
        if optional and node.value == NONE_TEXT:
            return None
        container = typing.get_origin(kind)
        if container is dict:
            return self._dict(typing.get_args(kind)[1], node, path, limits)
        if container is tuple:
            return self._tuple(kind, node, path, limits)
        return self._scalar(kind, node, limits)

    def _refuse(self, kind: Any, node: Node, limits: Mapping[str, Any]) -> Any:
        hint = nearest(str(node.value), map(str, limits["choices"])) if limits.get("choices") else ""
        self.problems.add(node.origin, f"found {found(node.plain())}; allowed: {describe(kind, limits)}{hint}")
        return INVALID

    def _dict(self, element: Any, node: Node, path: KeyPath, limits: Mapping[str, Any]) -> Any:
        if not isinstance(node.value, dict):
            return self._refuse(dict, node, {})
        return {name: self._value(element, child, (*path, name), limits) for name, child in node.value.items()}

    def _tuple(self, kind: Any, node: Node, path: KeyPath, limits: Mapping[str, Any]) -> Any:
        element, *more = typing.get_args(kind)
        elements = node.value
        if is_section(element) and isinstance(elements, dict):
            elements = [node]
        if not isinstance(elements, list) or (more != [Ellipsis] and len(elements) != 1 + len(more)):
            return self._refuse(kind, node, limits)
        values = tuple(self._value(element, child, (*path, i), limits) for i, child in enumerate(elements))
        return INVALID if any(value is INVALID for value in values) else values

    def _scalar(self, kind: Any, node: Node, limits: Mapping[str, Any]) -> Any:
        value, members = node.value, union_members(kind)
        if str in members and node.origin.text is not None:
            value = node.origin.text  # --run.name=2025 is a name, not a number
        elif isinstance(value, str) and str not in members:
            unit = next((member for member in members if member in (Duration, Tokens)), None)
            if unit is None:
                return self._refuse(kind, node, limits)
            try:
                value = unit.parse(value)
            except ValueError as error:
                self.problems.add(node.origin, str(error))
                return INVALID
        elif type(value) is int and int not in members and float in members and abs(value) < _LARGEST_WHOLE:
            value = float(value)
        return value if type(value) in members and _within(value, limits) else self._refuse(kind, node, limits)


def _within(value: Any, limits: Mapping[str, Any]) -> bool:
    if limits.get("choices") and value not in limits["choices"]:
        return False
    if isinstance(value, (Duration, Tokens)):
        value = value.value
    if isinstance(value, (bool, str)):
        return True
    return (
        (isinstance(value, int) or math.isfinite(value))
        and (limits.get("ge") is None or value >= limits["ge"])
        and (limits.get("gt") is None or value > limits["gt"])
        and (limits.get("le") is None or value <= limits["le"])
        and (limits.get("lt") is None or value < limits["lt"])
    )
