"""Masked diffusion: the bound against the exact expectation over all masks, and masks that depend on nothing else."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from titan_yulan.config.model import ModelConfig
from titan_yulan.config.sections import ObjectiveSection
from titan_yulan.data.loader import Batch
from titan_yulan.model import Decoder
from titan_yulan.model.initialise import initialise
from titan_yulan.objective.forward import forward
from titan_yulan.objective.masked_diffusion import MaskedDiffusion

VOCAB, MASK, LENGTH = 5, 5, 4
TINY = ModelConfig(
    vocab_size=VOCAB + 3,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    attention_bias=False,
    embedding_scale=1.0,
    residual_scale=1.0,
    wesar=False,
    initializer_range=0.5,
    initialization="transformer",
)


def objective(seed: int = 0, **section) -> MaskedDiffusion:
    keys = ObjectiveSection(kind="masked_diffusion", z_loss=0.0, **section)
    return MaskedDiffusion(keys, 2, mask_token_id=MASK, seed=seed)


def batch_of(rows: int, length: int = LENGTH, first: int = 0, tokens: Tensor | None = None) -> Batch:
    """Rows `first`, `first` + 1, ... of a run; every row the same tokens if they are given."""
    random = torch.randint(0, VOCAB, (rows, length + 1), generator=torch.Generator().manual_seed(3))
    return Batch(
        tokens=random if tokens is None else tokens.expand(rows, -1),
        document_ids=torch.zeros(rows, length + 1, dtype=torch.int64),
        loss_mask=torch.ones(rows, length + 1, dtype=torch.bool),
        source=torch.arange(rows) % 2,
        position=first + torch.arange(rows),
        weight=torch.ones(rows),
    )


def decoder() -> Decoder:
    model = Decoder(TINY)
    initialise(model, seed=1)
    return model.double()


def exact_bound(model: Decoder, tokens: Tensor, least: float) -> float:
    """Expectation over t and all 2^S masks of sum of -log P / p over hidden places, by Simpson's rule in t."""
    masks = torch.tensor(list(itertools.product([False, True], repeat=LENGTH)))
    logits = model(torch.where(masks, MASK, tokens), causal=False)
    losses = -torch.log_softmax(logits, -1).gather(2, tokens.expand(len(masks), -1)[..., None])[..., 0]
    hidden, sums = masks.sum(1), (losses * masks).sum(1)

    def at(ratio: float) -> float:
        chance = ratio**hidden * (1 - ratio) ** (LENGTH - hidden)
        return float((chance * sums).sum().detach()) / ratio / LENGTH

    steps = 400
    ratios = [least + (1 - least) * i / steps for i in range(steps + 1)]
    weights = [1, *[4, 2] * (steps // 2 - 1), 4, 1]
    return sum(w * at(r) for w, r in zip(weights, ratios, strict=True)) / (3 * steps)


def test_the_loss_is_the_bound_over_all_masks():
    model, tokens = decoder(), torch.tensor([0, 3, 1, 1, 4])
    expected = exact_bound(model, tokens[:LENGTH], 1e-3)
    rows = 20_000
    inputs = objective(seed=5).inputs(batch_of(rows, tokens=tokens))
    with torch.no_grad():
        logits = model(inputs.input_ids, causal=False)
    losses = -torch.log_softmax(logits, -1).gather(2, inputs.targets[..., None])[..., 0]
    by_row = (losses * inputs.weights).sum(1) / LENGTH
    error = float(by_row.std()) / math.sqrt(rows)
    assert error < 0.02 * expected
    assert float(by_row.mean()) == pytest.approx(expected, abs=4 * error)
    sums = forward(model, objective(seed=5), inputs)
    assert float(sums.objective.detach()) / float(inputs.denominator) == pytest.approx(float(by_row.mean()), rel=1e-5)
    assert sums.tokens.tolist() == [rows / 2 * LENGTH, rows / 2 * LENGTH]


def test_validation_is_the_bound_too_with_less_noise():
    model, tokens = decoder(), torch.tensor([0, 3, 1, 1, 4])
    expected = exact_bound(model, tokens[:LENGTH], 1e-3)
    batch = batch_of(64, tokens=tokens)

    def estimates(bound: MaskedDiffusion, samples: range) -> list[float]:
        found = []
        for sample in samples:
            inputs = bound.validation_inputs(batch, sample)
            with torch.no_grad():
                sums = forward(model, bound, inputs)
            found.append(float(sums.cross_entropy.sum() / sums.tokens.sum()))
        return found

    bound = objective(validation_samples=32)
    found = estimates(bound, range(32))
    error = torch.tensor(found).std() / math.sqrt(len(found))
    assert sum(found) / len(found) == pytest.approx(expected, abs=4 * float(error))
    times = torch.cat([bound.validation_inputs(batch, sample).weights.amax(1) for sample in range(32)])
    assert times.unique().numel() > 1000  # hardly two draws have one ratio


def ratios(weights: Tensor) -> Tensor:
    """(rows,) p of rows that hide something."""
    return 1 / weights.amax(1)


@given(st.integers(0, 2**62), st.integers(1, 40), st.integers(0, 2**40))
@settings(max_examples=30, deadline=None)
def test_masks_depend_on_seed_and_position_alone(seed: int, rows: int, first: int):
    bound = objective(seed, left_to_right_share=0.3)
    whole = bound.inputs(batch_of(rows, first=first))
    for row in range(rows):  # any micro-batch, any rank
        batch = batch_of(rows, first=first)
        alone = bound.inputs(
            Batch(**{f.name: getattr(batch, f.name)[row : row + 1] for f in dataclasses.fields(Batch)})
        )
        assert torch.equal(alone.input_ids[0], whole.input_ids[row])
        assert torch.equal(alone.weights[0], whole.weights[row])
    assert not torch.equal(
        objective(seed + 1).inputs(batch_of(40)).weights, objective(seed).inputs(batch_of(40)).weights
    )


def test_inputs():
    batch = batch_of(2000, length=64)
    inputs = objective().inputs(batch)
    hidden = inputs.input_ids == MASK
    assert torch.equal(inputs.targets, batch.tokens[:, :-1])  # not shifted
    assert torch.equal(hidden, inputs.weights > 0)
    assert torch.equal(inputs.input_ids[~hidden], inputs.targets[~hidden])
    assert float(inputs.denominator) == 2000 * 64
    some = hidden.any(1)
    p = ratios(inputs.weights[some])
    assert float(p.min()) >= 1e-3 and float(p.max()) <= 1
    share = hidden[some].float().mean(1)
    assert float((share - p).abs().max()) < 0.3  # 64 draws each
    assert float((share - p).mean().abs()) < 0.01
    assert float(p.mean()) == pytest.approx(0.5, abs=0.03)


def test_gradients_are_finite_where_hardly_anything_is_hidden():
    model = decoder().float()
    bound = objective(minimum_mask_ratio=1e-9)
    inputs = bound.inputs(batch_of(64))
    weights = torch.where(inputs.weights > 0, 1e9, 0.0)  # a token hidden at t = 0
    inputs = dataclasses.replace(inputs, weights=weights)
    forward(model, bound, inputs, inputs.denominator).objective.backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    nothing = dataclasses.replace(inputs, input_ids=inputs.targets, weights=torch.zeros_like(inputs.weights))
    model.zero_grad()
    sums = forward(model, bound, nothing, nothing.denominator)
    sums.objective.backward()
    assert float(sums.objective.detach()) == 0.0
    assert all(bool((p.grad == 0).all()) for p in model.parameters() if p.grad is not None)


def test_left_to_right_hides_as_many_at_the_end():
    plain, moved = objective().inputs(batch_of(500, 16)), objective(left_to_right_share=1.0).inputs(batch_of(500, 16))
    counts = (plain.weights > 0).sum(1)
    assert torch.equal((moved.weights > 0).sum(1), counts)
    assert bool((counts == 0).any())  # the edge: nothing hidden stays nothing
    places = torch.arange(16)
    assert torch.equal(moved.weights > 0, places >= 16 - counts[:, None])
    some = counts > 0
    assert torch.equal(moved.weights.amax(1)[some], plain.weights.amax(1)[some])  # 1 / p unchanged
    half = objective(left_to_right_share=0.5).inputs(batch_of(500, 16))
    same_as_moved = (half.input_ids == moved.input_ids).all(1)
    same_as_plain = (half.input_ids == plain.input_ids).all(1)
    assert bool((same_as_moved | same_as_plain).all())
    assert 150 < int((same_as_moved & ~same_as_plain).sum()) < 350


def test_perturbations_are_off_in_validation():
    batch = batch_of(50, 16)
    plain = objective().validation_inputs(batch, 0)
    perturbed = objective(seed=9, left_to_right_share=1.0, low_noise_rows=10**9).validation_inputs(batch, 0)
    assert torch.equal(plain.input_ids, perturbed.input_ids) and torch.equal(plain.weights, perturbed.weights)


def test_low_noise_start():
    plain, low = (objective(low_noise_rows=rows).inputs(batch_of(400, 32)) for rows in (0, 300))
    some = (plain.weights > 0).any(1) & (low.weights > 0).any(1)
    p, q = ratios(plain.weights), ratios(low.weights)
    early = torch.arange(400) < 300
    expected = (p - 1e-3) / 2 + 1e-3
    assert torch.allclose(q[some & early], expected[some & early].float(), rtol=1e-5)
    assert torch.equal(low.input_ids[~early], plain.input_ids[~early])


def test_questions_of_chats_are_never_hidden_and_padding_counts_nothing():
    batch = batch_of(60, 12)
    mask = batch.loss_mask.clone()
    mask[:, :6] = False
    weight = batch.weight.clone()
    weight[-1] = 0
    inputs = objective().inputs(dataclasses.replace(batch, loss_mask=mask, weight=weight))
    assert torch.equal(inputs.input_ids[:, :6], batch.tokens[:, :6])
    assert float(inputs.denominator) == 59 * 6
    assert float(inputs.weights[-1].sum()) == 0
    mask[:, 10:] = False  # behind an answer
    batch = dataclasses.replace(batch, loss_mask=mask)
    drawn, moved = (objective(left_to_right_share=share).inputs(batch).weights > 0 for share in (0.0, 1.0))
    assert torch.equal(moved.sum(1), drawn.sum(1))
    assert torch.equal(moved[:, 6:10], torch.arange(4) >= 4 - drawn.sum(1, keepdim=True))
