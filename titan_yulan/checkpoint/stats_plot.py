"""A picture of `checkpoint stats`. Needs matplotlib."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from titan_yulan.checkpoint.stats import COLUMNS, TensorStats, by_kind, known
from titan_yulan.errors import UserError


def plot_stats(measured: Sequence[TensorStats], output: Path) -> None:
    """Draw every quantity of the table for the matrices and the scalars: left the mean of the layers over the series
    with a band from least to greatest, right the layers of the last checkpoint.

    The series is drawn over tokens; where they do not grow (checkpoints of several runs), over the places in it.

    Args:
        measured: what `stats.measure` gives.
        output: file to write; its suffix is the format (.png, .svg, .pdf).

    Raises:
        UserError: matplotlib is missing, or the suffix is no format.
    """
    try:
        figures = importlib.import_module("matplotlib.figure").Figure
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install 'titan-yulan[plot]'") from None
    figure = figures(figsize=(12, 3 * len(COLUMNS)), layout="constrained")
    formats = figure.canvas.get_supported_filetypes()
    if output.suffix[1:].lower() not in formats:
        raise UserError(f"--plot {output}: the suffix says the format; allowed: {', '.join(sorted(formats))}")
    kinds = {kind: places for kind, places in by_kind(measured).items() if _is_shown(kind)}
    tokens = {line.place: line.tokens for line in measured}
    grows = all(one < other for one, other in pairwise(tokens.values()))
    axis = tokens if grows else {place: place for place in tokens}
    panels = figure.subplots(len(COLUMNS), 2, sharex="col")
    for (series, layers), (key, label) in zip(panels, COLUMNS.items(), strict=True):
        for number, (kind, places) in enumerate(kinds.items()):
            style = {"color": f"C{number}", "linestyle": ("-", "--", ":")[number // 10 % 3], "label": kind}
            _draw_series(series, axis, places, key, style)
            _draw_layers(layers, places.get(max(tokens), []), key, style)
        series.set_ylabel(label)
    panels[0][0].set_title("mean of the layers, least to greatest")
    panels[0][1].set_title(f"the layers of checkpoint {max(tokens)}")
    panels[-1][0].set_xlabel("tokens" if grows else "checkpoint")
    panels[-1][1].set_xlabel("layer")
    panels[-1][1].xaxis.get_major_locator().set_params(integer=True)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    figure.savefig(output, dpi=100)


def _is_shown(kind: str) -> bool:
    """Matrices; their scalars are in a row of their own, and norms are not drawn."""
    return kind.endswith(".weight") and "norm" not in kind


def _draw_series(
    axes: Any, axis: dict[int, int], places: dict[int, list[TensorStats]], key: str, style: dict[str, Any]
) -> None:
    found = {place: known(getattr(line, key) for line in lines) for place, lines in places.items()}
    found = {place: values for place, values in found.items() if values}
    x = [axis[place] for place in found]
    axes.plot(x, [sum(values) / len(values) for values in found.values()], marker=".", **style)
    least, greatest = [min(values) for values in found.values()], [max(values) for values in found.values()]
    axes.fill_between(x, least, greatest, color=style["color"], alpha=0.1, linewidth=0)


def _draw_layers(axes: Any, lines: Sequence[TensorStats], key: str, style: dict[str, Any]) -> None:
    points = [(line.layer, getattr(line, key)) for line in lines if line.layer is not None]
    points = [(layer, value) for layer, value in points if value is not None]
    if points:
        axes.plot(*zip(*points, strict=True), marker=".", **style)
