"""Next-token training against a restatement in float64, token by token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from titan_yulan.config.sections import ObjectiveSection
from titan_yulan.data.loader import Batch
from titan_yulan.objective.next_token import NextToken
from titan_yulan.objective.objective import Inputs

ROWS, LENGTH, VOCAB, HIDDEN, SOURCES = 4, 9, 17, 6, 3


def make_batch(seed: int = 0) -> Batch:
    """Four rows of three sources (the last one unused), the last row only filling up."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(ROWS, LENGTH + 1, generator=generator) < 0.7
    return Batch(
        tokens=torch.randint(0, VOCAB, (ROWS, LENGTH + 1), generator=generator),
        document_ids=torch.tensor([5, 5, 5, 6, 6, 7, 7, 7, 7, 8]).expand(ROWS, -1).contiguous(),
        loss_mask=mask,
        source=torch.tensor([0, 1, 0, 0]),
        position=torch.tensor([10, 11, 12, -1]),
        weight=torch.tensor([1.0, 1.0, 1.0, 0.0]),
    )


def run(batch: Batch, **section) -> tuple[Tensor, Tensor, Tensor, Tensor, Inputs]:
    """(objective, cross-entropy, tokens, gradient of the hidden states, inputs) in float64."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(ROWS, LENGTH, HIDDEN, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator, dtype=torch.float64)
    objective = NextToken(ObjectiveSection(**section), SOURCES)
    inputs = objective.inputs(batch)
    sums = objective.loss(hidden, weight, inputs)
    (gradient,) = torch.autograd.grad(sums.objective, hidden)
    return sums.objective, sums.cross_entropy, sums.tokens, gradient, inputs


def restated(batch: Batch, z_loss: float) -> tuple[float, list[float], list[float]]:
    """Token by token: row r predicts its token i + 1 from place i."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(ROWS, LENGTH, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator, dtype=torch.float64)
    total, losses, tokens = 0.0, [0.0] * SOURCES, [0.0] * SOURCES
    for row in range(ROWS):
        for place in range(LENGTH):
            if not batch.loss_mask[row, place + 1] or not batch.weight[row]:
                continue
            logits = weight @ hidden[row, place]
            log_partition = logits.exp().sum().log()
            loss = float(log_partition - logits[batch.tokens[row, place + 1]])
            total += loss + z_loss * float(log_partition) ** 2
            losses[int(batch.source[row])] += loss
            tokens[int(batch.source[row])] += 1
    return total, losses, tokens


@pytest.mark.parametrize("z_loss", [0.0, 1e-4, 0.5])
def test_sums_are_those_of_the_definition(z_loss: float) -> None:
    batch = make_batch()
    objective, cross_entropy, tokens, _, inputs = run(batch, z_loss=z_loss)
    total, losses, counts = restated(batch, z_loss)
    assert float(objective.detach()) == pytest.approx(total, rel=1e-12)
    assert cross_entropy.tolist() == pytest.approx(losses, rel=1e-12)
    assert tokens.tolist() == counts and counts[2] == 0
    assert float(inputs.denominator) == sum(counts)
    assert inputs.denominator.dtype == torch.float32


def test_sums_of_the_sources_add_up() -> None:
    objective, cross_entropy, tokens, _, inputs = run(make_batch(), z_loss=0.0)
    torch.testing.assert_close(cross_entropy.sum(), objective.detach(), rtol=1e-12, atol=0)
    assert tokens.sum() == inputs.denominator == inputs.weights.sum()


def test_masked_tokens_and_rows_without_weight_contribute_nothing() -> None:
    batch = make_batch()
    *_, gradient, _ = run(batch)
    counted = (batch.loss_mask[:, 1:] & (batch.weight[:, None] > 0)).nonzero().tolist()
    assert gradient.abs().sum(-1).nonzero().tolist() == counted
    changed = make_batch()
    masked = ~batch.loss_mask
    masked[:, 0] = False  # the first token is never a target
    changed.tokens[masked] = (changed.tokens[masked] + 1) % VOCAB
    changed.tokens[3] = 0
    for one, other in zip(run(batch)[:4], run(changed)[:4], strict=True):
        assert torch.equal(one, other)


def test_the_mask_of_a_token_is_about_it_as_a_target() -> None:
    batch = make_batch()
    batch.loss_mask[:] = False
    batch.loss_mask[1, 4] = True
    inputs = NextToken(ObjectiveSection(), SOURCES).inputs(batch)
    assert inputs.weights.nonzero().tolist() == [[1, 3]]
    assert inputs.targets[1, 3] == batch.tokens[1, 4]


def test_inputs_and_targets_are_shifted_by_one() -> None:
    batch = make_batch()
    inputs = NextToken(ObjectiveSection(), SOURCES).inputs(batch)
    assert torch.equal(inputs.input_ids, batch.tokens[:, :-1])
    assert torch.equal(inputs.targets, batch.tokens[:, 1:])
    assert inputs.weights.dtype == torch.float32
    assert inputs.position_ids is None and inputs.document_ids is None
    assert torch.equal(inputs.source, batch.source)


def test_document_ids_are_those_of_the_inputs() -> None:
    inputs = NextToken(ObjectiveSection(document_mask=True), SOURCES).inputs(make_batch())
    assert inputs.document_ids is not None and inputs.position_ids is None
    assert inputs.document_ids[0].tolist() == [5, 5, 5, 6, 6, 7, 7, 7, 7]


def test_positions_restart_in_every_document() -> None:
    batch = make_batch()
    batch.document_ids[1] = 4
    batch.document_ids[2] = torch.arange(10)
    inputs = NextToken(ObjectiveSection(restart_positions=True), SOURCES).inputs(batch)
    assert inputs.document_ids is None and inputs.position_ids is not None
    assert inputs.position_ids[:3].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2, 3], list(range(9)), [0] * 9]


def test_a_micro_batch_of_nothing_but_filling_has_sums_of_zero() -> None:
    batch = make_batch()
    batch.weight[:] = 0
    objective, cross_entropy, tokens, gradient, inputs = run(batch)
    assert objective == 0 and inputs.denominator == 0
    assert not cross_entropy.any() and not tokens.any() and not gradient.any()
