"""`load`: one configuration file and its overrides → a checked `RunConfig`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from titan_yulan.config.assemble import Assembled, Assembler
from titan_yulan.config.bind import Binder, found, is_section, keys_of, nearest
from titan_yulan.config.check import check
from titan_yulan.config.miniature import make_small
from titan_yulan.config.model import ModelConfig
from titan_yulan.config.override import loading_sections, phase_sections, read_overrides, run_sections
from titan_yulan.config.presets import PRESETS, describe_presets
from titan_yulan.config.read import KeyPath, Node, Origin, Problems, Reader, dotted
from titan_yulan.config.sections import MiniatureSection, PhaseSection, RunConfig


@dataclass(frozen=True)
class Loaded:
    """A configuration, and for every dotted key where its value came from (`"debug.toml:12"`, `"default"`,
    `"preset yulan_mini_2b"`, `"--optimizer.learning_rate"`). Keys of a phase are `phase.NAME.key`."""

    config: RunConfig
    origins: dict[str, str]


def load(path: Path, overrides: Sequence[str] = ()) -> Loaded:
    """Read, resolve and check a configuration file.

    Args:
        path: a phase file or a curriculum file.
        overrides: command-line settings, `--section.key=value` each.

    Raises:
        UserError: one line for each mistake, with file, line, key, what was found and what is allowed.
    """
    path = Path(path)
    reader = Reader(path.resolve().parent)
    problems = Problems()
    settings = read_overrides(overrides, problems)
    assembled = Assembler(reader.read(path), reader, settings, problems).assemble()
    binder = Binder(problems)
    config = _bind(assembled, binder)
    if miniature := assembled.run.get("miniature"):
        config = _made_small(config, miniature, binder)
    check(config, binder)
    problems.raise_all()
    places = binder.places
    names = [phase.name for phase in config.phases]
    origins = {
        dotted(_named(leaf, names)): places[leaf].where if leaf in places else "default" for leaf, _ in leaves(config)
    }
    return Loaded(config, origins)


def _bind(assembled: Assembled, binder: Binder) -> RunConfig:
    """Every section bound; sound in all its parts only if `binder.problems` stayed empty."""
    run = assembled.run
    known = [*run_sections(), *phase_sections(), *loading_sections(), "phase", "curriculum", "extends"]
    for name, node in run.value.items():
        if name not in known:
            hint = nearest(name, known) or f"; known here: {', '.join(known)}"
            binder.problems.add(node.origin, f"unknown section{hint}")
    sections: dict[str, Any] = {}
    for name, section in run_sections().items():
        node = run.get(name) or Node({}, run.origin.child(name))
        if section is ModelConfig:
            sections[name] = _model(node, binder)
        else:
            sections[name] = binder.section(section, node, (name,))
    phases = tuple(binder.section(PhaseSection, node, ("phases", i)) for i, node in enumerate(assembled.phases))
    return RunConfig(**sections, phases=phases, first_phase=assembled.first_phase)


def _made_small(config: RunConfig, node: Node, binder: Binder) -> RunConfig:
    """The configuration as its `[miniature]` has it; values that changed come from both places.

    Raises:
        UserError: mistakes so far, or in the miniature; the checks across sections are for what comes out.
    """
    section = binder.section(MiniatureSection, node, ("miniature",))
    binder.problems.raise_all()
    small = make_small(config, section, binder)
    binder.problems.raise_all()
    before = dict(leaves(config))
    for path, value in leaves(small):
        if path in before and before[path] != value:
            place = binder.at(path)
            binder.places[path] = replace(place, where=f"{place.where}, made smaller by {node.origin.where}")
    return small


def _model(node: Node, binder: Binder) -> ModelConfig:
    """[model], with `preset` replaced by the keys it stands for, under those the file sets itself."""
    preset = node.get("preset")
    if preset is None:
        if node.value == {}:
            binder.problems.add(node.origin, f"missing; required: preset, one of {describe_presets()}, or a shape")
        return binder.section(ModelConfig, node, ("model",), partial=node.value == {})
    own = {key: value for key, value in node.value.items() if key != "preset"}
    known = preset.plain() in list(PRESETS)
    if not known:
        allowed, hint = describe_presets(), nearest(str(preset.value), PRESETS)
        binder.problems.add(preset.origin, f"found {found(preset.plain())}; allowed: {allowed}{hint}")
    keys = preset_keys(preset.value) if known else {}
    return binder.section(ModelConfig, Node({**keys, **own}, node.origin), ("model",), partial=not known)


def preset_keys(name: str) -> dict[str, Node]:
    """The keys in which a preset differs from the defaults."""
    preset = PRESETS[name]
    keys = {}
    for key in keys_of(ModelConfig).values():
        value = getattr(preset, key.field.name)
        if key.required or value != key.default:
            keys[key.name] = Node(value, Origin(f"preset {name}", f"model.{key.name}"))
    return keys


def _named(path: KeyPath, names: Sequence[str]) -> KeyPath:
    """`("phases", 2, "mix")` -> `("phase", "anneal", "mix")`."""
    return ("phase", names[int(path[1])], *path[2:]) if path[0] == "phases" else path


def leaves(config: RunConfig) -> Iterator[tuple[KeyPath, Any]]:
    """Every key of a configuration with its value; tables of tables are walked, lists are one value.

    `first_phase` is not a key of a section and is left out.
    """
    for name in run_sections():
        yield from _leaves_below(getattr(config, name), (name,))
    for index, phase in enumerate(config.phases):
        yield from _leaves_below(phase, ("phases", index))


def _leaves_below(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    if is_section(type(value)):
        for key in keys_of(type(value)).values():
            yield from _leaves_below(getattr(value, key.field.name), (*path, key.name))
    elif isinstance(value, dict):
        for name, child in value.items():
            yield from _leaves_below(child, (*path, name))
    else:
        yield path, value
