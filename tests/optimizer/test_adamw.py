"""AdamW and clipping on one process, against a restatement in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from titan_yulan.config.model import ModelConfig
from titan_yulan.config.sections import OptimizerSection
from titan_yulan.model import Decoder
from titan_yulan.optimizer.adamw import build_adamw, clip_gradients, optimizer_state, set_learning_rate, step_unless

MODEL = ModelConfig(
    vocab_size=11,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
)
SECTION = OptimizerSection(
    learning_rate=0.02, base_width=2, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.2, weight_decay_norms=0.05
)


def make(seed: int = 0) -> tuple[Decoder, torch.Generator]:
    generator = torch.Generator().manual_seed(seed)
    decoder = Decoder(MODEL)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return decoder, generator


def multiplier_and_decay(name: str) -> tuple[float, float]:
    if "norm.weight" in name or "layernorm.weight" in name:
        return 1.0, 0.05
    return (0.25 if name.endswith("_proj.weight") else 1.0), 0.2


def test_steps_are_those_of_the_definition() -> None:
    """Loshchilov and Hutter, arXiv 1711.05101, algorithm 2, with the learning rate changing between the steps."""
    decoder, generator = make()
    optimizer = build_adamw(decoder, MODEL, SECTION)
    values = {name: p.detach().double() for name, p in decoder.named_parameters()}
    first = {name: torch.zeros_like(v) for name, v in values.items()}
    second = {name: torch.zeros_like(v) for name, v in values.items()}
    for step, rate in enumerate((0.02, 0.015, 0.001), start=1):
        set_learning_rate(optimizer, rate)
        for name, parameter in decoder.named_parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            gradient = parameter.grad.double()
            multiplier, decay = multiplier_and_decay(name)
            first[name] = 0.8 * first[name] + 0.2 * gradient
            second[name] = 0.9 * second[name] + 0.1 * gradient**2
            update = first[name] / (1 - 0.8**step) / ((second[name] / (1 - 0.9**step)).sqrt() + 1e-3)
            values[name] = values[name] * (1 - rate * multiplier * decay) - rate * multiplier * update
        optimizer.step()
    state = optimizer_state(decoder, optimizer)
    for name, parameter in decoder.named_parameters():
        torch.testing.assert_close(parameter.detach().double(), values[name], rtol=2e-6, atol=2e-7)
        torch.testing.assert_close(state[f"{name}.exp_avg"].double(), first[name], rtol=2e-6, atol=2e-7)
        torch.testing.assert_close(state[f"{name}.exp_avg_sq"].double(), second[name], rtol=2e-6, atol=2e-7)
        assert state[f"{name}.step"] == 3


def test_state_exists_before_the_first_step_and_is_what_the_steps_use() -> None:
    decoder, _ = make()
    optimizer = build_adamw(decoder, MODEL, SECTION)
    state = optimizer_state(decoder, optimizer)
    assert len(state) == 3 * len(list(decoder.parameters())) and not any(tensor.any() for tensor in state.values())
    for parameter in decoder.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    after = optimizer_state(decoder, optimizer)
    assert all(after[name] is tensor and tensor.all() for name, tensor in state.items())


def test_learning_rate_is_set_by_group() -> None:
    decoder, _ = make()
    optimizer = build_adamw(decoder, MODEL, SECTION)
    set_learning_rate(optimizer, 0.004)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in decoder.named_parameters():
        assert rates[id(parameter)] == 0.004 * multiplier_and_decay(name)[0]


@pytest.mark.parametrize("gradient", [1.0, math.nan, math.inf])
def test_a_refused_step_leaves_every_bit_and_the_next_is_as_if_it_had_not_been(gradient: float) -> None:
    made = [make()[0] for _ in range(2)]
    optimizers = [build_adamw(decoder, MODEL, SECTION) for decoder in made]

    def step(which: int, value: float, refused: float) -> dict[str, Tensor]:
        for parameter in made[which].parameters():
            parameter.grad = torch.full_like(parameter, value)
        step_unless(optimizers[which], torch.tensor(refused))
        state = dict(made[which].named_parameters()) | optimizer_state(made[which], optimizers[which])
        return {name: tensor.detach().clone() for name, tensor in state.items()}

    before, same = step(0, 0.5, 0.0), step(1, 0.5, 0.0)
    after = step(0, gradient, 1.0)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    ahead, expected = step(0, -0.25, 0.0), step(1, -0.25, 0.0)
    assert all(torch.equal(ahead[name], tensor) for name, tensor in expected.items())
    assert not any(torch.equal(expected[name], tensor) for name, tensor in same.items())


def parameters(*gradients: list[float] | None) -> list[nn.Parameter]:
    made = []
    for values in gradients:
        parameter = nn.Parameter(torch.zeros(len(values or [0])))
        parameter.grad = None if values is None else torch.tensor(values)
        made.append(parameter)
    return made


def gradients(made: list[nn.Parameter]) -> list[float]:
    return [value for p in made if isinstance(p.grad, Tensor) for value in p.grad.tolist()]


def test_gradients_above_the_limit_are_scaled_down_together() -> None:
    made = parameters([3.0, 0.0], None, [4.0], [12.0])
    assert float(clip_gradients(made, 1.0)) == pytest.approx(13)
    assert gradients(made) == pytest.approx([3 / 13, 0, 4 / 13, 12 / 13], rel=1e-6)


def test_gradients_below_the_limit_stay_as_they_are() -> None:
    made = parameters([0.3], [-0.4])
    before = gradients(made)
    assert float(clip_gradients(made, 1.0)) == pytest.approx(0.5)
    assert gradients(made) == before


def test_zero_gradients_stay_zero() -> None:
    made = parameters([0.0, 0.0])
    assert clip_gradients(made, 1.0) == 0 and gradients(made) == [0, 0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_makes_the_norm_so(bad: float) -> None:
    assert not math.isfinite(float(clip_gradients(parameters([1.0], [bad, 1.0]), 1.0)))


def test_no_gradient_at_all_is_an_error() -> None:
    with pytest.raises(ValueError, match="no parameter has a gradient"):
        clip_gradients(parameters(None), 1.0)
