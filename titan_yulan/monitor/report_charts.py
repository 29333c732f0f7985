"""The charts of the report page: which curves belong together, with their units. Drawn by report.js."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from titan_yulan.curriculum.adaptive import MIXTURE_LOG
from titan_yulan.monitor.report_series import Binned, Steps, count_lines, each_line, validation_mean

NUMBERS = 60_000  # of curves' points in one group of charts (sources, statistics): what bounds the size of the page
_MOST_BINS, _LEAST_BINS = 300, 40
_SHOWN = 8  # colours that people can tell apart; further curves are there but switched off
_LAYER = re.compile(r"layer_(\d+)")
_UNITS = {
    "tokens_per_s": "tokens/s",
    "logsumexp": "nat",
    "update": "RMS of update / RMS of weight",
    "gradient": "2-norm",
}


@dataclass
class Series:
    """One curve; its x values are those of a table.

    mark   line, raw (a pale line below another), points
    layer  (number, of how many) of a curve of a layer: its colour is a place on a scale
    low, high   least and greatest value in each bin, where bins hold more than one record
    """

    name: str
    table: str
    y: Sequence[float | None]
    color: int = 0
    mark: str = "line"
    layer: tuple[int, int] | None = None
    shown: bool = True
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None


@dataclass
class Chart:
    """kind: line or stack (areas that add up); log: whether the y axis begins logarithmic; wide: over the whole page;
    folded: shown on request."""

    id: str
    section: str
    title: str
    unit: str
    series: list[Series]
    kind: str = "line"
    log: bool = False
    wide: bool = False
    folded: bool = False
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        series = [{k: v for k, v in asdict(s).items() if v is not None} for s in self.series]
        return {**asdict(self), "series": series}


@dataclass
class Charts:
    """Charts, and the x values of their curves: `tables[name] = {"step": [...], "tokens": [...]}`."""

    tables: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    charts: list[Chart] = field(default_factory=list)

    def table(self, name: str, step: list[int], tokens: list[int]) -> str:
        self.tables[name] = {"step": step, "tokens": tokens}
        return name

    def binned(self, name: str, bins: Binned) -> str:
        return self.table(name, bins.step, bins.tokens)


def bins_for(names: int) -> int:
    """Points of each of so many curves, so that the page stays small."""
    return max(_LEAST_BINS, min(_MOST_BINS, NUMBERS // max(1, names)))


def draw(run: Path, steps: Steps) -> Charts:
    """All charts for which the run folder has values."""
    charts = Charts()
    validations = _read_binned(run / "validation.jsonl", lambda line: line["validation_loss"])
    means = _read_binned(run / "validation.jsonl", lambda line: {"mean": validation_mean(line)})
    _optimisation(charts, steps, means)
    if validations.step:
        charts.binned("validation", validations)
    _sources(charts, steps, validations)
    _mixture(charts, run, steps)
    _performance(charts, run)
    _statistics(charts, run)
    return charts


def order_of_sources(steps: Steps) -> list[str]:
    """Sources that were read, the largest first."""
    return sorted((name for name, n in steps.tokens_of.items() if n), key=lambda name: (-steps.tokens_of[name], name))


def _read_binned(path: Path, values_of: Any) -> Binned:
    first = next(each_line(path), None)
    names = len(values_of(first)) if first else 1
    bins = Binned(math.ceil(count_lines(path) / bins_for(names)))
    for line in each_line(path):
        bins.add(line["step"], line["tokens"], values_of(line), {}, "")
    return bins.finish()


def _curve(name: str, table: str, bins: Binned, key: str, **details: Any) -> Series:
    whole = bins.size == 1
    return Series(
        name,
        table,
        bins.mean[key],
        low=None if whole else bins.low[key],
        high=None if whole else bins.high[key],
        **details,
    )


def _means(bins: Binned, what: str, extremes: bool = True) -> str:
    if bins.size == 1:
        return ""
    return f"Means of up to {bins.size:,} {what}" + (
        "; pale, and in the read-out: least and greatest." if extremes else "."
    )


def _optimisation(charts: Charts, steps: Steps, means: Binned) -> None:
    kept = steps.kept
    table = charts.table("steps", [row["step"] for row in kept], [row["tokens"] for row in kept])
    column = {name: [row[name] for row in kept] for name in ("loss", "smooth", "gradient_norm", "learning_rate")}
    loss = [Series("each step", table, column["loss"], mark="raw")]
    loss.append(Series(f"smoothed (half-life {steps.half_life} steps)", table, column["smooth"]))
    if "mean" in means.mean:
        where = charts.binned("validation_mean", means)
        loss.append(Series("validation (all sources)", where, means.mean["mean"], color=1, mark="points"))
    charts.charts += [
        Chart(
            "loss", "Training", "Loss", "nat per token", loss, wide=True,
            note=_means(means, "validations", extremes=False),
        ),
        Chart(
            "learning_rate", "Training", "Learning rate", "", [Series("learning rate", table, column["learning_rate"])]
        ),
        Chart(
            "gradient_norm", "Training", "Gradient norm before clipping", "global 2-norm",
            [Series("gradient norm", table, column["gradient_norm"])], log=True,
        ),
    ]  # fmt: skip


def _sources(charts: Charts, steps: Steps, validations: Binned) -> None:
    names = order_of_sources(steps)
    where, shares = charts.binned("sources", steps.losses), charts.binned("shares", steps.shares)
    curves, areas = [], []
    for index, name in enumerate(names):
        shown = index < _SHOWN
        areas.append(Series(name, shares, steps.shares.mean[name], color=index, shown=shown))
        if name in steps.losses.mean:
            curves.append(_curve(name, where, steps.losses, name, color=index, shown=shown))
        if name in validations.mean:
            # one switch for both: report.js joins curves of one name
            curves.append(_curve(name, "validation", validations, name, color=index, mark="points", shown=shown))
    note = _means(steps.losses, "steps of one phase")
    shares_note = _means(steps.shares, "steps of one phase", extremes=False)
    told = f"Lines: training; dots: validation. {note}" if validations.mean else note
    charts.charts += [
        Chart("source_loss", "Sources", "Loss of each source", "nat per token", curves, note=told),
        Chart("mixture", "Sources", "Mixture that was read", "share of targets", areas, kind="stack", note=shares_note),
    ]


def _mixture(charts: Charts, run: Path, steps: Steps) -> None:
    """The controller's view of an adaptive mixture."""
    known = charts.tables["steps"]
    lines = list(each_line(run / MIXTURE_LOG))
    for key, title, unit in (
        ("shares", "Shares set by the adaptive mixture", "share"),
        ("perplexity", "Perplexity that moves the shares", "held-out perplexity"),
    ):
        bins = Binned(1)
        for line in lines:
            # the file has no tokens; in a phase they grow evenly, and its ends are always known
            tokens = round(np.interp(line["step"], known["step"], known["tokens"]))
            bins.add(line["step"], tokens, line[key], {}, "")
        bins.finish()
        names = [name for name in order_of_sources(steps) if name in bins.mean]
        if names:
            table = charts.binned(f"adaptive_{key}", bins)
            series = [
                Series(name, table, bins.mean[name], color=index, shown=index < _SHOWN)
                for index, name in enumerate(names)
            ]
            charts.charts.append(Chart(f"adaptive_{key}", "Sources", title, unit, series))


