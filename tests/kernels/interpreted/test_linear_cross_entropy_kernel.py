"""The fused head and loss with the Triton kernel inside: errors against float64, chunks, repeatability."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from titan_yulan.kernels.cross_entropy import cross_entropy_reference
from titan_yulan.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference

TOKENS, HIDDEN, Z = 10, 24, 1e-2
NAMES = ("objective", "losses", "logsumexp", "grad_hidden", "grad_weight")


def inputs(device: torch.device, vocab: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, head, targets (the first and the last column among them) and weights, two of them 0.

    In float32, logits are sums of small multiples of 1/64, so that the product makes them exactly: its rounding, which
    the kernel cannot help, would be more than the kernel's own.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64)
    weight = 0.5 * torch.randn(vocab, HIDDEN, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, vocab, (TOKENS,), generator=generator)
    targets[:3] = torch.tensor([0, vocab - 1, -100])
    token_weights = torch.rand(TOKENS, generator=generator) + 0.1
    token_weights[[2, 7]] = 0
    if dtype == torch.float32:
        hidden, weight = (8 * hidden).round() / 8, (8 * weight).round() / 8
    hidden, weight = (tensor.to(dtype).to(device).requires_grad_() for tensor in (hidden, weight))
    return hidden, weight, targets.to(device), token_weights.to(device)


def results(function, hidden: Tensor, weight: Tensor, *rest, **options) -> tuple[Tensor, ...]:
    objective, losses, logsumexp = function(hidden, weight, *rest, Z, **options)
    return (objective.detach(), losses, logsumexp, *torch.autograd.grad(objective, (hidden, weight)))


def ours(arguments: tuple[Tensor, ...], **options) -> tuple[Tensor, ...]:
    return results(linear_cross_entropy, *arguments, with_logsumexp=True, **options)


def exact(arguments: tuple[Tensor, ...], **options) -> tuple[Tensor, ...]:
    hidden, weight = (tensor.detach().double().requires_grad_() for tensor in arguments[:2])
    return results(linear_cross_entropy_reference, hidden, weight, *arguments[2:], **options)


def pytorch(hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor, z: float, denominator: Tensor):
    """Logits in the type of the inputs, then PyTorch's cross-entropy in float32."""
    wide = (hidden @ weight.t()).float()
    losses = token_weights * functional.cross_entropy(wide, targets, reduction="none", ignore_index=-100)
    logsumexp = torch.where(token_weights != 0, wide.logsumexp(1), 0)
    objective = (losses + z * token_weights * logsumexp**2).sum() / denominator
    return objective, losses.detach(), logsumexp.detach()


def relative_error(value: Tensor, reference: Tensor) -> float:
    return ((value.double() - reference).norm() / reference.norm()).item()


def ulp(reference: Tensor) -> float:
    """Float32's spacing at the largest value."""
    return 2.0 ** (math.floor(math.log2(reference.abs().max().item())) - 23)


def rounding_of_products(arguments: tuple[Tensor, ...], chunk_rows: int) -> tuple[float, float]:
    """How far float32 products of the exact gradient of the logits with W and H are off, in the same chunks.

    PyTorch adds up the products of a single row in another order than those of many, with a larger error.
    """
    hidden, weight = (tensor.detach().double() for tensor in arguments[:2])
    logits = (hidden @ weight.t()).requires_grad_()
    (gradient,) = torch.autograd.grad(cross_entropy_reference(logits, *arguments[2:], z_weight=Z)[0], logits)
    rounded = gradient.float().split(chunk_rows)
    grad_hidden = torch.cat([part @ weight.float() for part in rounded])
    grad_weight = sum(part.t() @ h.float() for part, h in zip(rounded, hidden.split(chunk_rows), strict=True))
    errors = grad_hidden - gradient @ weight, grad_weight - gradient.t() @ hidden
    return errors[0].abs().max().item(), errors[1].abs().max().item()


@pytest.mark.parametrize("chunk_rows", [1, 3, 5, 10, 11])
@pytest.mark.parametrize("vocab", [1000, 990, 495, 165])
def test_float32(device: torch.device, vocab: int, chunk_rows: int) -> None:
    arguments = inputs(device, vocab, torch.float32, seed=vocab)
    denominator = torch.tensor([4.0], device=device)
    reference = exact(arguments, denominator=denominator)
    values = ours(arguments, denominator=denominator, chunk_rows=chunk_rows)
    products = (0.0, 0.0, 0.0, *rounding_of_products(arguments, chunk_rows))
    for name, value, right, product in zip(NAMES, values, reference, products, strict=True):
        assert value.dtype == torch.float32
        assert (value.double() - right).abs().max().item() <= 4 * ulp(right) + 1.5 * product / 4, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk_rows", [3, None])
