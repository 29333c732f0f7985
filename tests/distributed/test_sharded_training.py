"""Training on 1, 2 and 3 ranks is training on one: against a plain decoder that sees the whole batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.distributed.bodies import BATCH_ROWS, MODEL, STEPS, TAPES, run_config
from titan_yulan.curriculum.plan import Plan
from titan_yulan.data.loader import Batch, read_rows
from titan_yulan.model import Decoder
from titan_yulan.model.initialise import initialise
from titan_yulan.optimizer.groups import assign, group_table
from titan_yulan.optimizer.guard import FINE, NOT_FINITE

WORLDS = (1, 2, 3)
Found = dict[int, list[dict[str, Any]]]


def loss_of(decoder: Decoder, batch: Batch, z_loss: float = 0.01) -> tuple[Tensor, Tensor, Tensor]:
    """(mean objective, cross-entropy by token, weights) of a whole global batch, from its logits."""
    logits = decoder(batch.tokens[:, :-1]).float()
    weights = batch.loss_mask[:, 1:].float()
    losses = functional.cross_entropy(logits.flatten(0, 1), batch.tokens[:, 1:].flatten(), reduction="none")
    losses = losses.view_as(weights) * weights
    total = losses.sum() + z_loss * (weights * logits.logsumexp(-1) ** 2).sum()
    return total / weights.sum(), losses, weights


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    """The same training on an unsharded float32 decoder with torch's own AdamW, the gradient scaled by hand."""
    config = run_config()
    plan = Plan(config)
    decoder = Decoder(MODEL)
    initialise(decoder, seed=3)
    found: dict[str, Any] = {"initial": {n: p.detach().clone() for n, p in decoder.named_parameters()}, "steps": []}
    named = dict(decoder.named_parameters())
    table = group_table(MODEL, config.optimizer)
    groups = [
        {"params": [named[name] for name in assign(named, table)[group.name]], "lr": 0.02 * group.learning_rate}
        for group in table
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-2, weight_decay=0.1, foreach=False)
    for step in range(STEPS):
        numbers = np.arange(step * BATCH_ROWS, (step + 1) * BATCH_ROWS)
        batch = read_rows(plan.phases[0], TAPES, numbers, BATCH_ROWS)
        loss, losses, weights = loss_of(decoder, batch)
        loss.backward()
        grads = {n: p.grad for n, p in named.items() if p.grad is not None}
        if step == 0:
            found["gradients"] = {n: g.clone() for n, g in grads.items()}
        norm = torch.stack([g.double().square().sum() for g in grads.values()]).sum().sqrt()
        by_source = [[float(x.detach()[batch.source == s].sum()) for s in (0, 1)] for x in (losses, weights)]
        found["steps"].append((float(loss.detach()), float(norm), by_source[0] + by_source[1]))
        for gradient in grads.values():
            gradient.mul_(min(1.0, 0.5 / float(norm)))
        optimizer.step()
        optimizer.zero_grad()
    found["trained"] = {n: p.detach() for n, p in named.items()}
    return found


def test_ranks_come_in_order_and_agree_on_the_largest_value(trained: Found) -> None:
    for world in WORLDS:
        assert [rank["rank"] for rank in trained[world]] == list(range(world))
        assert all(rank["agreed"] == [0, world - 1, 3] for rank in trained[world])


def test_initial_weights_are_the_same_for_every_number_of_ranks(trained: Found, plain: dict[str, Any]) -> None:
    for world in WORLDS:
        for rank in trained[world]:
            assert rank["initial"].keys() == plain["initial"].keys()
            for name, tensor in plain["initial"].items():
                assert torch.equal(rank["initial"][name], tensor), name


