"""Orders and hidden tokens of next-token training (arXiv 2507.15857)."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.objective.test_masked_diffusion import TINY, batch_of, decoder
from titan_yulan.config.sections import ObjectiveSection
from titan_yulan.data.loader import Batch
from titan_yulan.objective.forward import forward
from titan_yulan.objective.next_token import NextToken


def objective(seed: int = 0, **section) -> NextToken:
    return NextToken(ObjectiveSection(**section), 2, seed=seed)


def rows_of(batch: Batch, numbers: slice) -> Batch:
    return Batch(**{f.name: getattr(batch, f.name)[numbers] for f in dataclasses.fields(Batch)})


@pytest.mark.parametrize("kind", ["random", "predefined"])
def test_orders(kind: str):
    batch = batch_of(400, 12)
    tokens = torch.arange(13).expand(400, -1).contiguous()  # a token is its own place
    batch = dataclasses.replace(batch, tokens=tokens)
    inputs = objective(orders=4, order_kind=kind).inputs(batch)
    assert inputs.position_ids is not None
    assert torch.equal(inputs.input_ids, inputs.position_ids)  # rotary positions are those of the text
    assert torch.equal(inputs.input_ids[:, 1:], inputs.targets[:, :-1])  # the next in the order
    whole = torch.cat([inputs.input_ids, inputs.targets[:, -1:]], 1)
    assert torch.equal(whole.sort(1).values, tokens)  # every token once
    assert bool((whole[:, 0] == 0).all())  # token 0 stays
    kinds, counts = whole.unique(dim=0, return_counts=True)
    assert len(kinds) == 4
    assert torch.equal(kinds[0], torch.arange(13))  # the text's own is one of them
    assert int(counts.min()) > 60
    parts = [objective(orders=4, order_kind=kind).inputs(rows_of(batch, slice(i, i + 100))) for i in range(0, 400, 100)]
    assert torch.equal(torch.cat([part.input_ids for part in parts]), inputs.input_ids)
    assert not torch.equal(objective(1, orders=4, order_kind=kind).inputs(batch).input_ids, inputs.input_ids)


def test_predefined_orders_stray_further_and_further():
    orders = objective(orders=6, order_kind="predefined")._orders(200)
    strays = (orders - torch.arange(200)).abs().float().mean(1)
    assert strays[0] == 0
    assert bool((strays[1:] < torch.arange(1, 6) * 1.6).all())  # places move by about i times a normal number
    assert strays[5] > 2 * strays[1] > 0


def test_documents_and_masks_follow_their_tokens():
    batch = batch_of(50, 12)
    documents = (torch.arange(13) // 5).expand(50, -1)
    mask = (torch.arange(13) % 3 > 0).expand(50, -1)
    tokens = torch.arange(13).expand(50, -1)
    batch = dataclasses.replace(batch, tokens=tokens, document_ids=documents, loss_mask=mask)
    inputs = objective(orders=8, document_mask=True).inputs(batch)
    assert inputs.document_ids is not None
    assert torch.equal(inputs.document_ids, inputs.input_ids // 5)
    assert torch.equal(inputs.weights > 0, inputs.targets % 3 > 0)


def test_hidden_tokens():
    batch = batch_of(300, 24)
    inputs = objective(token_mask_share=0.4).inputs(batch)
    assert inputs.visible is not None and inputs.visible.shape == (300, 1, 24, 24)
    visible = inputs.visible[:, 0]
    causal = torch.ones(24, 24, dtype=torch.bool).tril()
    assert not bool((visible & ~causal).any())
    assert bool(visible.diagonal(dim1=1, dim2=2).all())
    late = visible[:, 20:]  # queries with many keys before them: untouched unless chosen
    touched = (late != causal[20:]).any(-1).float().mean()
    assert 0.3 < float(touched) < 0.42
    blocked = 1 - visible.sum() / (300 * causal.sum())
    assert 0.12 < float(blocked) < 0.22  # 0.4 chosen, half of their keys, never their own
    parts = [objective(token_mask_share=0.4).inputs(rows_of(batch, slice(i, i + 60))) for i in range(0, 300, 60)]
    assert torch.equal(torch.cat([part.visible for part in parts if part.visible is not None]), inputs.visible)
    documents = (torch.arange(25) // 6).expand(300, -1)
    apart = objective(token_mask_share=0.4, document_mask=True)
    inside = apart.inputs(dataclasses.replace(batch, document_ids=documents))
    assert inside.visible is not None and inside.document_ids is None
    same = documents[0, :24, None] == documents[0, :24]
    assert torch.equal(inside.visible[:, 0], visible & same)


def test_all_perturbations_are_off_in_validation():
    batch = batch_of(20, 12)
    plain = objective().validation_inputs(batch)
    perturbed = objective(orders=5, token_mask_share=0.5).validation_inputs(batch)
    assert torch.equal(plain.input_ids, perturbed.input_ids)
    assert perturbed.visible is None and perturbed.position_ids is None


def test_the_decoder_sees_what_is_visible_and_nothing_else():
    model, batch = decoder(), batch_of(1, 8)
    causal = torch.ones(8, 8, dtype=torch.bool).tril()[None, None]
    ids = batch.tokens[:, :-1]
    plain = model(ids)
    assert torch.allclose(model(ids, visible=causal), plain, atol=1e-12)
    narrow = causal.clone()
    narrow[0, 0, 5, 2] = False
    changed = (model(ids, visible=narrow) - plain).abs().amax(-1)[0] > 1e-9
    assert changed.tolist() == [False] * 5 + [True] * 3  # those that see place 5


def test_dropout_acts_in_training_alone():
    config = dataclasses.replace(TINY, attention_dropout=0.3, hidden_dropout=0.2)
    model, plain = decoder(), decoder()
    model.config = config
    model.model.config = config
    bound = objective(z_loss=0.0)
    inputs = bound.inputs(batch_of(6, 16))

    def loss(seed: int) -> float:
        torch.manual_seed(seed)
        return float(forward(model, bound, inputs, inputs.denominator).objective.detach())

    assert loss(1) == loss(1) != loss(2)
    with torch.no_grad():
        off = float(forward(plain, bound, inputs, inputs.denominator).objective)
        assert loss(1) == loss(2) == off
    draws = torch.tensor([loss(seed) for seed in range(40)])
    assert abs(float(draws.mean()) - off) < 0.5 * off  # of the same size, not the same
