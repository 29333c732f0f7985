"""A sweep file: a base configuration and a grid, expanded into runs with names and settings.

config = "base.toml"             relative to this file, or a bare name below train_configs/
output_dir = "outputs/sizes"     holds the run folders
name = "{kind}-{size}-{epochs}"  of a run: labels, keys, or the last words of keys

[set]                            keys for all runs
checkpoint.keep = 1

[grid]                           every combination is a run; [[grid]] tables are expanded one after the other
objective.kind = ["autoregressive", "masked_diffusion"]
phase.epochs = [1, 4]
size = [                         a name without a dot: settings that go together, and labels for the name
    { size = "7m", model.preset = "data_constrained_7m" },
    { size = "14m", model.preset = "data_constrained_14m" },
]
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan_yulan.config.bind import nearest
from titan_yulan.config.find import find
from titan_yulan.config.read import Node, Origin, Problems, Reader
from titan_yulan.config.show import toml_value

_KEYS = ("config", "output_dir", "name", "set", "grid")
_PLACEHOLDER = re.compile(r"\{([\w.\"-]+)\}")
_GIVEN = ("run.name", "run.output_dir")  # keys that a sweep sets itself

Settings = dict[str, Any]  # dotted key or label -> value


@dataclass(frozen=True)
class Expanded:
    """A sweep file; settings are `--section.key=value`, the later ones win.

    Attributes:
        config: the base configuration.
        output_dir: the folder of the runs.
        common: settings of all runs, before the grid's.
        runs: name -> settings from the grid.
        given: settings from the command line, after the grid's.
    """

    path: Path
    config: Path
    output_dir: Path
    common: tuple[str, ...]
    runs: dict[str, tuple[str, ...]]
    given: tuple[str, ...]


def expand(path: Path, root: Path, overrides: Sequence[str] = ()) -> Expanded:
    """Read a sweep file.

    Args:
        path: the file.
        root: the checkout, below which bare names of configurations are looked for.
        overrides: `--section.key=value` for all runs; `--run.output_dir` is the folder of the runs.

    Raises:
        UserError: one line for each mistake in the file.
    """
    tree, problems = Reader(path.resolve().parent).read(path).resolved, Problems()
    for key, node in tree.value.items():
        if key not in _KEYS:
            problems.add(node.origin, f"unknown key{nearest(key, _KEYS) or '; known here: ' + ', '.join(_KEYS)}")
    texts = {key: _text(tree, key, default, problems) for key, default in (("output_dir", ""), ("name", ""))}
    config = _text(tree, "config", None, problems)
    common = _settings(tree.get("set") or Node({}, tree.origin), problems)
    grid = tree.get("grid")
    grids = grid.value if grid is not None and isinstance(grid.value, list) else [grid] if grid is not None else []
    if not grids:
        problems.add(tree.origin, "no [grid] here; write one, with a list of values for each key that differs")
    runs: dict[str, tuple[str, ...]] = {}
    for table in grids:
        for axes in itertools.product(*_axes(table, problems)):
            _add_run(runs, common, axes, texts["name"], table.origin, problems)
    for override in overrides:
        if override.startswith("--run.name="):
            problems.add(Origin(override, ""), "a sweep names its runs itself; see `name` in the file")
    problems.raise_all()
    folders = [override.partition("=")[2] for override in overrides if override.startswith("--run.output_dir=")]
    output = Path(folders[-1] if folders else texts["output_dir"] or f"outputs/{path.stem}")
    given = tuple(override for override in overrides if not override.startswith("--run.output_dir="))
    beside = path.parent / config
    base = beside if beside.is_file() else find(config, root)
    return Expanded(path, base, output, _overrides(common), runs, given)


def _text(tree: Node, key: str, default: str | None, problems: Problems) -> str:
    node = tree.get(key)
    if node is None:
        if default is None:
            problems.add(tree.origin, f"{key} is missing: the configuration that all runs start from")
        return default or ""
    if not isinstance(node.value, str):
        problems.add(node.origin, f"found {node.plain()!r}; allowed: a text in quotes")
        return ""
    return node.value


def _flat(table: Node, prefix: str = "") -> Iterator[tuple[str, Node]]:
    """What is below a table that is no table itself, under its dotted name: `a.b = 1` and `"a.b" = 1` are the same."""
    for key, node in table.value.items():
        name = f"{prefix}.{key}" if prefix else key
        if isinstance(node.value, dict):
            yield from _flat(node, name)
        else:
            yield name, node


def _settings(table: Node, problems: Problems) -> Settings:
    if not isinstance(table.value, dict):
        problems.add(table.origin, f"found {table.plain()!r}; allowed: a table of keys and values")
        return {}
    found = dict(_flat(table))
    for name in _GIVEN:
        if name in found:
            problems.add(found[name].origin, "a sweep sets it itself, from `name` and `output_dir`")
    return {name: node.plain() for name, node in found.items()}


def _axes(table: Node, problems: Problems) -> list[list[Settings]]:
    """The choices of each key, and of each group of settings that go together."""
    axes = []
    for name, node in _flat(table) if isinstance(table.value, dict) else ():
        if not isinstance(node.value, list) or not node.value:
            problems.add(node.origin, f"found {node.plain()!r}; allowed: a list of at least one value")
        elif "." in name:
            axes.append([_settings(Node({name: value}, value.origin), problems) for value in node.value])
        else:
            axes.append([_settings(value, problems) for value in node.value])
    return axes


def _add_run(
    runs: dict[str, tuple[str, ...]],
    common: Settings,
    axes: Sequence[Settings],
    template: str,
    origin: Origin,
    problems: Problems,
) -> None:
    own: Settings = {}
    for choice in axes:
        if twice := sorted(own.keys() & choice.keys()):
            problems.add(origin, f"{twice[0]} stands in two lists of one grid; leave it in one")
        own |= choice
    settings = common | own
    asked = set(_PLACEHOLDER.findall(template)) or settings.keys()
    for label in sorted({key for key in settings if "." not in key} - asked):
        problems.add(origin, f"{label} is no key, which has a dot, and no {{{label}}} of `name` either; correct it")
    name = _name(template, settings, origin, problems) if template else "-".join(map(_word, _telling(axes)))
    if name in runs:
        problems.add(origin, f"{name!r} would be the name of two runs; put all that differs into `name`")
    runs[name] = _overrides(own)


def _overrides(settings: Settings) -> tuple[str, ...]:
    """As on the command line; labels are left out."""
    return tuple(f"--{key}={_typed(value)}" for key, value in settings.items() if "." in key)


def _typed(value: Any) -> str:
    """A value as one would type it behind the equals sign: a text is not in quotes."""
    return value if isinstance(value, str) else toml_value(_frozen(value))


def _telling(axes: Sequence[Settings]) -> Iterator[Any]:
    """What tells runs apart where no template says so: labels, or else all values."""
    for choice in axes:
        labels = [value for key, value in choice.items() if "." not in key]
        yield from labels or choice.values()


def _name(template: str, settings: Settings, origin: Origin, problems: Problems) -> str:
    def value(match: re.Match[str]) -> str:
        asked = match[1]
        last_words = [key for key in settings if key.rpartition(".")[2] == asked]
        keys = [asked] if asked in settings else last_words
        if len(keys) == 1:
            return _word(settings[keys[0]])
        among = f"; it could be {' or '.join(keys)}" if keys else nearest(asked, settings)
        problems.add(origin, f"`name` asks for {{{asked}}}, which is no setting of these runs{among}")
        return asked

    return _PLACEHOLDER.sub(value, template)


def _word(value: Any) -> str:
    """A value as a part of a folder's name."""
    text = f"{value:g}" if isinstance(value, float) else _typed(value)
    return re.sub(r"[^\w.+=@-]+", "_", text).strip("_")


def _frozen(value: Any) -> Any:
    """Lists as tuples, which is how configurations hold them."""
    if isinstance(value, dict):
        return {key: _frozen(child) for key, child in value.items()}
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
