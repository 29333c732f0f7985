"""What a law says to somebody who plans a run. Compute is 6 N D FLOPs, as in the papers that the forms come from."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from titan_yulan.errors import UserError
from titan_yulan.scaling.forms import Law

_LOWEST, _HIGHEST = math.log(1e4), math.log(1e14)  # parameters that are looked through
_STEPS = 400


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

    def loss(log_size: np.ndarray) -> np.ndarray:
        sizes = np.exp(log_size)
        tokens = flops / (6 * sizes)
        return np.asarray(law.loss(sizes, tokens, unique))

    log_size = _minimise(loss, _LOWEST, min(_HIGHEST, math.log(flops / 6)))
    size = math.exp(log_size)
    return Best(size, flops / (6 * size), float(loss(np.array([log_size]))[0]))


def _minimise(function: Callable[[np.ndarray], np.ndarray], low: float, high: float) -> float:
    """Where a function of one variable is lowest: a grid, made finer around its lowest place."""
    while high - low > 1e-9:
        places = np.linspace(low, high, _STEPS)
        lowest = int(np.argmin(function(places)))
        low, high = places[max(lowest - 1, 0)], places[min(lowest + 1, _STEPS - 1)]
    return (low + high) / 2


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


def critical_compute_of(law: Law, other: Law, unique: float) -> float | None:
    """FLOPs from which on `other` has a lower loss than `law`, each at its best size, on so many unique tokens; None:
    it never has, up to 1e24 FLOPs. 0: it always has."""

    def gap(flops: float) -> float:
        return compute_optimal(other, flops, unique).loss - compute_optimal(law, flops, unique).loss

    places = np.exp(np.linspace(math.log(1e12), math.log(1e24), 120)).tolist()
    if gap(places[0]) < 0:
        return 0.0
    for low, high in itertools.pairwise(places):
        if gap(high) < 0:
            while high / low > 1 + 1e-9:
                middle = math.sqrt(low * high)
                low, high = (low, middle) if gap(middle) < 0 else (middle, high)
            return high
    return None


def _decay(law: Law) -> float:
    if "R_D" not in law.coefficients:
        raise UserError("a law of the form 'chinchilla' knows nothing of repeated data: fit --form data_constrained")
    return law.coefficients["R_D"]
