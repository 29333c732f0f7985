"""From files to the tables of a run: the chain of phase files behind `after`, `curriculum`, and what they share.

A run has one table per run-level section and one complete table per phase. Every phase file is resolved with its own
`extends`; the tables of the file that was asked for are laid on top; what comes out must be the same for all of them,
because one run has one model, one optimizer, one set of sources.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from titan_yulan.config.bind import found
from titan_yulan.config.miniature import without_layout
from titan_yulan.config.mix_file import read_mix
from titan_yulan.config.override import Override, apply, phase_sections
from titan_yulan.config.read import ConfigFile, Node, Origin, Problems, Reader, merge
from titan_yulan.errors import UserError

_NOT_RUN_LEVEL = ("phase", "curriculum", "first_phase")


@dataclass(frozen=True)
class Assembled:
    """The tables of a run, before binding."""

    run: Node  # every section but [phase]
    phases: list[Node]  # each with complete [batch], [parallel]; without `after`
    first_phase: int


@dataclass(frozen=True)
class _Entry:
    """One phase: its own table, the file it stands in (None: inline in the curriculum)."""

    table: Node
    file: ConfigFile | None


class Assembler:
    """Collects the phases of the configuration whose file is `top`."""

    def __init__(self, top: ConfigFile, reader: Reader, overrides: Sequence[Override], problems: Problems) -> None:
        self.top, self.reader, self.problems = top, reader, problems
        self.on_run = [o for o in overrides if o.path[0] != "phase"]
        on_phase = [o for o in overrides if o.path[0] == "phase"]
        self.on_phase = [Override(o.path, self._read_mix(o.node)) if o.path[1:] == ("mix",) else o for o in on_phase]

    def assemble(self) -> Assembled:
        """The run-level tables and all phases in order; errors go to `problems`.

        Raises:
            UserError: a file of the chain is missing or the chain is a cycle.
        """
        tree = self.top.resolved
        curriculum = tree.get("curriculum")
        if curriculum is not None:
            entries = self._curriculum(curriculum, tree.get("phase"))
        elif tree.get("phase") is not None or self.on_phase:
            entries = [_Entry(tree.get("phase") or Node({}, tree.origin.child("phase")), self.top)]
        else:
            entries = []
            self.problems.add(tree.origin, "no phase here; write a [phase] table or curriculum = ['phase01.toml', …]")
        targets = [_Entry(self._with_overrides(entry.table), entry.file) for entry in entries]
        earlier = self._earlier(targets[0]) if targets else []
        self._check_links(targets)
        run = self._run_level([*earlier, *targets])
        before = [self._complete(entry.table, run, target=False) for entry in earlier]
        phases = before + [self._complete(entry.table, run, target=True) for entry in targets]
        return Assembled(run, phases, self._first_phase(tree, len(earlier), len(phases)))

    def _curriculum(self, curriculum: Node, common: Node | None) -> list[_Entry]:
        elements = curriculum.value
        if not isinstance(elements, list) or not elements:
            self.problems.add(curriculum.origin, "allowed: a list of at least one phase file or [[curriculum]] table")
            return []
        entries = []
        for element in elements:
            if isinstance(element.value, str):
                entries.append(self._phase_file(self._beside(element), element.origin))
            elif isinstance(element.value, dict):
                entries.append(_Entry(element, None))
            else:
                self.problems.add(element.origin, f"found {found(element.plain())}; allowed: a phase file or a table")
        return [_Entry(merge(common, e.table), e.file) for e in entries] if common else entries

    def _beside(self, node: Node) -> Path:
        """A file name in a configuration is relative to the file that holds it; in an override, to the caller."""
        return ((node.origin.path.parent if node.origin.path else Path()) / str(node.value)).resolve()

    def _phase_file(self, path: Path, asked_by: Origin) -> _Entry:
        file = self.reader.read(path, asked_by)
        table = file.resolved.get("phase")
        if table is None or file.resolved.get("curriculum") is not None:
            place = f"{asked_by.where}: {asked_by.key}"
            raise UserError(f"{place}: {self.reader.label(path)} is no phase file; name a file with one [phase] table")
        return _Entry(table, file)

    def _earlier(self, first: _Entry) -> list[_Entry]:
        """The phases before `first`, oldest first, along `after`."""
        chain: list[_Entry] = []
        entry, seen = first, [first.file.path if first.file else self.top.path]
        while (after := entry.table.get("after")) is not None and isinstance(after.value, str) and after.value:
            path = self._beside(after)
            if path in seen:
                cycle = " -> ".join(p.name for p in (*seen[seen.index(path) :], path))
                raise UserError(f"{after.origin.where}: {after.origin.key}: cycle {cycle}; remove one of these links")
            seen.append(path)
            entry = self._phase_file(path, after.origin)
            chain.insert(0, entry)
        return chain

    def _check_links(self, targets: list[_Entry]) -> None:
        """In a curriculum, `after` may only repeat what the order says; the first one may continue a chain."""
        for before, entry in itertools.pairwise(targets):
            after = entry.table.get("after")
            if after is None or not isinstance(after.value, str) or not after.value:
                continue
            if before.file is None or self._beside(after) != before.file.path:
                self.problems.add(after.origin, f"{after.value!r} is not the phase before it here; remove it")

    def _run_level(self, entries: list[_Entry]) -> Node:
        """The run-level tables, which must be the same whichever phase file they are read from."""
        top = apply(_run_tables(self.top.resolved), self.on_run)
        own, base = _run_tables(self.top.own), _run_tables(self.top.base)
        files = list({e.file.path: e.file for e in entries if e.file and e.file is not self.top}.values())
        seen = [apply(merge(merge(base, _run_tables(file.resolved)), own), self.on_run) for file in files]
        if self.top.resolved.get("curriculum") is None or not seen:
            seen.append(top)
        else:
            self._compare(top, seen[-1], "", one_sided=True)
        for tree in seen[:-1]:
            self._compare(tree, seen[-1], "", one_sided=False)
        return seen[-1]

    def _compare(self, a: Node, b: Node, name: str, one_sided: bool) -> None:
        """Note every key on which the run-level tables differ; one-sided: keys that only `b` has are fine."""
        if isinstance(a.value, dict) and isinstance(b.value, dict):
            for key in dict.fromkeys([*a.value, *b.value]):
                ours, theirs = a.value.get(key), b.value.get(key)
                if ours and theirs:
                    self._compare(ours, theirs, name or key, one_sided)
                elif ours:
                    self._differ(ours, None, b, name or key)
                elif theirs and not one_sided:
                    self._differ(theirs, None, a, name or key)
        elif a.plain() != b.plain():
            self._differ(b, a, a, name)

    def _differ(self, node: Node, other: Node | None, other_table: Node, section: str) -> None:
        value = f"{other.plain()!r} in {other.origin.where}" if other else f"not set in {_file(other_table.origin)}"
        remedy = f"write it in [phase.{section}]" if section in phase_sections() else "a run has one value"
        self.problems.add(node.origin, f"{node.plain()!r} here, {value}; {remedy}")

    def _complete(self, table: Node, run: Node, target: bool) -> Node:
        """A phase's table with its sections filled from the run's; overrides win over both."""
        if not isinstance(table.value, dict):
            return table
        table = self._with_mix(table)
        sections = {name: run.get(name) or Node({}, run.origin.child(name)) for name in phase_sections()}
        own = without_layout(table) if run.get("miniature") else table
        merged = dict(own.value)
        for name, section in sections.items():
            # the section keeps its own origin: a key missing from it is reported once, not once a phase
            if name in merged and isinstance(section.value, dict):
                section = Node(merge(section, merged[name]).value, section.origin)
            merged[name] = section
        complete = apply(Node(merged, table.origin), [o for o in self.on_run if o.path[0] in sections])
        return Node(self._finish((self._with_overrides(complete) if target else complete).value), table.origin)

    def _with_overrides(self, table: Node) -> Node:
        """A phase's table with `--phase.key=value` laid on it."""
        return apply(Node({"phase": self._with_mix(table)}, table.origin), self.on_phase).value["phase"]

    def _with_mix(self, table: Node) -> Node:
        """A phase's table in which the file that `mix` may name is read."""
        mix = table.get("mix")
        return Node({**table.value, "mix": self._read_mix(mix)}, table.origin) if mix else table

    def _read_mix(self, mix: Node) -> Node:
        if not isinstance(mix.value, str):
            return mix
        path = self._beside(mix)
        return read_mix(path, self.reader.label(path), mix.origin)

    def _finish(self, table: dict[str, Node]) -> dict[str, Node]:
        """`after` has done its work, and `lr` is a list."""
        after, start = table.get("after"), table.get("start_from")
        if after and after.value and start and start.value:
            self.problems.add(start.origin, "after is set too; allowed: only one of after and start_from")
        return {
            key: _segment_list(node) if key == "lr" else node
            for key, node in table.items()
            if key != "after" or not isinstance(node.value, str)
        }

    def _first_phase(self, tree: Node, earlier: int, total: int) -> int:
        node = tree.get("first_phase")
        if node is None:
            return earlier
        if tree.get("curriculum") is None or earlier:
            self.problems.add(node.origin, "only a file with its whole curriculum may set it; remove it")
        elif type(node.value) is not int or not 0 <= node.value < max(total, 1):
            self.problems.add(
                node.origin, f"found {found(node.plain())}; allowed: a whole number from 0 to {total - 1}"
            )
        else:
            return node.value
        return earlier


def _run_tables(tree: Node) -> Node:
    return Node({key: node for key, node in tree.value.items() if key not in _NOT_RUN_LEVEL}, tree.origin)


def _file(origin: Origin) -> str:
    return origin.where.rpartition(":")[0] or origin.where


def _segment_list(lr: Node) -> Node:
    """`lr` as a list of segments; the end of a constant segment is its start unless written."""
    segments = lr.value if isinstance(lr.value, list) else [lr]
    if not all(isinstance(segment.value, dict) for segment in segments):
        return lr
    return Node([_with_constant_end(segment) for segment in segments], lr.origin)


def _with_constant_end(segment: Node) -> Node:
    shape, start = segment.get("shape"), segment.get("from")
    if shape is None or shape.value != "constant" or start is None or "to" in segment.value:
        return segment
    return Node({**segment.value, "to": start}, segment.origin)
