"""The recipes of benchmarks/stability.py differ in what they say and in nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.stability import BASE_WIDTH, LAYERS, RECIPES, WIDTH, Recipe, cell, job_file, smooth
from titan_yulan import config as configuration
from titan_yulan.config import RunConfig
from titan_yulan.model.initialise import initial_std


def config_of(recipe: Recipe, folder: Path) -> RunConfig:
    return configuration.load(job_file(recipe, 0.04, 12, 0, folder)).config


def start_of(config: RunConfig) -> dict[str, float]:
    """Standard deviation of each kind of matrix as it enters the model, at the start."""
    model = config.model
    found = {}
    for matrix in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        scalar = "gate_up_proj_alpha" if matrix in ("gate_proj", "up_proj") else f"{matrix}_alpha"
        alpha = model.initial_alpha(scalar) if model.wesar else 1.0
        found[matrix] = alpha * initial_std(f"model.layers.0.{matrix}.weight", model)
    return found


@pytest.mark.parametrize("mup", [False, True])
def test_wesar_and_norms_change_no_start(mup: bool, tmp_path: Path) -> None:
    m = WIDTH / BASE_WIDTH if mup else 1.0
    output = 0.02 / (2 * LAYERS * m) ** 0.5
    for recipe in (recipe for recipe in RECIPES if recipe.mup == mup):
        for matrix, size in start_of(config_of(recipe, tmp_path)).items():
            expected = output if matrix in ("o_proj", "down_proj") else 0.02 / m**0.5
            assert size == pytest.approx(expected), (recipe, matrix)


def test_runs_differ_in_model_and_groups_alone(tmp_path: Path) -> None:
    first = config_of(RECIPES[0], tmp_path)
    for recipe in RECIPES[1:]:
        other = config_of(recipe, tmp_path)
        assert other.optimizer.base_width == (BASE_WIDTH if recipe.mup else 0)
        assert (other.model.wesar, other.model.qk_layer_norm) == (recipe.wesar, recipe.qk_layer_norm)
        same = replace(other.optimizer, base_width=first.optimizer.base_width)
        assert replace(other, run=first.run, model=first.model, optimizer=same) == first


def test_smooth_and_empty() -> None:
    values = {step: float(step) for step in range(1, 31)}
    assert smooth(values)[1] == 1.0
    assert smooth(values)[30] == pytest.approx(25.5)
    assert cell(max, smooth({})) == "-"
    assert cell(max, smooth(values)) == "25.5"
