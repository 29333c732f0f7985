"""Which validation is the best, and what a restart knows of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import cast

import pytest

from tests.checkpoint.making import make_checkpoint
from tests.curriculum.making import configuration, phase
from titan_yulan.checkpoint import layout
from titan_yulan.config.sections import CheckpointSection, RunConfig
from titan_yulan.config.values import Tokens
from titan_yulan.monitor.best import KeepBest, mean_validation_loss, mean_validation_losses, show_best
from titan_yulan.monitor.metrics import JsonLines
from titan_yulan.parallel.process import World


class OneRank:
    """Of a world, what is asked."""

    is_main = True

    def agree(self, value: int) -> int:
        return value


WORLD = cast(World, OneRank())


def config(keep_best: bool = True) -> RunConfig:
    phases = phase("a", "4 steps", {"x": 1.0}), phase("b", "4 steps", {"x": 3.0, "y": 1.0})
    return configuration(*phases, checkpoint=CheckpointSection(keep_best=keep_best))


def write(folder: Path, *lines: tuple[int, dict[str, float]]) -> None:
    JsonLines(folder / "validation.jsonl", 10**9).write(
        {"step": step, "tokens": step, "validation_loss": losses} for step, losses in lines
    )


@pytest.mark.parametrize(
    ("losses", "mix", "mean"),
    [
        ({"x": 2.0, "y": 4.0}, {"x": 3.0, "y": 1.0}, 2.5),
        ({"x": 2.0, "y": 4.0}, {"x": Tokens(1e9), "y": Tokens(3e9)}, 3.5),
        ({"x": 2.0, "y": 4.0}, {"y": 1.0, "z": 7.0}, 4.0),  # x is not mixed, z has no held-out part
        ({"x": 2.0, "y": 4.0}, {"z": 7.0}, 3.0),
        ({"x": 2.0, "y": 4.0}, {"x": 0.0, "z": 7.0}, 3.0),
    ],
)
def test_the_mean_is_weighted_by_the_mix(losses: dict, mix: dict, mean: float) -> None:
    assert mean_validation_loss(losses, mix) == mean


def test_all_validations_are_weighted_by_the_last_phase(tmp_path: Path) -> None:
    write(tmp_path, (0, {"x": 4.0, "y": 8.0}), (2, {"x": 2.0, "y": math.nan}), (6, {"x": 1.0, "y": 5.0}), (7, {}))
    assert mean_validation_losses(tmp_path, config()) == {0: 5.0, 6: 2.0}
    assert mean_validation_losses(tmp_path / "none", config()) == {}


def test_a_step_is_saved_when_it_is_lower_than_all_before(tmp_path: Path) -> None:
    def due(step: int, loss: float) -> bool:
        write(tmp_path, (step, {"x": loss}))
        best = KeepBest(config(), tmp_path, WORLD, first=0)  # as a restart would know it
        assert not best.due(step)  # no validation took place just now
        best.validated(step)
        return best.due(step)

    write(tmp_path, (0, {"x": 0.5}))  # of the model that the run began with
    lines = ((1, 3.0), (2, 3.0), (3, 2.0), (4, 2.5), (5, math.nan), (6, 1.0))
    assert [step for step, loss in lines if due(step, loss)] == [1, 3, 6]


def test_nothing_is_compared_without_the_key(tmp_path: Path) -> None:
    write(tmp_path, (1, {"x": 1.0}))
    for section, main in ((config(False), True), (config(), False)):
        world = OneRank()
        world.is_main = main
        best = KeepBest(section, tmp_path, cast(World, world), 0)
        best.validated(1)
        assert best.losses() is None and not best.due(1)


def test_a_link_that_a_kill_left_behind_is_put_right(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    made = [make_checkpoint(folder, step) for step in (1, 2)]
    write(tmp_path, (1, {"x": 2.0}), (2, {"x": 1.0}))
    show_best(tmp_path, config(False))
    assert not (folder / "best").is_symlink()
    layout.point_at_best(folder, made[0])
    show_best(tmp_path, config())
    assert layout.open_checkpoint(folder / "best") == made[1]
    show_best(tmp_path / "nothing", config())
