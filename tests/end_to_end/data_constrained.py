"""The data-constrained study in miniature (the time it takes on two idle cores: docs/data_constrained.md):

    python -m tests.end_to_end.data_constrained DIR [--only GLOB] [--section.key=value ...]

trains the runs of train_configs/data_constrained/mini_sweep.toml, two at a time: three sizes, one to many epochs of the
same few tokens and as many tokens without repetition, both objectives. Everything lies below DIR. Killed at any time,
the same command goes on; finished runs are left out. At the end: the table (`results.md`, `results.csv`), the curves
(`data_constrained.png`), and a law fitted to each objective (`fit_ar.json`, `fit_mdm.json`).
"""

from __future__ import annotations

import argparse
import csv
import importlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.end_to_end import harness
from titan_yulan.config.find import find
from titan_yulan.errors import UserError
from titan_yulan.monitor.best import mean_validation_losses
from titan_yulan.scaling.fit import Fit, fit
from titan_yulan.scaling.runs import Run, read_run
from titan_yulan.scaling.store import LEVEL, save_fit
from titan_yulan.sweep.expand import expand
from titan_yulan.sweep.local import run_all
from titan_yulan.sweep.runs import SweepRun, load_runs

SWEEP = "mini_sweep.toml"
AT_A_TIME = 2
KINDS = {"ar": "autoregressive", "mdm": "masked diffusion"}


@dataclass(frozen=True)
class Result:
    """A finished run; losses in nats per token, `best` the lowest of its validations, after `best_epochs`."""

    kind: str
    run: Run
    best: float
    best_epochs: float
    seconds: float

    @property
    def loss(self) -> float:
        return self.run.loss


