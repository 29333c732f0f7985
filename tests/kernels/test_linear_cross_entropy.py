"""The fused head and loss against torch's own cross-entropy in float64, for every size of chunk."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from titan_yulan.kernels import linear_cross_entropy as module
from titan_yulan.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from titan_yulan.kernels.runtime import Kernels

TOKENS, VOCAB, HIDDEN = 11, 13, 5


def inputs(dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, head, targets and token weights (two of them 0), fresh and not tiny."""
    generator = torch.Generator().manual_seed(seed)
    hidden = 2 * torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    token_weights = torch.rand(TOKENS, generator=generator) + 0.1
    token_weights[[2, 7]] = 0
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets, token_weights


def expected(hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor, z: float) -> tuple[Tensor, Tensor]:
    logits = hidden.double() @ weight.double().t()
    weights = token_weights.double()
    losses = weights * functional.cross_entropy(logits, targets, reduction="none")
    return (losses + z * weights * torch.logsumexp(logits, 1) ** 2).sum(), losses


@pytest.mark.parametrize("rows_in_a_chunk", [1, 4, 10, 11, 12, 1000])
@pytest.mark.parametrize("z", [0.0, 1e-4, 0.3])
def test_values_and_gradients(monkeypatch: pytest.MonkeyPatch, rows_in_a_chunk: int, z: float) -> None:
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", rows_in_a_chunk * VOCAB)
    arguments = inputs()
    objective, cross_entropy = linear_cross_entropy(*arguments, z)
    other_objective, other_cross_entropy = expected(*arguments, z)
    torch.testing.assert_close(objective, other_objective, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(cross_entropy, other_cross_entropy.detach(), rtol=1e-12, atol=1e-12)
    assert not cross_entropy.requires_grad
    gradients = torch.autograd.grad(2.5 * objective, arguments[:2])
    other = torch.autograd.grad(2.5 * other_objective, arguments[:2])
    torch.testing.assert_close(gradients, other, rtol=1e-11, atol=1e-12)


def test_gradcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 3 * VOCAB)
    hidden, weight, targets, token_weights = inputs()
    torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, targets, token_weights, 0.05)[0], (hidden, weight))


def test_a_chunk_has_a_row_even_when_the_vocabulary_is_larger_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 2)
    arguments = inputs()
    torch.testing.assert_close(linear_cross_entropy(*arguments, 0.1)[0], expected(*arguments, 0.1)[0])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_lower_precision_gives_float32_sums_and_gradients_of_its_own_type(dtype: torch.dtype, tolerance: float) -> None:
    arguments = inputs(dtype)
    objective, cross_entropy = linear_cross_entropy(*arguments, 1e-2)
    assert objective.dtype == cross_entropy.dtype == torch.float32
    reference, _ = expected(*arguments, 1e-2)
    torch.testing.assert_close(objective.double(), reference, rtol=tolerance, atol=0)
    objective.backward()
    for argument, gradient in zip(arguments[:2], torch.autograd.grad(reference, arguments[:2]), strict=True):
        assert argument.grad is not None and argument.grad.dtype == dtype
        error = (argument.grad.double() - gradient.double()).norm() / gradient.double().norm()
        assert error < tolerance


def test_non_contiguous_input() -> None:
    hidden, weight, targets, token_weights = inputs()
    h = hidden.detach().t().contiguous().t().requires_grad_()
    w = weight.detach().t().contiguous().t().requires_grad_()
    assert not h.is_contiguous() and not w.is_contiguous()
    objective, _ = linear_cross_entropy(h, w, targets, token_weights, 0.1)
    gradients = torch.autograd.grad(objective, (h, w))
    other = torch.autograd.grad(expected(hidden, weight, targets, token_weights, 0.1)[0], (hidden, weight))
    torch.testing.assert_close(gradients, other, rtol=1e-11, atol=1e-12)


