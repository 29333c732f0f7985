"""Results that a law is fitted to: run folders, or a table."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from titan_yulan import config as configuration
from titan_yulan.checkpoint.layout import TrainerState, newest_readable
from titan_yulan.config.model import count_parameters
from titan_yulan.config.sections import RunConfig
from titan_yulan.config.values import Tokens
from titan_yulan.curriculum.plan import Plan
from titan_yulan.curriculum.position import Position
from titan_yulan.errors import UserError
from titan_yulan.monitor.best import mean_validation_loss
from titan_yulan.monitor.metrics import read_lines

COLUMNS = ("parameters", "tokens", "unique_tokens", "loss")


@dataclass(frozen=True)
class Run:
    """One trained model.

    Attributes:
        name: for tables.
        parameters: trained values.
        tokens: trained tokens, repeats counted.
        unique_tokens: different ones among them.
        loss: validation loss in nats.
        objective: `[objective] kind` that it was trained with; empty: a table did not say.
    """

    name: str
    parameters: float
    tokens: float
    unique_tokens: float
    loss: float
    objective: str = ""

    @property
    def epochs(self) -> float:
        """How often the unique tokens were read."""
        return self.tokens / self.unique_tokens


class Unfinished(UserError):
    """A run that has not trained to the end of its plan: its loss is that of a learning rate still high."""


def read_runs(inputs: Sequence[Path], best: bool = False, objective: str = "") -> list[Run]:
    """All runs of the inputs: a run folder, a folder of run folders, or a table (.csv). Runs of such a folder that are
    not finished are left out, with a printed line.

    Args:
        best: of a run folder the lowest validation loss, with the tokens trained until then, instead of the last; of an
            unfinished run too.
        objective: of a folder or table only the runs with it; lines of a table that say none are taken.

    Raises:
        UserError: an input is none of these, or holds something that is no result, a run that is named itself is not
            finished or of another objective, or no run is left.
    """
    runs = []
    for path in inputs:
        if path.suffix == ".csv":
            runs += [run for run in read_table(path) if run.objective in ("", objective) or not objective]
        elif (path / "validation.jsonl").is_file():
            runs.append(read_run(path, best))
        else:
            runs += _read_folders(path, best, objective)
    if wrong := [run for run in runs if objective and run.objective not in ("", objective)]:
        raise UserError(f"--objective {objective}: {wrong[0].name} is {wrong[0].objective}; leave it out")
    if not runs:
        raise UserError(
            "no run is left: let one finish, or take --best" + (" or another --objective" * bool(objective))
        )
    return runs


def _read_folders(path: Path, best: bool, objective: str) -> list[Run]:
    folders = sorted(file.parent for file in path.glob("*/validation.jsonl"))
    if not folders:
        raise UserError(f"{path} is no run folder, no folder of run folders, and no .csv table of runs")
    runs = []
    for folder in folders:
        try:
            opened = _open(folder)
            if not objective or opened.config.objective.kind == objective:
                runs.append(_result(opened, best))
        except Unfinished as error:
            print(f"left out: {error}")
    return runs


def read_table(path: Path) -> list[Run]:
    """Read a table with the columns parameters, tokens, unique_tokens (may be missing: all are) and loss, in any order;
    `name`, `objective` and others may be there. Amounts may be written as in "1.2B".

    Raises:
        UserError: with the line and column of the mistake.
    """
    try:
        lines = list(csv.DictReader(path.read_text(encoding="utf-8-sig").splitlines()))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    found = set(lines[0]) if lines else set()
    if missing := [name for name in COLUMNS if name != "unique_tokens" and name not in found]:
        raise UserError(f"{path} lacks the column(s) {', '.join(missing)}; a table of runs has {', '.join(COLUMNS)}")
    runs = []
    for number, line in enumerate(lines, start=2):
        line["unique_tokens"] = line.get("unique_tokens") or line["tokens"]
        values = {name: _amount(line[name], f"{path}:{number}: {name}") for name in COLUMNS}
        values["unique_tokens"] = min(values["unique_tokens"], values["tokens"])
        objective = (line.get("objective") or "").strip().replace(" ", "_")
        runs.append(Run(line.get("name") or f"line {number}", **values, objective=objective))
    return runs


def _amount(text: str | None, where: str) -> float:
    try:
        value = Tokens.parse(text or "").value
    except ValueError:
        value = math.nan
    if not value > 0:
        raise UserError(f"{where}: {text!r} is no positive number; write 124e6 or '124M'")
    return value


def read_run(folder: Path, best: bool = False) -> Run:
    """What a run folder says: its parameters, tokens, the different ones among them, and its validation loss, the mean
    over the held-out parts weighted by the last phase's mix.

    Args:
        best: the lowest validation loss instead of the last, of an unfinished run too, with a printed line.

    Raises:
        Unfinished: its newest checkpoint is before its last step (not with `best`), or there is none.
        UserError: it has no finite validation loss.
    """
    return _result(_open(folder), best)


@dataclass(frozen=True)
class _Opened:
    """A run folder with its newest checkpoint."""

    folder: Path
    config: RunConfig
    state: TrainerState


def _open(folder: Path) -> _Opened:
    checkpoint = newest_readable(folder / "checkpoints", print)
    if checkpoint is None:
        raise Unfinished(f"{folder} has no checkpoint that says what was read; let it train")
    return _Opened(folder, configuration.load(checkpoint.path / "config.toml").config, checkpoint.state())


def _result(opened: _Opened, best: bool) -> Run:
    folder, config = opened.folder, opened.config
    _check_finished(opened, best)
    first = opened.state.origin["step"]  # validated there is the model that the run began with
    lines = [
        line for line in read_lines(folder / "validation.jsonl") if line["step"] > first and line["validation_loss"]
    ]
    if lines and None in lines[-1]["validation_loss"].values() and not best:
        raise UserError(f"{folder}: the last validation loss is not finite; leave the run out, or take --best")
    lines = [line for line in lines if None not in line["validation_loss"].values()]
    if not lines:
        raise UserError(f"{folder} has no finite validation loss after its first step; leave it out")
    mix = config.phases[-1].mix
    losses = [mean_validation_loss(line["validation_loss"], mix) for line in lines]
    chosen = min(range(len(lines)), key=lambda i: (losses[i], i)) if best else len(lines) - 1
    unique = sum(entry["tokens"] / max(1.0, entry["epochs"] or 1.0) for entry in opened.state.ledger.values())
    tokens = float(lines[chosen]["tokens"])
    parameters = count_parameters(config.model)
    return Run(folder.name, parameters, tokens, min(tokens, unique), losses[chosen], config.objective.kind)


def _check_finished(opened: _Opened, best: bool) -> None:
    origin = opened.state.origin  # a run that began from another counts on from there
    start = Position(origin["step"], origin["row"], origin["token"])
    step, last = opened.state.step, Plan(opened.config, start, origin["tapes"]).end.step
    if step >= last:
        return
    place = f"{opened.folder} is at step {step:,} of {last:,}"
    if not best:
        raise Unfinished(
            f"{place}: its learning rate has not come down, so its loss is no result; let it finish, or take --best"
        )
    print(f"note: {place}: its schedule was not finished, so its lowest loss may be higher than it had to be")
