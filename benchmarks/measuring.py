"""What the host-side benchmarks share: sides measured in turn, what they ran on, tables as Markdown and CSV.

The machine may be busy with other work: sides are measured in turn, round by round, so that all meet the same noise;
besides the clock there is the processor time of the process, which others can hardly lengthen.
"""

from __future__ import annotations

import csv
import importlib.metadata
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Timing:
    """Seconds by the clock, and of processor time: of this process, all its threads, and its ended children."""

    seconds: float
    processor: float


def processor_seconds() -> float:
    """Processor time so far of this process and of its children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def timed(action: Callable[[], object]) -> Timing:
    begin, processor = time.perf_counter(), processor_seconds()
    action()
    return Timing(time.perf_counter() - begin, processor_seconds() - processor)


def in_turn(sides: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[Timing]]:
    """Every side once a round; odd rounds go backwards, so that none always follows the same other."""
    found: dict[str, list[Timing]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides)[:: -1 if number % 2 else 1]:
            found[name].append(timed(sides[name]))
    return found


def median(timings: Sequence[Timing]) -> Timing:
    """Of both, each for itself."""
    return Timing(statistics.median(t.seconds for t in timings), statistics.median(t.processor for t in timings))


def best(timings: Sequence[Timing]) -> Timing:
    """Of both, each for itself."""
    return Timing(min(t.seconds for t in timings), min(t.processor for t in timings))


def head(*packages: str) -> str:
    """The command and what it ran on: commit, versions, processor."""
    command = f"python benchmarks/{Path(sys.argv[0]).name}{''.join(f' {word}' for word in sys.argv[1:])}"
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    return (
        f"`{command}`: commit {commit()}, Python {platform.python_version()}, {versions}, {os.cpu_count()} cores "
        f"({processor_name()}), load {os.getloadavg()[0]:.1f} at the start\n"
    )


def commit() -> str:
    """Short name of the commit, with "+" where files differ from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True).stdout.strip()

    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+" if git("status", "--porcelain", "-uno") else "")


def processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], csv_file: Path | None = None) -> str:
    """A Markdown table, the first column to the left; the same rows are appended to `csv_file`."""
    if csv_file is not None:
        with csv_file.open("a", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([columns, *rows])
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)
