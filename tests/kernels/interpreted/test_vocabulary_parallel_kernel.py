"""The cross-entropy kernel on the columns of each shard of a vocabulary against float64 of whole rows."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.kernels.shards import all_shards
from titan_yulan.kernels.cross_entropy import cross_entropy_reference

TOKENS, Z = 7, 1e-2
NAMES = ("losses", "logsumexp", "gradient")


def inputs(device: torch.device, vocab: int, ranks: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, targets (both ends of the vocabulary and of its first shards) and weights (one 0, its target -100)."""
    generator = torch.Generator().manual_seed(vocab + ranks)
    logits = 3 * torch.randn(TOKENS, vocab, generator=generator, dtype=torch.float64)
    border = -(-vocab // ranks)
    targets = torch.tensor([0, border - 1, -100, min(border, vocab - 1), min(2 * border, vocab) - 1, vocab - 1, 0])
    token_weights = torch.rand(TOKENS, generator=generator) + 0.1
    token_weights[2] = 0
    return logits.to(dtype).to(device), targets.to(device), token_weights.to(device)


def exact(logits: Tensor, targets: Tensor, token_weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    wide = logits.double().requires_grad_()
    objective, losses, logsumexp = cross_entropy_reference(wide, targets, token_weights, Z)
    return losses, logsumexp, torch.autograd.grad(objective, wide)[0]


def sharded(logits: Tensor, ranks: int, targets: Tensor, token_weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    statistics, gradients = all_shards(logits, ranks, targets, token_weights, Z, use_triton=True)
    assert all(torch.equal(other, statistics[0]) for other in statistics)
    losses, maxima, sums = statistics[0].unbind()
    return token_weights * losses, maxima + sums.log(), torch.cat(gradients, 1)


@pytest.mark.parametrize(("vocab", "ranks"), [(250, 3), (990, 6), (330, 2), (129, 1), (4, 3)])
def test_float32(device: torch.device, vocab: int, ranks: int) -> None:
    logits, *rest = inputs(device, vocab, ranks, torch.float32)
    for name, value, right in zip(NAMES, sharded(logits, ranks, *rest), exact(logits, *rest), strict=True):
        unit = 2.0 ** (math.floor(math.log2(right.abs().max().item())) - 23)
        assert value.dtype == torch.float32 and value.shape == right.shape
        assert (value.double() - right).abs().max().item() <= 4 * unit, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_as_exact_as_their_rounding(device: torch.device, dtype: torch.dtype) -> None:
    logits, *rest = inputs(device, 495, 2, dtype)
    losses, logsumexp, gradient = sharded(logits, 2, *rest)
    right = exact(logits, *rest)
    torch.testing.assert_close((losses, logsumexp), (right[0].float(), right[1].float()), rtol=1e-6, atol=1e-6)
    error, rounding = ((value.double() - right[2]).norm() for value in (gradient, right[2].to(dtype)))
    assert gradient.dtype == dtype and error <= 1.05 * rounding


def test_rows_that_do_not_count_are_not_read(device: torch.device) -> None:
    logits, targets, token_weights = inputs(device, 250, 3, torch.float32)
    logits[2] = math.nan
    losses, logsumexp, gradient = sharded(logits, 3, targets, token_weights)
    assert losses[2] == 0 and logsumexp[2] == 0 and not gradient[2].any() and gradient.isfinite().all()


@pytest.mark.parametrize("target", [-1, 250])
def test_a_target_that_no_rank_has_makes_the_loss_infinite(device: torch.device, target: int) -> None:
    logits, targets, token_weights = inputs(device, 250, 3, torch.float32)
    targets[4] = target
    losses, logsumexp, gradient = sharded(logits, 3, targets, token_weights)
    assert losses.isinf().tolist() == [row == 4 for row in range(TOKENS)]
    assert logsumexp.isfinite().all() and gradient.isfinite().all()
