"""A resolved configuration as TOML that loads to an equal one, and the difference of two configurations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from titan_yulan.config.bind import NONE_TEXT, is_section, keys_of
from titan_yulan.config.load import Loaded, leaves
from titan_yulan.config.override import run_sections
from titan_yulan.config.read import KeyPath, dotted, quoted_key, toml_string
from titan_yulan.config.sections import RunConfig
from titan_yulan.config.values import Duration, Tokens


@dataclass(frozen=True)
class Difference:
    """One key on which two configurations differ; `old` and `new` are TOML values, None where the key is absent."""

    key: str
    old: str | None
    new: str | None

    def __str__(self) -> str:
        return f"{self.key}: {self.old or '(not set)'} -> {self.new or '(not set)'}"


def show(loaded: Loaded) -> str:
    """The configuration as TOML, each value followed by `# where it came from`; it loads to an equal RunConfig."""
    return _document(loaded.config, loaded.origins)


def to_toml(config: RunConfig) -> str:
    """The configuration as TOML, to be saved with a checkpoint; it loads to an equal RunConfig."""
    return _document(config, {})


def diff(a: RunConfig, b: RunConfig) -> list[Difference]:
    """The keys on which two configurations differ, in the order of the sections.

    Phases are matched by name (`phase.anneal.length`). If their names or order differ, the key `curriculum` lists
    them. `first_phase`, which says what to run and not what is run, is not compared.
    """
    old, new = flatten(a), flatten(b)
    keys = dict.fromkeys([*old, *new])
    return [Difference(key, old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)]


def flatten(config: RunConfig) -> dict[str, str]:
    """Every dotted key with its value as TOML; `curriculum` lists the names of the phases."""
    names = [phase.name for phase in config.phases]
    flat = {dotted(_by_name(path, names)): toml_value(value) for path, value in leaves(config)}
    return {**flat, "curriculum": toml_value(tuple(names))}


def _by_name(path: KeyPath, names: list[str]) -> KeyPath:
    return ("phase", names[int(path[1])], *path[2:]) if path[0] == "phases" else path


def toml_value(value: Any) -> str:
    """One value as TOML on one line; sections become inline tables, durations and amounts their text."""
    if value is None:
        return toml_string(NONE_TEXT)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (str, Duration, Tokens)):
        return toml_string(str(value))
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, tuple):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{quoted_key(name)} = {toml_value(child)}" for name, child in value.items()) + "}"
    if is_section(type(value)):
        keys = keys_of(type(value)).values()
        return "{" + ", ".join(f"{key.name} = {toml_value(getattr(value, key.field.name))}" for key in keys) + "}"
    raise TypeError(f"no TOML value: {value!r}")


def _document(config: RunConfig, origins: Mapping[str, str]) -> str:
    lines = [f"first_phase = {config.first_phase}"] if config.first_phase else []
    for name in run_sections():
        lines += _table(getattr(config, name), f"[{name}]", name, name, origins)
    for phase in config.phases:
        lines += _table(phase, "[[curriculum]]", "curriculum", dotted(("phase", phase.name)), origins)
    return "\n".join(lines).strip() + "\n"


def _table(section: Any, header: str, table: str, key: str, origins: Mapping[str, str]) -> list[str]:
    """A section or a dict as a TOML table, its own values first, then the tables below it."""
    if isinstance(section, dict):
        items = {quoted_key(name): value for name, value in section.items()}
    else:
        items = {name: getattr(section, k.field.name) for name, k in keys_of(type(section)).items()}
        items.pop("after", None)  # has become the order of the phases
    lines, below = ["", header], []
    for name, value in items.items():
        if isinstance(value, dict) or is_section(type(value)):
            below += _table(value, f"[{table}.{name}]", f"{table}.{name}", f"{key}.{name}", origins)
        else:
            origin = origins.get(f"{key}.{name}")
            lines.append(f"{name} = {toml_value(value)}" + (f"  # {origin}" if origin else ""))
    if isinstance(section, dict) and below and len(lines) == 2:
        return below  # a table of nothing but tables needs no header
    return lines + below
