"""Shares that follow perplexities, and plans whose mix changes inside a phase."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.curriculum.making import configuration, phase
from titan_yulan.config.sections import AdaptiveSection, RunConfig
from titan_yulan.config.values import Duration
from titan_yulan.curriculum.adaptive import Adjustment, adjusted_shares, next_shares, read_history
from titan_yulan.curriculum.controller import MixtureController
from titan_yulan.curriculum.plan import Plan
from titan_yulan.errors import UserError

TOPICS = st.integers(2, 12).flatmap(
    lambda n: st.tuples(
        st.lists(st.floats(0.01, 1), min_size=n, max_size=n),
        st.lists(st.floats(1, 1e6), min_size=n, max_size=n),
        st.lists(st.floats(1, 1e6), min_size=n, max_size=n),
        st.lists(st.floats(0, 1), min_size=n, max_size=n),
    )
)
BATCH, LENGTH = 8, 16


def test_the_worked_example() -> None:
    """By hand: D = (.5, -1, 0, 2), d = (.25, -.5, 0, 1), f = (1.025, .95, 1, 1.1), sum of r f = 1.005."""
    shares = np.array([0.4, 0.3, 0.2, 0.1])
    before, now = np.array([10.0, 12.0, 9.0, 20.0]), np.array([10.5, 11.0, 9.0, 22.0])
    new = adjusted_shares(shares, before, now, 0.1, np.ones(4))
    np.testing.assert_allclose(new, [0.40796020, 0.28358209, 0.19900498, 0.10945274], atol=5e-9)
    np.testing.assert_allclose(new, np.array([0.41, 0.285, 0.2, 0.11]) / 1.005, rtol=1e-15)


@given(TOPICS, st.floats(0.001, 0.999), st.floats(0, 1))
@settings(max_examples=200)
def test_shares_sum_to_one_keep_the_floor_and_follow_the_change(topics: Any, alpha: float, low: float) -> None:
    shares, before, now, weights = (np.array(values) for values in topics)
    shares /= shares.sum()
    floor = low * shares.min()
    new = adjusted_shares(shares, before, now, alpha, weights, floor)
    assert new.sum() == pytest.approx(1) and (new >= floor * (1 - 1e-12)).all() and (new > 0).all()
    free = adjusted_shares(shares, before, now, alpha, weights)
    growth, pull = free / shares, (now - before) * weights
    order = np.argsort(pull)
    assert (np.diff(growth[order]) >= -1e-9 * growth.max()).all()  # what got worse grows, in the order of how much
    lifted = new[new > floor * (1 + 1e-9)] / free[new > floor * (1 + 1e-9)]
    assert np.allclose(lifted, lifted[:1], rtol=1e-9)  # the others give in proportion


@pytest.mark.parametrize("now", [[3.0, 4.0], [math.inf, 4.0], [math.nan, 5.0]])
def test_without_a_measured_change_shares_stay(now: list[float]) -> None:
    shares = np.array([0.25, 0.75])
    assert adjusted_shares(shares, np.array([3.0, 4.0]), np.array(now), 0.5, np.ones(2)).tolist() == shares.tolist()


def test_groups_keep_their_share_of_the_mix_and_other_sources_theirs() -> None:
    section = AdaptiveSection(every=Duration(1, "steps"), alpha=0.5, groups={"en": ("en-*",), "zh": ("zh-a", "zh-b")})
    shares = {"code": 0.2, "en-a": 0.4, "en-b": 0.2, "zh-a": 0.1, "zh-b": 0.1, "unread": 0.0}
    before = dict.fromkeys(shares, 10.0)
    new = next_shares(section, shares, before, {**before, "en-b": 11.0, "zh-a": 9.0, "code": 99.0})
    assert new["code"] == 0.2 and new["unread"] == 0
    assert new["en-a"] + new["en-b"] == pytest.approx(0.6) and new["zh-a"] + new["zh-b"] == pytest.approx(0.2)
    # inside a group alone: the factor is 1.5 for en-b and 0.5 for zh-a
    assert new["en-b"] == pytest.approx(0.6 * 0.3 / 0.7) and new["zh-a"] == pytest.approx(0.2 * 0.05 / 0.15)
    # a group that was not measured whole before waits
    assert next_shares(section, shares, {"zh-a": 10.0, "en-a": 9.0, "en-b": 9.0}, before)["zh-a"] == 0.1


def adaptive_run(length: str = "50 steps", **changes: Any) -> RunConfig:
    section = AdaptiveSection(every=Duration(10, "steps"), alpha=0.5)
    first = phase("a", length, {"x": 0.5, "y": 0.3, "z": 0.2}, batch=BATCH, adaptive=section, **changes)
    return configuration(first, phase("b", "20 steps", {"x": 1, "z": 1}, batch=BATCH))


def adjustment(row: int, *shares: float) -> Adjustment:
    return Adjustment("a", row // BATCH, row, dict(zip("xyz", shares, strict=True)), dict.fromkeys("xyz", 1.0))


@given(st.lists(st.integers(1, 399), max_size=4, unique=True), st.lists(st.integers(0, 400), min_size=2, max_size=5))
@settings(max_examples=40, deadline=None)
def test_rows_before_a_change_stay_and_tapes_go_on_without_a_gap(changes: list[int], cuts: list[int]) -> None:
    random = np.random.default_rng(len(changes))
    history = [adjustment(row, *random.dirichlet(np.ones(3)).tolist()) for row in sorted(changes)]
    plan, static = Plan(adaptive_run(), history=history), Plan(adaptive_run())
    source, place = plan.phases[0].rows(0, 400)
    first = min(changes, default=400)
    for ours, others in zip((source, place), static.phases[0].rows(0, first), strict=True):
        np.testing.assert_array_equal(ours[:first], others)
    for index in range(3):  # every token once, in the order of the tape
        np.testing.assert_array_equal(place[source == index], LENGTH * np.arange((source == index).sum()))
    for cut in cuts:
        counts = np.bincount(source[:cut], minlength=3)
        np.testing.assert_array_equal(plan.phases[0].counts(cut), counts)
        assert plan.phases[0].tapes(cut) == tuple(LENGTH * counts)
        np.testing.assert_array_equal(plan.phases[0].rows(cut, 400)[1], place[cut:])
    assert plan.phases[1].tape_start == tuple(LENGTH * np.bincount(source, minlength=3))
    assert plan.end == static.end


def test_after_a_change_the_rows_have_its_shares() -> None:
    plan = Plan(adaptive_run("500 steps"), history=[adjustment(800, 0.1, 0.1, 0.8), adjustment(2400, 0.6, 0.4, 0.0)])
    source, _ = plan.phases[0].rows(0, 4000)
    for start, stop, shares in ((0, 800, (0.5, 0.3, 0.2)), (800, 2400, (0.1, 0.1, 0.8)), (2400, 4000, (0.6, 0.4, 0))):
        counts = np.bincount(source[start:stop], minlength=3)
        assert np.abs(counts - np.array(shares) * (stop - start)).max() <= 2
    assert plan.phases[0].shares(2399)["z"] == 0.8 and plan.phases[0].shares(2400)["z"] == 0


def test_the_controller_measures_first_and_then_adjusts_at_every_interval() -> None:
    plan = Plan(adaptive_run())
    controller = MixtureController(plan)
    assert [step for step in range(71) if controller.due(step)] == [0, 10, 20, 30, 40]
    assert [controller.constant_until(step) for step in (0, 9, 10, 45, 50)] == [10, 10, 20, 50, 70]
    first, shares = controller.adjust(0, {"x": 1.0, "y": 2.0, "z": 3.0})
    assert first.shares == shares == {"x": 0.5, "y": 0.3, "z": 0.2} and not controller.due(0)
    assert first.perplexity["y"] == pytest.approx(math.e**2)
    second, before = controller.adjust(10, {"x": 1.0, "y": 2.0, "z": 3.1})
    assert before == shares and second.row == 80
    assert second.shares["z"] == pytest.approx(0.2 * 1.5 / 1.1) and second.shares["x"] == pytest.approx(0.5 / 1.1)
    assert plan.phases[0].shares(80) == second.shares and plan.history == (first, second)
    diverged, _ = controller.adjust(20, {"x": 1e6, "y": 2.0, "z": 3.0})
    assert diverged.shares == second.shares and diverged.perplexity["x"] == math.inf
    with pytest.raises(UserError, match=r"adaptive.groups.all: the held-out part of 'y' is shorter than one row"):
        controller.adjust(30, {"x": 1.0, "z": 2.0})


def test_a_phase_that_replays_or_does_not_adapt_adjusts_nothing() -> None:
    replayed = adaptive_run(mixture_history="mixture.jsonl")
    for config in (replayed, replace(replayed, phases=replayed.phases[1:])):
        controller = MixtureController(Plan(config))
        assert not any(controller.due(step) for step in range(50))
        assert controller.constant_until(0) == Plan(config).phases[0].end.step


def test_history_is_read_as_it_was_logged(tmp_path: Path) -> None:
    entries = [adjustment(0, 0.5, 0.3, 0.2), replace(adjustment(80, 1 / 3, 1 / 3, 1 / 3), perplexity={"x": math.inf})]
    lines = [json.dumps(entry.to_json()).replace("Infinity", "null") for entry in entries]
    other = json.dumps(replace(entries[0], phase="b").to_json())
    (tmp_path / "mixture.jsonl").write_text("\n".join([*lines, other]))
    read = read_history(tmp_path / "mixture.jsonl", "a")
    assert read[0] == entries[0] and read[1].shares == entries[1].shares and math.isnan(read[1].perplexity["x"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"line 1: Expecting"),
        ('{"step": 1}', r"line 1: not an adjustment"),
        (json.dumps(adjustment(0, 0.5, 0.5, 0.5).to_json()), "line 1: the shares add up to 1.5, not to 1"),
        (json.dumps(adjustment(0, 1.5, -0.5, 0).to_json()), "line 1: shares is not a table of numbers from 0 to 1"),
        (json.dumps(adjustment(-8, 1, 0, 0).to_json()), "line 1: phase, step or row"),
        (json.dumps({**adjustment(8, 1, 0, 0).to_json(), "perplexity": {"x": []}}), "line 1: perplexity is not a"),
        (json.dumps(adjustment(0, 1, 0, 0).to_json()), "knows nothing of phase 'c'; its phases: a"),
    ],
)
def test_a_history_that_is_none_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "mixture.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        read_history(tmp_path / "mixture.jsonl", "c")
    with pytest.raises(UserError, match=r"phase.mixture_history: cannot read .*give the mixture.jsonl of a run folder"):
        read_history(tmp_path / "none.jsonl", "a")
