"""Runs that follow a law."""

from __future__ import annotations

import numpy as np

from titan_yulan.scaling.forms import Law
from titan_yulan.scaling.runs import Run

PLANTED = {"E": 1.9, "A": 500.0, "B": 1500.0, "a": 0.34, "b": 0.37, "R_D": 15.0, "R_N": 5.0}
LAW = Law("data_constrained", PLANTED)


def make_runs(law: Law = LAW, noise: float = 0.0, seed: int = 0) -> list[Run]:
    """A grid of sizes, unique tokens and epochs; losses with normal noise in their logarithm."""
    random = np.random.default_rng(seed)
    runs = []
    for unique in (1e8, 1e9, 1e10):
        for parameters in (1e7, 3e7, 1e8, 3e8, 1e9, 3e9):
            for epochs in (1, 4, 16, 64):
                loss = law.loss(parameters, unique * epochs, unique) * np.exp(noise * random.standard_normal())
                runs.append(Run(f"{parameters:g}", parameters, unique * epochs, unique, float(loss)))
    return runs
