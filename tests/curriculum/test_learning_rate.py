"""Learning-rate shapes, and schedules over the phases of a run."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.curriculum.making import configuration, phase, segment
from titan_yulan.config.sections import OptimizerSection
from titan_yulan.curriculum.learning_rate import Schedule, place_segments, shape_value
from titan_yulan.curriculum.plan import Plan
from titan_yulan.curriculum.position import Position, Timeline

SHAPES = ("constant", "linear", "cosine", "quarter-cosine", "1-sqrt")
MIX = {"code": 1.0}

# YuLan-Mini (arXiv 2412.17743): 1-sqrt annealing over 19000 steps after step 243198, held 198 steps before its end.
YULAN_MINI_ANNEALING = {
    243198: 1.0,
    243199: 0.99274524,
    247948: 0.5,
    252698: 0.29289322,
    253006: 0.28152208,
    257448: 0.1339746,
    262000: 0.00522417,
    262001: 0.00522417,
    300000: 0.00522417,
}


def annealing_schedule() -> Plan:
    stable = phase("stable", "243198 steps", MIX, lr=(segment("constant"),))
    lr = (segment("1-sqrt", 1.0, 0.0, "19000 steps", "18802 steps"),)
    return Plan(configuration(stable, phase("anneal", "60000 steps", MIX, lr=lr)))


@pytest.mark.parametrize(("step", "multiplier"), YULAN_MINI_ANNEALING.items())
def test_yulan_mini_annealing_to_8_digits(step: int, multiplier: float) -> None:
    assert annealing_schedule().learning_rate(step) == pytest.approx(multiplier, abs=5e-9)


def test_yulan_mini_final_learning_rate() -> None:
    config = configuration(
        phase("anneal", "30000 steps", MIX, lr=(segment("1-sqrt", 1.0, 0.0, "19000 steps", "18802 steps"),)),
        optimizer=OptimizerSection(learning_rate=1e-2),
    )
    assert Plan(config).learning_rate(25000) == pytest.approx(5.2242e-5, abs=5e-10)


@pytest.mark.parametrize("over", ["19000 steps", "152000 rows", "2432000 tokens", "50%"])
def test_segment_means_the_same_in_every_unit(over: str) -> None:
    """38000 steps of 8 rows of 16 tokens."""
    plan = Plan(configuration(phase("a", "38000 steps", MIX, lr=(segment("1-sqrt", 1.0, 0.0, over),))))
    for step in (0, 1, 4750, 9500, 18999, 19000, 30000):
        assert plan.learning_rate(step) == pytest.approx(1 - math.sqrt(min(step / 19000, 1)), abs=1e-12)


@pytest.mark.parametrize(
    ("shape", "values"),
    [
        ("constant", [0.8, 0.8, 0.8, 0.8, 0.8]),
        ("linear", [0.8, 0.65, 0.5, 0.35, 0.2]),
        ("cosine", [0.8, 0.71213203, 0.5, 0.28786797, 0.2]),
        ("quarter-cosine", [0.8, 0.75432772, 0.62426407, 0.42961006, 0.2]),
        ("1-sqrt", [0.8, 0.5, 0.37573593, 0.28038476, 0.2]),
    ],
)
def test_shapes_from_four_fifths_to_one_fifth_in_quarters(shape: str, values: list[float]) -> None:
    assert [shape_value(shape, 0.8, 0.2, u / 4) for u in range(5)] == pytest.approx(values, abs=5e-9)


def test_unknown_shape_is_an_error() -> None:
    with pytest.raises(ValueError, match="unknown learning-rate shape 'sine'"):
        shape_value("sine", 1, 0, 0.5)


@given(st.sampled_from(SHAPES), st.floats(0, 2), st.floats(0, 2), st.floats(0, 1), st.floats(0, 1))
def test_shapes_are_monotonic_and_stay_between_their_ends(shape: str, a: float, b: float, u: float, v: float) -> None:
    first, second = (shape_value(shape, a, b, x) for x in sorted((u, v)))
    low, high = min(a, b) - 1e-12, max(a, b) + 1e-12
    assert low <= first <= high and low <= second <= high
    assert (second - first) * (b - a) >= -1e-12


@given(st.sampled_from(SHAPES[1:]), st.floats(0, 2), st.floats(0, 2), st.floats(1, 1e9))
def test_a_shape_holds_its_value_past_its_end(shape: str, a: float, b: float, beyond: float) -> None:
    assert shape_value(shape, a, b, beyond) == shape_value(shape, a, b, 1.0) == pytest.approx(b, abs=1e-12)
    assert shape_value(shape, a, b, -beyond) == pytest.approx(a, abs=1e-12)


def test_segments_follow_each_other() -> None:
    lr = (
        segment("linear", 0, 1, "10 steps"),
        segment("constant", over="20 steps"),
        segment("cosine", 1, 0, "10 steps"),
    )
    plan = Plan(configuration(phase("a", "60 steps", MIX, lr=lr)))
    values = [plan.learning_rate(step) for step in range(60)]
    assert values[:11] == pytest.approx([i / 10 for i in range(11)])
    assert values[10:31] == [1.0] * 21
    assert values[35] == pytest.approx(0.5) and values[40:] == pytest.approx([0.0] * 20, abs=1e-15)


def test_segments_in_different_units_follow_each_other() -> None:
    """5 steps are 40 rows are 640 tokens."""
    lr = (segment("linear", 0, 1, "5 steps"), segment("linear", 1, 0, "640 tokens"), segment("linear", 0, 1, "40 rows"))
    plan = Plan(configuration(phase("a", "20 steps", MIX, lr=lr)))
    expected = [0, 0.2, 0.4, 0.6, 0.8, 1, 0.8, 0.6, 0.4, 0.2, 0, 0.2, 0.4, 0.6, 0.8, 1, 1, 1]
    assert [plan.learning_rate(step) for step in range(18)] == pytest.approx(expected, abs=1e-12)


def test_a_segment_in_tokens_goes_on_through_a_phase_with_twice_the_tokens_a_step() -> None:
    """10 steps of 128 tokens, then the remaining 2560 of 3840 tokens in 10 steps of 256."""
    first = phase("a", "10 steps", MIX, lr=(segment("linear", 1, 0, "3840 tokens"),))
    plan = Plan(configuration(first, phase("b", "20 steps", MIX, sequence_length=32)))
    assert plan.learning_rate(10) == pytest.approx(2 / 3)
    assert plan.learning_rate(15) == pytest.approx(1 / 3)
    assert [plan.learning_rate(step) for step in (20, 29)] == pytest.approx([0, 0], abs=1e-12)


def test_a_phase_without_lr_continues_the_segment_before_and_one_with_lr_replaces_it() -> None:
    a = phase("a", "10 steps", MIX, lr=(segment("linear", 1, 0, "20 steps"), segment("constant", 0.3, 0.3)))
    b = phase("b", "5 steps", MIX)
    c = phase("c", "10 steps", MIX, lr=(segment("linear", 0.6, 0.4, "10 steps"),))
    plan = Plan(configuration(a, b, c))
    assert [plan.learning_rate(step) for step in (10, 12, 14)] == pytest.approx([0.5, 0.4, 0.3])
    # the second segment of the first phase would begin at step 20, but the third phase has its own
    assert [plan.learning_rate(step) for step in (15, 20, 25, 40)] == pytest.approx([0.6, 0.5, 0.4, 0.4])


def test_without_any_segment_the_learning_rate_is_the_peak() -> None:
    assert [Plan(configuration(phase("a", "9 steps", MIX))).learning_rate(step) for step in (0, 8)] == [1.0, 1.0]


def test_hold_at_in_another_unit_than_over() -> None:
    """Half of 20 steps, in tokens: 10 steps of 128."""
    lr = (segment("linear", 1, 0, "20 steps", "1280 tokens"),)
    plan = Plan(configuration(phase("a", "30 steps", MIX, lr=lr)))
    assert [plan.learning_rate(step) for step in (5, 10, 11, 29)] == pytest.approx([0.75, 0.5, 0.5, 0.5])


@given(
    st.lists(st.tuples(st.sampled_from(SHAPES[1:]), st.integers(1, 40)), min_size=1, max_size=4),
    st.lists(st.floats(0, 1), min_size=5, max_size=5),
)
def test_joined_segments_never_jump(shapes: list[tuple[str, int]], ends: list[float]) -> None:
    """A segment's steepest step is its first or its last: its value is within that of its neighbour's."""
    timeline = Timeline([Position(0, 0, 0), Position(200, 1600, 25600)])
    segments = [segment(shape, ends[i], ends[i + 1], f"{over} steps") for i, (shape, over) in enumerate(shapes)]
    schedule = Schedule(place_segments(segments, 0, timeline, lambda d: (d.value, d.unit)), timeline)
    boundary = 0
    for i, (_, over) in enumerate(shapes):
        assert schedule(boundary) == pytest.approx(ends[i], abs=1e-12)
        boundary += over
    assert {schedule(step) for step in range(boundary, boundary + 50)} == {schedule(boundary)}
    assert schedule(boundary) == pytest.approx(ends[len(shapes)], abs=1e-12)
