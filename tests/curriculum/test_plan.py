"""The plan of a run: positions, tapes and rows across phases."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.curriculum.making import configuration, phase
from titan_yulan.config.sections import PhaseSection, SourceSection
from titan_yulan.config.values import Duration, Tokens
from titan_yulan.curriculum.plan import Plan, phase_steps
from titan_yulan.curriculum.position import Position, Timeline
from titan_yulan.errors import UserError

MIX = {"code": 0.5, "math": 0.3, "prose": 0.2}


@st.composite
def curricula(draw: st.DrawFn) -> list[PhaseSection]:
    phases = []
    for index in range(draw(st.integers(1, 4))):
        mix = {name: draw(st.sampled_from([0.0, 0.1, 1.0, 3.0])) for name in MIX}
        mix["code"] += 0.5
        length = draw(st.sampled_from(["7 steps", "100 rows", "5000 tokens", "40 steps"]))
        options = {"sequence_length": draw(st.sampled_from([8, 16, 48])), "batch": draw(st.integers(1, 12))}
        phases.append(phase(f"phase{index}", length, mix, **options))
    return phases


@given(curricula())
@settings(max_examples=50, deadline=None)
def test_positions_chain(phases: list[PhaseSection]) -> None:
    plan = Plan(configuration(*phases))
    position = Position(0, 0, 0)
    for section, planned in zip(phases, plan.phases, strict=True):
        assert (planned.start, planned.first_row) == (position, position.row)
        rows = planned.steps * section.batch.rows(section.sequence_length)
        position = Position(
            position.step + planned.steps, position.row + rows, position.token + rows * section.sequence_length
        )
        assert planned.end == position and planned.rows_total == rows
        for step in range(planned.steps):
            assert plan.phase_at(planned.start.step + step) is planned
            assert plan.position(planned.start.step + step) == planned.position(step)
    assert plan.end == position == plan.position(position.step)
    assert plan.phase_at(position.step) is plan.phases[-1]


@given(curricula(), st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_no_token_of_a_tape_is_a_target_twice_and_none_is_left_out(phases: list[PhaseSection], began: int) -> None:
    """Across phases with other sequence lengths: a row's targets are the tokens after its first."""
    plan = Plan(configuration(*phases), tapes={"math": began})
    targets: dict[int, list[int]] = {source: [] for source in range(3)}
    for planned in plan.phases:
        source, place = planned.rows(0, planned.rows_total)
        for s, start in zip(source.tolist(), place.tolist(), strict=True):
            targets[s] += range(start + 1, start + 1 + planned.sequence_length)
    stands = plan.phases[-1].tapes(plan.phases[-1].rows_total)
    for source, tokens in targets.items():
        begin = began if plan.sources[source] == "math" else 0
        assert tokens == list(range(begin + 1, stands[source] + 1))


@given(curricula(), st.integers(0, 30))
@settings(max_examples=30, deadline=None)
def test_tapes_stand_where_the_rows_before_ended(phases: list[PhaseSection], row: int) -> None:
    planned = Plan(configuration(*phases)).phases[-1]
    source, place = planned.rows(0, row)
    expected = list(planned.tape_start)
    for s, start in zip(source.tolist(), place.tolist(), strict=True):
        assert start == expected[s]
        expected[s] += planned.sequence_length
    assert planned.tapes(row) == tuple(expected)


@given(st.integers(1, 200), st.integers(1, 8), st.sampled_from(["steps", "rows", "tokens"]))
@settings(max_examples=40, deadline=None)
def test_a_longer_phase_has_the_same_rows_first(steps: int, factor: int, unit: str) -> None:
    size = {"steps": 1, "rows": 8, "tokens": 8 * 16}[unit]
    short = Plan(configuration(phase("a", f"{steps * size} {unit}", MIX))).phases[0]
    long = Plan(configuration(phase("a", f"{steps * size * factor} {unit}", MIX))).phases[0]
    assert long.steps == short.steps * factor
    for before, after in zip(short.rows(0, short.rows_total), long.rows(0, short.rows_total), strict=True):
        assert (before == after).all()


def test_the_order_of_the_sources_in_the_file_changes_nothing() -> None:
    table = {name: SourceSection(path=name) for name in MIX}
    mixes = [MIX, dict(reversed(MIX.items()))]
    tables = [table, dict(reversed(table.items()))]
    plans = [Plan(configuration(phase("a", "50 steps", mix), sources=t)) for mix in mixes for t in tables]
    for plan in plans[1:]:
        assert plan.sources == plans[0].sources
        for one, other in zip(plan.phases[0].rows(0, 400), plans[0].phases[0].rows(0, 400), strict=True):
            assert (one == other).all()


