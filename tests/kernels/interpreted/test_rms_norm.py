"""RMSNorm's kernels, with and without the residual addition, against float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.kernels.accuracy import DTYPES, assert_accurate, results_of
from titan_yulan.kernels import add_rms_norm as add_module
from titan_yulan.kernels import rms_norm as module
from titan_yulan.kernels.add_rms_norm import add_rms_norm
from titan_yulan.kernels.rms_norm import rms_norm, rms_norm_reference

EPS = 1e-6
# (tokens, hidden, eps). The norm of one element is its sign, and its gradient 0, but for a large eps.
SHAPES = [(3, 1920, EPS), (1, 1920, EPS), (7, 48, 1e-5), (9, 130, 0.1), (1, 1, 20.0), (5, 1, 20.0)]


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three programs in backward, so that each goes through several rows, not all the same number."""
    for owner in (module, add_module):
        monkeypatch.setattr(owner, "backward_programs", lambda rows: min(rows, 3))


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    """Other numbers for every test, the same in every run."""
    return torch.Generator().manual_seed(sum(map(ord, request.node.name)))


def normal(generator: torch.Generator, device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def gradient(generator: torch.Generator, like: Tensor) -> Tensor:
    """A gradient that has something in common with `like`, so that sums over all elements do not cancel out."""
    return normal(generator, like.device, torch.float64, *like.shape).to(like.dtype) + 0.5 * like


def peer(x: Tensor, weight: Tensor, scale: Tensor, eps: float = EPS) -> Tensor:
    return (functional.rms_norm(x, x.shape[-1:], weight, eps) * scale).to(x.dtype)


def add_peer(
    x: Tensor, residual: Tensor, weight: Tensor, scale: Tensor, x_scale: Tensor, eps: float = EPS
) -> tuple[Tensor, Tensor]:
    residual_out = (residual + x * x_scale).to(x.dtype)
    return peer(residual_out, weight, scale, eps), residual_out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "hidden", "eps"), SHAPES)
def test_rms_norm(
    device: torch.device, generator: torch.Generator, dtype: torch.dtype, tokens: int, hidden: int, eps: float
) -> None:
    x, weight = 3 * normal(generator, device, dtype, tokens, hidden), normal(generator, device, dtype, hidden)
    scale = torch.tensor([0.037], device=device)
    assert_accurate(
        lambda x, w, c: rms_norm(x, w, eps, c, kernels="triton"),
        lambda x, w, c: peer(x, w, c, eps),
        lambda x, w, c: rms_norm_reference(x, w, eps, c),
        (x, weight, scale),
        (gradient(generator, peer(x, weight, scale) / scale),),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "hidden", "eps"), SHAPES)
