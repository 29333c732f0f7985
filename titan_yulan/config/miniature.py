"""`[miniature]`: a whole curriculum at a size that a laptop trains, on the sources of the file that says so.

The phases stay as many as they are, in their order and proportions. Whatever a phase says is made smaller by three
divisors; its mix is summed by the domains of its sources, and each domain becomes one source of the file. What comes
out is an ordinary configuration: nothing behind loading knows that it was ever larger.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

from titan_yulan.config.adaptive import NO_GROUP, adaptive_groups
from titan_yulan.config.bind import Binder, nearest
from titan_yulan.config.read import KeyPath, Node, quoted_key
from titan_yulan.config.sections import (
    AdaptiveSection,
    BatchSection,
    LearningRateSegment,
    MiniatureSection,
    PhaseSection,
    RunConfig,
)
from titan_yulan.config.values import Duration, Tokens, amount

MINIMUM_ROWS = 200  # of a phase: with fewer, shares of a few per cent are rounded away

# What a phase says about the machine that it was written for; the miniature's machine is another.
_LAYOUT = ("parallel", "activation_checkpoint")


def without_layout(phase: Node) -> Node:
    """A phase's own table without its layout and micro-batch, so that those of the run hold."""
    table = {key: node for key, node in phase.value.items() if key not in _LAYOUT}
    batch = table.get("batch")
    if batch and isinstance(batch.value, dict):
        kept = {key: node for key, node in batch.value.items() if key != "micro_batch_size"}
        table["batch"] = Node(kept, batch.origin)
    return Node(table, phase.origin)


def make_small(config: RunConfig, section: MiniatureSection, binder: Binder) -> RunConfig:
    """The configuration made smaller; whatever hinders is noted in `binder.problems`.

    Args:
        config: bound without problems, its phases' layouts as `without_layout` leaves them.
        section: bound by `binder` as `("miniature",)`.
    """
    return _Miniature(config, section, binder).make()


