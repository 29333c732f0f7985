"""Re-balancing of a plain decoder in float64: what stays, and what the next step does. Ranks: test_continuity.py."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.optimizer.rebalancing import factor_of, scales
from titan_yulan.config.model import ModelConfig
from titan_yulan.config.sections import OptimizerSection
from titan_yulan.errors import RunError, UserError
from titan_yulan.model import Decoder
from titan_yulan.optimizer.adamw import build_adamw, optimizer_state, set_learning_rate
from titan_yulan.optimizer.rebalance import rebalance

MODEL = ModelConfig(
    vocab_size=19,
    hidden_size=12,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    alpha_base_width=8,
    embedding_scale=2.0,
)
# an epsilon that is seen
OPTIMIZER = OptimizerSection(learning_rate=0.01, base_width=6, eps=1e-3, weight_decay=0.3)
RMS = 0.05


class Training:
    """A decoder and its optimizer in float64, trained on random ids, always the same."""

    def __init__(self, model: ModelConfig = MODEL) -> None:
        self.decoder = Decoder(model).double()
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, parameter in self.decoder.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                is_gain = name.endswith(("_alpha", "norm.weight"))
                parameter.copy_(1 + 0.2 * noise if is_gain else 0.3 * noise)
        self.optimizer = build_adamw(self.decoder, model, OPTIMIZER)
        set_learning_rate(self.optimizer, OPTIMIZER.learning_rate)

    def ids(self, seed: int) -> Tensor:
        return torch.randint(19, (3, 10), generator=torch.Generator().manual_seed(seed))

    def backward(self, seed: int) -> None:
        self.optimizer.zero_grad()
        self.decoder(self.ids(seed)).logsumexp(-1).square().mean().backward()

    def step(self, seed: int) -> None:
        self.backward(seed)
        self.optimizer.step()

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.decoder.named_parameters()}

    def gradients(self) -> dict[str, Tensor]:
        return {name: p.grad.clone() for name, p in self.decoder.named_parameters() if p.grad is not None}

    def moments(self) -> dict[str, Tensor]:
        return {name: t.clone() for name, t in optimizer_state(self.decoder, self.optimizer).items()}


def trained() -> Training:
    training = Training()
    for seed in range(3):
        training.step(seed)
    return training


def test_the_function_stays_and_every_matrix_has_the_magnitude() -> None:
    training = trained()
    before, logits = training.weights(), training.decoder(training.ids(9))
    rebalance(training.decoder, training.optimizer, RMS)
    by_scalar = scales(before, RMS)
    assert len(by_scalar) == 6 * MODEL.num_hidden_layers and all(abs(math.log(s)) > 1 for s in by_scalar.values())
    for name, after in training.weights().items():
        torch.testing.assert_close(after, before[name] * factor_of(name, by_scalar), rtol=1e-13, atol=0)
    assert all(abs(scale - 1) < 1e-13 for scale in scales(training.weights(), RMS).values())
    torch.testing.assert_close(training.decoder(training.ids(9)), logits, rtol=1e-11, atol=1e-11)


def test_moments_become_those_of_the_gradients_that_follow() -> None:
    """The same loss has gradients divided by what the parameter was multiplied by; Adam's directions stay."""
    training = trained()
    before, moments = training.weights(), training.moments()
    training.backward(7)
    gradients = training.gradients()
    rebalance(training.decoder, training.optimizer, RMS)
    training.backward(7)
    by_scalar, after = scales(before, RMS), training.moments()
    for name, gradient in training.gradients().items():
        factor = factor_of(name, by_scalar)
        torch.testing.assert_close(gradient, gradients[name] / factor, rtol=1e-9, atol=1e-14)
        torch.testing.assert_close(after[f"{name}.exp_avg"], moments[f"{name}.exp_avg"] / factor, rtol=1e-13, atol=0)
        square = moments[f"{name}.exp_avg_sq"] / factor**2
        torch.testing.assert_close(after[f"{name}.exp_avg_sq"], square, rtol=1e-13, atol=0)
        direction = after[f"{name}.exp_avg"] / after[f"{name}.exp_avg_sq"].sqrt()
        was = moments[f"{name}.exp_avg"] / moments[f"{name}.exp_avg_sq"].sqrt()
        torch.testing.assert_close(direction, was, rtol=1e-12, atol=0, equal_nan=True)
        assert after[f"{name}.step"] == moments[f"{name}.step"]


def test_the_next_step_moves_the_product_by_the_scale_as_documented() -> None:
    """A matrix W of scale s: alpha * W shrinks by decay as before, and moves s times as far along the direction that
    Adam would have with epsilon / s; a scalar 1 / s times as far with epsilon * s."""
    plain, balanced = trained(), trained()
    before = plain.weights()
    rebalance(balanced.decoder, balanced.optimizer, RMS)
    for training in (plain, balanced):
        training.step(7)
    by_scalar, moments, steps = scales(before, RMS), plain.moments(), 4
    rates = {p: group["lr"] for group in plain.optimizer.param_groups for p in group["params"]}
    (first, second), compared = OPTIMIZER.betas, 0
    for (name, own), parameter in zip(balanced.weights().items(), plain.decoder.parameters(), strict=True):
        factor, rate = factor_of(name, by_scalar), rates[parameter]
        mean = moments[f"{name}.exp_avg"] / (1 - first**steps)
        square = moments[f"{name}.exp_avg_sq"] / (1 - second**steps)
        direction = mean / (square.sqrt() + OPTIMIZER.eps * factor)
        expected = before[name] * (1 - rate * OPTIMIZER.weight_decay) - rate / factor * direction
        torch.testing.assert_close(own / factor, expected, rtol=1e-9, atol=1e-13)
        compared += factor != 1.0
    assert compared == MODEL.num_hidden_layers * (7 + 3 + 6)  # matrices, biases, scalars


def test_a_second_time_changes_nothing_but_rounding() -> None:
    training = trained()
    rebalance(training.decoder, training.optimizer, RMS)
    weights, moments = training.weights(), training.moments()
    rebalance(training.decoder, training.optimizer, RMS)
    for now, then in ((training.weights(), weights), (training.moments(), moments)):
        torch.testing.assert_close(now, then, rtol=1e-13, atol=0)


def test_what_cannot_be_balanced_is_said() -> None:
    bare = Training(replace(MODEL, wesar=False))
    with pytest.raises(UserError, match=r"^phase.rebalance_rms: the model has no WeSaR scalars"):
        rebalance(bare.decoder, bare.optimizer, RMS)
    empty = Training()
    with torch.no_grad():
        empty.decoder.model.layers[1].mlp.down_proj.weight.zero_()  # type: ignore[union-attr]
    with pytest.raises(
        RunError, match=r"^phase.rebalance_rms: the root mean square of model.layers.1.mlp.down_proj is 0"
    ):
        rebalance(empty.decoder, empty.optimizer, RMS)
