"""A fit as a file: JSON with the law, its intervals, the resampled coefficients and the runs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from titan_yulan.errors import UserError
from titan_yulan.monitor.metrics import write_atomically
from titan_yulan.scaling.fit import Fit
from titan_yulan.scaling.forms import FORMS, PUBLISHED, Law
from titan_yulan.scaling.runs import Run

LEVEL = 0.95


@dataclass(frozen=True)
class Stored:
    """A law and what its intervals come from.

    Attributes:
        name: for tables.
        samples: (resamples, coefficients); may be empty.
        runs: that it was fitted to; none of a published law.
    """

    name: str
    law: Law
    samples: np.ndarray
    runs: tuple[Run, ...] = ()

    @property
    def laws(self) -> list[Law]:
        """The resampled laws."""
        names = FORMS[self.law.form]
        return [Law(self.law.form, dict(zip(names, row, strict=True))) for row in self.samples.tolist()]

    def beyond(self, parameters: float, tokens: float, epochs: float) -> bool:
        """Whether one of these is larger than in all runs; rounding apart. Never, if the runs are not known."""
        if not self.runs:
            return False
        most = (
            max(run.parameters for run in self.runs),
            max(run.tokens for run in self.runs),
            max(run.epochs for run in self.runs),
        )
        return any(asked > 1.001 * known for asked, known in zip((parameters, tokens, epochs), most, strict=True))

    def losses(self, parameters: float, tokens: float, unique: float) -> tuple[float, tuple[float, float] | None]:
        """The loss, and the interval that holds 95 % of the resampled laws' losses; None: there are none."""
        loss = self.law.loss(parameters, tokens, unique)
        if not len(self.samples):
            return loss, None
        losses = [law.loss(parameters, tokens, unique) for law in self.laws]
        low, high = np.quantile(losses, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return loss, (float(low), float(high))


def save_fit(path: Path, fit: Fit, runs: list[Run]) -> None:
    """Write a fit."""
    intervals = {name: fit.interval(name, LEVEL) for name in FORMS[fit.law.form]} if len(fit.samples) else {}
    content: dict[str, Any] = {
        "form": fit.law.form,
        "coefficients": dict(fit.law.coefficients),
        "intervals": intervals,
        "tied": fit.tied,
        "samples": fit.samples.tolist(),
        "runs": [asdict(run) for run in runs],
    }
    write_atomically(path, json.dumps(content, indent=1) + "\n")


def open_fit(name: str) -> Stored:
    """A file that `save_fit` wrote, or a published law by its name.

    Raises:
        UserError: it is neither.
    """
    if name in PUBLISHED:
        law = PUBLISHED[name]
        return Stored(name, law, np.zeros((0, len(law.coefficients))))
    try:
        content = json.loads(Path(name).read_text(encoding="utf-8"))
        names = FORMS[content["form"]]
        law = Law(content["form"], {key: float(content["coefficients"][key]) for key in names})
        samples = np.array(content["samples"], float).reshape(-1, len(names))
        runs = tuple(Run(**run) for run in content.get("runs", ()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{name} is no fit ({error}): name a file that 'titan-yulan scaling fit --output' wrote, or "
            f"{', '.join(PUBLISHED)}"
        ) from None
    return Stored(Path(name).stem, law, samples, runs)
