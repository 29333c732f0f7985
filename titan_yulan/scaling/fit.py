"""Fits a scaling law to runs, with intervals.

Minimised is the Huber loss of the differences in log loss (Hoffmann et al., arXiv 2203.15556, appendix D.3), from a
grid of starts, by Levenberg-Marquardt with Huber's weights: all starts, and later all resampled sets of runs,
are one batch of small least-squares problems. Coefficients are fitted as logarithms. The intervals are percentiles
over fits to runs drawn with replacement.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from titan_yulan.errors import UserError
from titan_yulan.scaling.forms import FORMS, Law, law_of, log_loss
from titan_yulan.scaling.runs import Run

_STARTS = {  # of the logarithms of E, A, B, a, b, R_D, R_N
    "E": (-1.0, 0.0, 0.7),
    "A": (2.0, 6.0, 12.0),
    "B": (2.0, 6.0, 12.0),
    "a": (-1.6, -0.9, -0.3),
    "b": (-1.6, -0.9, -0.3),
    "R_D": (1.0, 3.0, 6.0),
    "R_N": (1.0,),
}
_KEPT_STARTS = 32
# Beyond these the data say nothing, and the exponential of an exponential overflows.
_LOWER = {"E": -12.0, "A": -8.0, "B": -8.0, "a": -5.0, "b": -5.0, "R_D": -5.0, "R_N": -5.0}
_UPPER = {"E": 5.0, "A": 60.0, "B": 60.0, "a": 1.0, "b": 1.0, "R_D": 12.0, "R_N": 12.0}


@dataclass(frozen=True)
class Fit:
    """A law fitted to runs.

    Attributes:
        law: fitted to all runs.
        samples: (resamples, coefficients) coefficients fitted to resampled runs, in the order of `FORMS`.
        residuals: (runs,) log of measured over fitted loss.
        tied: whether the two exponents were one.
    """

    law: Law
    samples: np.ndarray
    residuals: np.ndarray
    tied: bool

    def interval(self, name: str, level: float) -> tuple[float, float]:
        """Percentile interval of a coefficient that holds `level` of the resampled fits."""
        column = self.samples[:, FORMS[self.law.form].index(name)]
        low, high = np.quantile(column, [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)

    def undetermined(self) -> list[str]:
        """Coefficients that ended at the edge of what is searched, or that the resampled fits disagree on by more than
        a factor of 100."""
        names = FORMS[self.law.form]
        theta = dict(zip(names, self.law.theta.tolist(), strict=True))
        edge = {name for name in names if min(theta[name] - _LOWER[name], _UPPER[name] - theta[name]) < 1e-6}
        ends = {name: self.interval(name, 0.95) for name in names} if len(self.samples) else {}
        return [name for name in names if name in edge or (name in ends and ends[name][1] > 100 * ends[name][0])]


def fit(
    runs: Sequence[Run], form: str, *, tied: bool = False, delta: float = 1e-3, resamples: int = 200, seed: int = 0
) -> Fit:
    """Fit a form of `FORMS` to runs.

    Args:
        tied: one exponent for parameters and tokens, as in arXiv 2305.16264.
        delta: differences in log loss beyond this count linearly, so that a bad run does not bend the law.
        resamples: fits to resampled runs, for the intervals; 0: none.
        seed: of the resampling.

    Raises:
        UserError: runs of two objectives, too few runs, or none that says what repeats or extra parameters are worth.
    """
    _check(runs, form, tied)
    data = np.array([[run.parameters, run.tokens, min(run.unique_tokens, run.tokens)] for run in runs]).T
    losses = np.log([run.loss for run in runs])
    problem = _Problem(data, losses, delta, FORMS[form], tied)
    starts = problem.starts()
    chosen = starts[np.argsort(problem.costs(starts, np.ones((1, len(runs)))))[:_KEPT_STARTS]]
    ends, costs = problem.solve(chosen, np.ones((len(chosen), len(runs))))
    best = ends[np.argmin(costs)]
    draws = np.random.default_rng(seed).multinomial(len(runs), np.full(len(runs), 1 / len(runs)), size=resamples)
    samples, _ = problem.solve(np.repeat(best[None], resamples, axis=0), draws.astype(float))
    law = law_of(problem.whole(best))
    return Fit(law, np.exp(problem.whole(samples)), losses - log_loss(law.theta, *data), tied)


def _check(runs: Sequence[Run], form: str, tied: bool) -> None:
    if len(kinds := sorted({run.objective for run in runs} - {""})) > 1:
        raise UserError(
            f"the runs have different objectives, {' and '.join(kinds)}, whose losses follow different laws: fit one "
            f"at a time, with --objective {kinds[0]} or a narrower list of runs"
        )
    needed = len(FORMS[form]) - tied
    if len(runs) <= needed:
        raise UserError(f"{len(runs)} runs cannot determine the {needed} coefficients of {form!r}: give more than that")
    for name, values in (("parameters", {r.parameters for r in runs}), ("tokens", {r.tokens for r in runs})):
        if len(values) < 3:
            raise UserError(f"the runs have {len(values)} different numbers of {name}; a law in them needs at least 3")
    if form == "data_constrained" and not any(run.tokens > 1.5 * run.unique_tokens for run in runs):
        raise UserError(
            "no run repeats its data, so that R_D is not determined: fit --form chinchilla, or add runs of several "
            "epochs"
        )


class _Problem:
    """The runs, and least squares over batches of starts or of weights of runs. Free coefficients are those of the
    form, without the second exponent where the two are tied."""

    def __init__(self, data: np.ndarray, losses: np.ndarray, delta: float, names: tuple[str, ...], tied: bool) -> None:
        self._data, self._losses, self._delta = data, losses, delta
        free = [name for name in names if not (tied and name == "b")]
        self._columns = [free.index("a" if tied and name == "b" else name) for name in names]
        self._free = free
        self._lower, self._upper = (np.array([limit[name] for name in free]) for limit in (_LOWER, _UPPER))

    def starts(self) -> np.ndarray:
        """(starts, free) the grid."""
        return np.array(list(itertools.product(*(_STARTS[name] for name in self._free))))

    def whole(self, free: np.ndarray) -> np.ndarray:
        """(..., free) -> (..., coefficients of the form)."""
        return free[..., self._columns]

    def _residuals(self, free: np.ndarray) -> np.ndarray:
        return log_loss(self.whole(free), *self._data) - self._losses

    def costs(self, free: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """(batch,) Huber's loss."""
        size = np.abs(self._residuals(free))
        huber = np.where(size < self._delta, size**2 / 2, self._delta * (size - self._delta / 2))
        return (huber * weights).sum(-1)

    def solve(self, free: np.ndarray, weights: np.ndarray, rounds: int = 300) -> tuple[np.ndarray, np.ndarray]:
        """Minimise from every row of `free` (batch, free), with every row of `weights` (batch, runs).

        Returns:
            (batch, free) where it ended, and (batch,) the costs there.
        """
        free, damping = free.copy(), np.full(len(free), 1e-2)
        costs, active = self.costs(free, weights), np.ones(len(free), bool)
        for _ in range(rounds):
            if not active.any():
                break
            here, mass = free[active], weights[active]
            step = self._step(here, mass, damping[active])
            there = np.clip(here + step, self._lower, self._upper)
            after = self.costs(there, mass)
            better = after < costs[active]
            index = np.flatnonzero(active)
            gain = (costs[active] - after) / np.maximum(costs[active], 1e-300)
            free[index[better]], costs[index[better]] = there[better], after[better]
            damping[index] *= np.where(better, 0.2, 4.0)
            active[index] = np.where(better, gain > 1e-10, damping[index] < 1e8)
        return free, costs

    def _step(self, free: np.ndarray, mass: np.ndarray, damping: np.ndarray) -> np.ndarray:
        """One Levenberg-Marquardt step with Huber's weights."""
        residuals = self._residuals(free)
        jacobian = np.stack([self._derivative(free, i) for i in range(free.shape[1])], axis=-1)
        weights = mass * np.minimum(1.0, self._delta / np.maximum(np.abs(residuals), 1e-300))
        weighted = jacobian * weights[..., None]
        normal = np.swapaxes(weighted, 1, 2) @ jacobian
        gradient = (weighted * residuals[..., None]).sum(1)
        diagonal = np.einsum("bii->bi", normal)
        # at a limit a coefficient that pushes outwards is left where it is
        held = ((free <= self._lower) & (gradient > 0)) | ((free >= self._upper) & (gradient < 0))
        gradient = np.where(held, 0.0, gradient)
        normal = np.where(held[:, :, None] | held[:, None, :], 0.0, normal)
        scale = diagonal * (1 + damping[:, None]) + 1e-12 * diagonal.max(1, keepdims=True) + 1e-300
        normal[:, range(free.shape[1]), range(free.shape[1])] = np.where(held, 1.0, scale)
        return -np.linalg.solve(normal, gradient[..., None])[..., 0]

    def _derivative(self, free: np.ndarray, index: int) -> np.ndarray:
        moved = free.astype(complex)
        moved[:, index] += 1e-30j
        return log_loss(self.whole(moved), *self._data).imag / 1e-30
