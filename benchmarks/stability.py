"""Small runs at high learning rates with WeSaR, muP and QK LayerNorm on and off: do they stay stable?

    python benchmarks/stability.py --plot docs/stability.png            24 runs, eleven minutes of a CPU core
    python benchmarks/stability.py --rates 0.04 --folder outputs/stability     in parts: finished runs are only read

Every run goes through the trainer: the debug data (prepared if missing), 6 layers of 128 with heads of 32, 8 rows of 64
tokens a step, the same seed, so the same rows and the same random numbers; ten steps of warm-up, then a constant rate.
Losses and gradient norms are those of metrics.jsonl, the rest those of statistics.jsonl (docs/monitoring.md).

    none           matrices at eta, standard deviation 0.02, of o and down 0.02 / sqrt(2 layers)
    QK LayerNorm   a LayerNorm per head on queries and keys
    WeSaR          trained scalars on all matrices; without muP they start at 1, of o and down at 1 / sqrt(2 layers)
    muP            the column of YuLan-Mini (arXiv 2412.17743, table 3), from width 32: matrices learn at eta / 4 and
                   start with a quarter of the variance; embedding times 10, residual times 1.4 / sqrt(layers)

One eta is not one learning rate: muP's matrices learn at a quarter of it. So the rates are a factor of 4 apart, and a
run without muP is to be compared with those of muP at the same eta, and at four times as much.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measuring import ROOT, head, table
from titan_yulan import config as configuration
from titan_yulan.data.ensure import ensure_prepared
from titan_yulan.errors import RunError
from titan_yulan.monitor.metrics import read_lines, read_status
from titan_yulan.train import train

LAYERS, WIDTH, BASE_WIDTH = 6, 128, 32
RATES = (0.0025, 0.01, 0.04, 0.16)
PLOT_RATE = 0.04
WARM_UP = 10  # steps
SMOOTHING = 10  # steps whose mean is called the loss

JOB = """
extends = "{debug}"
[run]
name = "{name}"
output_dir = "{folder}"
seed = {seed}
[model]
hidden_size = {width}
intermediate_size = 320
num_hidden_layers = {layers}
num_attention_heads = 4
num_key_value_heads = 2
head_dim = 32
{model}
[batch]
global_batch_size = 8
micro_batch_size = 8
[optimizer]
learning_rate = {rate}
base_width = {base_width}
[checkpoint]
every = "{steps} steps"
[eval]
rows = 1
prompt = ""
[recovery]
spike = "off"
[monitor]
log_every = 20
tensorboard = false
statistics_every = 4
statistics_rows = 8
statistics_layers = 2
[[curriculum]]
name = "stable"
length = "{steps} steps"
sequence_length = 64
mix = {{ code = 0.5, math = 0.3, prose = 0.2 }}
lr = [{{ shape = "linear", from = 0.1, to = 1.0, over = "{warm_up} steps" }}, {{ shape = "constant" }}]
"""


@dataclass(frozen=True)
class Recipe:
    name: str
    wesar: bool = False
    mup: bool = False
    qk_layer_norm: bool = False

    def model_lines(self) -> str:
        """Keys of `[model]`."""
        lines = [f"wesar = {str(self.wesar).lower()}", f"qk_layer_norm = {str(self.qk_layer_norm).lower()}"]
        if self.wesar:
            lines += ['initialization = "wesar"', f"alpha_base_width = {BASE_WIDTH if self.mup else WIDTH}"]
        elif self.mup:
            lines += ['initialization = "cerebras"', f"initialization_base_width = {BASE_WIDTH}"]
        else:
            lines += ['initialization = "cerebras"', f"output_init_divisor = {math.sqrt(2 * LAYERS)}"]
        if not self.mup:
            lines += ["embedding_scale = 1.0", "residual_scale = 1.0"]
        return "\n".join(lines)


RECIPES = (
    Recipe("none"),
    Recipe("QK LayerNorm", qk_layer_norm=True),
    Recipe("WeSaR", wesar=True),
    Recipe("muP", mup=True),
    Recipe("WeSaR + muP (YuLan-Mini)", wesar=True, mup=True),
    Recipe("all three", wesar=True, mup=True, qk_layer_norm=True),
)


@dataclass(frozen=True)
class Run:
    """What one run recorded: values by step.

    ended: "" if it came to its end, else why it did not.
    hidden_rms: of the residual stream behind the last block.
    logsumexp: of attention in the last block, of the head that has the largest mean.
    """

    recipe: Recipe
    rate: float
    ended: str
    loss: dict[int, float]
    gradient_norm: dict[int, float]
    hidden_rms: dict[int, float]
    logsumexp: dict[int, float]


def job_file(recipe: Recipe, rate: float, steps: int, seed: int, folder: Path) -> Path:
    """The configuration of one run, in `folder`; its run folder will be there too, named as the file is."""
    name = f"{RECIPES.index(recipe)}-{rate}-{seed}"
    job = folder / f"{name}.toml"
    text = JOB.format(
        debug=ROOT / "train_configs/debug.toml",
        name=name,
        folder=folder,
        seed=seed,
        width=WIDTH,
        layers=LAYERS,
        model=recipe.model_lines(),
        rate=rate,
        base_width=BASE_WIDTH if recipe.mup else 0,
        steps=steps,
        warm_up=WARM_UP,
    )
    job.write_text(text, encoding="utf-8")
    return job


def run(recipe: Recipe, rate: float, steps: int, seed: int, folder: Path) -> Run:
    job = job_file(recipe, rate, steps, seed, folder)
    ended = ""
    if read_status(folder / job.stem).get("state") != "finished":
        config = configuration.load(job).config
        ensure_prepared(config, print)
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                train(config)
            except RunError as error:
                ended = str(error)
    return read(recipe, rate, ended, folder / job.stem)


def read(recipe: Recipe, rate: float, ended: str, folder: Path) -> Run:
    metrics = read_lines(folder / "metrics.jsonl")
    observed = {line["step"]: line["values"] for line in read_lines(folder / "statistics.jsonl")}
    last = f"layer_{LAYERS - 1:02d}"
    return Run(
        recipe,
        rate,
        ended,
        {line["step"]: line["loss"] for line in metrics if line["loss"] is not None},
        {line["step"]: line["gradient_norm"] for line in metrics if line["gradient_norm"] is not None},
        {step: values[f"hidden/mlp_residual/{last}/rms"] for step, values in observed.items()},
        {step: values[f"attention/logsumexp_max/{last}"] for step, values in observed.items()},
    )


def smooth(values: Mapping[int, float]) -> dict[int, float]:
    """Means of SMOOTHING steps (at the beginning, of those there are), by the last of them."""
    steps = list(values)
    return {
        step: statistics.fmean(values[before] for before in steps[max(0, index + 1 - SMOOTHING) : index + 1])
        for index, step in enumerate(steps)
    }


def cell(value: Callable[[list[float]], float], values: Mapping[int, float]) -> str:
    """A run that ended at once has no values."""
    return f"{value(list(values.values())):.3g}" if values else "-"


def report(runs: Sequence[Run], csv_file: Path | None) -> str:
    columns = [
        "eta",
        "recipe",
        "loss at the end",
        "gradient norm, median of the second half",
        "largest gradient norm",
        "hidden RMS, first",
        "hidden RMS, last",
        "log-sum-exp, first",
        "log-sum-exp, largest",
    ]
    lines = [
        [
            one.rate,
            one.recipe.name,
            cell(lambda values: values[-1], smooth(one.loss)) + (f" (ended: {one.ended})" if one.ended else ""),
            cell(lambda values: statistics.median(values[len(values) // 2 :]), one.gradient_norm),
            cell(max, one.gradient_norm),
            cell(lambda values: values[0], one.hidden_rms),
            cell(lambda values: values[-1], one.hidden_rms),
            cell(lambda values: values[0], one.logsumexp),
            cell(max, one.logsumexp),
        ]
        for one in runs
    ]
    return table(columns, lines, csv_file)


def plot(runs: Sequence[Run], rate: float, path: Path) -> None:
    """Four panels over the steps of the runs at `rate`."""
    canvas = importlib.import_module("matplotlib.backends.backend_agg").FigureCanvasAgg
    figure = importlib.import_module("matplotlib.figure").Figure(figsize=(10, 6.4))
    axes = list(figure.subplots(2, 2, sharex=True).flat)
    for one in (one for one in runs if one.rate == rate):
        curves = (smooth(one.loss), smooth(one.gradient_norm), one.hidden_rms, one.logsumexp)
        for panel, values in zip(axes, curves, strict=True):
            panel.plot(list(values), list(values.values()), label=one.recipe.name, linewidth=1.3)
    titles = (
        f"training loss, mean of {SMOOTHING} steps",
        f"gradient norm before clipping, mean of {SMOOTHING} steps",
        "RMS of the residual stream behind the last block",
        "attention log-sum-exp, last block, largest head",
    )
    for panel, title in zip(axes, titles, strict=True):
        panel.set_yscale("log")
        panel.set_title(title, fontsize="medium")
        panel.grid(alpha=0.3, which="both")
    for panel in axes[:2]:  # less than a decade each: a few labels between the powers of ten, as plain numbers
        panel.yaxis.set_minor_formatter("{x:g}")
        panel.tick_params(axis="y", which="minor", labelsize="small")
    figure.supxlabel("step")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=len(labels), frameon=False, fontsize="small")
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    figure.set_dpi(80)
    canvas(figure).print_png(str(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="values of eta")
    parser.add_argument("--steps", type=int, default=120, help="of every run, default 120")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--folder", type=Path, help="keep the run folders here; runs that are finished are only read")
    parser.add_argument("--csv", type=Path, help="append the table to this file")
    parser.add_argument("--plot", type=Path, help="also draw a PNG (needs matplotlib)")
    parser.add_argument("--plot-rate", type=float, default=PLOT_RATE, help="which of the rates to draw")
    options = parser.parse_args()
    if options.plot and options.plot_rate not in options.rates:
        parser.error(f"--plot-rate {options.plot_rate} is not among --rates")
    torch.set_num_threads(1)
    print(head("torch"))
    begin = time.process_time()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        cases = [(recipe, rate) for rate in options.rates for recipe in RECIPES]
        runs = [run(recipe, rate, options.steps, options.seed, folder) for recipe, rate in cases]
    print(report(runs, options.csv))
    print(f"\n{time.process_time() - begin:.0f} s of processor time")
    if options.plot:
        plot(runs, options.plot_rate, options.plot)


if __name__ == "__main__":
    main()
