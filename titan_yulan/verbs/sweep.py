"""`titan-yulan sweep`: many runs from one file."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from titan_yulan.verbs.common import ROOT, add_verb


def add(verbs: Any) -> None:
    """The verb sweep."""
    sweep = add_verb(verbs, "sweep", "runs of a grid of settings: show them, train them, queue them", _sweep)
    sweep.add_argument("file", metavar="FILE", help="sweep file, or a bare name below train_configs/")
    sweep.add_argument("--only", action="append", default=[], metavar="GLOB", help="only runs whose names match")
    action = sweep.add_mutually_exclusive_group()
    action.add_argument("--list", action="store_true", help="show the runs and what became of each (the default)")
    action.add_argument("--run", type=int, metavar="N", help="train what is not finished, N runs at a time")
    action.add_argument("--slurm", action="store_true", help="write a Slurm job array, one task a run")
    sweep.set_defaults(takes_keys=True)


def _sweep(options: argparse.Namespace) -> int:
    from titan_yulan.config.find import find
    from titan_yulan.sweep.expand import expand
    from titan_yulan.sweep.runs import load_runs, table_lines

    path = find(options.file, ROOT)
    sweep = expand(Path(path), ROOT, options.overrides)
    runs = load_runs(sweep, options.only, check_data=options.run is not None or options.slurm)
    if options.slurm:
        from titan_yulan.sweep.slurm import SCRIPT, write_array

        again = (sweep.output_dir / SCRIPT).exists()
        print(f"sbatch {shlex.quote(str(write_array(sweep.path, sweep.output_dir, runs)))}")
        if again:
            print(
                "an array was written here before: if it is still queued or runs, cancel the old array first "
                "(scancel JOB), as it has tasks for the same runs",
                file=sys.stderr,
            )
        return 0
    if options.run is not None:
        from titan_yulan.sweep.local import run_all

        return run_all(runs, options.run)
    for line in table_lines(runs):
        print(line)
    return 0