def test_all_weights_zero_gives_zero_and_no_gradient() -> None:
    hidden, weight, targets, token_weights = inputs()
    objective, cross_entropy = linear_cross_entropy(hidden, weight, targets, token_weights * 0, 0.1)
    objective.backward()
    assert hidden.grad is not None and weight.grad is not None
    assert objective == 0 and not cross_entropy.any() and not hidden.grad.any() and not weight.grad.any()


def test_a_token_without_weight_contributes_nothing_whatever_it_holds() -> None:
    hidden, weight, targets, token_weights = inputs()
    other = hidden.detach().clone()
    other[[2, 7]] = 1e6
    results = []
    for h in (hidden, other.requires_grad_()):
        objective, _ = linear_cross_entropy(h, weight, targets, token_weights, 0.1)
        results.append((objective, *torch.autograd.grad(objective, (h, weight))))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


@pytest.mark.parametrize("needed", [0, 1])
def test_only_one_of_the_two_needs_a_gradient(needed: int) -> None:
    hidden, weight, targets, token_weights = inputs()
    needs = (hidden, weight)[needed]
    h, w = (hidden, weight.detach()) if needed == 0 else (hidden.detach(), weight)
    objective, _ = linear_cross_entropy(h, w, targets, token_weights, 0.1)
    (gradient,) = torch.autograd.grad(objective, needs)
    (other,) = torch.autograd.grad(expected(h, w, targets, token_weights, 0.1)[0], needs)
    torch.testing.assert_close(gradient, other, rtol=1e-11, atol=1e-12)


def test_large_logits_do_not_overflow() -> None:
    hidden, weight, targets, token_weights = inputs(torch.float32)
    objective, _ = linear_cross_entropy(hidden * 1e4, weight, targets, token_weights, 0.0)
    objective.backward()
    assert torch.isfinite(objective) and hidden.grad is not None and torch.isfinite(hidden.grad).all()