@pytest.mark.parametrize("world", WORLDS)
def test_gradients_are_those_of_the_whole_batch(trained: Found, plain: dict[str, Any], world: int) -> None:
    for rank in trained[world]:
        assert rank["gradients"].keys() == plain["gradients"].keys()
        total = torch.stack([g.double().norm() for g in plain["gradients"].values()]).norm()
        for name, gradient in plain["gradients"].items():
            # a scalar's gradient is a sum that cancels: its rounding is that of the gradient as a whole
            tolerance = float(2e-6 * gradient.abs().max() + 1e-7 * total)
            torch.testing.assert_close(rank["gradients"][name], gradient, rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("world", WORLDS)
def test_losses_and_norms_are_those_of_the_whole_batch(trained: Found, plain: dict[str, Any], world: int) -> None:
    for rank in trained[world]:
        assert rank["steps"] == trained[world][0]["steps"]
        for found, expected in zip(rank["steps"], plain["steps"], strict=True):
            assert found[0] == pytest.approx(expected[0], rel=1e-6)
            assert found[1] == pytest.approx(expected[1], rel=5e-6)
            assert found[2] == pytest.approx(expected[2], rel=2e-6)


@pytest.mark.parametrize("world", WORLDS)
def test_trained_weights_are_those_of_the_plain_decoder(trained: Found, plain: dict[str, Any], world: int) -> None:
    for rank in trained[world]:
        for name, tensor in plain["trained"].items():
            torch.testing.assert_close(rank["trained"][name], tensor, rtol=0, atol=2e-6, msg=name)
    changed = [n for n, t in plain["trained"].items() if torch.equal(t, plain["initial"][n])]
    assert changed == []


def test_rows_are_the_same_for_every_number_of_ranks(trained: Found) -> None:
    prints = {world: [step[3] for step in trained[world][0]["steps"]] for world in WORLDS}
    assert prints[1] == prints[2] == prints[3] and len(set(prints[1])) == STEPS


@pytest.mark.parametrize("world", [2, 3])
def test_replicated_parameters_stay_identical_on_all_ranks(trained: Found, world: int) -> None:
    first, *others = [rank["replicated"] for rank in trained[world]]
    assert {"lm_head_alpha", "model.norm.weight", "model.layers.1.self_attn.q_proj_alpha"} <= first.keys()
    assert len(first) == 2 * (8 + 2) + 3
    for other in others:
        assert all(torch.equal(tensor, other[name]) for name, tensor in first.items())


@pytest.mark.parametrize("world", WORLDS)
def test_a_checkpoint_of_two_ranks_loads_bitwise_on_any_number(trained: Found, world: int) -> None:
    written = trained[2][0]["trained"]
    for rank in trained[world]:
        assert rank["loaded"].keys() == written.keys()
        for name, tensor in written.items():
            assert torch.equal(rank["loaded"][name], tensor), name
    assert sum(name.endswith(".exp_avg_sq") for name in written) == len(trained[2][0]["initial"])


def test_training_goes_on_bitwise_from_a_checkpoint(trained: Found) -> None:
    for rank in trained[2]:
        through, resumed = rank["continued"]
        assert through == resumed and through != rank["steps"]


@pytest.mark.parametrize("world", WORLDS)
def test_a_step_that_is_not_finite_on_one_rank_changes_no_bit_on_any(trained: Found, world: int) -> None:
    for rank in trained[world]:
        found = rank["refused"]
        assert found["verdicts"] == [(NOT_FINITE, False), (NOT_FINITE, True), (FINE, True)]
        assert found["changed"][:2] == [[], []] and found["worst"] == NOT_FINITE
        assert sorted(found["changed"][2]) == found["all"]  # weights, moments, step counts, window


@pytest.mark.parametrize("world", WORLDS)
def test_scalars_and_norm_weights_are_not_rounded_under_bfloat16(trained: Found, world: int) -> None:
    found = trained[world][-1]["bfloat16"]
    assert found["hidden"] == torch.bfloat16
    seen = found["seen"]
    replicated = {name for name in seen if name.endswith("_alpha") or "norm" in name}
    for name, (dtype, plain_tensor, _) in seen.items():
        assert plain_tensor, name
        assert dtype == (torch.float32 if name in replicated else torch.bfloat16), name
    alpha = seen["self_attn.q_proj_alpha"][2]
    assert torch.equal(alpha, torch.tensor([0.034503])) and alpha != alpha.bfloat16()
    assert set(found["gradients"].values()) == {torch.float32}
