"""The JSON Schema of a configuration file, made from the same declarations that the reader checks."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Mapping
from typing import Any

from titan_yulan.config.bind import NONE_TEXT, Key, is_section, keys_of, union_members
from titan_yulan.config.override import loading_sections, phase_sections, run_sections
from titan_yulan.config.presets import PRESETS
from titan_yulan.config.sections import PhaseSection
from titan_yulan.config.values import Duration, Tokens

_LIMITS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}

# The texts that Duration.parse and Tokens.parse read.
_AMOUNT = r"^\s*\d+(_\d+)*(\.\d+)?([eE][+-]?\d+)?\s*[KMBT]?\s*"
_TEXT = {Tokens: _AMOUNT + r"(tokens)?\s*$", Duration: _AMOUNT + r"(tokens|steps|rows|%)?\s*$"}


def schema() -> dict[str, Any]:
    """A JSON Schema (draft 2020-12) of a phase file or a curriculum file.

    No key is required by the schema: a file may take any of them from the files it extends. What is required of the
    resolved configuration is said in the descriptions.
    """
    sections = {**run_sections(), **phase_sections(), **loading_sections()}
    properties: dict[str, Any] = {
        "extends": {
            "description": "files that this one is laid upon, relative to it",
            "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
        },
        "curriculum": {
            "description": "the phases in order: files with one [phase] table each, or tables [[curriculum]]",
            "type": "array",
            "minItems": 1,
            "items": {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/phase"}]},
        },
        "first_phase": {"description": "index of the phase to train first", "type": "integer", "minimum": 0},
        "phase": {"$ref": "#/$defs/phase"},
        **{name: _section(section) for name, section in sections.items()},
    }
    properties["model"]["properties"]["preset"] = {
        "description": "a whole model by name; keys written beside it win",
        "enum": list(PRESETS),
    }
    phase = _section(PhaseSection)
    mix = phase["properties"]["mix"]
    table = {key: mix.pop(key) for key in ("type", "additionalProperties")}
    mix["anyOf"] = [table, {"type": "string"}]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "titan_yulan configuration",
        "description": "A phase file ([phase]) or a curriculum file (curriculum); keys may also come from `extends`.",
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
        "$defs": {"phase": phase},
    }


def _section(section: type) -> dict[str, Any]:
    return {
        "description": (inspect.getdoc(section) or "").splitlines()[0],
        "type": "object",
        "additionalProperties": False,
        "properties": {name: _key(key) for name, key in keys_of(section).items()},
    }


def _key(key: Key) -> dict[str, Any]:
    value = _value(key.type, key.field.metadata)
    if key.optional:
        value = {"anyOf": [value, {"const": NONE_TEXT}]}
    described: dict[str, Any] = {**value, "description": key.field.metadata.get("help") or value.get("description", "")}
    if is_section(key.type):
        return described
    if key.required:
        described["description"] += " (required)"
    else:
        described["default"] = _plain(key.default)
    return described


def _value(kind: Any, limits: Mapping[str, Any]) -> dict[str, Any]:
    members = union_members(kind)
    if len(members) > 1:
        return {"anyOf": [_value(member, limits) for member in members]}
    if is_section(kind):
        return _section(kind)
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is dict:
        return {"type": "object", "additionalProperties": _value(arguments[1], limits)}
    if typing.get_origin(kind) is tuple:
        return _list(arguments, limits)
    if kind in _TEXT:
        return {"type": "string", "pattern": _TEXT[kind]}
    if kind in (bool, str):
        plain: dict[str, Any] = {"type": "boolean" if kind is bool else "string"}
    else:
        plain = {"type": "integer" if kind is int else "number"}
        plain |= {_LIMITS[name]: limits[name] for name in _LIMITS if limits.get(name) is not None}
    return plain | ({"enum": list(limits["choices"])} if limits.get("choices") else {})


def _list(arguments: tuple[Any, ...], limits: Mapping[str, Any]) -> dict[str, Any]:
    element = _value(arguments[0], limits)
    values: dict[str, Any] = {"type": "array", "items": element}
    if arguments[-1] is not Ellipsis:
        return values | {"minItems": len(arguments), "maxItems": len(arguments)}
    return {"anyOf": [element, values]} if is_section(arguments[0]) else values


def _plain(value: Any) -> Any:
    """A default as it would be written in a file."""
    if isinstance(value, (Duration, Tokens)):
        return str(value)
    return NONE_TEXT if value is None else list(value) if isinstance(value, tuple) else value
