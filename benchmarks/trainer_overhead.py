"""What the trainer costs a step beside a bare loop: the debug job on the CPU, one process.

    python benchmarks/trainer_overhead.py              100 steps of each: a minute or two

A run of the debug configuration's first phase goes its usual way: loader, agreement between ranks before and after
every step, watchdog, guard, fingerprints, records, TensorBoard, a printed line every ten steps. After each of its steps
the same rows are trained on once more by a bare loop, with the same model, objective and optimizer: forward, backward,
clipping, AdamW, nothing else. So the sides take turns step by step, and meet the same noise. The trainer's time is all
that is not the bare loop's, from one bare step to the next: what waiting, recording and the background threads cost is
in it. The shares are of windows of ten steps, so that each holds one printed line; the first window is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measuring import ROOT, head, table
from titan_yulan import config as configuration
from titan_yulan.data.ensure import ensure_prepared
from titan_yulan.data.loader import Batch
from titan_yulan.learner import Learner
from titan_yulan.monitor.recorder import StepValues
from titan_yulan.objective.forward import forward
from titan_yulan.optimizer.adamw import clip_gradients
from titan_yulan.train import train

WINDOW = 10  # steps; as `[monitor] log_every`

JOB = """
extends = "{debug}"
[run]
name = "overhead"
output_dir = "{folder}"
[eval]
rows = 1
prompt = ""
[monitor]
log_every = {window}
[[curriculum]]
name = "stable"
length = "{steps} steps"
sequence_length = 128
mix = {{ code = 0.5, math = 0.3, prose = 0.2 }}
lr = [{{ shape = "linear", from = 0.05, to = 1.0, over = "20 steps" }}, {{ shape = "constant" }}]
[checkpoint]
every = "{steps} steps"
"""


@dataclass(frozen=True)
class Moment:
    """Both clocks of this process: seconds, and processor seconds of all threads."""

    seconds: float
    processor: float

    @classmethod
    def now(cls) -> Moment:
        return cls(time.perf_counter(), time.process_time())

    def __sub__(self, other: Moment) -> Moment:
        return Moment(self.seconds - other.seconds, self.processor - other.processor)

    def __add__(self, other: Moment) -> Moment:
        return Moment(self.seconds + other.seconds, self.processor + other.processor)


class Watch:
    """Times the learner's steps where the trainer calls them, and puts a bare step behind each."""

    def __init__(self, learner_step: Any) -> None:
        self._learner_step = learner_step
        self._last: Moment | None = None
        self.outside: list[Moment] = []  # in the trainer, outside the learner's step
        self.inside: list[Moment] = []
        self.bare: list[Moment] = []

    def __call__(self, learner: Learner, step: int, batches: list[Batch], **options: Any) -> StepValues:
        begin = Moment.now()
        values = self._learner_step(learner, step, batches, **options)
        end = Moment.now()
        bare_step(learner, batches)
        last = Moment.now()
        if self._last is not None:
            self.outside.append(begin - self._last)
            self.inside.append(end - begin)
            self.bare.append(last - end)
        self._last = last
        return values


def bare_step(learner: Learner, batches: list[Batch]) -> None:
    """One step as a short script would write it."""
    inputs = [learner.objective.inputs(batch) for batch in batches]
    denominator = torch.stack([part.denominator for part in inputs]).sum()
    for part in inputs:
        forward(learner.decoder, learner.objective, part, denominator).objective.backward()
    clip_gradients(learner.decoder.parameters(), learner.config.optimizer.max_gradient_norm)
    learner.optimizer.step()
    learner.optimizer.zero_grad()


def windows(moments: list[Moment]) -> list[Moment]:
    """Sums of WINDOW steps each, without the first one."""
    starts = range(WINDOW, len(moments) - WINDOW + 1, WINDOW)
    return [sum(moments[start : start + WINDOW], Moment(0.0, 0.0)) for start in starts]


def report(watch: Watch, csv_file: Path | None) -> str:
    bare, inside, outside = windows(watch.bare), windows(watch.inside), windows(watch.outside)
    parts = {
        "bare loop": bare,
        "trainer": [a + b for a, b in zip(inside, outside, strict=True)],
        "of which the learner's step": inside,
        "of which the loop around it": outside,
    }
    lines = []
    for name, found in parts.items():
        cells = []
        for clock in ("seconds", "processor"):
            values = [getattr(moment, clock) for moment in found]
            shares = [100 * value / getattr(other, clock) for value, other in zip(values, bare, strict=True)]
            cells += [f"{1e3 * statistics.median(values) / WINDOW:.2f}", f"{statistics.median(shares):.2f}"]
            if clock == "seconds":
                low, *_, high = statistics.quantiles(shares, n=4) if len(shares) > 1 else shares * 2
                cells.append(f"{low:.2f} to {high:.2f}")
        lines.append([name, *cells])
    columns = [
        f"a step, medians of {len(bare)} windows of {WINDOW}",
        "ms",
        "% of the bare loop's",
        "its middle half",
        "processor ms",
        "% of the bare loop's",
    ]
    return table(columns, lines, csv_file)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=100, help="default 100")
    parser.add_argument("--csv", type=Path, help="append the table to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(head("torch", "numpy", "tensorboard"))
    watch = Watch(Learner.train_step)
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder, "job.toml")
        debug = ROOT / "train_configs/debug.toml"
        job.write_text(JOB.format(debug=debug, folder=folder, steps=options.steps, window=WINDOW), encoding="utf-8")
        config = configuration.load(job).config
        ensure_prepared(config, print)
        # a function, so that it is bound to the learner as the method that it replaces
        step = mock.patch.object(Learner, "train_step", lambda *arguments, **more: watch(*arguments, **more))
        with step, contextlib.redirect_stdout(io.StringIO()):
            train(config)
    print(report(watch, options.csv))


if __name__ == "__main__":
    main()
