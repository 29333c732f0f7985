"""From a command to the first step: where the time goes, and which imports cost it.

    python benchmarks/start_time.py                    about a minute and a half
    python benchmarks/start_time.py --rounds 1 --helps 5

First `titan-yulan --help`, in turn with an interpreter that does nothing. Then the debug job with one process and one
step, started as `./run_train.sh` does once its environment is there. Every Python process that it starts notes its own
beginning (through a `sitecustomize` on PYTHONPATH), and every line of output is stamped when it arrives; a stage lasts
from one mark to the next:

    launcher        interpreter, imports without torch, configuration read and checked, plan made, machine looked at
    preflight       memory, disk, data and layout checked, until torchrun is a process
    torchrun        its own import of torch, and starting the worker
    worker          import of torch and of the trainer, process group, test of the nodes
    build           data opened, model and optimizer built, checkpoints looked for, dry run
    validation      before the first step
    first step      which is the slowest one: memory is claimed, and operators are met for the first time

Last, `-X importtime` of what the launcher, torchrun and a worker import: each package's own time, without what it
imports in turn.
"""

from __future__ import annotations

import argparse
import collections
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measuring import ROOT, head, in_turn, median, table

MARKS = "TITAN_YULAN_BENCHMARK_MARKS"
SITE = f"""
import os, sys, time
with open(os.environ["{MARKS}"], "a") as file:
    file.write(f"{{time.time()}} {{' '.join(sys.orig_argv)!r}}\\n")
"""
JOB = """
extends = "{debug}"
[run]
name = "start"
output_dir = "{folder}"
[monitor]
log_every = 1
[eval]
rows = 1
prompt = ""
[[curriculum]]
name = "stable"
length = "1 steps"
sequence_length = 128
mix = {{ code = 0.5, math = 0.3, prose = 0.2 }}
lr = [{{ shape = "constant" }}]
"""
# stage -> what ends it: a word of a process's command line, or the beginning of a line
STAGES = {
    "launcher": "configuration",
    "preflight": "titan_yulan.monitor.agent",
    "torchrun": "titan_yulan.train",
    "worker": "nodes:",
    "build": "dry run of",
    "validation": "phase 'stable'",
    "first step": "step 1/",
}
PACKAGES = {
    "launcher (`titan_yulan.launch`)": "import titan_yulan.launch",
    "torchrun (`titan_yulan.monitor.agent`)": "import titan_yulan.monitor.agent",
    "worker (`titan_yulan.train`)": "import titan_yulan.train",
}
SHOWN = 10  # packages


def run(*words: str) -> None:
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)


def help_time(times: int, csv_file: Path | None) -> str:
    sides = {
        "an interpreter alone": lambda: run("-c", "pass"),
        "`titan-yulan --help`": lambda: run("-m", "titan_yulan.cli", "--help"),
    }
    found = in_turn(sides, times)
    rows = [
        [name, f"{median(t).seconds:.3f}", f"{min(x.seconds for x in t):.3f}", f"{median(t).processor:.3f}"]
        for name, t in found.items()
    ]
    return table([f"median of {times}", "seconds", "best", "processor seconds"], rows, csv_file)


def start(folder: Path) -> dict[str, float]:
    """Seconds of every stage of one start."""
    site, marks = folder / "site", folder / "marks"
    site.mkdir()
    (site / "sitecustomize.py").write_text(SITE)
    job = folder / "job.toml"
    job.write_text(JOB.format(debug=ROOT / "train_configs/debug.toml", folder=folder / "runs"))
    begin = time.time()
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [sys.executable, "-m", "titan_yulan.cli", "train", "--config", str(job)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env={**os.environ, "NPROC": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": path, MARKS: str(marks)},
    )
    assert process.stdout is not None
    seen = [(time.time(), line.strip()) for line in process.stdout]
    if process.wait():
        sys.exit("\n".join(line for _, line in seen))
    for line in marks.read_text().splitlines():
        stamp, _, words = line.partition(" ")
        seen.append((float(stamp), words))
    found, last = {}, begin
    for stage, mark in STAGES.items():
        # torchrun's command line names both modules
        at = max if mark == "titan_yulan.train" else min
        end = at(stamp for stamp, text in seen if mark in text)
        found[stage], last = end - last, end
    return {**found, "all": last - begin}


def importing(statement: str) -> tuple[float, list[tuple[str, float]]]:
    """Seconds in all, and each package's own, the dearest first; parts of torch each for itself."""
    answer = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", statement], capture_output=True, text=True, check=True, cwd=ROOT
    )
    own: collections.Counter[str] = collections.Counter()
    for line in answer.stderr.splitlines():
        cells = line.removeprefix("import time:").split("|")
        if len(cells) == 3 and cells[0].strip().isdigit():
            name = cells[2].strip().split(".")
            own[".".join(name[: 2 if name[0] == "torch" else 1])] += int(cells[0])
    return sum(own.values()) / 1e6, [(name, value / 1e6) for name, value in own.most_common(SHOWN)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="starts of the debug job (default 3)")
    parser.add_argument("--helps", type=int, default=15, help="calls of --help (default 15)")
    parser.add_argument("--csv", type=Path, help="append the tables to this file")
    options = parser.parse_args()
    print(head("torch", "numpy"))
    print(f"{help_time(options.helps, options.csv)}\n", flush=True)
    starts = []
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            starts.append(start(Path(folder)))
    rows = []
    for stage in starts[0]:
        values = [one[stage] for one in starts]
        rows.append([stage, f"{statistics.median(values):.2f}", f"{min(values):.2f}"])
    print(f"{table([f'median of {options.rounds} starts', 'seconds', 'best'], rows, options.csv)}\n", flush=True)
    rows = []
    for name, statement in PACKAGES.items():
        importing(statement)  # files come into the memory of the system
        total, packages = importing(statement)
        rows.append([name, f"{total:.2f}", ", ".join(f"{package} {value:.2f}" for package, value in packages)])
    print(table(["imports of", "seconds", "the dearest packages, their own seconds"], rows, options.csv))


if __name__ == "__main__":
    main()
