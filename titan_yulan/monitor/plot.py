"""A picture of a run over its tokens: learning rate, loss of every source, mixture. Needs matplotlib."""

from __future__ import annotations

import bisect
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan_yulan.curriculum.adaptive import MIXTURE_LOG
from titan_yulan.errors import UserError
from titan_yulan.monitor.metrics import read_lines

_POINTS = 150  # of a curve; more steps are averaged
_SHOWN_SOURCES = 10  # those with the most tokens have curves and colours, the rest is one area of the mixture
_REST = "the rest"


@dataclass(frozen=True)
class Point:
    """Some neighbouring steps of one phase.

    tokens          trained after the last of them
    learning_rate   of the last of them
    source_tokens   targets of each source
    source_loss     mean cross-entropy of each source that occurs, nat per token
    """

    phase: str
    tokens: int
    learning_rate: float
    source_tokens: dict[str, int]
    source_loss: dict[str, float]


def gather(lines: Sequence[Mapping[str, Any]], points: int = _POINTS) -> list[Point]:
    """Lines of metrics.jsonl as about `points` points; none goes over the end of a phase."""
    size = max(1, len(lines) // points)
    gathered: list[Point] = []
    group: list[Mapping[str, Any]] = []
    for line in lines:
        if group and (len(group) == size or line["phase"] != group[0]["phase"]):
            gathered.append(_point(group))
            group = []
        group.append(line)
    return [*gathered, _point(group)] if group else gathered


def _point(lines: Sequence[Mapping[str, Any]]) -> Point:
    tokens: dict[str, int] = {}
    sums: dict[str, float] = {}
    finite: dict[str, int] = {}
    for line in lines:
        for name, count in line["source_tokens"].items():
            tokens[name] = tokens.get(name, 0) + count
            loss = line["source_loss"].get(name)
            if loss is not None:
                sums[name] = sums.get(name, 0.0) + loss * count
                finite[name] = finite.get(name, 0) + count
    losses = {name: total / finite[name] for name, total in sums.items()}
    return Point(lines[-1]["phase"], lines[-1]["tokens"], lines[-1]["learning_rate"], tokens, losses)


def plot(run: Path, output: Path | None = None) -> Path:
    """Draw a run.

    Args:
        run: run folder.
        output: file to write; its suffix is the format (.png, .svg, .pdf). None: curves.png in the run folder.

    Returns:
        the file.

    Raises:
        UserError: matplotlib is missing, the folder has no steps yet, or the suffix is no format.
    """
    try:
        figures = importlib.import_module("matplotlib.figure").Figure
    except ImportError:
        raise UserError("plot needs matplotlib: pip install 'titan-yulan[plot]'") from None
    steps = read_lines(run / "metrics.jsonl")
    if not steps:
        raise UserError(f"{run} has no metrics.jsonl with a step in it; name the folder of a run that has begun")
    output = output or run / "curves.png"
    figure = figures(figsize=(11, 8.5), layout="constrained")
    formats = figure.canvas.get_supported_filetypes()
    if output.suffix[1:].lower() not in formats:
        raise UserError(f"--output {output}: the suffix says the format; allowed: {', '.join(sorted(formats))}")
    points = gather(steps)
    rate, loss, mixture = figure.subplots(3, 1, sharex=True, height_ratios=(1, 2.2, 1.8))
    _draw_rate(rate, steps)
    colours = _draw_loss(loss, points, read_lines(run / "validation.jsonl"))
    _draw_mixture(mixture, points, colours, _adjusted(run, steps))
    _draw_phases((rate, loss, mixture), points)
    figure.suptitle(f"{run.resolve().name}: {steps[-1]['step']:,} steps, {steps[-1]['tokens']:,} tokens")
    figure.savefig(output, dpi=100)
    return output


def _adjusted(run: Path, steps: Sequence[Mapping[str, Any]]) -> list[int]:
    """Tokens at which an adaptive mixture was adjusted."""
    tokens = {line["step"]: line["tokens"] for line in steps}
    return [tokens[line["step"]] for line in read_lines(run / MIXTURE_LOG) if line["step"] in tokens]


def _draw_rate(axes: Any, steps: Sequence[Mapping[str, Any]]) -> None:
    axes.plot([line["tokens"] for line in steps], [line["learning_rate"] for line in steps], color="black")
    axes.set_ylabel("learning rate")
    axes.set_ylim(bottom=0)


def _sources(points: Sequence[Point]) -> list[str]:
    """All sources that were read, the largest first."""
    totals: dict[str, int] = {}
    for point in points:
        for name, count in point.source_tokens.items():
            totals[name] = totals.get(name, 0) + count
    return sorted((name for name, total in totals.items() if total), key=lambda name: -totals[name])


def _draw_loss(axes: Any, points: Sequence[Point], validations: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Lines for training, dots for validation; returns the colour of each source that is shown."""
    colours = {}
    for name in _sources(points)[:_SHOWN_SOURCES]:
        measured = [point for point in points if name in point.source_loss]
        tokens, losses = [point.tokens for point in measured], [point.source_loss[name] for point in measured]
        (line,) = axes.plot(tokens, losses, linewidth=1, alpha=0.7, label=name)
        colours[name] = line.get_color()
        held_out = [line for line in validations if name in line["validation_loss"]]
        tokens, losses = [v["tokens"] for v in held_out], [v["validation_loss"][name] for v in held_out]
        axes.plot(tokens, losses, "o", markersize=3, color=colours[name])
    axes.set_ylabel("loss of each source, nat per token\n(line: training, dots: validation)")
    axes.legend(loc="upper right", fontsize="small")
    # the first steps, at the logarithm of the vocabulary, would flatten all others
    later = [value for point in points[len(points) // 20 :] for value in point.source_loss.values()]
    if later:
        axes.set_ylim(min(later) - 0.1, max(later) + 0.1)
    return colours


def _draw_mixture(axes: Any, points: Sequence[Point], colours: Mapping[str, Any], adjusted: Sequence[int]) -> None:
    """Areas of the shares that were read; a triangle where an adaptive mixture was adjusted."""
    names = list(colours)
    has_rest = len(_sources(points)) > len(names)
    areas: list[list[float]] = [[] for _ in names]
    rest = []
    for point in points:
        total = sum(point.source_tokens.values()) or 1
        shares = [point.source_tokens.get(name, 0) / total for name in names]
        for area, share in zip(areas, shares, strict=True):
            area.append(share)
        rest.append(max(0.0, 1 - sum(shares)))
    areas += [rest] if has_rest else []
    palette = [*colours.values(), *(["lightgrey"] if has_rest else [])]
    labels = [*names, *([_REST] if has_rest else [])]
    axes.stackplot([point.tokens for point in points], areas, labels=labels, colors=palette, alpha=0.7)
    if adjusted:
        axes.plot(adjusted, [0.01] * len(adjusted), "^", color="black", markersize=4, label="adjusted")
        axes.legend(loc="upper right", fontsize="small")
    elif has_rest:
        axes.legend(loc="upper right", fontsize="small")
    axes.set_ylim(0, 1)
    axes.set_ylabel("mixture: share of tokens")
    axes.set_xlabel("tokens")
    axes.set_xlim(_first_token(points), points[-1].tokens)
    axes.xaxis.set_major_formatter(lambda value, _: _short(value))


def _draw_phases(panels: Sequence[Any], points: Sequence[Point]) -> None:
    """A line where each phase ends, and its name above, where there is room."""
    ends = {point.phase: point.tokens for point in points}
    begin = _first_token(points)
    room, written = (points[-1].tokens - begin) / 30, -points[-1].tokens
    top = panels[0]
    for name, end in ends.items():
        for axes in panels:
            axes.axvline(end, color="grey", linewidth=0.5)
        middle = (begin + end) / 2
        if middle - written >= room:
            top.annotate(
                name, (middle, 1.02), xycoords=("data", "axes fraction"), rotation=90, ha="center", fontsize="x-small"
            )
            written = middle
        begin = end


def _first_token(points: Sequence[Point]) -> int:
    """Where the run began: not at 0 if it goes on from another's checkpoint."""
    return max(0, points[0].tokens - sum(points[0].source_tokens.values()))


def _short(tokens: float) -> str:
    units = ("", "K", "M", "B", "T")
    place = max(0, bisect.bisect_right([1e3, 1e6, 1e9, 1e12], tokens))
    return f"{tokens / 1000**place:g}{units[place]}"