def train(folder: Path, only: Sequence[str], keys: Sequence[str]) -> tuple[int, list[SweepRun]]:
    """Train what is not finished; the exit code, and all runs."""
    data = folder / "data"
    paths = [
        f"--tokenizer.path={data / 'tokenizer.tiktoken'}",
        f"--data.sources.prose.path={data / 'prose' / 'train'}",
        f"--data.sources.prose.validation_path={data / 'prose' / 'validation'}",
        f"--run.output_dir={folder / 'runs'}",
    ]
    os.environ.update({"NPROC": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    sweep = expand(Path(find(SWEEP, harness.ROOT)), harness.ROOT, [*keys, *paths])
    code = run_all(load_runs(sweep, only, check_data=True), AT_A_TIME)
    return code, load_runs(sweep, only)


def results(runs: Sequence[SweepRun]) -> list[Result]:
    """What the run folders say."""
    found = []
    for run in runs:
        read = read_run(run.folder)
        losses = mean_validation_losses(run.folder, run.config)
        best = min((step for step in losses if step), key=lambda step: losses[step])
        epochs = read.epochs * best / run.plan.end.step
        spent = sum(sum(line["seconds"].values()) for line in harness.read_lines(run.folder / "intervals.jsonl"))
        found.append(Result(run.name.partition("-")[0], read, losses[best], epochs, spent))
    return sorted(found, key=lambda result: (result.kind, result.run.parameters, result.run.epochs, result.run.tokens))


def table_lines(found: Sequence[Result]) -> Iterator[str]:
    """A table for people."""
    yield "| objective | parameters | unique tokens | epochs | last loss | lowest loss | after epochs | s |"
    yield "|---|---:|---:|---:|---:|---:|---:|---:|"
    for result in found:
        run = result.run
        yield (
            f"| {KINDS[result.kind]} | {run.parameters:,.0f} | {run.unique_tokens:,.0f} | {run.epochs:.0f} | "
            f"{result.loss:.3f} | {result.best:.3f} | {result.best_epochs:.1f} | {result.seconds:.0f} |"
        )


def write_csv(path: Path, found: Sequence[Result]) -> None:
    """A table for `titan-yulan scaling fit`, and for anything else."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "objective", "parameters", "tokens", "unique_tokens", "loss"])
        for result in found:
            run = result.run
            writer.writerow([run.name, KINDS[result.kind], run.parameters, run.tokens, run.unique_tokens, run.loss])


def without_overfitted(found: Sequence[Result]) -> list[Run]:
    """The runs that a law can describe: it falls with every epoch, so of the runs of one size on one number of unique
    tokens those with more epochs than the best one are left out."""
    kept = []
    for result in found:
        run = result.run
        same = [
            other.run
            for other in found
            if other.run.parameters == run.parameters and abs(other.run.unique_tokens / run.unique_tokens - 1) < 0.05
        ]
        if run.tokens <= min(same, key=lambda other: other.loss).tokens:
            kept.append(run)
    return kept


def fit_lines(kind: str, runs: list[Run], all_runs: int, output: Path) -> Iterator[str]:
    """Fit the data-constrained law, with one exponent for parameters and tokens, and say what came of it."""
    try:
        found: Fit = fit(runs, "data_constrained", tied=True)
    except UserError as error:
        yield f"{KINDS[kind]}: no law: {error}"
        return
    save_fit(output, found, runs)
    yield f"{KINDS[kind]}: law fitted to {len(runs)} of {all_runs} runs, {LEVEL:.0%} intervals"
    unsure = found.undetermined()
    for name, value in found.law.coefficients.items():
        low, high = found.interval(name, LEVEL)
        yield f"  {name:<4}{value:>12.5g}  [{low:.4g}, {high:.4g}]{'  not determined' if name in unsure else ''}"
    yield f"  measured / fitted loss: root mean square difference {float((found.residuals**2).mean() ** 0.5):.2%}"


def draw(found: Sequence[Result], output: Path) -> None:
    """Validation loss over epochs of the fewest unique tokens, a panel for each size; beside it, as a thin line, over
    as many tokens without repetition."""
    figure = importlib.import_module("matplotlib.figure").Figure(figsize=(11, 4), layout="constrained")
    sizes = sorted({result.run.parameters for result in found})
    least = min(result.run.unique_tokens for result in found)
    panels = figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
    for axes, size in zip(panels, sizes, strict=True):
        for kind, colour in (("ar", "tab:blue"), ("mdm", "tab:orange")):
            own = sorted(
                (r for r in found if (r.kind, r.run.parameters) == (kind, size)), key=lambda result: result.run.tokens
            )
            repeated = [result for result in own if result.run.unique_tokens < 1.05 * least]
            fresh = [result for result in own if result.run.epochs < 1.05]
            for chosen, style, text in ((repeated, "o-", "repeated"), (fresh, "x:", "all tokens fresh")):
                tokens = [result.run.tokens / least for result in chosen]
                label = f"{KINDS[kind]}, {text}"
                axes.plot(tokens, [result.loss for result in chosen], style, color=colour, label=label)
        axes.set(xscale="log", title=f"{size / 1e3:,.0f}k parameters", xlabel=f"tokens trained / {least:,.0f}")
        epochs = sorted({round(result.run.tokens / least) for result in own})
        axes.set_xticks(epochs, [str(number) for number in epochs])
        axes.minorticks_off()
    panels[0].set_ylabel("validation loss, nat per token\n(diffusion: its bound)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(output, dpi=110)


def main() -> int:
    """Train, then tell; returns the exit code of the sweep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--only", action="append", default=[], metavar="GLOB", help="only runs whose names match")
    options, keys = parser.parse_known_args()
    folder = options.folder.resolve()
    begin = time.perf_counter()
    code, runs = train(folder, options.only, keys)
    print(f"{time.perf_counter() - begin:.0f} s")
    if code:
        return code
    found = results(runs)
    lines = list(table_lines(found))
    for kind in KINDS:
        own = [result for result in found if result.kind == kind]
        lines += ["", *fit_lines(kind, without_overfitted(own), len(own), folder / f"fit_{kind}.json")]
    print("\n".join(lines))
    (folder / "results.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_csv(folder / "results.csv", found)
    draw(found, folder / "data_constrained.png")
    print(f"{folder / 'data_constrained.png'}: the curves")
    return 0


if __name__ == "__main__":
    sys.exit(main())
