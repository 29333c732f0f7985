"""The one Triton kernel of the packed projection, alone and inside the operation."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.accuracy import DTYPES, assert_accurate, results_of
from titan_yulan.kernels import packed_linear
from titan_yulan.kernels.packed_linear import packed_linear_reference


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "programs"), [((1, 1), 528), ((3, 701), 528), ((37, 500), 3)])
def test_scaled_gradient_and_product(
    dtype: torch.dtype, shape: tuple[int, int], programs: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_linear, "_PROGRAMS", programs)
    generator = torch.Generator().manual_seed(shape[1])
    gradient, weight = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
    scale = torch.tensor([-0.37], device=device)
    exact = gradient.double() * scale.double()
    product = (gradient.double() * weight.double()).sum()
    first, second = gradient.clone(), gradient.clone()
    found = packed_linear._scale_gradient(first, weight, scale)
    assert torch.equal(found, packed_linear._scale_gradient(second, weight, scale)) and torch.equal(first, second)
    bound = torch.finfo(dtype).eps * exact.abs() + torch.finfo(dtype).smallest_normal * 2**-10
    assert ((first.double() - exact).abs() <= bound).all()
    assert found.dtype == torch.float32 and found.shape == (1,)
    magnitude = (gradient.double() * weight.double()).abs().sum()
    assert abs(float(found) - float(product)) <= 2**-20 * float(magnitude)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "size"), [(1, 130), (15, 48)])
def test_packed_linear(dtype: torch.dtype, tokens: int, size: int, device: str) -> None:
    """Error and repeatability; the peer is plain autograd of the same packed product.

    In float32, all is of few bits, so that the products, whose rounding the kernel cannot help, are exact.
    """
    generator = torch.Generator().manual_seed(size)
    shapes = [(tokens, size), (33, size), (7, size), (33,), (7,)]
    leaves = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    leaves.append(torch.tensor([0.37, -0.61], device=device))
    dy = torch.randn(tokens, 40, generator=generator).to(device, dtype)
    if dtype == torch.float32:
        *leaves, dy = ((8 * tensor).round() / 8 for tensor in (*leaves, dy))

    def ours(x, w, v, b, c, s):
        return packed_linear.packed_linear(x, (w, v), s, (b, c))

    def plain(x, w, v, b, c, s):
        return packed_linear_reference(x, (w, v), s, (b, c))

    assert_accurate(ours, plain, plain, leaves, [dy])
    runs = [results_of(ours, leaves, [dy]) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_offsets_beyond_32_bits(device: str) -> None:
    """On a GPU with more than 2^31 elements; the interpreter, for which that is too much, goes through the test."""
    rows = 2**31 // 1920 + 5 if torch.device(device).type == "cuda" else 5
    generator = torch.Generator().manual_seed(0)
    last, other = (torch.randn(5, 1920, generator=generator).to(device, torch.bfloat16) for _ in range(2))
    gradient = torch.ones(rows, 1920, dtype=torch.bfloat16, device=device)
    weight = torch.zeros_like(gradient)
    gradient[-5:], weight[-5:] = last, other
    product = packed_linear._scale_gradient(gradient, weight, torch.tensor([0.5], device=device))
    assert torch.equal(gradient[-5:], last * 0.5)
    assert rows == 5 or torch.equal(gradient[:-5].amin(), gradient[:-5].amax())
    torch.testing.assert_close(product.double(), (last.double() * other.double()).sum().reshape(1))
