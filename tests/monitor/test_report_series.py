"""Records made short: extremes survive, means are those of all records."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from titan_yulan.monitor.report_series import Binned, shorten_steps

numbers = st.one_of(st.none(), st.floats(-1e6, 1e6), st.just(math.nan))


@settings(max_examples=40)
@given(st.lists(st.tuples(numbers, st.integers(1, 9), st.sampled_from("ab")), max_size=40), st.integers(1, 7))
def test_bins_hold_mean_and_extremes(records: list[tuple[float | None, int, str]], size: int) -> None:
    bins = Binned(size)
    for step, (value, weight, phase) in enumerate(records, 1):
        bins.add(step, 10 * step, {"x": value}, {"x": weight}, phase)
    bins.finish()
    begin = 0
    for index, end in enumerate(bins.step):
        part = records[begin:end]
        assert len(part) <= size and len({phase for _, _, phase in part}) == 1
        known = [(value, weight) for value, weight, _ in part if value is not None and math.isfinite(value)]
        if known:
            mean = sum(v * w for v, w in known) / sum(w for _, w in known)
            assert bins.mean["x"][index] == pytest.approx(mean, rel=1e-5, abs=1e-5)
            assert bins.low["x"][index] == pytest.approx(min(v for v, _ in known), rel=1e-6)
            assert bins.high["x"][index] == pytest.approx(max(v for v, _ in known), rel=1e-6)
        elif "x" in bins.mean:
            assert bins.mean["x"][index] is None
        begin = end
    assert begin == len(records) and bins.tokens == [10 * step for step in bins.step]


def line(step: int, loss: float | None, norm: float | None, phase: str, **remark: str) -> dict[str, Any]:
    places = {"step": step, "tokens": 4 * step, "phase": phase, "learning_rate": 0.1, "cross_entropy": loss}
    return {**places, "loss": loss, "gradient_norm": norm, "source_loss": {}, "source_tokens": {"a": 4}, **remark}


@settings(max_examples=3, deadline=None)
@given(st.integers(1, 9000), st.integers(1, 9000), st.integers(2, 8998), st.integers(1, 9000))
def test_spikes_ends_of_phases_and_remarks_survive(spike: int, dip: int, end: int, bad: int) -> None:
    lines = []
    for step in range(1, 9001):
        loss = 3 + (step % 13) / 100 + 50 * (step == spike)
        norm = 1 + (step % 7) / 100 - 0.9 * (step == dip)
        remark = {"warning": "spike"} if step == bad else {}
        lines.append(line(step, loss, norm, "one" if step <= end else "two", **remark))
    steps = shorten_steps(lines, 9000, 100)
    kept = [row["step"] for row in steps.kept]
    assert kept == sorted(set(kept)) and len(kept) < 7000 and steps.total == 9000
    assert {1, spike, dip, end, end + 1, bad, 9000} <= set(kept)
    assert steps.flagged == [(bad, 4 * bad, "spike")]
    assert [(p.name, p.first_step, p.last_step, p.last_tokens) for p in steps.phases] == [
        ("one", 0, end, 4 * end), ("two", end, 9000, 36000),
    ]  # fmt: skip
    assert max(row["loss"] for row in steps.kept) == pytest.approx(max(row["loss"] for row in lines))


def test_the_smoothed_loss_has_no_bias_and_passes_over_what_is_not_finite() -> None:
    steps = shorten_steps([line(n, None if n == 3 else 2.0, 1.0, "one") for n in range(1, 8)], 7, 100)
    assert [row["smooth"] for row in steps.kept] == pytest.approx([2.0] * 7)
    steps = shorten_steps([line(1, None, None, "one"), line(2, 4.0, 1.0, "one")], 2, 100)
    assert [row["smooth"] for row in steps.kept] == [None, 4.0]