def test_no_gradients_are_computed_when_none_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation runs under no_grad over parameters that require gradients; they would cost twice the loss itself."""

    def unexpected(*_: object) -> None:
        raise AssertionError("a gradient was computed")

    arguments = inputs()
    monkeypatch.setattr(Tensor, "scatter_add_", unexpected)
    with torch.no_grad():
        objective, _ = linear_cross_entropy(*arguments, 0.1)
    torch.testing.assert_close(objective, expected(*arguments, 0.1)[0].detach())
    with pytest.raises(AssertionError, match="a gradient was computed"):
        linear_cross_entropy(*arguments, 0.1)  # the probe works


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_a_denominator_divides_the_objective_and_the_gradients_but_not_the_report(kernels: Kernels) -> None:
    arguments = inputs()
    denominator = torch.tensor([7.0])
    objective, cross_entropy, logsumexp = linear_cross_entropy(
        *arguments, 0.1, denominator=denominator, with_logsumexp=True, chunk_rows=4, kernels=kernels
    )
    reference, other = expected(*arguments, 0.1)
    torch.testing.assert_close(objective, reference / 7, rtol=1e-12, atol=0)
    torch.testing.assert_close(cross_entropy, other.detach(), rtol=1e-12, atol=1e-12)
    lse = torch.where(arguments[3] != 0, torch.logsumexp(arguments[0] @ arguments[1].t(), 1), 0)
    torch.testing.assert_close(logsumexp, lse.detach(), rtol=1e-12, atol=1e-12)
    assert not logsumexp.requires_grad
    gradients = torch.autograd.grad(objective, arguments[:2])
    torch.testing.assert_close(gradients, torch.autograd.grad(reference / 7, arguments[:2]), rtol=1e-11, atol=1e-12)


def test_the_reference_with_all_logits() -> None:
    hidden, weight, targets, token_weights = inputs()
    targets[2] = -100  # without weight
    denominator = torch.tensor(7.0)
    whole = linear_cross_entropy_reference(hidden, weight, targets, token_weights, 0.1, denominator=denominator)
    chunked = linear_cross_entropy(
        hidden, weight, targets, token_weights, 0.1, denominator=denominator, with_logsumexp=True, chunk_rows=4
    )
    torch.testing.assert_close(whole, chunked, rtol=1e-12, atol=1e-12)
    torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy_reference(h, w, targets, token_weights, 0.05)[0], (hidden, weight)
    )


def test_a_tied_head_gets_both_its_gradients() -> None:
    _, weight, targets, token_weights = inputs()
    tokens = torch.arange(TOKENS) % VOCAB
    objective, _ = linear_cross_entropy(weight[tokens], weight, targets, token_weights, 0.1)
    (gradient,) = torch.autograd.grad(objective, weight)
    (other,) = torch.autograd.grad(expected(weight[tokens], weight, targets, token_weights, 0.1)[0], weight)
    torch.testing.assert_close(gradient, other, rtol=1e-11, atol=1e-12)


def test_a_16_bit_gradient_is_multiplied_in_float32() -> None:
    """A factor rounded to bfloat16 before the product would be 0.3% off."""
    arguments = inputs(torch.bfloat16)
    objective, _ = linear_cross_entropy(*arguments, 0.1)
    one = torch.autograd.grad(objective, arguments[:2], retain_graph=True)
    factor = 1.0 + 2**-9
    scaled = torch.autograd.grad(objective * factor, arguments[:2])
    assert torch.equal(scaled[0], (one[0].float() * factor).to(torch.bfloat16))
    assert not torch.equal(scaled[1], one[1])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.ones(TOKENS, HIDDEN, dtype=torch.int64)}, TypeError, "hidden is torch.int64"),
        ({"hidden": torch.ones(TOKENS, HIDDEN)}, TypeError, "weight is torch.float64, hidden is torch.float32"),
        ({"hidden": torch.ones(TOKENS, 4).double()}, ValueError, r"hidden has shape \(11, 4\), weight \(13, 5\)"),
        ({"hidden": torch.ones(1, TOKENS, HIDDEN).double()}, ValueError, r"hidden has shape \(1, 11, 5\)"),
        ({"weight": torch.ones(VOCAB, HIDDEN, device="meta").double()}, ValueError, "weight is on meta"),
        ({"targets": torch.ones(TOKENS, dtype=torch.int32)}, TypeError, "targets is torch.int32"),
        ({"targets": torch.ones(10, dtype=torch.int64)}, ValueError, r"targets has shape \(10,\); 11 tokens"),
        ({"targets": torch.ones(TOKENS, dtype=torch.int64, device="meta")}, ValueError, "targets is on meta"),
        ({"token_weights": torch.ones(TOKENS, dtype=torch.bool)}, TypeError, "token_weights is torch.bool"),
        ({"token_weights": torch.ones(TOKENS, 1)}, ValueError, r"token_weights has shape \(11, 1\)"),
        ({"denominator": torch.ones(2)}, ValueError, r"denominator must be one .* not \(2,\)"),
        ({"chunk_rows": 0}, ValueError, "chunk_rows = 0"),
        ({"kernels": "triton"}, ValueError, "Triton"),
        ({"kernels": "fast"}, ValueError, 'kernels = "fast"'),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    hidden, weight, targets, token_weights = inputs()
    arguments: dict[str, Any] = {
        "hidden": hidden,
        "weight": weight,
        "targets": targets,
        "token_weights": token_weights,
        "z_weight": 0.1,
    }
    with pytest.raises(error, match=message):
        linear_cross_entropy(**(arguments | change))


def test_targets_are_checked_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets, token_weights = inputs()
    targets[2], targets[5] = -100, VOCAB  # the first has no weight
    monkeypatch.setenv("TITAN_YULAN_CHECK_TARGETS", "1")
    with pytest.raises(IndexError, match=f"target {VOCAB} of token 5 is outside the vocabulary of {VOCAB}"):
        linear_cross_entropy(hidden, weight, targets, token_weights, 0.1)
    targets[5] = VOCAB - 1
    assert linear_cross_entropy(hidden, weight, targets, token_weights, 0.1)[0].isfinite()
