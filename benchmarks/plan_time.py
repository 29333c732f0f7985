"""The plan of a large phase: how long it takes to know a row, anywhere in it, and how much memory.

    python benchmarks/plan_time.py                     under half a minute

One phase of 40 billion tokens, rows of 4,096, from 100 sources with unequal shares, 1,024 rows a step. Nothing of the
plan is stored anywhere: each line below is computed from the configuration. "New" is a plan that has not been asked
anything yet, as after a restart. Memory is the peak of what the step allocates (tracemalloc, in a run of its own); of
a command it is the largest resident memory of its process, the interpreter with it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measuring import ROOT, Timing, head, in_turn, median, table
from titan_yulan import config as configuration
from titan_yulan.config.sections import RunConfig
from titan_yulan.curriculum.plan import PhasePlan, Plan

HEAD = """
[run]
name = "large"
output_dir = "{folder}/outputs"
[model]
preset = "yulan_mini_2b"
[tokenizer]
path = "{folder}/tokenizer.tiktoken"
[batch]
global_batch_size = 1024
micro_batch_size = 2
[optimizer]
learning_rate = 0.01
[phase]
name = "large"
length = "{tokens}"
sequence_length = 4096
lr = [{{ shape = "constant" }}]
"""


def write_config(folder: Path, sources: int, tokens: str) -> Path:
    """Shares fall as 1 / rank, so that the least source has a hundredth of the largest one's."""
    names = [f"source_{number:03d}" for number in range(sources)]
    lines = [f'[data.sources.{name}]\npath = "{folder}/{name}"\n' for name in names]
    mix = "\n".join(f"{name} = {1 / (number + 1):.6f}" for number, name in enumerate(names))
    path = folder / "large.toml"
    path.write_text(HEAD.format(folder=folder, tokens=tokens) + f"[phase.mix]\n{mix}\n" + "".join(lines))
    return path


def new_plan(config: RunConfig) -> PhasePlan:
    return Plan(config).phases[0]


def all_rows(phase: PhasePlan) -> None:
    for step in range(0, phase.steps, 8):
        phase.rows(step * phase.batch_rows, min(step + 8, phase.steps) * phase.batch_rows)


def actions(path: Path) -> dict[str, Callable[[], object]]:
    config = configuration.load(path).config
    known = new_plan(config)
    rows = known.batch_rows
    late = known.steps * 9 // 10
    known.rows(0, rows)
    return {
        "read and check the configuration": lambda: configuration.load(path),
        "make the plan": lambda: new_plan(config),
        "rows of the first step, new plan": lambda: new_plan(config).rows(0, rows),
        f"rows of step {late:,}, new plan": lambda: new_plan(config).rows(late * rows, (late + 1) * rows),
        "where all tapes stand at the end, new plan": lambda: new_plan(config).tapes(known.rows_total),
        f"all {known.rows_total:,} rows, 8 steps at a time": lambda: all_rows(new_plan(config)),
    }


def peak_memory(action: Callable[[], object]) -> float:
    """MiB"""
    tracemalloc.start()
    action()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 2**20


def command(*words: str) -> tuple[Timing, float]:
    """Time and largest resident memory (MiB) of a command."""
    begin = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "titan_yulan.cli", *words], stdout=subprocess.DEVNULL, cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"titan-yulan {' '.join(words)} ended with {process.returncode}")
    return Timing(time.perf_counter() - begin, usage.ru_utime + usage.ru_stime), usage.ru_maxrss / 2**10


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--tokens", default="40B", help="length of the phase (default 40B)")
    parser.add_argument("--sources", type=int, default=100, help="default 100")
    parser.add_argument("--rounds", type=int, default=5, help="default 5")
    parser.add_argument("--csv", type=Path, help="append the table to this file")
    options = parser.parse_args()
    print(head("numpy"))
    with tempfile.TemporaryDirectory() as name:
        path = write_config(Path(name), options.sources, options.tokens)
        measured = actions(path)
        found = in_turn(measured, options.rounds)
        rows = [
            [text, f"{1e3 * median(t).seconds:,.1f}", f"{1e3 * median(t).processor:,.1f}", f"{peak_memory(action):.1f}"]
            for (text, action), t in zip(measured.items(), found.values(), strict=True)
        ]
        verbs = {
            f"`titan-yulan plan`, {options.sources} sources": ("plan", str(path)),
            "`titan-yulan plan`, the 27 phases of YuLan-Mini": ("plan", "phase27.toml"),
        }
        for text, words in verbs.items():
            runs = [command(*words) for _ in range(options.rounds)]
            middle = median([timing for timing, _ in runs])
            memory = statistics.median(memory for _, memory in runs)
            rows.append([text, f"{1e3 * middle.seconds:,.0f}", f"{1e3 * middle.processor:,.0f}", f"{memory:.0f}"])
    columns = [f"{options.tokens} tokens, median of {options.rounds}", "ms", "processor ms", "peak MiB"]
    print(table(columns, rows, options.csv))


if __name__ == "__main__":
    main()
