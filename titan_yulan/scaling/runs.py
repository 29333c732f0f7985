"""Results that a law is fitted to: run folders, or a table."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from titan_yulan import config as configuration
from titan_yulan.checkpoint.layout import newest_readable
from titan_yulan.config.model import count_parameters
from titan_yulan.config.values import Tokens
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
    """

    name: str
    parameters: float
    tokens: float
    unique_tokens: float
    loss: float

    @property
    def epochs(self) -> float:
        """How often the unique tokens were read."""
        return self.tokens / self.unique_tokens


def read_runs(inputs: Sequence[Path], best: bool = False) -> list[Run]:
    """All runs of the inputs: a run folder, a folder of run folders, or a table (.csv).

    Args:
        best: of a run folder the lowest validation loss, with the tokens trained until then, instead of the last.

    Raises:
        UserError: an input is none of these, or holds something that is no result.
    """
    runs = []
    for path in inputs:
        if path.suffix == ".csv":
            runs += read_table(path)
        elif (path / "validation.jsonl").is_file():
            runs.append(read_run(path, best))
        else:
            folders = sorted(file.parent for file in path.glob("*/validation.jsonl"))
            if not folders:
                raise UserError(f"{path} is no run folder, no folder of run folders, and no .csv table of runs")
            runs += [read_run(folder, best) for folder in folders]
    return runs


def read_table(path: Path) -> list[Run]:
    """Read a table with the columns parameters, tokens, unique_tokens (may be missing: all are) and loss, in any order;
    `name` and others may be there. Amounts may be written as in "1.2B".

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
        values = {name: _amount(line.get(name) or line["tokens"], f"{path}:{number}: {name}") for name in COLUMNS}
        values["unique_tokens"] = min(values["unique_tokens"], values["tokens"])
        runs.append(Run(line.get("name") or f"line {number}", **values))
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

    Raises:
        UserError: it has no finite validation loss, or no checkpoint that says what was read.
    """
    lines = [line for line in read_lines(folder / "validation.jsonl") if line["tokens"] > 0 and line["validation_loss"]]
    if lines and None in lines[-1]["validation_loss"].values() and not best:
        raise UserError(f"{folder}: the last validation loss is not finite; leave the run out, or take --best")
    lines = [line for line in lines if None not in line["validation_loss"].values()]
    checkpoint = newest_readable(folder / "checkpoints", print)
    if not lines or checkpoint is None:
        missing = "checkpoint" if lines else "validation loss after its first step"
        raise UserError(f"{folder} has no {missing}; leave it out, or let it finish")
    config = configuration.load(checkpoint.path / "config.toml").config
    mix = config.phases[-1].mix
    losses = [mean_validation_loss(line["validation_loss"], mix) for line in lines]
    chosen = min(range(len(lines)), key=lambda i: (losses[i], i)) if best else len(lines) - 1
    read = checkpoint.state().ledger.values()
    unique = sum(entry["tokens"] / max(1.0, entry["epochs"] or 1.0) for entry in read)
    tokens = float(lines[chosen]["tokens"])
    return Run(folder.name, count_parameters(config.model), tokens, min(tokens, unique), losses[chosen])