def test_add_rms_norm(
    device: torch.device, generator: torch.Generator, dtype: torch.dtype, tokens: int, hidden: int, eps: float
) -> None:
    x, residual = (normal(generator, device, dtype, tokens, hidden) for _ in range(2))
    weight = normal(generator, device, dtype, hidden)
    scales = torch.tensor([1.7], device=device), torch.tensor([-0.19], device=device)
    y, residual_out = add_peer(x, residual, weight, *scales)
    assert_accurate(
        lambda x, r, w, c, a: add_rms_norm(x, r, w, eps, c, a, kernels="triton"),
        lambda x, r, w, c, a: add_peer(x, r, w, c, a, eps),
        lambda x, r, w, c, a: add_module.add_rms_norm_reference(x, r, w, eps, c, a),
        (x, residual, weight, *scales),
        (gradient(generator, y), gradient(generator, residual_out) - x),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_multipliers(device: torch.device, generator: torch.Generator, dtype: torch.dtype) -> None:
    x, residual = (normal(generator, device, dtype, 5, 130) for _ in range(2))
    weight = normal(generator, device, dtype, 130)
    one = torch.ones(1, device=device)
    dy, ds = (normal(generator, device, dtype, 5, 130) for _ in range(2))
    assert_accurate(
        lambda x, w: rms_norm(x, w, EPS, kernels="triton"),
        lambda x, w: peer(x, w, one),
        lambda x, w: rms_norm_reference(x, w, EPS),
        (x, weight),
        (dy,),
    )
    assert_accurate(
        lambda x, r, w: add_rms_norm(x, r, w, EPS, kernels="triton"),
        lambda x, r, w: add_peer(x, r, w, one, one),
        lambda x, r, w: add_module.add_rms_norm_reference(x, r, w, EPS),
        (x, residual, weight),
        (dy, ds),
    )


@pytest.mark.parametrize("used", [0, 1])
def test_only_one_of_two_results_is_used(device: torch.device, generator: torch.Generator, used: int) -> None:
    x, residual = (normal(generator, device, torch.float32, 5, 48) for _ in range(2))
    weight, scale = normal(generator, device, torch.float32, 48), torch.tensor([2.5], device=device)
    assert_accurate(
        lambda x, r, w, s: add_rms_norm(x, r, w, EPS, None, s, kernels="triton")[used],
        lambda x, r, w, s: add_peer(x, r, w, torch.ones_like(s), s)[used] + 0 * w,
        lambda x, r, w, s: add_module.add_rms_norm_reference(x, r, w, EPS, None, s)[used] + 0 * w,
        (x, residual, weight, scale),
        (gradient(generator, x),),
    )


def test_rounding_before_the_weight(device: torch.device, generator: torch.Generator) -> None:
    x, weight = (normal(generator, device, torch.bfloat16, 9, 130), normal(generator, device, torch.bfloat16, 130))
    normed = (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS)).to(torch.bfloat16)
    rounded = rms_norm(x, weight, EPS, round_before_weight=True, kernels="triton")
    # A normed value at the border of two bfloat16 numbers may fall to either side.
    assert (rounded != weight * normed).double().mean() < 0.01
    assert (rounded != rms_norm(x, weight, EPS, kernels="triton")).double().mean() > 0.1
    _, _, grad_weight = results_of(
        lambda x, w: rms_norm(x, w, EPS, round_before_weight=True, kernels="triton"), (x, weight.float()), (x,)
    )
    expected = (x.double() * normed.double()).sum(0)
    torch.testing.assert_close(grad_weight.double(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("scaled", [False, True])
def test_rounding_before_the_weight_of_a_sum(device: torch.device, generator: torch.Generator, scaled: bool) -> None:
    """The norm of a sum is the norm of that sum, forward and backward, to the bit."""
    x, residual, dy = (normal(generator, device, torch.bfloat16, 9, 130) for _ in range(3))
    weight, scale = normal(generator, device, torch.float32, 130), torch.tensor([1.7], device=device)
    options: dict[str, Any] = {"scale": scale if scaled else None, "round_before_weight": True, "kernels": "triton"}
    total = add_rms_norm(x, residual, weight, EPS, **options)[1]
    added = results_of(lambda r, w: add_rms_norm(x, r, w, EPS, **options)[0], (residual, weight), (dy,))
    plain = results_of(lambda x, w: rms_norm(x, w, EPS, **options), (total, weight), (dy,))
    assert torch.equal(total, x + residual)
    assert all(torch.equal(a, b) for a, b in zip(added, plain, strict=True))
    assert not torch.equal(added[0], rms_norm(total, weight, EPS, options["scale"], kernels="triton"))


@pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm"])
def test_memory_that_is_not_in_order(device: torch.device, generator: torch.Generator, name: str) -> None:
    """Three dimensions, inputs transposed, and a gradient without strides, as `sum` makes them."""
    operations: dict[str, tuple[Callable[..., object], int]] = {
        "rms_norm": (rms_norm, 1),
        "add_rms_norm": (add_rms_norm, 2),
    }
    operation, count = operations[name]
    inputs = [normal(generator, device, torch.float32, 48, 3, 2).permute(2, 1, 0) for _ in range(count)]
    inputs.append(normal(generator, device, torch.float32, 96)[::2])
    gradients = [torch.ones(1, 1, 1, device=device).expand(2, 3, 48)] * count
    assert not any(tensor.is_contiguous() for tensor in (*inputs, *gradients))
    ours, other = (
        results_of(lambda *i, kernels=kernels: operation(*i, EPS, kernels=kernels), inputs, gradients)
        for kernels in ("triton", "reference")
    )
    torch.testing.assert_close(ours, other)
    assert all(tensor.is_contiguous() for tensor in ours)


def test_types_of_weight_and_scale_are_their_own(device: torch.device, generator: torch.Generator) -> None:
    x, weight = normal(generator, device, torch.bfloat16, 5, 48), normal(generator, device, torch.float32, 48)
    scale = torch.tensor(0.5, dtype=torch.bfloat16, device=device)  # of no dimension
    y, dx, dw, ds = results_of(
        lambda x, w, s: rms_norm(x, w, EPS, s, kernels="triton"), (x, weight, scale), (x.float(),)
    )
    assert (y.dtype, dx.dtype, dw.dtype, ds.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32, torch.bfloat16)
    assert ds.shape == ()
    other = results_of(lambda x, w, s: rms_norm_reference(x, w, EPS, s), (x, weight, scale), (x.float(),))
    torch.testing.assert_close((y, dx, dw, ds), tuple(other))


def test_float32_weights_of_16_bit_activations(device: torch.device, generator: torch.Generator) -> None:
    """As a model launches it: float32 weight and scale, a constant multiplier of x."""
    x, residual, dy, ds = (normal(generator, device, torch.bfloat16, 7, 130) for _ in range(4))
    weight, scale = normal(generator, device, torch.float32, 130), torch.tensor([0.037], device=device)
    ours, other = (
        results_of(lambda x, r, w, c, call=call: call(x, r, w, EPS, c, 0.19), (x, residual, weight, scale), (dy, ds))
        for call in (partial(add_rms_norm, kernels="triton"), add_module.add_rms_norm_reference)
    )
    assert [tensor.dtype for tensor in ours] == [torch.bfloat16] * 4 + [torch.float32] * 2
    torch.testing.assert_close(ours, other)


def test_results_repeat_bit_for_bit(device: torch.device, generator: torch.Generator) -> None:
    x, residual = (normal(generator, device, torch.bfloat16, 9, 130) for _ in range(2))
    weight = normal(generator, device, torch.bfloat16, 130)
    scales = torch.tensor([1.7], device=device), torch.tensor([-0.19], device=device)
    runs = [
        results_of(
            lambda x, r, w, c, a: add_rms_norm(x, r, w, EPS, c, a, kernels="triton"),
            (x, residual, weight, *scales),
            (x, residual),
        )
        for _ in range(3)
    ]
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_a_row_does_not_depend_on_the_others(device: torch.device, generator: torch.Generator) -> None:
    x, weight = normal(generator, device, torch.bfloat16, 9, 130), normal(generator, device, torch.bfloat16, 130)
    together = rms_norm(x, weight, EPS, kernels="triton")
    alone = torch.cat([rms_norm(row, weight, EPS, kernels="triton") for row in x.split(1)])
    assert torch.equal(together, alone)


def test_no_rows(device: torch.device) -> None:
    x, weight, scale = torch.empty(0, 48, device=device), torch.ones(48, device=device), torch.ones(1, device=device)
    for result in (
        results_of(lambda x, w, s: rms_norm(x, w, EPS, s, kernels="triton"), (x, weight, scale), (x,)),
        results_of(lambda x, w, s: add_rms_norm(x, x, w, EPS, s, s, kernels="triton"), (x, weight, scale), (x, x)),
    ):
        assert result[0].shape == (0, 48)
        assert torch.equal(result[-2], torch.zeros_like(weight)) and torch.equal(result[-1], torch.zeros_like(scale))


@pytest.mark.parametrize("added", [False, True])
def test_offsets_beyond_32_bits(device: torch.device, generator: torch.Generator, added: bool) -> None:
    """On a GPU with more than 2^31 elements; the interpreter, for which that is too much, goes through the test."""
    rows = 2**31 // 1920 + 5 if device.type == "cuda" else 5
    x = torch.ones(rows, 1920, dtype=torch.bfloat16, device=device)
    x[-5:] = normal(generator, device, torch.bfloat16, 5, 1920)
    weight = torch.ones(1920, dtype=torch.bfloat16, device=device)

    def norm(x: Tensor) -> Tensor:
        if added:
            return add_rms_norm(x, x.detach(), weight, EPS, kernels="triton")[0]
        return rms_norm(x, weight, EPS, kernels="triton")

    x.requires_grad_()
    y = norm(x)
    (dx,) = torch.autograd.grad(y, x, y.detach())
    last = results_of(norm, (x[-5:],), (y[-5:].detach(),))
    assert torch.equal(y[-5:], last[0]) and torch.equal(dx[-5:], last[1])


def test_more_columns_than_registers_hold(device: torch.device) -> None:
    x = torch.ones(1, module.MAXIMUM_SIZE + 1, device=device)
    with pytest.raises(ValueError, match=r'8193 columns.*choose kernels = "reference"'):
        rms_norm(x, x[0], EPS, kernels="triton")
    assert torch.equal(rms_norm(x, x[0], 0.0, kernels="reference"), x)
