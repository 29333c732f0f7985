"""Long records made short for a page: neighbouring records become one, and their extremes are kept."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_DIGITS = 7  # float32 holds no more
_KEPT_BINS = 1200  # of single steps; each keeps at most five, of a short run all
_FLAGGED = 1000  # steps with a remark that are kept besides


def each_line(path: Path) -> Iterator[dict[str, Any]]:
    """The complete lines of a JSON-lines file, one at a time: a long run's record may not fit into memory."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text)
            except ValueError:
                return
            yield line


def count_lines(path: Path) -> int:
    """Ends of lines in a file; 0 if there is none."""
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))


def validation_mean(line: Mapping[str, Any]) -> float | None:
    """Of a line of validation.jsonl: the mean over the tokens of all sources, which TensorBoard shows as `loss/val`;
    where an earlier version wrote the line, the mean of the sources. None: nothing was measured, or not finite."""
    known = [value for value in line["validation_loss"].values() if value is not None]
    return line.get("loss", sum(known) / len(known) if known else None)


def rounded(value: float | None) -> float | None:
    """Seven digits; None for what JSON cannot hold."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value


class Binned:
    """Means, least and greatest values of named numbers over neighbouring records.

    Args:
        size: records in a bin; none goes over a `boundary`.
    """

    def __init__(self, size: int) -> None:
        self.size = max(1, size)
        self.step: list[int] = []
        self.tokens: list[int] = []
        self.mean: dict[str, list[float | None]] = {}
        self.low: dict[str, list[float | None]] = {}
        self.high: dict[str, list[float | None]] = {}
        self._count, self._place, self._boundary = 0, (0, 0), ""
        self._open: dict[str, list[float]] = {}  # weighted sum, weight, least, greatest

    def add(
        self, step: int, tokens: int, values: Mapping[str, float | None], weights: Mapping[str, float], boundary: str
    ) -> None:
        """Take a record. What has no weight counts as 1; None and what is not finite is left out."""
        if self._count and (self._count == self.size or boundary != self._boundary):
            self._close()
        for name, value in values.items():
            if value is None or not math.isfinite(value):
                continue
            weight = weights.get(name, 1)
            if (known := self._open.get(name)) is None:
                self._open[name] = [value * weight, weight, value, value]
            else:
                known[0] += value * weight
                known[1] += weight
                known[2], known[3] = min(known[2], value), max(known[3], value)
        self._count, self._place, self._boundary = self._count + 1, (step, tokens), boundary

    def _close(self) -> None:
        done = len(self.step)
        for name, (total, weight, low, high) in self._open.items():
            for column, value in ((self.mean, total / weight if weight else None), (self.low, low), (self.high, high)):
                series = column.setdefault(name, [])
                series.extend([None] * (done - len(series)))
                series.append(rounded(value))
        self.step.append(self._place[0])
        self.tokens.append(self._place[1])
        self._count, self._open = 0, {}

    def finish(self) -> Binned:
        """End the last bin; every series then has a value or None for each."""
        if self._count:
            self._close()
        for column in (self.mean, self.low, self.high):
            for series in column.values():
                series.extend([None] * (len(self.step) - len(series)))
        return self


@dataclass
class PhaseSpan:
    """Where a phase lies: the steps and tokens before its first and at its last recorded step."""

    name: str
    first_step: int
    first_tokens: int
    last_step: int
    last_tokens: int


@dataclass
class Steps:
    """metrics.jsonl, made short.

    total      steps in the file
    kept       those drawn one by one, in order, with their `smooth` loss
    losses     cross-entropy per source, nat per token
    shares     of each source in the targets
    tokens_of  targets of every source in all steps
    flagged    steps with a remark: (step, tokens, remark)
    half_life  of the smoothing, in steps
    """

    total: int
    half_life: int
    losses: Binned
    shares: Binned
    kept: list[dict[str, Any]] = field(default_factory=list)
    phases: list[PhaseSpan] = field(default_factory=list)
    tokens_of: dict[str, int] = field(default_factory=dict)
    flagged: list[tuple[int, int, str]] = field(default_factory=list)


_COLUMNS = ("step", "tokens", "loss", "cross_entropy", "gradient_norm", "learning_rate")


def shorten_steps(lines: Iterable[Mapping[str, Any]], total: int, source_bins: int) -> Steps:
    """Read the steps once.

    Of single steps, every bin keeps its first and those with the least and greatest loss and gradient norm; the first
    and last of each phase and those with a remark (up to 1,000) are kept too. Sources are averaged.

    Args:
        total: how many lines there are, about.
        source_bins: points of each source's curve, about.
    """
    size = math.ceil(total / _KEPT_BINS) if total > 5 * _KEPT_BINS else 1
    half_life = max(5, total // 200)
    per_source = math.ceil(total / source_bins)
    steps = Steps(0, half_life, Binned(per_source), Binned(per_source))
    keep = _Keeper(size, half_life)
    for line in lines:
        steps.total += 1
        row = {name: line[name] for name in _COLUMNS}
        remark = line.get("skipped") or line.get("warning")
        if remark:
            steps.flagged.append((line["step"], line["tokens"], remark))
        _enter_phase(steps.phases, line)
        keep.add(row, line["phase"], bool(remark) and len(steps.flagged) <= _FLAGGED)
        _add_sources(steps, line)
    steps.kept = keep.finish()
    steps.losses.finish()
    steps.shares.finish()
    return steps


def _enter_phase(phases: list[PhaseSpan], line: Mapping[str, Any]) -> None:
    if not phases or phases[-1].name != line["phase"]:
        targets = sum(line["source_tokens"].values())
        begin = phases[-1].last_tokens if phases else max(0, line["tokens"] - targets)
        phases.append(PhaseSpan(line["phase"], line["step"] - 1, begin, line["step"], line["tokens"]))
    phases[-1].last_step, phases[-1].last_tokens = line["step"], line["tokens"]


def _add_sources(steps: Steps, line: Mapping[str, Any]) -> None:
    counts = line["source_tokens"]
    targets = sum(counts.values()) or 1
    for name, count in counts.items():
        steps.tokens_of[name] = steps.tokens_of.get(name, 0) + count
    place = line["step"], line["tokens"]
    steps.losses.add(*place, line["source_loss"], counts, line["phase"])
    steps.shares.add(*place, {name: count / targets for name, count in counts.items()}, {}, line["phase"])


class _Keeper:
    """Chooses single steps, and smooths the loss over all of them."""

    def __init__(self, size: int, half_life: int) -> None:
        self._size, self._decay = size, 0.5 ** (1 / half_life)
        self._average, self._weight = 0.0, 0.0
        self._kept: list[dict[str, Any]] = []
        self._bin: list[dict[str, Any]] = []
        self._always: set[int] = set()
        self._phase: str | None = None

    def add(self, row: dict[str, Any], phase: str, always: bool) -> None:
        if self._bin and (len(self._bin) == self._size or phase != self._phase):
            if phase != self._phase:
                self._always.add(self._bin[-1]["step"])
            self._choose()
        loss = row["loss"]
        if loss is not None and math.isfinite(loss):
            # an exponential mean that starts without a bias towards 0
            self._average = self._decay * self._average + (1 - self._decay) * loss
            self._weight = self._decay * self._weight + (1 - self._decay)
        row["smooth"] = self._average / self._weight if self._weight else None
        if always:
            self._always.add(row["step"])
        self._bin.append(row)
        self._phase = phase

    def _choose(self) -> None:
        chosen = {self._bin[0]["step"]} | self._always
        for name in ("loss", "gradient_norm"):
            finite = [row for row in self._bin if row[name] is not None and math.isfinite(row[name])]
            if finite:
                chosen.add(min(finite, key=lambda row: row[name])["step"])
                chosen.add(max(finite, key=lambda row: row[name])["step"])
        self._kept += [row for row in self._bin if row["step"] in chosen]
        self._bin, self._always = [], set()

    def finish(self) -> list[dict[str, Any]]:
        if self._bin:
            self._always.add(self._bin[-1]["step"])
            self._choose()
        return [{name: rounded(value) for name, value in row.items()} for row in self._kept]
