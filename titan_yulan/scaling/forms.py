"""Loss as a function of parameters N, trained tokens D and unique tokens U.

    Chinchilla (Hoffmann et al., arXiv 2203.15556):         L = E + A / N^a + B / D^b
    data-constrained (Muennighoff et al., arXiv 2305.16264): L = E + A / N'^a + B / D'^b
        D' = U + U R_D (1 - exp(-(D / U - 1) / R_D))              repeated tokens are worth less and less
        N' = U_N + U_N R_N (1 - exp(-(N / U_N - 1) / R_N))        so are parameters beyond what U can use:
        U_N = min(N, N_opt(U)),  N_opt(D) = G (D G)^(b/a),  G = (a A / (b B))^(1 / (a + b))

A law is a vector of logarithms, because that is what is fitted: all coefficients are positive. The formulas take any
array library type of numpy, complex numbers too: the fit differentiates by the complex step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from titan_yulan.errors import UserError

CHINCHILLA = ("E", "A", "B", "a", "b")
DATA_CONSTRAINED = (*CHINCHILLA, "R_D", "R_N")
FORMS = {"chinchilla": CHINCHILLA, "data_constrained": DATA_CONSTRAINED}
_LARGEST_LOG = 40.0  # of an amount over the fresh one; beyond it all is saturated, and an exponential would overflow


@dataclass(frozen=True)
class Law:
    """A form with its coefficients, by name."""

    form: str
    coefficients: Mapping[str, float]

    @property
    def theta(self) -> np.ndarray:
        """(coefficients,) logarithms, in the order of `FORMS`."""
        return np.log([self.coefficients[name] for name in FORMS[self.form]])

    def loss(self, parameters: Any, tokens: Any, unique: Any = None) -> Any:
        """Loss in nats; arguments broadcast.

        Args:
            unique: unique tokens; None: as many as tokens.
        """
        tokens = np.asarray(tokens, float)
        unique = tokens if unique is None else np.minimum(unique, tokens)
        flat = np.broadcast_arrays(np.asarray(parameters, float), tokens, unique)
        values = np.exp(log_loss(self.theta, *(array.ravel() for array in flat))).reshape(flat[0].shape)
        return values if values.ndim else float(values)


def law_of(theta: np.ndarray) -> Law:
    """The law of a vector of logarithms."""
    form = "chinchilla" if len(theta) == len(CHINCHILLA) else "data_constrained"
    return Law(form, dict(zip(FORMS[form], np.exp(theta).tolist(), strict=True)))


def log_loss(theta: np.ndarray, parameters: np.ndarray, tokens: np.ndarray, unique: np.ndarray) -> np.ndarray:
    """log L.

    Args:
        theta: (..., coefficients) logarithms, in the order of `FORMS`; their number tells the form.
        parameters, tokens, unique: (runs,), unique <= tokens.

    Returns:
        (..., runs).
    """
    e, log_a, log_b = (theta[..., i, None] for i in range(3))
    a, b = (np.exp(theta[..., i, None]) for i in (3, 4))
    size, data = np.log(parameters), np.log(tokens)
    if theta.shape[-1] == len(DATA_CONSTRAINED):
        best = _log_optimal_parameters(theta[..., None, :], np.log(unique))
        # a complex minimum compares real parts first, which is what differentiation needs
        size = _log_effective(size, np.minimum(best, size), theta[..., 6, None])
        data = _log_effective(data, np.log(unique), theta[..., 5, None])
    terms = [e + 0 * size, log_a - a * size, log_b - b * data]
    shift = np.max([np.real(term) for term in terms], axis=0)
    return shift + np.log(sum(np.exp(term - shift) for term in terms))


def _log_optimal_parameters(theta: np.ndarray, log_tokens: Any) -> np.ndarray:
    log_amplitude_a, log_amplitude_b, log_a, log_b = (theta[..., i] for i in (1, 2, 3, 4))
    a, b = np.exp(log_a), np.exp(log_b)
    log_g = (log_a + log_amplitude_a - log_b - log_amplitude_b) / (a + b)
    return log_g + b / a * (log_tokens + log_g)


def _log_effective(log_amount: np.ndarray, log_fresh: np.ndarray, log_decay: np.ndarray) -> np.ndarray:
    """log of U + U R (1 - exp(-(X / U - 1) / R))."""
    decay = np.exp(log_decay)
    ratio = np.exp(np.minimum(log_amount - log_fresh, _LARGEST_LOG))
    return log_fresh + np.log(1 + decay * (1 - np.exp(-(ratio - 1) / decay)))


PUBLISHED = {
    # github.com/huggingface/datablations, the fit of arXiv 2305.16264 to autoregressive models
    "datablations": Law(
        "data_constrained",
        {
            "E": math.exp(0.6254804),
            "A": math.exp(6.255414),
            "B": math.exp(7.3049974),
            "a": 0.3526596,
            "b": 0.3526596,
            "R_D": 15.387756,
            "R_N": 5.309743,
        },
    )
}


def critical_compute(unique: float) -> float:
    """FLOPs above which masked diffusion beats autoregressive training on so many unique tokens U, as published
    (arXiv 2507.15857): 2.12 * 10^1.956 * U^2.174.

    Raises:
        UserError: `unique` is not positive.
    """
    if unique <= 0:
        raise UserError(f"--unique-tokens {unique:g}: at least 1")
    return 2.12 * 10**1.956 * unique**2.174
