"""The cross-entropy kernel against float64: values, gradients, and what it must not touch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from titan_yulan.kernels import cross_entropy as module
from titan_yulan.kernels.cross_entropy import cross_entropy, cross_entropy_reference, forward_gradient_rows

TOKENS = 6
Z = 1e-2


def inputs(device: torch.device, vocab: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, targets (first and last column among them) and weights (one of them 0, with a target of -100)."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(TOKENS, vocab, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, vocab, (TOKENS,), generator=generator)
    targets[:3] = torch.tensor([0, vocab - 1, -100])
    token_weights = torch.rand(TOKENS, generator=generator) + 0.1
    token_weights[2] = 0
    return logits.to(dtype).to(device).requires_grad_(), targets.to(device), token_weights.to(device)


def results(function, logits: Tensor, *rest) -> dict[str, Tensor]:
    objective, losses, logsumexp = function(logits, *rest)
    (gradient,) = torch.autograd.grad(objective * 1.7, logits)
    return {"objective": objective.detach(), "losses": losses, "logsumexp": logsumexp, "gradient": gradient}


def exact(logits: Tensor, targets: Tensor, token_weights: Tensor, z: float) -> dict[str, Tensor]:
    return results(cross_entropy_reference, logits.detach().double().requires_grad_(), targets, token_weights, z)


def pytorch(logits: Tensor, targets: Tensor, token_weights: Tensor, z: float) -> tuple[Tensor, Tensor, Tensor]:
    """The same with PyTorch's cross-entropy in float32."""
    wide = logits.float()
    losses = token_weights * functional.cross_entropy(wide, targets, reduction="none", ignore_index=-100)
    logsumexp = torch.where(token_weights != 0, wide.logsumexp(1), 0)
    return (losses + z * token_weights * logsumexp**2).sum(), losses.detach(), logsumexp.detach()


def relative_error(value: Tensor, reference: Tensor) -> float:
    return ((value.double() - reference).norm() / reference.norm()).item()


def units_in_the_last_place(value: Tensor, reference: Tensor) -> float:
    """The largest error, in float32's spacing at the largest value."""
    scale = reference.abs().max().item()
    return (value.double() - reference).abs().max().item() / 2.0 ** (math.floor(math.log2(scale)) - 23)


@pytest.mark.parametrize("block", [None, 128])
@pytest.mark.parametrize("vocab", [1000, 990, 495, 165, 2])
def test_float32(monkeypatch: pytest.MonkeyPatch, device: torch.device, vocab: int, block: int | None) -> None:
    if block:
        monkeypatch.setattr(module, "_configuration", lambda width: (block, 4))
    arguments = (*inputs(device, vocab, torch.float32, seed=vocab), Z)
    ours, reference = results(cross_entropy, *arguments), exact(*arguments)
    for name, value in ours.items():
        assert value.dtype == torch.float32
        assert units_in_the_last_place(value, reference[name]) <= 4, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [1000, 165])
def test_16_bits_are_as_exact_as_pytorch(device: torch.device, vocab: int, dtype: torch.dtype) -> None:
    arguments = (*inputs(device, vocab, dtype, seed=vocab), Z)
    ours, theirs, reference = results(cross_entropy, *arguments), results(pytorch, *arguments), exact(*arguments)
    assert ours["gradient"].dtype == dtype
    for name, value in ours.items():
        limit = 1.05 * relative_error(theirs[name], reference[name]) + 1e-4
        assert relative_error(value, reference[name]) <= limit, name


@pytest.mark.parametrize("z", [0.0, 0.3])
def test_a_row_of_the_gradient_sums_to_its_z_term(device: torch.device, z: float) -> None:
    logits, targets, token_weights = inputs(device, 990, torch.float32, seed=1)
    objective, _, logsumexp = cross_entropy(logits, targets, token_weights, z)
    (gradient,) = torch.autograd.grad(objective, logits)
    torch.testing.assert_close(gradient.sum(1), 2 * z * token_weights * logsumexp, rtol=1e-5, atol=2e-6)


def test_adding_to_a_row_changes_nothing_but_its_logsumexp(device: torch.device) -> None:
    logits, targets, token_weights = inputs(device, 300, torch.float32, seed=2)
    moved = (logits.detach() * 16).round() / 16 + 64 * torch.arange(TOKENS, device=device)[:, None]  # exact sums
    one, other = (
        results(cross_entropy, part.requires_grad_(), targets, token_weights, 0.0)
        for part in ((logits.detach() * 16).round() / 16, moved)
    )
    for name in ("objective", "losses", "gradient"):
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=0)
    shift = torch.where(token_weights != 0, 64.0 * torch.arange(TOKENS, device=device), 0)
    torch.testing.assert_close(other["logsumexp"] - one["logsumexp"], shift, rtol=0, atol=1e-4)


def test_repeated_runs_are_bitwise_equal(device: torch.device) -> None:
    arguments = (*inputs(device, 990, torch.bfloat16, seed=3), Z)
    first = results(cross_entropy, *arguments)
    for _ in range(2):
        again = results(cross_entropy, *arguments)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_without_weight_is_zero_whatever_it_holds(device: torch.device, bad: float) -> None:
    logits, targets, token_weights = inputs(device, 165, torch.float32, seed=4)
    with torch.no_grad():
        logits[2] = bad
    arguments = (logits, targets, token_weights, Z)
    ours, reference = results(cross_entropy, *arguments), exact(*arguments)
    assert not ours["gradient"][2].any() and ours["losses"][2] == 0 and ours["logsumexp"][2] == 0
    for name, value in ours.items():
        torch.testing.assert_close(value.double(), reference[name], rtol=1e-5, atol=1e-6)


