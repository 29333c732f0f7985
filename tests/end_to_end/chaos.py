"""A run that everything happens to, compared with one that nothing happens to:

    python -m tests.end_to_end.chaos DIR [--seed N] [--minutes M] [--short]

trains a small three-phase curriculum three times: undisturbed on 2 ranks; with faults of all kinds, on 1, 2 and 3 ranks
and other layouts; and with faults on 2 ranks all the time. Then it compares the rows of every step that was ever
trained, and the losses. Prints a Markdown report, and ends with 1 if a promise of docs/resume.md was broken. The order
of the faults, their steps and the numbers of ranks follow from the seed; every start has a time limit. `--short` is one
disturbed run with four faults. Filling a disk needs the right to mount a small tmpfs; without it that fault is left
out, and the report says so.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.end_to_end import harness
from tests.end_to_end.faults_of_runs import ALIKE, SETTINGS, SHORT, Run, full_disk, signal_in_compilation
from titan_yulan.monitor.events import read_events

SECONDS_A_FAULT = 13  # what a fault takes with its start, on two idle cores
STEPS_A_FAULT = 8
TOLERANCE = 0.02  # nat, of the last validation losses
Fault = Callable[[Run], None]
ROWS = {"stable": 7, "mix": 7, "anneal": 4}  # of a step of each phase


# --- the runs --------------------------------------------------------------------------------------------------------


def curriculum(steps: int) -> str:
    """The three phases of the small configuration, made longer."""
    lengths = iter((steps * 2 // 5, steps * 2 // 5, steps // 5))
    phases = re.sub(r'length = "\d+ steps"', lambda _: f'length = "{next(lengths)} steps"', harness.PHASES)
    return phases.replace(
        '"1-sqrt", from = 1.0, to = 0.0, over = "8', f'"1-sqrt", from = 1.0, to = 0.0, over = "{steps // 5}'
    )


def draw_plans(draw: random.Random, minutes: float, short: bool, mounted: bool) -> dict[str, list[Fault]]:
    """The faults of each run, in their order."""
    if short:
        return {"moving": list(SHORT)}
    alike: list[Fault] = [*ALIKE, full_disk] if mounted else list(ALIKE)
    every: list[Fault] = [*alike, signal_in_compilation]  # compiled code rounds otherwise
    rounds = max(1, round(minutes * 60 / SECONDS_A_FAULT / len(every)) - 1)
    moving = [fault for _ in range(rounds) for fault in draw.sample(every, len(every))]
    return {"moving": moving, "fixed": draw.sample(alike, len(alike))}


def suffer(run: Run, plan: Sequence[Fault], end: int, deadline: float) -> None:
    """Do everything in `plan` to a run, then let it come to its end."""
    for fault in plan:
        if run.step >= end - 2 or time.monotonic() > deadline:
            run.missed[fault.__name__] += 1
            continue
        fault(run)
    run.start("", (0,))


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """A file system of 96 MiB in `folder`; False where mounting is not allowed, and then a usual folder."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=96m", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


# --- what is compared ------------------------------------------------------------------------------------------------


@dataclass
class Comparison:
    """A disturbed run against the undisturbed one."""

    steps: int
    trained: int  # lines ever written
    lost: int  # rows
    repeated: int  # rows
    changed: list[int]  # steps that were ever trained on other rows
    strayed: list[int]  # steps that came neither after the one before nor after a checkpoint that was loaded
    drift: dict[str, float]  # of the last validation loss of each source
    same_bits: bool
    restarts: int
    hangs: int


def compare(run: Run, reference: Path) -> Comparison:
    lines, expected = harness.metrics(run.folder), harness.metrics(reference)
    rows = {line["step"]: (line["batch_fingerprint"], ROWS[line["phase"]]) for line in expected}
    history = [json.loads(line) for line in run.history.read_text().splitlines()]
    last, goal = (harness.validations(folder)[-1]["validation_loss"] for folder in (run.folder, reference))
    steps = Counter(line["step"] for line in lines)
    right = {line["step"] for line in lines if rows.get(line["step"], ("",))[0] == line["batch_fingerprint"]}
    events = read_events(run.folder)
    finite = [line for line in history if "skipped" not in line]
    by_step = {line["step"]: line for line in expected}
    return Comparison(
        steps=len(rows),
        trained=len(history),
        lost=sum(count for step, (_, count) in rows.items() if step not in right),
        repeated=sum(rows[step][1] * (count - 1) for step, count in steps.items() if step in rows),
        strayed=_strayed([line["step"] for line in history], events),
        changed=sorted({line["step"] for line in history if rows[line["step"]][0] != line["batch_fingerprint"]}),
        drift={name: last[name] - goal[name] for name in goal},
        same_bits=harness.same_in_every_bit(run.folder, reference)
        and all(line == by_step[line["step"]] for line in finite),
        restarts=sum(event["event"] == "group" and event["restarts"] > 0 for event in events),
        hangs=sum(event["event"] == "hang" for event in events),
    )


def _strayed(history: list[int], events: list[dict[str, Any]]) -> list[int]:
    """Where the order in which steps were trained cannot be explained."""
    loaded = {0} | {event["step"] for event in events if event["event"] in ("resume", "went back")}
    pairs = zip([0, *history], history, strict=False)
    return [step for before, step in pairs if step != before + 1 and (step > before + 1 or step - 1 not in loaded)]


# --- the report ------------------------------------------------------------------------------------------------------