def test_a_source_that_a_phase_does_not_mix_changes_nothing_in_it() -> None:
    table = {name: SourceSection(path=name) for name in (*MIX, "aaa_added")}
    with_it = Plan(configuration(phase("a", "50 steps", MIX), sources=table))
    without = Plan(configuration(phase("a", "50 steps", MIX)))
    named = [[p.sources[s] for s in p.phases[0].rows(0, 400)[0]] for p in (with_it, without)]
    assert named[0] == named[1]
    assert (with_it.phases[0].rows(0, 400)[1] == without.phases[0].rows(0, 400)[1]).all()


@pytest.mark.parametrize("change", [{"seed": 8}, {"name": "b"}])
def test_seed_and_name_of_the_phase_decide_the_order(change: dict) -> None:
    config = configuration(phase("a", "50 steps", MIX))
    if "seed" in change:
        other = replace(config, run=replace(config.run, **change))
    else:
        other = replace(config, phases=(replace(config.phases[0], **change),))
    rows = [Plan(c).phases[0].rows(0, 400)[0] for c in (config, other)]
    assert (rows[0] != rows[1]).any()


@pytest.mark.parametrize(
    ("length", "steps"),
    [
        ("10 steps", 10),
        ("80 rows", 10),
        ("87 rows", 10),
        ("88 rows", 11),
        ("1280 tokens", 10),
        ("1407 tokens", 10),
        ("1408", 11),
        ("1.28K", 10),
    ],
)
def test_a_length_is_rounded_down_to_whole_batches(length: str, steps: int) -> None:
    assert phase_steps(phase("a", length, MIX)) == steps


@pytest.mark.parametrize("length", ["16.1K", "4.1M", "8.2M", "64.4K", "2.3M"])
def test_a_length_that_is_whole_batches_loses_none(length: str) -> None:
    """Of 100 tokens each."""
    expected = round(float(length[:-1]) * 10) * {"K": 1, "M": 1000}[length[-1]]
    assert phase_steps(phase("a", length, MIX, sequence_length=10, batch=10)) == expected


def test_a_length_shorter_than_a_batch_is_refused_with_the_batch_in_the_message() -> None:
    with pytest.raises(UserError, match=r"phase 'a' is shorter than .* length = '7 rows', one batch is 8 rows = 128"):
        phase_steps(phase("a", "7 rows", MIX))


def test_amounts_are_shares_and_together_the_length() -> None:
    amounts = {"code": Tokens(6400), "math": Tokens(3200), "prose": Tokens(3300)}
    planned = Plan(configuration(phase("a", None, amounts))).phases[0]
    assert planned.steps == 100  # 12900 tokens are 100.8 batches of 128
    assert planned.weights.tolist() == pytest.approx([6400 / 12900, 3200 / 12900, 3300 / 12900])
    source, _ = planned.rows(0, planned.rows_total)
    assert np.bincount(source).tolist() == pytest.approx([6400 / 12900 * 800, 3200 / 12900 * 800, 204.65], abs=2)


def test_weights_need_not_sum_to_one() -> None:
    planned = Plan(configuration(phase("a", "9 steps", {"code": 3, "math": 1}))).phases[0]
    assert planned.weights.tolist() == [0.75, 0.25]


def test_a_batch_in_tokens() -> None:
    section = phase("a", "9 steps", MIX, sequence_length=4096, batch=Tokens(4_128_768))
    assert section.batch.rows(4096) == 1008


def test_a_distance_in_whole_steps_of_the_phase() -> None:
    planned = Plan(configuration(phase("a", "200 steps", MIX))).phases[0]
    durations = ["50 steps", "80 rows", "1280 tokens", "10%", "1 tokens"]
    assert [planned.steps_in(Duration.parse(text)) for text in durations] == [50, 10, 10, 20, 1]


def test_a_run_that_begins_elsewhere() -> None:
    start = Position(1000, 8000, 123456)
    plan = Plan(configuration(phase("a", "10 steps", MIX), phase("b", "5 steps", MIX)), start, {"math": 640})
    first = plan.phases[0]
    assert first.start == start and first.tape_start == (0, 640, 0)
    assert plan.end == Position(1015, 8120, 123456 + 120 * 16)
    assert plan.phase_at(1010).name == "b"
    assert plan.position(1001) == Position(1001, 8008, 123456 + 128)


def test_timeline_is_linear_between_phases_and_goes_on_past_its_end() -> None:
    timeline = Timeline([Position(0, 0, 0), Position(10, 80, 1280), Position(20, 120, 3840)])
    assert [timeline.convert(step, "steps", "rows") for step in (0, 5, 10, 15, 20, 30)] == [0, 40, 80, 100, 120, 160]
    assert [timeline.convert(token, "tokens", "steps") for token in (128, 1280, 2560, 6400)] == [1, 10, 15, 30]
    assert timeline.convert(100, "rows", "tokens") == 2560
    assert timeline.convert(7.5, "steps", "steps") == 7.5
