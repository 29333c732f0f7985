"""A fit finds the law that made its runs, and says when it cannot."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.scaling.making import LAW, PLANTED, make_runs
from titan_yulan.errors import UserError
from titan_yulan.scaling.fit import fit
from titan_yulan.scaling.forms import DATA_CONSTRAINED, Law


def test_recovers_the_law_without_noise():
    found = fit(make_runs(), "data_constrained", resamples=0)
    assert found.law.coefficients == pytest.approx(PLANTED, rel=1e-6)
    assert np.abs(found.residuals).max() < 1e-9


def test_recovers_a_tied_law():
    law = Law("data_constrained", {**PLANTED, "b": PLANTED["a"]})
    found = fit(make_runs(law), "data_constrained", tied=True, resamples=3)
    assert found.law.coefficients == pytest.approx(law.coefficients, rel=1e-6)
    assert found.samples.shape == (3, 7)
    assert (found.samples[:, 3] == found.samples[:, 4]).all()


def test_recovers_chinchilla():
    law = Law("chinchilla", {name: PLANTED[name] for name in ("E", "A", "B", "a", "b")})
    runs = [replace(run, unique_tokens=run.tokens, loss=law.loss(run.parameters, run.tokens)) for run in make_runs()]
    assert fit(runs, "chinchilla", resamples=0).law.coefficients == pytest.approx(law.coefficients, rel=1e-6)


def test_intervals_cover_the_planted_law():
    found = fit(make_runs(noise=0.005, seed=3), "data_constrained", resamples=100, seed=1)
    for name in DATA_CONSTRAINED:
        low, high = found.interval(name, 0.999)
        assert low < PLANTED[name] < high
        assert high > low
    again = fit(make_runs(noise=0.005, seed=3), "data_constrained", resamples=100, seed=1)
    assert (again.samples == found.samples).all()


def test_a_bad_run_does_not_bend_the_law():
    runs = make_runs()
    runs[7] = replace(runs[7], loss=3 * runs[7].loss)
    found = fit(runs, "data_constrained", resamples=0).law
    assert found.loss(5e8, 1e10, 1e9) == pytest.approx(LAW.loss(5e8, 1e10, 1e9), rel=2e-3)


def test_what_runs_do_not_determine_is_named():
    law = Law("chinchilla", {"E": 2.0, "A": 400.0, "B": 1e-9, "a": 0.3, "b": 0.3})  # tokens have no effect
    noise = np.exp(0.005 * np.random.default_rng(0).standard_normal(72))
    runs = [
        replace(run, loss=float(law.loss(run.parameters, run.tokens) * factor))
        for run, factor in zip(make_runs(), noise, strict=True)
    ]
    assert "B" in fit(runs, "chinchilla", resamples=60).undetermined()
    assert fit(make_runs(noise=0.005), "data_constrained", resamples=60).undetermined() == []


def test_refusals():
    runs = make_runs()
    with pytest.raises(UserError, match="7 runs cannot determine the 7 coefficients"):
        fit(runs[:7], "data_constrained")
    with pytest.raises(UserError, match="1 different numbers of parameters"):
        fit([replace(run, parameters=1e8) for run in runs], "chinchilla")
    with pytest.raises(UserError, match=r"no run repeats its data.*--form chinchilla"):
        fit([replace(run, unique_tokens=run.tokens) for run in runs], "data_constrained")
    two = [replace(run, objective=kind) for run in runs for kind in ("masked_diffusion", "autoregressive")]
    with pytest.raises(UserError, match=r"autoregressive and masked_diffusion.*--objective autoregressive"):
        fit(two, "data_constrained")