def _performance(charts: Charts, run: Path) -> None:
    """What intervals.jsonl holds: rates, memory, and where the time went."""
    path = run / "intervals.jsonl"
    size = math.ceil(count_lines(path) / _MOST_BINS)
    rates, memory, shares = Binned(size), Binned(size), Binned(size)
    for line in each_line(path):
        place, seconds = (line["step"], line["tokens"]), line["seconds"]
        wall = sum(seconds.values())
        rates.add(*place, {name: line.get(name) for name in ("tokens_per_s", "mfu_percent")}, {}, "")
        memory.add(*place, line.get("memory", {}), {}, "")
        parts = {name: spent / wall for name, spent in seconds.items()} if wall else {}
        shares.add(*place, parts, dict.fromkeys(parts, wall), "")
    for bins in (rates, memory, shares):
        bins.finish()
    if not rates.step:
        return
    table, note = charts.binned("intervals", rates), _means(rates, "intervals")
    for title, unit, bins, names in (
        ("Throughput without validation and checkpoints", "tokens/s", rates, ["tokens_per_s"]),
        ("Model FLOPs utilisation", "percent", rates, ["mfu_percent"]),
        ("Memory of the main rank", "GiB", memory, list(memory.mean)),
    ):
        series = [_curve(name, table, bins, name, color=i) for i, name in enumerate(names) if name in bins.mean]
        if series:
            charts.charts.append(Chart(f"intervals/{unit}", "Speed", title, unit, series, note=note))
    kinds = sorted(shares.mean, key=lambda name: (name != "compute", name))
    areas = [Series(name.replace("_", " "), table, shares.mean[name], color=i) for i, name in enumerate(kinds)]
    charts.charts.append(
        Chart(
            "intervals/shares",
            "Speed",
            "Where the time went",
            "share of wall time",
            areas,
            kind="stack",
            note=_means(shares, "intervals", extremes=False),
        )
    )