@pytest.mark.parametrize("vocab", [1000, 165])
def test_16_bits_are_as_exact_as_pytorch(
    device: torch.device, vocab: int, chunk_rows: int | None, dtype: torch.dtype
) -> None:
    arguments = inputs(device, vocab, dtype, seed=vocab)
    denominator = torch.tensor([3.0], device=device)
    theirs = results(pytorch, *arguments, denominator=denominator)
    reference = exact(arguments, denominator=denominator)
    values = ours(arguments, denominator=denominator, chunk_rows=chunk_rows)
    assert [value.dtype for value in values] == [torch.float32] * 3 + [dtype] * 2
    for name, value, peer, right in zip(NAMES, values, theirs, reference, strict=True):
        assert relative_error(value, right) <= 1.05 * relative_error(peer, right) + 1e-4, name


def test_the_size_of_chunks_does_not_matter(device: torch.device) -> None:
    arguments = inputs(device, 495, torch.float32, seed=1)
    whole = ours(arguments)
    for chunk_rows in (1, 2, 4, 7, 9):
        values = ours(arguments, chunk_rows=chunk_rows)
        products = (0.0, 0.0, 0.0, *rounding_of_products(arguments, chunk_rows))
        for name, value, other, product in zip(NAMES, values, whole, products, strict=True):
            assert (value - other).abs().max().item() <= 2 * ulp(other) + 2 * product, (name, chunk_rows)


def test_a_16_bit_gradient_of_the_head_is_summed_in_float32(device: torch.device) -> None:
    """Chunks of one token: 100 roundings to bfloat16 on the way would leave an error of several parts in a thousand."""
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(100, HIDDEN, generator=generator).bfloat16().to(device).requires_grad_()
    weight = torch.randn(40, HIDDEN, generator=generator).bfloat16().to(device).requires_grad_()
    targets = torch.randint(0, 40, (100,), generator=generator).to(device)
    arguments = (hidden, weight, targets, torch.ones(100, device=device))
    by_token, whole = ours(arguments, chunk_rows=1)[-1], ours(arguments)[-1]
    assert relative_error(by_token, whole.double()) < 5e-4


@pytest.mark.parametrize("dead", [range(4, 8), range(TOKENS)], ids=["a chunk", "all"])
def test_tokens_without_weight(device: torch.device, dead: range) -> None:
    hidden, weight, targets, token_weights = inputs(device, 165, torch.float32, seed=3)
    token_weights[list(dead)] = 0
    targets[list(dead)] = -100
    arguments = (hidden, weight, targets, token_weights)
    values = ours(arguments, chunk_rows=4)
    for name, value, right in zip(NAMES, values, exact(arguments), strict=True):
        torch.testing.assert_close(value.double(), right, rtol=1e-5, atol=1e-5, msg=name)
    assert not values[3][list(dead)].any()
    if len(dead) == TOKENS:
        assert not any(value.any() for value in values)


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(device: torch.device, tokens: int) -> None:
    hidden, weight, targets, token_weights = inputs(device, 165, torch.float32, seed=4)
    arguments = (hidden.detach()[:tokens].requires_grad_(), weight, targets[:tokens], token_weights[:tokens])
    for value, right in zip(ours(arguments), exact(arguments), strict=True):
        torch.testing.assert_close(value.double(), right, rtol=1e-5, atol=1e-6)


def test_repeated_runs_are_bitwise_equal(device: torch.device) -> None:
    arguments = inputs(device, 990, torch.bfloat16, seed=5)
    first = ours(arguments, chunk_rows=4)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(first, ours(arguments, chunk_rows=4), strict=True))


def test_without_gradients_the_values_are_the_same(device: torch.device) -> None:
    arguments = inputs(device, 495, torch.bfloat16, seed=6)
    with torch.no_grad():
        values = linear_cross_entropy(*arguments, Z, with_logsumexp=True, chunk_rows=4)
    assert not values[0].requires_grad
    assert all(torch.equal(a, b) for a, b in zip(values, ours(arguments, chunk_rows=4)[:3], strict=True))


def test_the_kernel_and_the_reference_arithmetic_agree(device: torch.device) -> None:
    arguments = inputs(device, 495, torch.float32, seed=7)
    triton, reference = ours(arguments, kernels="triton"), ours(arguments, kernels="reference")
    for name, one, other in zip(NAMES, triton, reference, strict=True):
        assert (one - other).abs().max().item() <= 4 * ulp(other), name
