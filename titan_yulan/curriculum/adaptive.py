"""Shares of a mixture that follow perplexities: the topic-based mixture of Llama3-SynE (arXiv 2407.18743).

With the perplexity p_i(t) of topic i's held-out part at adjustment t:

    D_i = p_i(t) - p_i(t-1)                     positive: the topic got worse
    d_i = D_i / max_j |D_j|
    f_i = 1 + alpha d_i w_i
    r_i(t) = r_i(t-1) f_i / sum_j r_j(t-1) f_j

Published are the formula and its meaning, not the values of alpha, w_i and the time between adjustments.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from titan_yulan.config.adaptive import adaptive_groups
from titan_yulan.config.sections import AdaptiveSection
from titan_yulan.errors import UserError

MIXTURE_LOG = "mixture.jsonl"  # in the run folder: every adjustment


@dataclass(frozen=True)
class Adjustment:
    """From row `row` of phase `phase` on, the sources have these shares.

    The first one of a phase, usually at row 0, is the measurement that the next one is compared with: it changes no
    share.

    step: finished steps of the run. shares: source -> share of the rows, summing to 1. perplexity: source -> of its
    held-out part after `step` steps.
    """

    phase: str
    step: int
    row: int
    shares: dict[str, float]
    perplexity: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, entry: Any) -> Adjustment:
        """
        Raises:
            ValueError: `entry` is not what `to_json` made.
        """
        if not isinstance(entry, dict) or entry.keys() != {"phase", "step", "row", "shares", "perplexity"}:
            raise ValueError("not an adjustment of a mixture (phase, step, row, shares, perplexity)")
        shares, row = entry["shares"], entry["row"]
        if type(row) is not int or row < 0 or type(entry["step"]) is not int or not isinstance(entry["phase"], str):
            raise ValueError("phase, step or row is not what it should be")
        if not isinstance(shares, dict) or not all(_is_share(share) for share in shares.values()):
            raise ValueError("shares is not a table of numbers from 0 to 1")
        if not math.isclose(sum(shares.values()), 1, abs_tol=1e-6):
            raise ValueError(f"the shares add up to {sum(shares.values())}, not to 1")
        if not isinstance(entry["perplexity"], dict):
            raise ValueError("perplexity is not a table")
        # one that was not finite was logged as null
        perplexity = {name: math.nan if value is None else value for name, value in entry["perplexity"].items()}
        if not all(isinstance(value, int | float) for value in perplexity.values()):
            raise ValueError("perplexity is not a table of numbers")
        return replace(cls(**entry), perplexity=perplexity)


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def adjusted_shares(
    shares: np.ndarray,
    before: np.ndarray,
    now: np.ndarray,
    alpha: float,
    weights: np.ndarray,
    floor: float = 0.0,
) -> np.ndarray:
    """The formula above, for the topics of one group.

    Args:
        shares: (n,) r(t-1), summing to 1.
        before, now: (n,) perplexities p(t-1) and p(t). If one of them is not finite, or none has changed, the shares
            stay as they are.
        weights: (n,) w, with alpha w < 1, so that no factor reaches 0.
        floor: no share falls below it; what it lacks is taken from the others in proportion.

    Returns:
        (n,) r(t), summing to 1.
    """
    change = now - before
    largest = np.abs(change).max()
    if not np.isfinite(largest) or largest == 0:
        return shares.copy()
    new = shares * (1 + alpha * (change / largest) * weights)
    new /= new.sum()
    low = np.zeros(len(new), dtype=bool)
    while (lower := ~low & (new < floor)).any():  # lifting some may push others below: at most n rounds
        low |= lower
        new[low] = floor
        if not low.all():
            new[~low] *= (1 - floor * low.sum()) / new[~low].sum()
    return new


def next_shares(
    section: AdaptiveSection, shares: Mapping[str, float], before: Mapping[str, float], now: Mapping[str, float]
) -> dict[str, float]:
    """The shares of a whole mix after an adjustment.

    Args:
        shares: source -> its share until now, those of sources that are not read being 0.
        before: source -> perplexity at the last adjustment. A group with a source that was not measured then, because
            the group is a new one, keeps its shares.
        now: source -> perplexity now, at least for every source of a group.
    """
    new = dict(shares)
    for members in adaptive_groups(section, [name for name, share in shares.items() if share]).values():
        inside = np.array([shares[name] for name in members])
        group = inside.sum()
        result = adjusted_shares(
            inside / group,
            np.array([before.get(name, math.nan) for name in members]),
            np.array([now[name] for name in members]),
            section.alpha,
            np.array([section.weights.get(name, 1.0) for name in members]),
            section.floor,
        )
        new |= zip(members, (result * group).tolist(), strict=True)
    return new


def read_history(path: Path, phase: str) -> list[Adjustment]:
    """What a run logged of the mixture of one phase (`mixture.jsonl` in its run folder), in order.

    Raises:
        UserError: the file cannot be read, or does not know the phase.
    """
    key = "phase.mixture_history"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{key}: cannot read {path} ({error}); give the mixture.jsonl of a run folder") from error
    history = []
    for number, line in enumerate(lines, start=1):
        try:
            history.append(Adjustment.from_json(json.loads(line)))
        except ValueError as error:
            raise UserError(f"{key}: {path}, line {number}: {error}; give the mixture.jsonl of a run folder") from error
    found = sorted((entry for entry in history if entry.phase == phase), key=lambda entry: entry.row)
    if not found:
        phases = ", ".join(sorted({entry.phase for entry in history})) or "none"
        raise UserError(f"{key}: {path} knows nothing of phase {phase!r}; its phases: {phases}; set the key in these")
    return found
