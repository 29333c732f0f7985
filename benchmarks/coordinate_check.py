"""muP coordinate check: how far a few steps move a model's activations, by width (Yang et al., arXiv 2203.03466).

    python benchmarks/coordinate_check.py --plot docs/coordinate_check.png         some minutes of a CPU core

The trainer's decoder and optimizer at widths from 64 to 1,024, otherwise alike: 4 blocks, heads of 32, two query heads
to a key head, an MLP 2.5 times as wide, tied embeddings. All steps read one batch of made-up tokens (frequency as
1 / rank), at a constant learning rate. A point's change is the root mean square, over tokens and features, of its
value after the steps minus that at the start; its exponent is the slope of log(change) over log(width). It is 0 where
one learning rate moves every width alike, which is what muP is for. Of blocks, the last one is looked at.

Recipes; m is width / 64, eta the learning rate, s = 0.02:

    standard                 every matrix learns at eta; standard deviation s, of o and down s / sqrt(2 layers)
    muP                      matrices at eta / m, standard deviation / sqrt(m); logits / m; embedding times 10, residual
                             times 1.4 / sqrt(layers)
    logits not divided       the same with logits as they are: the table of YuLan-Mini (arXiv 2412.17743, table 3)
    YuLan-Mini               the same with WeSaR: raw matrices at s, scalars that learn at eta hold 1 / sqrt(m)
    WeSaR, rates corrected   logits / m; matrices and all scalars at eta / sqrt(m). Not published: it is here to show
                             where the exponents of YuLan-Mini come from

The raw standard deviation that YuLan-Mini publishes is 5e-5 (`--initializer-range 5e-5`): the first update is then far
larger than the start.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measuring import head, table
from titan_yulan.config.model import ModelConfig
from titan_yulan.config.sections import OptimizerSection
from titan_yulan.model import Decoder
from titan_yulan.model.attend import AttentionContext
from titan_yulan.model.initialise import initialise
from titan_yulan.model.observer import Observer
from titan_yulan.model.scale import Alpha, combine
from titan_yulan.optimizer.adamw import build_adamw, set_learning_rate

BASE_WIDTH = 64
WIDTHS = (64, 128, 256, 512, 1024)
LAYERS, HEAD_DIM = 4, 32
VOCABULARY = 1024
INITIALIZER_RANGE = 0.02
POINTS = ("embedding", "attention scores", "attention output", "MLP output", "residual stream", "logits")
_SHOWN_AS = {"embedding": "embedding", "attention_output": "attention output", "mlp_output": "MLP output"}


@dataclass(frozen=True)
class Recipe:
    """`model` has the fields that differ from YuLan-Mini's; `corrected`: rates that follow the scalars."""

    name: str
    model: Mapping[str, object]
    base_width: int = BASE_WIDTH
    corrected: bool = False


_MUP_INIT = {"wesar": False, "initialization": "cerebras", "initialization_base_width": BASE_WIDTH}
_STANDARD = {
    "wesar": False,
    "initialization": "cerebras",
    "output_init_divisor": math.sqrt(2 * LAYERS),
    "embedding_scale": 1.0,
    "residual_scale": 1.0,
}
RECIPES = (
    Recipe("standard", _STANDARD, base_width=0),
    Recipe("muP", {**_MUP_INIT, "logits_base_width": BASE_WIDTH}),
    Recipe("logits not divided", _MUP_INIT),
    Recipe("YuLan-Mini", {}),
    Recipe("WeSaR, rates corrected", {"logits_base_width": BASE_WIDTH}, corrected=True),
)


@dataclass(frozen=True)
class Size:
    """Root mean squares at one point: at the start, and of the change since then."""

    start: float
    change: float


@dataclass(frozen=True)
class Measured:
    recipe: str
    width: int
    seed: int
    sizes: Mapping[str, Size]


