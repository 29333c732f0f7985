"""The check of the nodes and the stragglers: one of three real ranks repeats its product, or gets it wrong."""

from __future__ import annotations

import re

import pytest
import torch

from tests.distributed.ranks import run_ranks
from titan_yulan.errors import RunError
from titan_yulan.parallel import nodes
from titan_yulan.parallel.process import World


def slow_multiply(matrix: torch.Tensor, repeats: int) -> torch.Tensor:
    return multiply(matrix, 12 * repeats)


def wrong_multiply(matrix: torch.Tensor, repeats: int) -> torch.Tensor:
    result = multiply(matrix, repeats)
    result[3, 5] += 1
    return result


multiply = nodes._multiply


def said(world: World, of_rank_1) -> list[str]:
    """What `check_nodes` says when rank 1 multiplies in its own way."""
    lines: list[str] = []
    nodes._multiply = of_rank_1 if world.rank == 1 else multiply
    try:
        nodes.check_nodes(world, lines.append)
    except RunError as error:
        lines.append(f"RunError: {error}")
    return lines


def body(world: World) -> dict[str, list[str]]:
    found = {"alike": said(world, multiply), "slow": said(world, slow_multiply), "wrong": said(world, wrong_multiply)}
    times = nodes.StepTimes(world)
    nodes._multiply = multiply
    reports = [times.report()]  # no step yet
    for _ in range(3):
        times.add(0.10 if world.rank == 1 else 0.08)
    reports.append(times.report())
    times.add(0.011 if world.rank == 1 else 0.002)  # many times the median, but nothing to a step
    reports.append(times.report())
    times.add(0.010)
    nodes._multiply = slow_multiply if world.rank == 1 else multiply
    reports.append(times.report())
    return found | {"reports": reports}


@pytest.fixture(scope="module")
def found() -> dict[str, list[str]]:
    first, *others = run_ranks(body, 3)
    assert all(other["wrong"] == first["wrong"] for other in others)  # all ranks end with the same words
    assert all(other["reports"][1:] == first["reports"][1:] for other in others)
    return first


def test_the_sizes_of_the_group_and_the_times_are_told(found) -> None:
    assert found["alike"][0].startswith("nodes: 3 rank(s) on 1 host(s), matrix product ")
    assert "all-reduce of 1 MiB" in found["alike"][0]


def test_a_slow_rank_is_named(found) -> None:
    assert any(
        line.startswith("WARNING: slower than the median in a matrix product: rank 1 on ") for line in found["slow"]
    )


def test_a_rank_that_computes_wrongly_ends_the_run_by_name(found) -> None:
    assert len(found["wrong"]) == 1
    assert found["wrong"][0].startswith("RunError: the check of the nodes failed on rank 1 on ")
    assert "wrong entries" in found["wrong"][0] and "rank 0" not in found["wrong"][0]


def test_stragglers_are_named_by_their_own_time_and_by_their_device(found) -> None:
    _, own, small, product = found["reports"]
    assert "in its own part of a step: rank 1 on " in own
    assert "(100.00 ms, median 80.00 ms)" in own
    assert "own part" not in small and "own part" not in product
    assert "in a matrix product: rank 1 on " in product


@pytest.mark.parametrize(
    ("seconds", "named"),
    [
        ([1.0, 1.0, 1.0, 1.0], []),
        ([1.0, 1.19, 1.0, 1.0], []),
        ([1.0, 1.2, 1.0, 1.5], [3, 1]),
        ([1.0, 1.3], [1]),
        ([0.1, 1.0, 1.0], []),  # one that is faster is nobody's fault
        ([2.0], []),
    ],
)
def test_twenty_percent_above_the_median(seconds: list[float], named: list[int]) -> None:
    text = nodes._slower([nodes._Rank(f"node{i}", value) for i, value in enumerate(seconds)], 1.2)
    assert [int(rank) for rank in re.findall(r"rank (\d+) on node\1 ", text)] == named


@pytest.mark.parametrize("size", [1, 2, 64])
def test_a_hadamard_matrix_times_itself_is_its_size_times_the_identity(size: int) -> None:
    matrix = nodes._hadamard(size, torch.device("cpu"))
    assert torch.equal(matrix.abs(), torch.ones(size, size))
    assert torch.equal(matrix.double() @ matrix.double(), size * torch.eye(size, dtype=torch.float64))
