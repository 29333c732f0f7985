"""The one Triton kernel of the packed projection."""

from __future__ import annotations

import pytest
import torch

from titan_yulan.kernels import packed_linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
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
