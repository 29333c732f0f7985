"""A sweep as a Slurm job array: one task a run, each of which is `deploy/slurm.sh` with the arguments of that run."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from titan_yulan.errors import UserError
from titan_yulan.monitor.metrics import write_atomically
from titan_yulan.sweep.runs import ARGUMENTS, SweepRun, write_arguments

SCRIPT = "array.slurm.sh"

_TEXT = """#!/usr/bin/env bash
# One task for each unfinished run of {sweep}. From the root of the checkout:
#
#     sbatch {script}
#
# A task that is stopped (75: the time limit is near, a preemption) is queued again and goes on, as deploy/slurm.sh does
# it. Written by `titan-yulan sweep --slurm`; the same command leaves out the runs that have finished since. Cancel an
# older array first (scancel): it has tasks for the same runs.

#SBATCH --job-name={name}
#SBATCH --array={tasks}
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%A_%a.out
#SBATCH --open-mode=append
#SBATCH --requeue
# Seconds before the time limit: longer than a step, a validation and a save together.
#SBATCH --signal=B:USR1@600
# Fill in and remove one of the two #; %N behind the array's tasks lets only N run at a time:
##SBATCH --partition=
##SBATCH --account=

set -euo pipefail
cd "${{SLURM_SUBMIT_DIR:?this file is for sbatch}}"
case "${{SLURM_ARRAY_TASK_ID:?this file is for sbatch, as a job array}}" in
{cases}
    *)
        echo "ERROR: there is no run $SLURM_ARRAY_TASK_ID" >&2
        exit 2
        ;;
esac
mapfile -t arguments <"$run/{arguments}"
exec bash deploy/slurm.sh "${{arguments[@]}}"
"""


def write_array(sweep: Path, output_dir: Path, runs: Sequence[SweepRun]) -> Path:
    """Write the script of the job array, and each run's arguments.

    Args:
        sweep: the sweep file.
        output_dir: gets the script.
        runs: all of them; a run's place is its task, so that it stays the same when others finish.

    Returns:
        the script.

    Raises:
        UserError: all runs are finished.
    """
    left = [task for task, run in enumerate(runs) if not run.finished]
    if not left:
        raise UserError(f"all {len(runs)} runs of {sweep} are finished; there is nothing to queue")
    for task in left:
        write_arguments(runs[task])
    script = output_dir / SCRIPT
    cases = "\n".join(f"    {task}) run={shlex.quote(str(runs[task].folder))} ;;" for task in left)
    text = _TEXT.format(
        sweep=sweep,
        script=shlex.quote(str(script)),
        name=re.sub(r"[^A-Za-z0-9_.-]+", "-", sweep.stem),
        tasks=_ranges(left),
        cases=cases,
        arguments=ARGUMENTS,
    )
    write_atomically(script, text)
    return script


def _ranges(numbers: Sequence[int]) -> str:
    """`0-3,7`."""
    parts = []
    for _, group in itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        parts.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return ",".join(parts)
