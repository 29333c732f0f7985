"""Pictures of a fit. Needs matplotlib."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from titan_yulan.errors import UserError
from titan_yulan.scaling.answers import compute_optimal
from titan_yulan.scaling.forms import Law
from titan_yulan.scaling.runs import Run


def plot_fit(law: Law, runs: Sequence[Run], output: Path) -> None:
    """Measured losses and the law's curves over tokens, a colour for each size; and measured over fitted loss."""
    figure = _figure((11, 4.5))
    curves, spread = figure.subplots(1, 2)
    sizes = sorted({run.parameters for run in runs})
    for index, size in enumerate(sizes):
        colour = _colour(index, len(sizes))
        own = [run for run in runs if run.parameters == size]
        curves.plot([run.tokens for run in own], [run.loss for run in own], "o", color=colour, markersize=4)
        for unique in sorted({run.unique_tokens for run in own}):
            most = max(run.tokens for run in own if run.unique_tokens == unique)
            tokens = np.geomspace(min(run.tokens for run in own), max(most, 1.001 * unique), 60)
            curves.plot(tokens, law.loss(size, tokens, unique), color=colour, linewidth=1)
        curves.plot([], [], "o-", color=colour, label=f"{size:.3g} parameters")
    curves.set(xscale="log", xlabel="trained tokens, repeats counted", ylabel="validation loss, nat per token")
    curves.legend(fontsize="x-small")
    fitted = np.array([law.loss(run.parameters, run.tokens, run.unique_tokens) for run in runs])
    spread.plot(fitted, [run.loss for run in runs] / fitted - 1, "o", markersize=4)
    spread.axhline(0, color="grey", linewidth=0.5)
    spread.set(xlabel="fitted loss, nat per token", ylabel="measured / fitted loss - 1")
    _save(figure, output)


def plot_plan(laws: dict[str, Law], flops: Sequence[float], unique: float, output: Path) -> None:
    """The loss of each law at its best size, over compute, on so many unique tokens."""
    figure = _figure((7, 4.5))
    axes = figure.subplots()
    compute = np.geomspace(min(flops), max(flops), 60)
    for name, law in laws.items():
        axes.plot(compute, [compute_optimal(law, value, unique).loss for value in compute.tolist()], label=name)
    axes.set(
        xscale="log",
        xlabel="compute 6 N D, FLOPs",
        ylabel="loss at the best size, nat per token",
        title=f"{unique:.4g} unique tokens",
    )
    axes.legend()
    _save(figure, output)


def _figure(size: tuple[float, float]) -> Any:
    try:
        return importlib.import_module("matplotlib.figure").Figure(figsize=size, layout="constrained")
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install 'titan-yulan[plot]'") from None


def _colour(index: int, count: int) -> Any:
    return importlib.import_module("matplotlib").colormaps["viridis"](0.9 * index / max(1, count - 1))


def _save(figure: Any, output: Path) -> None:
    formats = figure.canvas.get_supported_filetypes()
    if output.suffix[1:].lower() not in formats:
        raise UserError(f"--plot {output}: the suffix says the format; allowed: {', '.join(sorted(formats))}")
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=110)
