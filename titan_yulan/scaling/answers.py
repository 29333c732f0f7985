"""What a law says to somebody who plans a run. Compute is 6 N D FLOPs, as in the papers that the forms come from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from titan_yulan.errors import UserError
from titan_yulan.scaling.forms import Law

_LOWEST, _HIGHEST = math.log(1e4), math.log(1e14)  # parameters that are looked through
_STEPS = 100
_TOLERANCE = 1e-6  # of the logarithm of the best size: the loss is flat there, so its error is about the square of it
_COMPUTES = 60  # amounts of compute at which two laws are compared
_FINER = 1e-3  # of the logarithm of compute: within it the difference of two laws is a straight line


@dataclass(frozen=True)
class Best:
    """The size that a law thinks best."""

    parameters: float
    tokens: float
    loss: float

    def epochs(self, unique: float) -> float:
        return max(1.0, self.tokens / unique)


def compute_optimal(law: Law, flops: float, unique: float | None = None) -> Best:
    """The size with the lowest loss among all that 6 N D = flops allows.

    Args:
        unique: tokens that are there; None: as many as are wanted.
    """
    size, loss = (float(values[0]) for values in _best(law, np.array([float(flops)]), unique))
    return Best(size, flops / (6 * size), loss)


def _best(law: Law, flops: np.ndarray, unique: float | None) -> tuple[np.ndarray, np.ndarray]:
    """The best size for each of (n,) amounts of compute, and its loss: a grid of sizes, made finer around its lowest
    place."""
    places = np.arange(len(flops))
    low, high = np.full(len(flops), _LOWEST), np.minimum(_HIGHEST, np.log(flops / 6))
    while (high - low).max() > _TOLERANCE:
        log_sizes = np.linspace(low, high, _STEPS, axis=-1)
        losses = law.loss(np.exp(log_sizes), flops[:, None] / (6 * np.exp(log_sizes)), unique)
        lowest = np.argmin(losses, axis=-1)
        low = log_sizes[places, np.maximum(lowest - 1, 0)]
        high = log_sizes[places, np.minimum(lowest + 1, _STEPS - 1)]
    sizes = np.exp((low + high) / 2)
    return sizes, np.asarray(law.loss(sizes, flops / (6 * sizes), unique))


def tokens_for_one_epoch(flops: float, parameters: float) -> float:
    """Unique tokens with which that compute is one epoch: flops / (6 N)."""
    return flops / (6 * parameters)


def epochs_worth(law: Law, worth: float) -> float:
    """Up to which epoch a repeated token is worth at least `worth` of a fresh one: dD'/dD = exp(-(D/U - 1) / R_D), so
    1 + R_D ln(1 / worth).

    Raises:
        UserError: the law has no R_D, or `worth` is not between 0 and 1.
    """
    if not 0 < worth < 1:
        raise UserError(f"--worth {worth:g}: between 0 and 1")
    return 1 + _decay(law) * math.log(1 / worth)


def ranges_won(law: Law, other: Law, unique: float, within: tuple[float, float]) -> list[tuple[float, float]]:
    """Ranges of FLOPs inside `within` in which `other` has a lower loss than `law`, each at its best size, on so many
    unique tokens. Losses are compared at 60 amounts of compute, evenly in their logarithm, and where one overtakes the
    other the place is made finer: a range between two neighbours is not seen. With the laws exchanged the answer is
    the rest of `within`."""
    compute = np.linspace(math.log(within[0]), math.log(within[1]), _COMPUTES)
    gaps = _gaps(law, other, unique, compute)
    wins = gaps < 0
    places = [within[0]] if wins[0] else []
    places += [
        math.exp(_crossing(law, other, unique, compute[i : i + 2], gaps[i : i + 2]))
        for i in np.flatnonzero(wins[1:] != wins[:-1]).tolist()
    ]
    places += [within[1]] if wins[-1] else []
    return list(zip(places[::2], places[1::2], strict=True))


def _gaps(law: Law, other: Law, unique: float, log_flops: np.ndarray) -> np.ndarray:
    """(n,) by how much the loss of `other` is higher."""
    flops = np.exp(log_flops)
    return _best(other, flops, unique)[1] - _best(law, flops, unique)[1]


def _crossing(law: Law, other: Law, unique: float, ends: np.ndarray, gaps: np.ndarray) -> float:
    """Logarithm of the FLOPs at which the losses are equal, between two `ends` whose gaps differ in sign."""
    while ends[1] - ends[0] > _FINER:
        places = np.linspace(ends[0], ends[1], 12)
        inner = np.concatenate([gaps[:1], _gaps(law, other, unique, places[1:-1]), gaps[1:]])
        at = int(np.flatnonzero((inner[1:] < 0) != (inner[:-1] < 0))[0])
        ends, gaps = places[at : at + 2], inner[at : at + 2]
    return float(ends[0] + (ends[1] - ends[0]) * gaps[0] / (gaps[0] - gaps[1]))


def first_win_interval(
    laws: Sequence[Law], others: Sequence[Law], unique: float, within: tuple[float, float]
) -> tuple[float, float]:
    """The 95 % range of the FLOPs from which on the second law first has the lower loss, over pairs of resampled laws.

    Returns:
        Lower and upper end. The beginning of `within` means there or below; infinity means beyond its end or never.
    """
    starts = []
    for law, other in zip(laws, others, strict=False):
        won = ranges_won(law, other, unique, within)
        starts.append(won[0][0] if won else math.inf)
    # a value that occurred, for there is nothing between a number and infinity
    low, high = np.quantile(starts, [0.025, 0.975], method="inverted_cdf")
    return float(low), float(high)


def _decay(law: Law) -> float:
    if "R_D" not in law.coefficients:
        raise UserError("a law of the form 'chinchilla' knows nothing of repeated data: fit --form data_constrained")
    return law.coefficients["R_D"]