class Recorder(Observer):
    """Keeps the activations of one forward pass at POINTS, without the logits."""

    def __init__(self) -> None:
        self._layer = -1
        self.seen: dict[str, Tensor] = {}

    def enter(self, layer: int) -> None:
        self._layer = layer

    def see(self, point: str, x: Tensor, *factors: Alpha) -> None:
        if point == "stream" and self._layer == LAYERS:
            self.seen["residual stream"] = x
        elif point in _SHOWN_AS and self._layer in (-1, LAYERS - 1):
            self.seen[_SHOWN_AS[point]] = x / combine(factors, None)

    def see_attention(self, query: Tensor, key: Tensor, scale: float, context: AttentionContext) -> None:
        if self._layer == LAYERS - 1:
            keys = key.repeat_interleave(query.shape[2] // key.shape[2], dim=2)
            scores = scale * torch.einsum("bqhd,bkhd->bhqk", query, keys)
            rows, columns = torch.tril_indices(*scores.shape[2:])
            self.seen["attention scores"] = scores[..., rows, columns]


def model_config(recipe: Recipe, width: int, initializer_range: float = INITIALIZER_RANGE) -> ModelConfig:
    yulan_mini = ModelConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=5 * width // 2,
        num_hidden_layers=LAYERS,
        num_attention_heads=width // HEAD_DIM,
        num_key_value_heads=max(1, width // HEAD_DIM // 2),
        head_dim=HEAD_DIM,
        alpha_base_width=BASE_WIDTH,
        initializer_range=initializer_range,
        embedding_initializer_range=initializer_range,
    )
    return dataclasses.replace(yulan_mini, **recipe.model)  # type: ignore[arg-type]


def made_up_batch(rows: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """(rows, length) ids and the ids behind them."""
    weights = 1 / torch.arange(1, VOCABULARY + 1, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.multinomial(weights, rows * (length + 1), replacement=True, generator=generator)
    ids = ids.view(rows, length + 1)
    return ids[:, :-1], ids[:, 1:]


@torch.no_grad()
def activations(decoder: Decoder, ids: Tensor) -> dict[str, Tensor]:
    recorder, before = Recorder(), decoder.model.observer
    decoder.model.observer = recorder
    try:
        logits = decoder(ids)
    finally:
        decoder.model.observer = before
    return {**recorder.seen, "logits": logits}


def optimizer_of(decoder: Decoder, recipe: Recipe, learning_rate: float) -> torch.optim.AdamW:
    """The trainer's, at a constant rate."""
    section = OptimizerSection(learning_rate=learning_rate, base_width=recipe.base_width, eps=1e-15)
    optimizer = build_adamw(decoder, decoder.config, section)
    if recipe.corrected:
        names = {parameter: name for name, parameter in decoder.named_parameters()}
        for group in optimizer.param_groups:
            group_names = [names[parameter] for parameter in group["params"]]
            if all("_proj.weight" in name or name.endswith("_alpha") for name in group_names):
                group["multiplier"] = math.sqrt(BASE_WIDTH / decoder.config.hidden_size)
    set_learning_rate(optimizer, learning_rate)
    return optimizer


def measure(
    recipe: Recipe,
    width: int,
    seed: int,
    *,
    steps: int,
    learning_rate: float,
    shape: tuple[int, int],
    initializer_range: float = INITIALIZER_RANGE,
) -> Measured:
    """Train on one batch and compare. `shape`: rows and their length."""
    decoder = Decoder(model_config(recipe, width, initializer_range))
    initialise(decoder, seed)
    optimizer = optimizer_of(decoder, recipe, learning_rate)
    ids, targets = made_up_batch(*shape, seed)
    start = activations(decoder, ids)
    for _ in range(steps):
        functional.cross_entropy(decoder(ids).flatten(0, 1), targets.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    end = activations(decoder, ids)
    sizes = {
        point: Size(root_mean_square(start[point]), root_mean_square(end[point] - start[point])) for point in POINTS
    }
    return Measured(recipe.name, width, seed, sizes)


def root_mean_square(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def exponent(widths: Sequence[int], sizes: Sequence[float]) -> float:
    """Least-squares slope of log(size) over log(width)."""
    return statistics.linear_regression([math.log(w) for w in widths], [math.log(s) for s in sizes]).slope


def mean_by_width(found: Sequence[Measured], recipe: str, size: Callable[[Measured], float]) -> dict[int, float]:
    """Geometric means over the seeds."""
    mine = [one for one in found if one.recipe == recipe]
    return {
        width: statistics.geometric_mean(size(one) for one in mine if one.width == width)
        for width in sorted({one.width for one in mine})
    }


def report(found: Sequence[Measured], csv_file: Path | None) -> str:
    """Exponents, and the changes at the ends of the range of widths."""
    recipes = list(dict.fromkeys(one.recipe for one in found))
    lines: dict[str, list[list[str]]] = {"start": [], "change": [], "ends": []}
    for point in POINTS:
        cells: dict[str, list[str]] = {name: [point] for name in lines}
        for recipe in recipes:
            starts = mean_by_width(found, recipe, lambda one, at=point: one.sizes[at].start)
            changes = mean_by_width(found, recipe, lambda one, at=point: one.sizes[at].change)
            cells["start"].append(f"{exponent(list(starts), list(starts.values())):+.2f}")
            cells["change"].append(f"{exponent(list(changes), list(changes.values())):+.2f}")
            cells["ends"].append(f"{changes[min(changes)]:.3g} → {changes[max(changes)]:.3g}")
        for name, row in cells.items():
            lines[name].append(row)
    if csv_file is not None:
        raw = [
            [one.recipe, one.width, one.seed, point, size.start, size.change]
            for one in found
            for point, size in one.sizes.items()
        ]
        table(["recipe", "width", "seed", "point", "start", "change"], raw, csv_file)
    narrow, wide = min(one.width for one in found), max(one.width for one in found)
    return "\n\n".join(
        [
            "Exponent of the change over width:",
            table(["", *recipes], lines["change"]),
            f"Change at width {narrow} → {wide}:",
            table(["", *recipes], lines["ends"]),
            "Exponent of the size at the start:",
            table(["", *recipes], lines["start"]),
        ]
    )


def plot(found: Sequence[Measured], path: Path) -> None:
    """A panel for each point: change by width, a line for each recipe."""
    canvas = importlib.import_module("matplotlib.backends.backend_agg").FigureCanvasAgg
    figure = importlib.import_module("matplotlib.figure").Figure(figsize=(10, 5.6))
    recipes = list(dict.fromkeys(one.recipe for one in found))
    for axes, point in zip(figure.subplots(2, 3, sharex=True).flat, POINTS, strict=True):
        for recipe, marker in zip(recipes, "os^vD", strict=False):
            changes = mean_by_width(found, recipe, lambda one, at=point: one.sizes[at].change)
            axes.plot(list(changes), list(changes.values()), marker=marker, markersize=4, label=recipe)
        axes.set(title=point, xscale="log", yscale="log")
        axes.title.set_fontsize("medium")
        axes.grid(alpha=0.3)
        widths = sorted({one.width for one in found})
        axes.set_xticks(widths, [str(width) for width in widths])
        axes.minorticks_off()
    figure.supxlabel("width")
    figure.supylabel("RMS of the change since the start")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=len(labels), frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.94))
    figure.set_dpi(90)
    canvas(figure).print_png(str(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=4, help="default 4")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="eta, default 0.002")
    parser.add_argument("--initializer-range", type=float, default=INITIALIZER_RANGE, help="s, default 0.02")
    parser.add_argument("--rows", type=int, default=4, help="rows of 32 tokens in the batch, default 4")
    parser.add_argument("--seeds", type=int, default=4, help="of weights and batch, default 4")
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--csv", type=Path, help="append every measured size to this file")
    parser.add_argument("--plot", type=Path, help="also draw this PNG (needs matplotlib)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(head("torch"))
    found = [
        measure(
            recipe,
            width,
            seed,
            steps=options.steps,
            learning_rate=options.learning_rate,
            shape=(options.rows, 32),
            initializer_range=options.initializer_range,
        )
        for width in options.widths
        for recipe in RECIPES
        for seed in range(options.seeds)
    ]
    print(report(found, options.csv))
    if options.plot:
        plot(found, options.plot)


if __name__ == "__main__":
    main()
