"""How sizes grow with the width: exact for the first update, and measured for activations of real steps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.coordinate_check import BASE_WIDTH, POINTS, RECIPES, exponent, measure, model_config, optimizer_of
from titan_yulan.model import Decoder
from titan_yulan.model.initialise import initialise

BY_NAME = {recipe.name: recipe for recipe in RECIPES}
BLOCK = ("attention scores", "attention output", "MLP output")


@given(st.floats(-3, 3), st.floats(1e-3, 1e3))
def test_exponent_of_a_power_law(power: float, factor: float) -> None:
    widths = [64, 128, 512]
    assert exponent(widths, [factor * width**power for width in widths]) == pytest.approx(power, abs=1e-9)


def first_update(recipe: str, width: int) -> tuple[float, float]:
    """How far one update moves an element of a matrix times its scalar, and the scalar over its value (0: it has none).

    Adam's first update is the learning rate of the group, whatever the gradient.
    """
    decoder = Decoder(model_config(BY_NAME[recipe], width))
    initialise(decoder, seed=0)
    values = {name: parameter.detach() for name, parameter in decoder.named_parameters()}
    weight = values["model.layers.0.self_attn.o_proj.weight"]
    scalar = values.get("model.layers.0.self_attn.o_proj_alpha", torch.ones(1))
    before, scalar_before = weight.clone(), scalar.clone()
    for parameter in decoder.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer = optimizer_of(decoder, BY_NAME[recipe], 1e-3)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    optimizer.step()
    return float(scalar_before * (before - weight).mean()), float((scalar_before - scalar) / scalar_before)


@pytest.mark.parametrize(
    ("recipe", "of_matrix", "of_scalar"),
    [
        ("standard", 0.0, None),
        ("muP", -1.0, None),
        ("logits not divided", -1.0, None),
        ("YuLan-Mini", -1.5, 0.5),  # alpha falls with sqrt(m) and the rate with m; the scalar's rate does not
        ("WeSaR, rates corrected", -1.0, 0.0),
    ],
)
def test_first_update_by_width(recipe: str, of_matrix: float, of_scalar: float | None) -> None:
    widths = (BASE_WIDTH, 4 * BASE_WIDTH)
    updates = [first_update(recipe, width) for width in widths]
    assert exponent(widths, [matrix for matrix, _ in updates]) == pytest.approx(of_matrix, abs=1e-4)
    if of_scalar is not None:
        assert exponent(widths, [scalar for _, scalar in updates]) == pytest.approx(of_scalar, abs=1e-4)


def exponents(recipe: str) -> dict[str, float]:
    """Of the change of each point's activations over widths from 64 to 256."""
    widths = (64, 128, 256)
    found = [measure(BY_NAME[recipe], width, seed=0, steps=2, learning_rate=2e-3, shape=(4, 32)) for width in widths]
    return {point: exponent(widths, [one.sizes[point].change for one in found]) for point in POINTS}


def test_activations_move_alike_in_every_width_under_mup() -> None:
    found = exponents("muP")
    assert all(abs(value) < 0.2 for value in found.values()), found


def test_without_mup_activations_of_wide_blocks_move_more() -> None:
    found = exponents("standard")
    assert all(found[point] > 0.7 for point in BLOCK), found
    assert abs(found["embedding"]) < 0.2, found


def test_published_recipe_moves_blocks_less_and_logits_more() -> None:
    found = exponents("YuLan-Mini")
    assert all(found[point] < -0.2 for point in BLOCK), found
    assert found["logits"] > 0.5, found
