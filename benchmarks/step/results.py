"""The step benchmark's results: rows, Markdown, and a plot with a stacked bar for each row."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from titan_yulan.config.model import ModelConfig
from titan_yulan.kernels.bench_report import Machine
from titan_yulan.monitor.breakdown import CATEGORIES
from titan_yulan.monitor.flops import FORMULAS, flops_utilization

OURS = "ours"


@dataclass(frozen=True)
class Row:
    """One case. What was not measured is None; `status` says why ("measured" if nothing is missing)."""

    implementation: str
    layers: int
    sequence_length: int
    rows: int  # of a micro-batch
    micro_batches: int
    dtype: str
    recompute: str
    compiled: bool
    status: str
    ms: float | None = None  # median of the steps
    ms_min: float | None = None
    ms_p25: float | None = None
    ms_p75: float | None = None
    steps: int | None = None
    turns_ms: tuple[float, ...] = ()  # median of each turn
    processor_ms: float | None = None  # of the process, for one step; on a GPU what the host needs to launch it
    tokens_per_s: float | None = None
    first_step_s: float | None = None  # with compilation, if it was not done before
    peak_gib: float | None = None  # on a GPU of this implementation alone, on a CPU of the process
    profiled_ms: float | None = None
    communication_ms: float | None = None  # also behind computation
    parts: dict[str, float] = field(default_factory=dict)  # milliseconds of a profiled step by category

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.rows * self.sequence_length * self.micro_batches

    @property
    def place(self) -> tuple[object, ...]:
        """What rows that are compared with each other have in common."""
        return self.layers, self.sequence_length, self.rows, self.micro_batches, self.dtype, self.recompute


@dataclass(frozen=True)
class Setting:
    """What all rows share. `peak`: FLOP/s that MFU refers to, and `peak_is` where it comes from."""

    model: ModelConfig
    model_name: str
    peak: float
    peak_is: str
    peers: str
    machine: Machine

    def utilization(self, name: str, layers: int, sequence_length: int, tokens_per_second: float) -> float:
        """MFU by the formula `name` of the model with so many layers."""
        model = dataclasses.replace(self.model, num_hidden_layers=layers)
        per_token = FORMULAS[name].per_token(model, sequence_length)
        return flops_utilization(per_token, tokens_per_second, self.peak)


def extrapolate(points: Sequence[tuple[int, float]], layers: int) -> tuple[float, float, float] | None:
    """A straight line through (layers, value): what a layer adds, what is left without layers, and the value at
    `layers`. Least squares; None with fewer than two counts."""
    if len({count for count, _ in points}) < 2:
        return None
    center = sum(count for count, _ in points) / len(points)
    mean = sum(value for _, value in points) / len(points)
    spread = sum((count - center) ** 2 for count, _ in points)
    slope = sum((count - center) * (value - mean) for count, value in points) / spread
    rest = mean - slope * center
    return slope, rest, rest + slope * layers


def write(folder: Path, setting: Setting, rows: Sequence[Row]) -> list[Path]:
    """`step.csv` and `step.md`, written anew with all rows so far."""
    names = [item.name for item in dataclasses.fields(Row) if item.name != "parts"]
    shares = [f"mfu_{name}" for name in FORMULAS]
    machine = {**dataclasses.asdict(setting.machine), "model": setting.model_name, "peers": setting.peers}
    with open(folder / "step.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*names, *shares, *(f"ms {name}" for name in CATEGORIES), *machine])
        writer.writeheader()
        for row in rows:
            values = {name: getattr(row, name) for name in names} | {"turns_ms": " ".join(map(_number, row.turns_ms))}
            if row.tokens_per_s is not None:
                found = (setting.utilization(n, row.layers, row.sequence_length, row.tokens_per_s) for n in FORMULAS)
                values |= dict(zip(shares, found, strict=True))
            parts = {f"ms {name}": value for name, value in row.parts.items()}
            writer.writerow(
                {k: _number(v) if isinstance(v, float) else v for k, v in {**values, **parts}.items()} | machine
            )
    page = folder / "step.md"
    page.write_text(markdown(setting, rows), encoding="utf-8")
    return [folder / "step.csv", page]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    aligned = ["---" if i < 1 else "---:" for i in range(len(head))]
    return ["| " + " | ".join(cells) + " |" for cells in (head, aligned, *lines)]


def markdown(setting: Setting, rows: Sequence[Row]) -> str:
    machine = setting.machine
    text = [
        f"# Training step of {setting.model_name}",
        "",
        f"{machine.device}; torch {machine.torch}, triton {machine.triton}, {setting.peers}, driver {machine.driver}, "
        f"Python {machine.python}; commit {machine.commit}, {machine.time}. Copy {machine.copy_gigabytes_per_s} GB/s, "
        f"matrix product {machine.matrix_tflops} TFLOP/s. MFU refers to {setting.peak / 1e12:.4g} TFLOP/s "
        f"({setting.peak_is}).",
    ]
    for place in dict.fromkeys(row.place for row in rows):
        mine = [row for row in rows if row.place == place]
        layers, length, size, count, dtype, recompute = place
        text += [
            "",
            f"## {layers} layers, {count} x {size} rows of {length}, {dtype}, activation checkpoint {recompute}",
            "",
        ]
        text += [*_times(mine), "", *_shares(setting, mine), "", *_parts(mine)]
    text += _full(setting, rows)
    text += ["", *(f"- `{name}`: {formula.meaning}" for name, formula in FORMULAS.items()), ""]
    return "\n".join(text)


def label(row: Row) -> str:
    return row.implementation + (", compiled" if row.compiled else ", eager")


def ratio(row: Row, rows: Sequence[Row]) -> float | None:
    """Time over that of ours (compiled alike, where there is one): the median of the ratios of turns that followed each
    other, so that a machine which gets slower or faster meanwhile favours nobody."""
    ours = [other for other in rows if other.implementation == OURS and other.turns_ms]
    ours.sort(key=lambda other: other.compiled != row.compiled)
    if not ours or not row.turns_ms:
        return None
    return statistics.median(mine / theirs for mine, theirs in zip(row.turns_ms, ours[0].turns_ms, strict=False))


def _times(rows: Sequence[Row]) -> list[str]:
    lines = []
    for row in rows:
        if row.ms is None:
            lines.append([label(row), row.status, *[""] * 8])
            continue
        numbers = [row.ms, row.ms_min, row.ms_p25, row.ms_p75, row.tokens_per_s]
        rest = [ratio(row, rows), row.processor_ms, row.peak_gib, row.first_step_s]
        lines.append([label(row), *map(_number, [*numbers, *rest])])
    head = ["implementation", "ms", "min", "25 %", "75 %", "tokens/s", "time / ours"]
    head += ["processor ms", "peak GiB", "first step, s"]
    return _table(head, lines)


def _shares(setting: Setting, rows: Sequence[Row]) -> list[str]:
    lines = [
        [
            label(row),
            *(f"{setting.utilization(n, row.layers, row.sequence_length, row.tokens_per_s):.1%}" for n in FORMULAS),
        ]
        for row in rows
        if row.tokens_per_s is not None
    ]
    return _table(["MFU", *FORMULAS], lines)


def _parts(rows: Sequence[Row]) -> list[str]:
    lines = [
        [label(row), *map(_number, (row.profiled_ms, *(row.parts[name] for name in CATEGORIES), row.communication_ms))]
        for row in rows
        if row.parts
    ]
    return _table(["ms of a profiled step", "whole", *CATEGORIES, "communication"], lines) if lines else []


def _full(setting: Setting, rows: Sequence[Row]) -> list[str]:
    """Time per layer, and at the whole depth where that was not measured itself."""
    full, lines, bases = setting.model.num_hidden_layers, [], dict[object, float]()
    for key in dict.fromkeys((row.place[1:], row.implementation, row.compiled) for row in rows):
        mine = [row for row in rows if (row.place[1:], row.implementation, row.compiled) == key and row.ms is not None]
        found = extrapolate([(row.layers, row.ms or 0.0) for row in mine], full)
        if found is None or any(row.layers == full for row in mine):
            continue
        first, counts = mine[0], ", ".join(str(row.layers) for row in mine)
        case = (
            f"{label(first)}, {first.micro_batches} x {first.rows} rows of {first.sequence_length}, {first.recompute}"
        )
        each, rest, whole = found
        if each <= 0:
            lines.append([case, counts, "not above 0: noise", *[""] * (4 + len(FORMULAS))])
            continue
        if first.implementation == OURS:
            bases[first.place[1:], first.compiled] = whole
        alike = (bases.get((first.place[1:], compiled)) for compiled in (first.compiled, not first.compiled))
        base, rate = next(filter(None, alike), None), first.tokens / whole * 1e3
        over = "" if base is None else _number(whole / base)
        shares = (f"{setting.utilization(n, full, first.sequence_length, rate):.1%}" for n in FORMULAS)
        lines.append([case, counts, *map(_number, (each, rest, whole, rate)), over, *shares])
    if not lines:
        return []
    head = ["case", "layers", "ms a layer", "ms without", f"ms at {full}", "tokens/s", "time / ours", *FORMULAS]
    text = "A straight line through the layer counts; not measured at that depth."
    return ["", f"## Extrapolated to {full} layers", "", text, "", *_table(head, lines)]


def plot(folder: Path, setting: Setting, rows: Sequence[Row]) -> list[Path]:
    """`step.png`: a stacked bar of the profiled step for each row. None without matplotlib, which is said."""
    try:
        canvas = importlib.import_module("matplotlib.backends.backend_agg").FigureCanvasAgg
        figures = importlib.import_module("matplotlib.figure").Figure
    except ImportError:
        print("no plot: matplotlib is not installed")
        return []
    shown = [row for row in rows if row.parts]
    figure = figures(figsize=(max(6.0, 1.5 * len(shown) + 3), 5))
    axes = figure.add_subplot()
    bottom = [0.0] * len(shown)
    for name in CATEGORIES:
        heights = [row.parts[name] for row in shown]
        axes.bar(range(len(shown)), heights, 0.7, bottom=bottom, label=name)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    names = [f"{label(row)}\n{row.layers} layers, {row.recompute}" for row in shown]
    axes.set_xticks(range(len(shown)), names, fontsize="small")
    axes.set_ylabel("ms of a profiled step")
    axes.set_title(f"{setting.model_name}, {setting.machine.device}")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    path = folder / "step.png"
    canvas(figure).print_png(str(path))
    return [path]