class _Miniature:
    def __init__(self, config: RunConfig, section: MiniatureSection, binder: Binder) -> None:
        self.config, self.section, self.binder = config, section, binder
        rows = section.batch_divisor * section.steps_divisor
        self.divisors = {"steps": section.steps_divisor, "rows": rows, "tokens": rows * section.sequence_length_divisor}
        self.targets = self._targets()

    def refuse(self, path: KeyPath, text: str) -> None:
        self.binder.problems.add(self.binder.at(("miniature", *path)), text)

    def make(self) -> RunConfig:
        self._check_divisors()
        if self.binder.problems:
            return self.config
        kept = set(self.targets.values())
        sources = {name: source for name, source in self.config.data.sources.items() if name in kept}
        data = replace(self.config.data, sources=sources)
        phases = tuple(self._phase(phase, index) for index, phase in enumerate(self.config.phases))
        small = replace(self.config, data=data, phases=phases)
        self._check_rows(small.phases)
        return small

    # --- domains ---

    def _targets(self) -> dict[str, str]:
        """Source of a mix -> the source that takes its place."""
        sources, domains = self.config.data.sources, self.section.domains
        known = dict.fromkeys(source.domain for source in sources.values() if source.domain)
        for domain, target in domains.items():
            if target not in sources:
                hint = nearest(target, sources) or "; write the name of one of them"
                self.refuse(("domains", domain), f"no table [data.sources] has the name {target!r}{hint}")
            if domain not in known:
                self.refuse(("domains", domain), f"no source has this domain{nearest(domain, known)}; remove it")
        targets, without_target = {}, dict[str, list[str]]()
        for index, name in self._mixed():
            if name not in sources:
                hint = nearest(name, sources) or "; add it there"
                self._refuse_at(("phases", index, "mix", name), f"no table [data.sources] has this name{hint}")
            elif not sources[name].domain:
                self._refuse_at(("data", "sources", name, "domain"), "missing; required by [miniature]")
            elif sources[name].domain in domains:
                targets[name] = domains[sources[name].domain]
            else:
                without_target.setdefault(sources[name].domain, []).append(name)
        for domain, names in without_target.items():
            self.refuse(("domains", domain), f"missing; it is the domain of {_some(names)}; write a source for it")
        return targets

    def _mixed(self) -> Iterable[tuple[int, str]]:
        """Every source of a mix once, with the first phase that has it."""
        first = {}
        for index, phase in enumerate(self.config.phases):
            for name in phase.mix:
                first.setdefault(name, index)
        return [(index, name) for name, index in first.items()]

    def _refuse_at(self, path: KeyPath, text: str) -> None:
        self.binder.problems.add(self.binder.at(path), text)

    def _mix(self, mix: dict[str, float | Tokens], path: KeyPath) -> dict[str, float | Tokens]:
        kinds = {type(value) for value in mix.values()}
        if kinds == {Tokens, float}:
            self._refuse_at(path, "holds weights and amounts of tokens; write all as weights or all as amounts")
            return mix
        sums: dict[str, float] = {}
        for name, value in mix.items():
            target = self.targets[name]
            sums[target] = sums.get(target, 0.0) + amount(value)
            origin = self.binder.at(("miniature", "domains", self.config.data.sources[name].domain))
            self.binder.places.setdefault((*path, target), origin)
        if kinds == {float}:
            return {name: float(f"{value:.12g}") for name, value in sums.items()}  # 0.1 + 0.2 is 0.3
        return {name: Tokens(_at_least_one(value / self.divisors["tokens"])) for name, value in sums.items()}

    def _adaptive(self, phase: PhaseSection, path: KeyPath) -> AdaptiveSection:
        """Weights and groups follow the sources; a source has one weight."""
        section = phase.adaptive
        if section.every is None:
            return AdaptiveSection()
        weights: dict[str, float] = {}
        for name in phase.mix:
            weight, target = section.weights.get(name, 1.0), self.targets[name]
            if weights.setdefault(target, weight) != weight:
                text = f"{weight} for {name}, but {weights[target]} for another that {target!r} stands for"
                self._refuse_at((*path, "weights"), f"{text}; a source of a miniature has one weight")
        groups = {
            group: tuple(dict.fromkeys(self.targets[name] for name in members))
            for group, members in adaptive_groups(section, phase.mix).items()
        }
        if section.groups and not groups:
            self._refuse_at((*path, "groups"), NO_GROUP)  # no groups would mean one of all sources
        groups = groups if section.groups else {}
        return replace(section, every=self._duration(section.every), weights=weights, groups=groups)

    # --- sizes ---

    def _phase(self, phase: PhaseSection, index: int) -> PhaseSection:
        return replace(
            phase,
            sequence_length=phase.sequence_length // self.section.sequence_length_divisor,
            length=self._duration(phase.length),
            lr=tuple(self._segment(segment) for segment in phase.lr),
            batch=self._batch(phase),
            mix=self._mix(phase.mix, ("phases", index, "mix")),
            adaptive=self._adaptive(phase, ("phases", index, "adaptive")),
        )

    def _duration(self, duration: Duration | None) -> Duration | None:
        if duration is None or duration.unit == "share":
            return duration
        return Duration(_at_least_one(duration.value / self.divisors[duration.unit]), duration.unit)

    def _segment(self, segment: LearningRateSegment) -> LearningRateSegment:
        return replace(segment, over=self._duration(segment.over), hold_at=self._duration(segment.hold_at))

    def _batch(self, phase: PhaseSection) -> BatchSection:
        """Micro-batches have the rows that the file says in the first phase, and as many tokens in all others."""
        size = phase.batch.global_batch_size
        rows = phase.batch.rows(phase.sequence_length) // self.section.batch_divisor
        micro = phase.batch.micro_batch_size * self.config.phases[0].sequence_length // phase.sequence_length
        if isinstance(size, Tokens):
            size = Tokens(size.value / (self.section.batch_divisor * self.section.sequence_length_divisor))
        else:
            size = rows
        return BatchSection(global_batch_size=size, micro_batch_size=max(1, min(micro, rows)))

    def _check_divisors(self) -> None:
        """Rows and batches must stay whole, or the phases would no longer be in proportion."""
        phases = self.config.phases
        values = {
            "sequence_length": {phase.sequence_length: phase.name for phase in reversed(phases)},
            "batch": {phase.batch.rows(phase.sequence_length): phase.name for phase in reversed(phases)},
        }
        for key, numbers in values.items():
            divisor = getattr(self.section, f"{key}_divisor")
            wrong = [f"{number} of {name}" for number, name in numbers.items() if number % divisor]
            if wrong:
                what = "sequence_length" if key == "sequence_length" else "the global batch in rows"
                remedy = f"choose a divisor of {math.gcd(*numbers)}"
                self.refuse((f"{key}_divisor",), f"{divisor} does not divide {what}, {_some(wrong[::-1])}; {remedy}")

    def _check_rows(self, phases: Iterable[PhaseSection]) -> None:
        short = []
        for small in phases:
            rows = _phase_rows(small)
            if rows is not None and rows < MINIMUM_ROWS:
                short.append((rows, small.name))
        if short:
            largest = int(self.section.steps_divisor * min(short)[0] / MINIMUM_ROWS)
            named = _some([f"{name} ({rows})" for rows, name in short])
            remedy = f"lower it to about {largest}" if largest else "lower batch_divisor"
            self.refuse(("steps_divisor",), f"leaves fewer than {MINIMUM_ROWS} rows to {named}; {remedy}")


def _at_least_one(value: float) -> float:
    return float(max(1, round(value)))


def _phase_rows(phase: PhaseSection) -> int | None:
    """Rows of a phase, if its length can be told; whole batches, as the plan has them."""
    batch, length = phase.batch.rows(phase.sequence_length), phase.length
    if length is None:
        amounts = [value.value for value in phase.mix.values() if isinstance(value, Tokens)]
        length = Duration(sum(amounts), "tokens") if amounts else None
    if length is None or length.unit == "share":
        return None
    rows = {"steps": length.value * batch, "rows": length.value, "tokens": length.value / phase.sequence_length}
    return int(rows[length.unit] // batch) * batch


def _some(names: list[str]) -> str:
    """The first names of a list, in words."""
    shown = ", ".join(quoted_key(name) if " " not in name else name for name in names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"