def group_of(tag: str) -> tuple[str, str, int | None]:
    """The chart of a TensorBoard tag, the name of its curve there, and its layer if it is of one."""
    if found := _LAYER.search(tag):
        parts = [part for part in tag.split("/") if not _LAYER.fullmatch(part)]
        return "/".join(parts), f"layer {int(found.group(1))}", int(found.group(1))
    head, _, last = tag.rpartition("/")
    return head or tag, last, None


def _statistics(charts: Charts, run: Path) -> None:
    path = run / "statistics.jsonl"
    bins = _read_binned(path, lambda line: line["values"])
    if not bins.step:
        return
    table = charts.binned("statistics", bins)
    groups: dict[str, list[tuple[str, str, int | None]]] = {}
    for tag in bins.mean:
        group, name, layer = group_of(tag)
        groups.setdefault(group, []).append((tag, name, layer))
    for group in sorted(groups, key=_importance):
        members = sorted(groups[group], key=lambda member: (member[2] is None, member[2] or 0, member[1]))
        numbers = sorted({member[2] for member in members if member[2] is not None})
        series = [
            _curve(
                name, table, bins, tag, color=index, shown=layer is not None or index < _SHOWN,
                layer=None if layer is None else (numbers.index(layer), len(numbers)),
            )
            for index, (tag, name, layer) in enumerate(members)
        ]  # fmt: skip
        charts.charts.append(
            Chart(
                f"statistics/{group}", "Stability", group, _unit(group), series, log=_is_positive(bins, members),
                folded=not _is_central(group), note=_means(bins, "records"),
            )
        )  # fmt: skip


def _is_positive(bins: Binned, members: Sequence[tuple[str, str, int | None]]) -> bool:
    """Whether a logarithmic axis can show all of it; logarithms already are none for a second one."""
    if any("logsumexp" in tag for tag, _, _ in members):
        return False
    return all(value is None or value > 0 for tag, _, _ in members for value in bins.low[tag])


def _is_central(group: str) -> bool:
    """What shows an instability first; the rest is folded."""
    head, *rest = group.split("/")
    if head == "hidden":
        residual = rest[0].endswith("_residual")
        return (rest[-1] == "variance" and residual) or (
            rest[-1] == "rms" and (residual or rest[0].endswith("_output"))
        )
    return head in ("update", "gradient", "attention")


def _importance(group: str) -> tuple[bool, str]:
    return not _is_central(group), group


def _unit(group: str) -> str:
    return next((unit for part, unit in _UNITS.items() if part in group), group.split("/")[-1])
