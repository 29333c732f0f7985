"""The runs that several tests look at; each starts its processes once."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed import saving
from tests.distributed.ranks import run_ranks
from tests.distributed.repeated import training_and_repeated


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """By number of ranks, what each rank found in `bodies.training` and `repeated.repeated`; two ranks write the
    checkpoint that all read."""
    folder, other = tmp_path_factory.mktemp("trained"), tmp_path_factory.mktemp("repeated")
    return {world: run_ranks(training_and_repeated, world, folder, other) for world in (2, 1, 3)}


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks found in `saving.protocol`."""
    return run_ranks(saving.protocol, 2, tmp_path_factory.mktemp("saved"))
