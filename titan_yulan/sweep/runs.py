"""The runs of a sweep: each configuration loaded and checked, and what became of it so far. No torch."""

from __future__ import annotations

import fnmatch
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from titan_yulan import config as configuration
from titan_yulan.checkpoint.layout import CONFIG, Checkpoint, newest_readable
from titan_yulan.checkpoint.resume import FREE, LAYOUT, check_resume, make_plan
from titan_yulan.config.model import count_parameters
from titan_yulan.config.read import dotted
from titan_yulan.config.sections import RunConfig
from titan_yulan.config.subset import unique_amount
from titan_yulan.curriculum.plan import Plan
from titan_yulan.errors import UserError
from titan_yulan.monitor.metrics import read_status, write_atomically
from titan_yulan.plan.sources import check_sources_there
from titan_yulan.sweep.expand import Expanded

ARGUMENTS = "arguments.txt"
_SHOWN = 3  # names of runs that share a mistake


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep.

    Attributes:
        arguments: of ./run_train.sh.
        step: finished steps, of the newest checkpoint.
        finished: whether nothing is left to do.
        failed: whether the last start ended with a failure.
        begun: whether there was one.
        notices: what differs from the configuration of the newest checkpoint and may, a line each.
    """

    name: str
    arguments: tuple[str, ...]
    config: RunConfig
    plan: Plan
    folder: Path
    step: int
    finished: bool
    failed: bool
    begun: bool
    notices: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        return count_parameters(self.config.model)

    @property
    def tokens(self) -> int:
        return self.plan.end.token

    @property
    def flops(self) -> float:
        """6 N D, as scaling laws count."""
        return 6.0 * self.parameters * self.tokens

    @property
    def epochs(self) -> float | None:
        """How often the unique tokens are read; None: the configuration does not limit them."""
        unique = [unique_amount(phase) for phase in self.config.phases]
        return self.tokens / unique[0] if len(unique) == 1 and unique[0] else None

    @property
    def state(self) -> str:
        """In words."""
        if self.finished:
            return "finished"
        place = f"at step {self.step:,} of {self.plan.end.step:,}"
        return f"failed {place}" if self.failed else place if self.begun else "not begun"


def load_runs(sweep: Expanded, only: Sequence[str] = (), check_data: bool = False) -> list[SweepRun]:
    """All runs of a sweep, in the order of the file.

    Args:
        only: globs; runs whose names match none of them are left out. Empty: all.
        check_data: also that what they read is prepared or has text to prepare it from.

    Raises:
        UserError: all mistakes of all runs.
    """
    names = [name for name in sweep.runs if not only or any(fnmatch.fnmatchcase(name, glob) for glob in only)]
    if not names:
        raise UserError(f"--only {' '.join(only)}: no run has such a name; the first is {next(iter(sweep.runs))}")
    runs, mistakes = [], defaultdict[str, list[str]](list)
    for name in names:
        try:
            run = _load_run(sweep, name)
            if check_data and not run.finished:
                check_sources_there(run.config)
            runs.append(run)
        except UserError as error:
            text = str(error)  # a mistake a line, or one with an indented list
            for mistake in [text] if "\n " in text else text.split("\n"):
                mistakes[mistake].append(name)
    if mistakes:
        raise UserError("\n".join(f"{_shortened(runs)}: {text}" for text, runs in mistakes.items()))
    return runs


def _shortened(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{'run' if len(names) == 1 else 'runs'} {', '.join(names[:_SHOWN])}{more}"


def _load_run(sweep: Expanded, name: str) -> SweepRun:
    folder = sweep.output_dir / name
    place = (f"--run.output_dir={sweep.output_dir}", f"--run.name={name}")
    arguments = ("--config", str(sweep.config), *sweep.common, *sweep.runs[name], *sweep.given, *place)
    config = configuration.load(sweep.config, arguments[2:]).config
    status = read_status(folder)
    checkpoint = newest_readable(folder / "checkpoints", lambda _: None)
    plan = make_plan(config, checkpoint)
    resume = check_resume(config, plan, checkpoint)
    if checkpoint is not None:
        _check_unchanged(config, checkpoint)
    return SweepRun(
        name,
        arguments,
        config,
        plan,
        folder,
        step=resume.step,
        finished=resume.complete,
        failed=status.get("state") == "failed",
        begun=checkpoint is not None or bool(status),
        notices=tuple(resume.notices),
    )


def _check_unchanged(config: RunConfig, checkpoint: Checkpoint) -> None:
    """A run that has begun keeps its configuration: the trainer would go on with other values of many keys, such as the
    learning rate, and a finished run would be skipped, but neither would be what its name says. Free are the keys that
    a resume never asks about, and how a phase is computed; phases may follow, and sources that nothing has read.

    Raises:
        UserError: it was begun with another one.
    """
    saved = configuration.load(checkpoint.path / CONFIG).config
    old, new = [phase.name for phase in saved.phases], [phase.name for phase in config.phases]
    free = (*FREE, *(f"phase.*.{part}.*" for part in LAYOUT))
    follow: tuple[str, ...] = ()
    if old[: len(new)] == new[: len(old)]:
        free = (*free, "curriculum")
        follow = tuple(f"{dotted(('phase', name))}." for name in {*old} ^ {*new})
    changed = [
        f"\n  {difference}"
        for difference in configuration.diff(saved, config)
        if not any(fnmatch.fnmatchcase(difference.key, pattern) for pattern in free)
        and not difference.key.startswith(follow)
        and not (difference.key.startswith("data.sources.") and None in (difference.old, difference.new))
    ]
    if changed:
        raise UserError(
            f"begun with another configuration than this one, which differs in:{''.join(changed)}\n"
            "Bring the old values back, delete the run folder, or choose another name or output_dir"
        )


def write_arguments(run: SweepRun) -> None:
    """`arguments.txt` in the run folder: what ./run_train.sh gets, one argument a line."""
    run.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(run.folder / ARGUMENTS, "".join(f"{argument}\n" for argument in run.arguments))


def table_lines(runs: Sequence[SweepRun]) -> Iterator[str]:
    """The runs as a table."""
    width = max(len(run.name) for run in runs)
    yield f"{'run':<{width}} {'parameters':>14} {'tokens':>16} {'epochs':>8} {'6 N D':>10}  state"
    for run in runs:
        epochs = "-" if run.epochs is None else f"{run.epochs:,.2f}"
        size = f"{run.parameters:>14,} {run.tokens:>16,} {epochs:>8} {run.flops:>10.3g}"
        yield f"{run.name:<{width}} {size}  {run.state}"
    told = defaultdict[str, list[str]](list)
    for run in runs:
        for notice in run.notices:
            told[notice].append(run.name)
    for notice, names in told.items():
        yield f"{_shortened(names)}: {notice}"
    left = [run for run in runs if not run.finished]
    cost = sum(run.flops * (1 - run.step / run.plan.end.step) for run in left)
    yield f"{len(runs)} runs, {len(runs) - len(left)} finished, {cost:.3g} FLOPs to go"
