"""Time the real training step of ours beside two peers: a plain Llama as torchtitan trains it, and Hugging Face's.

    python benchmarks/train_step.py                                                          the debug model (on a CPU)
    python benchmarks/train_step.py --model yulan_mini_2b --seq-len 4096 --micro-batch 2 --layers 8,16 --compile on
        --impl ours,reference,hf_liger --activation-checkpoint none,selective --out DIR --plot

The step is forward, backward, clipping and update of `--micro-batches` micro-batches; data are made-up rows that lie on
the device. After a warm-up, implementations take turns of a few steps in one process, so that a change of the machine's
speed meets all of them; with `--alternate` only one of them is in memory at a time, built anew for each turn. A few
more steps run under the profiler for the breakdown. Results are written after each turn.

    ours                the trainer's step: Triton kernels on a GPU, z-loss, guard, fingerprints
    ours_without_wesar  the same without trained scalars
    reference           PyTorch's operators alone (benchmarks/step/plain_llama.py)
    reference_foreach   the same with AdamW's foreach implementation
    hf_liger            transformers with liger-kernel, always eager (benchmarks/step/hugging_face.py); on a CPU, where
                        Liger's kernels do not run, transformers alone
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import re
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.step import hugging_face, measure, results
from benchmarks.step.hugging_face import HuggingFaceTraining
from benchmarks.step.ours import OurTraining, run_config, without_wesar
from benchmarks.step.plain_llama import PlainTraining
from benchmarks.step.results import Row, Setting
from titan_yulan.config.model import ModelConfig
from titan_yulan.config.presets import PRESETS
from titan_yulan.kernels.bench_measure import copy_rate, matrix_rate
from titan_yulan.kernels.bench_report import describe_machine
from titan_yulan.monitor.breakdown import Sizes
from titan_yulan.monitor.flops import device_peak
from titan_yulan.parallel import process
from titan_yulan.parallel.process import World

IMPLEMENTATIONS = ("ours", "ours_without_wesar", "reference", "reference_foreach", "hf_liger")
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


@dataclass
class Run:
    """One implementation in one case, and what was measured of it so far."""

    row: Row
    training: measure.Training | None = None
    turns: list[measure.Turn] = field(default_factory=list)
    failed: bool = False
    state: int = 0  # bytes of weights, moments and buffers on a GPU

    def drop(self) -> None:
        self.training = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class Bench:
    """Measures what the command line asks for."""

    def __init__(self, options: argparse.Namespace, world: World, setting: Setting, start: float) -> None:
        self._options, self._world, self._setting = options, world, setting
        self._end = start + options.budget_s
        self._mesh = init_device_mesh(world.device.type, (1,))

    def rows(self) -> Iterator[tuple[list[Row], bool]]:
        """Case by case, the fewest layers first: its rows after each turn, and whether it is done."""
        options = self._options
        for layers in options.layers:
            for recompute in options.activation_checkpoint:
                runs = [
                    Run(self._row(name, layers, recompute, compiled))
                    for name in options.impl
                    for compiled in ((False,) if name == "hf_liger" else options.compile)
                ]
                for _ in self._turns(runs):
                    yield [run.row for run in runs], False
                yield [run.row for run in runs], True
                for run in runs:
                    run.drop()

    def _row(self, name: str, layers: int, recompute: str, compiled: bool) -> Row:
        options = self._options
        return Row(
            name,
            layers,
            options.seq_len,
            options.micro_batch,
            options.micro_batches,
            DTYPES[options.dtype],
            recompute,
            compiled,
            "not measured",
        )

    def _turns(self, runs: list[Run]) -> Iterator[Run]:
        """Each run whose turn is over, round after round; the order is reversed in every second round."""
        options = self._options
        for turn in range(options.rounds):
            for run in runs if turn % 2 == 0 else reversed(runs):
                if run.failed:
                    continue
                try:
                    if time.monotonic() > self._end:
                        raise TimeoutError(f"not measured: the budget of {options.budget_s:.0f} s was spent")
                    self._take_turn(run, last=turn == options.rounds - 1)
                except Exception as problem:  # a peer that fails must not end the run; what failed is in the table
                    run.failed = True
                    if not run.turns:
                        run.row = dataclasses.replace(run.row, status=_reason(problem))
                    print(f"{results.label(run.row)}: {_reason(problem)}", flush=True)
                    run.drop()
                if options.alternate:
                    run.drop()
                yield run

    def _take_turn(self, run: Run, last: bool) -> None:
        options, device = self._options, self._world.device
        batches = self._batches()
        if run.training is None:
            before = measure.allocated(device)
            run.training = self._build(run.row)
            first = measure.warm_up(run.training, batches, options.warmup, device)
            run.state = measure.allocated(device) - before
            if run.row.first_step_s is None:
                run.row = dataclasses.replace(run.row, first_step_s=first)
        memory, others = measure.PeakMemory(device), measure.allocated(device) - run.state
        steps = -(-options.steps // options.rounds)
        run.turns.append(measure.take_turn(run.training, batches, steps, device))
        run.row = self._timed(run, (memory.bytes() - others) / 2**30)
        if last and options.profile_steps:
            run.row = self._profiled(run, batches)
        print(f"{run.row.layers} layers, {results.label(run.row)}: {run.row.ms:.2f} ms", flush=True)

    def _timed(self, run: Run, peak: float) -> Row:
        seconds = [second for turn in run.turns for second in turn.seconds]
        least, low, median, high = measure.quartiles(seconds)
        return dataclasses.replace(
            run.row,
            status="measured",
            ms=1e3 * median,
            ms_min=1e3 * least,
            ms_p25=1e3 * low,
            ms_p75=1e3 * high,
            steps=len(seconds),
            turns_ms=tuple(1e3 * measure.quartiles(turn.seconds)[2] for turn in run.turns),
            processor_ms=1e3 * measure.quartiles([turn.processor for turn in run.turns])[2],
            tokens_per_s=run.row.tokens / median,
            peak_gib=max(peak, run.row.peak_gib or 0.0),
        )

    def _profiled(self, run: Run, batches: list[Tensor]) -> Row:
        options, row = self._options, run.row
        sizes = Sizes.of(self._setting.model, row.rows * row.sequence_length)
        keep = options.out / f"{_file_name(row)}.json" if options.keep_traces else None
        if run.training is None:
            raise RuntimeError("profiled before it was built")
        found = measure.profiled(run.training, batches, options.profile_steps, sizes, self._world.device, keep)
        return dataclasses.replace(
            row,
            profiled_ms=1e3 * found.window,
            communication_ms=1e3 * found.communication,
            parts={name: 1e3 * value for name, value in found.seconds.items()},
        )

    def _batches(self) -> list[Tensor]:
        options, model = self._options, self._setting.model
        generator = torch.Generator().manual_seed(0)
        shape = (options.micro_batch, options.seq_len + 1)
        made = [torch.randint(model.vocab_size, shape, generator=generator) for _ in range(options.micro_batches)]
        return [tokens.to(self._world.device) for tokens in made]

    def _build(self, row: Row) -> measure.Training:
        model = dataclasses.replace(self._setting.model, num_hidden_layers=row.layers)
        dtype, device = getattr(torch, row.dtype), self._world.device
        if row.implementation.startswith("ours"):
            model = without_wesar(model) if row.implementation == "ours_without_wesar" else model
            shape = row.sequence_length, row.rows, row.micro_batches
            return OurTraining(run_config(model, *shape, row.dtype, row.recompute, row.compiled), self._world)
        if row.implementation == "hf_liger":
            if row.recompute == "selective":
                raise ImportError("transformers has no selective checkpointing")
            return HuggingFaceTraining(model, row.sequence_length, dtype, row.recompute == "full", device)
        fused = row.implementation == "reference"
        return PlainTraining(model, self._mesh, dtype, row.recompute, row.compiled, fused, device)


def _file_name(row: Row) -> str:
    return re.sub(r"\W+", "_", f"{results.label(row)} {row.layers} {row.recompute}")


def _reason(problem: Exception) -> str:
    if isinstance(problem, TimeoutError):
        return str(problem)
    if isinstance(problem, ImportError):
        return f"not measured: {problem}"
    if isinstance(problem, torch.OutOfMemoryError):
        return "out of memory"
    message = re.sub(r"[|\s]+", " ", str(problem))[:200]
    return f"failed: {type(problem).__name__}: {message}"


def use_wheels(folder: Path, into: Path) -> None:
    """Make the packages of the wheels in `folder` importable, behind those that are installed; nothing is installed."""
    for wheel in sorted(folder.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(into)
    sys.path.append(str(into))


def read_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", choices=list(PRESETS), default="yulan_mini_2b" if cuda else "debug", help="default: %(default)s")
    add("--seq-len", type=_count, default=4096 if cuda else 128, help="tokens of a row (default: %(default)s)")
    add("--micro-batch", type=_count, default=2 if cuda else 4, help="rows of a micro-batch (default: %(default)s)")
    add("--micro-batches", type=_count, default=1, help="micro-batches of a step (default: 1)")
    add("--impl", type=_words(IMPLEMENTATIONS), default="ours,reference,hf_liger", help="default: %(default)s")
    add("--compile", type=_words(("on", "off")), default="on" if cuda else "off", help="on, off or both")
    add("--activation-checkpoint", type=_words(("none", "selective", "full")), default="none", help="default: none")
    add("--layers", type=_counts, default=None, help="layer counts, separated by commas (default: the model's)")
    add("--dtype", choices=list(DTYPES), default="bf16" if cuda else "fp32", help="of products (default: %(default)s)")
    add("--warmup", type=_count, default=3, help="steps before the first turn (default: 3)")
    add("--steps", type=_count, default=20, help="timed steps of each implementation, over all turns (default: 20)")
    add("--rounds", type=_count, default=4, help="turns of each implementation (default: 4)")
    add("--profile-steps", type=int, default=2, help="steps under the profiler; 0: no breakdown (default: 2)")
    add("--alternate", action="store_true", help="hold one implementation at a time in memory")
    add("--peers", type=Path, help="folder of wheels of peers that are not installed; used where they lie")
    add("--out", type=Path, default=Path("benchmarks/results/step"), help="folder (default: %(default)s)")
    add("--plot", action="store_true", help="also step.png, a stacked bar for each case (needs matplotlib)")
    add("--keep-traces", action="store_true", help="keep the profiler's traces beside the tables")
    add("--budget-s", type=float, default=3600.0, help="start nothing after this long (default: 3600)")
    options = parser.parse_args(arguments)
    options.compile = [word == "on" for word in options.compile]
    options.layers = sorted(options.layers or [PRESETS[options.model].num_hidden_layers])
    return options


def _count(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no positive whole number")
    return int(text)


def _counts(text: str) -> list[int]:
    return [_count(word) for word in text.split(",")]


def _words(allowed: Sequence[str]):
    def read(text: str) -> list[str]:
        words = text.split(",")
        if unknown := [word for word in words if word not in allowed]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)} is none of {', '.join(allowed)}")
        return [word for word in allowed if word in words]

    return read


def describe(options: argparse.Namespace, model: ModelConfig, device: torch.device) -> Setting:
    """The machine, measured, and the rate that MFU refers to: the device's data sheet if it is known."""
    rates = copy_rate(device), matrix_rate(device)
    machine = describe_machine(device, *rates)
    peak = device_peak(machine.device) if device.type == "cuda" else None
    known = "data sheet, dense bfloat16" if peak else "a large matrix product, measured here"
    return Setting(model, options.model, peak or rates[1], known, hugging_face.versions(device), machine)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; 1 if one of our own cases failed."""
    start = time.monotonic()
    options = read_arguments(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    world = process.start()
    with tempfile.TemporaryDirectory() as folder:
        if options.peers:
            use_wheels(options.peers, Path(folder))
        setting = describe(options, PRESETS[options.model], world.device)
        rows: list[Row] = []
        files: list[Path] = []
        for case, done in Bench(options, world, setting, start).rows():
            files = results.write(options.out, setting, rows + case)
            if done:
                rows += case
                print(results.markdown(setting, case), flush=True)
    if options.plot:
        files += results.plot(options.out, setting, rows)
    print("\n".join(f"wrote {path}" for path in files))
    process.leave()
    return int(any(row.implementation.startswith("ours") and row.status.startswith("failed") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