def test_all_rows_without_weight(device: torch.device) -> None:
    logits, targets, token_weights = inputs(device, 165, torch.float32, seed=4)
    ours = results(cross_entropy, logits, targets - 1000, token_weights * 0, Z)
    assert not any(value.any() for value in ours.values())


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(device: torch.device, rows: int) -> None:
    logits, targets, token_weights = inputs(device, 165, torch.float32, seed=5)
    logits = logits.detach()[:rows].requires_grad_()
    arguments = (logits, targets[:rows], token_weights[:rows], Z)
    ours, reference = results(cross_entropy, *arguments), exact(*arguments)
    assert ours["gradient"].shape == (rows, 165)
    for name, value in ours.items():
        torch.testing.assert_close(value.double(), reference[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("stride", [165, 170, 2**30])
def test_rows_at_any_distance(device: torch.device, stride: int) -> None:
    """Also where the third row's offset has 64 bits; a CPU holds no memory for what lies between, never written."""
    chosen = [0, 1, 3] if stride > 1000 else list(range(TOKENS))  # row 2 has no weight and is not read
    values, *rest = (tensor.detach()[chosen] for tensor in inputs(device, 165, torch.float16, seed=6))
    memory = torch.empty((len(chosen) - 1) * stride + 165, dtype=torch.float16, device=device)
    logits = memory.as_strided((len(chosen), 165), (stride, 1)).copy_(values).requires_grad_()
    ours, contiguous = (results(cross_entropy, part, *rest, Z) for part in (logits, values.requires_grad_()))
    assert all(torch.equal(ours[name], contiguous[name]) for name in ours)


def test_in_place_the_padding_is_ignored_and_set_to_zero(device: torch.device) -> None:
    logits, targets, token_weights = inputs(device, 165, torch.float32, seed=7)
    buffer = torch.full((TOKENS, 192), math.nan, device=device)
    buffer[:, :165] = logits.detach()
    beyond = torch.full((3, TOKENS + 1), 42.0, device=device)  # the last column must stay
    gradient = forward_gradient_rows(buffer, 165, targets, token_weights, Z, beyond[:, :TOKENS], True)
    reference = exact(logits, targets, token_weights, Z)
    assert gradient.data_ptr() == buffer.data_ptr() and not buffer[:, 165:].any()
    assert units_in_the_last_place(1.7 * gradient.double(), reference["gradient"]) <= 4
    torch.testing.assert_close((token_weights * beyond[0, :TOKENS]).double(), reference["losses"], rtol=1e-6, atol=1e-6)
    assert (beyond[:, TOKENS] == 42).all()


def test_upstream_gradient_may_be_zero_or_nan(device: torch.device) -> None:
    logits, targets, token_weights = inputs(device, 165, torch.float32, seed=8)
    objective, _, _ = cross_entropy(logits, targets, token_weights, Z)
    (zero,) = torch.autograd.grad(objective, logits, torch.zeros_like(objective), retain_graph=True)
    (nan,) = torch.autograd.grad(objective, logits, torch.full_like(objective, math.nan))
    assert not zero.any() and nan[[0, 1, 3, 4, 5]].isnan().all()


def test_extreme_logits(device: torch.device) -> None:
    logits, targets, token_weights = inputs(device, 165, torch.float32, seed=9)
    with torch.no_grad():
        logits *= 1e4
        logits[:, 7] = -math.inf
    targets[targets == 7] = 8
    arguments = (logits, targets, token_weights, 0.0)
    ours, reference = results(cross_entropy, *arguments), exact(*arguments)
    assert not ours["gradient"][:, 7].any()
    for name, value in ours.items():
        torch.testing.assert_close(value.double(), reference[name], rtol=1e-5, atol=1e-6)


def test_a_nan_among_the_logits_reaches_the_loss(device: torch.device) -> None:
    logits, targets, token_weights = inputs(device, 300, torch.float32, seed=10)
    with torch.no_grad():
        logits[4, 123] = math.nan
    objective, losses, _ = cross_entropy(logits, targets, token_weights, Z)
    assert objective.isnan() and losses.isnan().tolist() == [False] * 4 + [True, False]


@pytest.mark.parametrize("target", [-1, 165, 2**31 + 3])
def test_a_target_outside_the_vocabulary(monkeypatch: pytest.MonkeyPatch, device: torch.device, target: int) -> None:
    logits, targets, token_weights = inputs(device, 165, torch.float32, seed=11)
    targets[4] = target
    objective, losses, _ = cross_entropy(logits, targets, token_weights, Z)
    assert objective.isnan() and losses.isnan().tolist() == [False] * 4 + [True, False]
    monkeypatch.setenv("TITAN_YULAN_CHECK_TARGETS", "1")
    with pytest.raises(IndexError, match=f"target {target} of token 4 is outside the vocabulary of 165"):
        cross_entropy(logits, targets, token_weights, Z)
