"""Verdicts and the window against a restatement with lists."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from titan_yulan.config.sections import RecoverySection
from titan_yulan.optimizer.guard import FINE, NOT_FINITE, SPIKE, Guard

SIZE = 8
CPU = torch.device("cpu")

ordinary = st.floats(1.0, 2.0, width=32)
strange = st.sampled_from([math.nan, math.inf, -math.inf, 100.0, 2.0**100, -100.0])
values = st.one_of(ordinary, ordinary, ordinary, strange)


def judge(guard: Guard, loss: float, norm: float) -> tuple[int, bool]:
    verdict, refused = guard.judge(torch.tensor(loss), torch.tensor(norm))
    return int(verdict), bool(refused)


def above(value: float, window: list[float], factor: float) -> bool:
    return value > statistics.fmean(window) + factor * statistics.pstdev(window)


@settings(deadline=None)
@given(
    steps=st.lists(st.tuples(values, values), max_size=40),
    policy=st.sampled_from(["off", "warn", "skip", "rollback"]),
    factor=st.sampled_from([2.0, 6.0]),
)
def test_a_value_is_judged_by_the_last_accepted_ones(
    steps: list[tuple[float, float]], policy: str, factor: float
) -> None:
    guard = Guard(RecoverySection(spike=policy, spike_factor=factor, spike_window=SIZE), CPU)
    accepted: list[tuple[float, float]] = []
    for step in steps:
        window = list(zip(*accepted[-SIZE:], strict=True))
        expected = FINE
        if not all(math.isfinite(value) for value in step):
            expected = NOT_FINITE
        elif len(accepted) >= SIZE and policy != "off":
            far = [above(value, list(column), factor) for value, column in zip(step, window, strict=True)]
            expected = SPIKE if any(far) else FINE
        refuses = expected == NOT_FINITE or (expected == SPIKE and policy != "warn")
        assert judge(guard, *step) == (expected, refuses)
        if not refuses:
            accepted.append(step)
    assert int(guard.tensors()["accepted"]) == len(accepted)
    held = sorted(guard.tensors()["window"].T[: len(accepted)].tolist())
    assert held == sorted([list(step) for step in accepted[-SIZE:]])


def filled(policy: str = "skip") -> Guard:
    """Losses 2 and 4 (mean 3, deviation 1), gradient norms 1 and 1.5 (mean 1.25, deviation 0.25)."""
    guard = Guard(RecoverySection(spike=policy, spike_factor=4.0, spike_window=SIZE), CPU)
    for i in range(SIZE):
        assert judge(guard, 2.0 + 2 * (i % 2), 1.0 + 0.5 * (i % 2)) == (FINE, False)
    return guard


@pytest.mark.parametrize(("loss", "norm"), [(7.001, 1.0), (3.0, 2.2501), (1e30, 1e30)])
def test_either_value_makes_a_spike(loss: float, norm: float) -> None:
    assert judge(filled(), loss, norm) == (SPIKE, True)
    assert judge(filled("warn"), loss, norm) == (SPIKE, False)
    assert judge(filled("off"), loss, norm) == (FINE, False)


@pytest.mark.parametrize(("loss", "norm"), [(7.0, 2.25), (-50.0, 0.0)])
def test_the_limit_itself_and_low_values_are_fine(loss: float, norm: float) -> None:
    assert judge(filled(), loss, norm) == (FINE, False)


def test_refused_values_leave_every_bit_of_the_state() -> None:
    guard = filled()
    before = {name: tensor.clone() for name, tensor in guard.tensors().items()}
    for loss, norm in ((math.nan, 1.0), (3.0, math.inf), (99.0, 1.0)):
        assert judge(guard, loss, norm)[1]
    assert all(torch.equal(tensor, before[name]) for name, tensor in guard.tensors().items())


def test_a_loaded_window_judges_as_the_one_that_was_saved() -> None:
    guard, other = filled(), Guard(RecoverySection(spike="skip", spike_factor=4.0, spike_window=SIZE), CPU)
    assert judge(other, 99.0, 1.0) == (FINE, False)  # an empty window knows nothing
    for name, tensor in other.tensors().items():
        tensor.copy_(guard.tensors()[name])
    assert judge(other, 7.001, 1.0) == (SPIKE, True)
    assert judge(other, 6.9, 1.0) == judge(guard, 6.9, 1.0) == (FINE, False)
    assert torch.equal(other.tensors()["window"], guard.tensors()["window"])


def test_a_level_that_stays_is_warned_of_once_in_a_while_only() -> None:
    """With `warn` the values are accepted, so the window comes to hold the new level."""
    guard = filled("warn")
    verdicts = [judge(guard, 20.0 + 0.1 * (i % 2), 1.0)[0] for i in range(3 * SIZE)]
    assert verdicts[0] == SPIKE and verdicts[SIZE:] == [FINE] * (2 * SIZE)


def test_a_new_phase_is_not_compared_with_the_one_before() -> None:
    guard = Guard(RecoverySection(spike="skip", spike_window=SIZE), CPU)
    for _ in range(SIZE):
        assert judge(guard, 2.2, 1.0) == (FINE, False)
    assert judge(guard, 2.6, 1.0) == (SPIKE, True)
    guard.forget()
    for _ in range(SIZE):
        assert judge(guard, 2.6, 1.0) == (FINE, False)
    assert judge(guard, 2.7, 1.0) == (SPIKE, True)