def report(runs: dict[str, tuple[Run, Comparison]], header: str) -> tuple[str, bool]:
    """The report in Markdown, and whether every promise was kept."""
    text, kept = [header, ""], True
    names = list(runs)
    text += [f"| fault | {' | '.join(names)} |", "|---|" + "---:|" * len(names)]
    kinds = sorted({kind for run, _ in runs.values() for kind in run.faults})
    text += [f"| {kind} | {' | '.join(str(run.faults[kind]) for run, _ in runs.values())} |" for kind in kinds]
    numbers: dict[str, Callable[[Run, Comparison], object]] = {
        "faults": lambda run, _: run.faults.total(),
        "starts": lambda run, _: run.starts.total(),
        "restarts by torchrun": lambda _, found: found.restarts,
        "hangs ended by the watchdog": lambda _, found: found.hangs,
        "steps": lambda _, found: found.steps,
        "steps trained again from a checkpoint": lambda _, found: found.trained - found.steps,
        "rows lost": lambda _, found: found.lost,
        "rows repeated": lambda _, found: found.repeated,
        "steps that were ever trained on other rows": lambda _, found: len(found.changed),
        "last validation loss, less the undisturbed one, nat": lambda _, found: ", ".join(
            f"{name} {drift:+.4f}" for name, drift in found.drift.items()
        ),
        "every line and tensor equal, bit for bit": lambda run, found: "yes" if found.same_bits else "no",
    }
    text += ["", f"| | {' | '.join(names)} |", "|---|" + "---:|" * len(names)]
    text += [f"| {what} | {' | '.join(str(get(*both)) for both in runs.values())} |" for what, get in numbers.items()]
    text += ["", "Starts: " + "; ".join(f"{n} on {w}" for n, w in _worlds(runs)) + "."]
    for name, (run, found) in runs.items():
        wrong = list(run.broken)
        if found.lost or found.repeated or found.changed or found.strayed:
            wrong.append(f"rows lost, repeated or changed (steps {(found.changed + found.strayed)[:10]})")
        if max(map(abs, found.drift.values())) > TOLERANCE:
            wrong.append(f"a validation loss differs by more than {TOLERANCE}")
        if run.fixed and not found.same_bits:
            wrong.append("not equal bit for bit")
        if run.missed:
            text += ["", f"Did not come to happen, {name}: {', '.join(f'{n} x {k}' for k, n in run.missed.items())}."]
        text += ["", f"Promises, {name}: {'kept' if not wrong else 'BROKEN: ' + '; '.join(wrong)}."]
        kept = kept and not wrong
    return "\n".join(text) + "\n", kept


def _worlds(runs: dict[str, tuple[Run, Comparison]]) -> list[tuple[int, str]]:
    total = sum((run.starts for run, _ in runs.values()), Counter[str]())
    return [(count, world) for world, count in total.most_common()]


def chaos(folder: Path, seed: int, minutes: float, short: bool, data: Path | None = None) -> tuple[str, bool]:
    """Run everything in `folder`, which must be new; returns the report, and whether every promise was kept."""
    begin, draw = time.monotonic(), random.Random(seed)
    data = data or folder / "data"
    folder.mkdir(parents=True)
    with small_disk(folder / "disk") as mounted:
        plans = draw_plans(draw, minutes, short, mounted)
        phases = curriculum(max(48, STEPS_A_FAULT * len(plans["moving"])))
        end = sum(int(steps) for steps in re.findall(r'length = "(\d+) steps"', phases))
        configs = {}
        for name in ("undisturbed", *plans):
            place = folder / "disk" / name
            place.mkdir()
            configs[name] = harness.write_small_config(place, data, place, phases=phases)
        undisturbed = harness.train(configs["undisturbed"], 2, *SETTINGS)
        if undisturbed.code != 0:
            raise SystemExit(f"the undisturbed run ended with {undisturbed.code}:\n{undisturbed.output}")
        runs: dict[str, tuple[Run, Comparison]] = {}
        for name, plan in plans.items():
            place = folder / "disk" / name / "small"
            run = Run(place, configs[name], folder, random.Random(seed), name == "fixed", end // len(plan))
            share = len(plan) / sum(map(len, plans.values()))
            suffer(run, plan, end, deadline=time.monotonic() + 1.5 * 60 * minutes * share)
            runs[name] = (run, compare(run, folder / "disk" / "undisturbed" / "small"))
    named = {"moving": "other ranks and layouts at every start", "fixed": "2 ranks throughout"}
    header = (
        f"Seed {seed}, {time.strftime('%Y-%m-%d')}, {(time.monotonic() - begin) / 60:.1f} minutes on {os.cpu_count()} "
        f"CPU cores, Python {platform.python_version()}, torch {torch.__version__}; {end} steps in 3 phases."
        + ("" if mounted else " No disk was filled: that needs the right to mount.")
    )
    return report({named[name]: both for name, both in runs.items()}, header)


def main() -> int:
    """Print the report; returns 0 if every promise was kept."""
    parser = argparse.ArgumentParser(description="Faults of all kinds in a run, and what became of it.")
    parser.add_argument("folder", type=Path, help="a new folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=14.0, help="about how long, on two idle cores")
    parser.add_argument("--short", action="store_true", help="three faults, a minute")
    arguments = parser.parse_args()
    text, kept = chaos(arguments.folder, arguments.seed, arguments.minutes, arguments.short)
    print(text)
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
