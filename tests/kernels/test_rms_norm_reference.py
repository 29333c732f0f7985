"""The reference RMSNorm: values, types, gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from titan_yulan.kernels.rms_norm import rms_norm_reference


def test_known_values() -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.float64)
    weight, scale = torch.tensor([1.0, 2.0], dtype=torch.float64), torch.tensor([10.0], dtype=torch.float64)
    # mean square 12.5, and eps 12.5 beside it: divisor 5
    expected = torch.tensor([[6.0, 16.0], [0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(rms_norm_reference(x, weight, 12.5, scale), expected)
    torch.testing.assert_close(rms_norm_reference(x, None, 12.5, 5.0)[0], torch.tensor([3.0, 4.0]).double())


@given(
    rows=st.integers(1, 5),
    size=st.integers(1, 70),
    factor=st.floats(1e-3, 1e3),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float64]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_agrees_with_pytorch(rows: int, size: int, factor: float, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = (factor * torch.randn(rows, size, generator=generator, dtype=torch.float64)).to(dtype)
    weight, scale = torch.randn(size, generator=generator), torch.randn(1, generator=generator)
    y = rms_norm_reference(x, weight.to(torch.promote_types(dtype, torch.float32)), 1e-6, scale)
    expected = torch.nn.functional.rms_norm(x.double(), (size,), weight.double(), 1e-6) * scale.double()
    assert y.dtype == dtype
    tolerance = {torch.bfloat16: 2**-8, torch.float32: 1e-6, torch.float64: 1e-13}[dtype]
    torch.testing.assert_close(y.double(), expected, rtol=1.01 * tolerance, atol=1e-35)


@pytest.mark.parametrize("with_weight", [True, False])
def test_gradients(with_weight: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 7), (7,), (1,))
    x, weight, scale = (
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes
    )
    if with_weight:
        assert torch.autograd.gradcheck(lambda x, w, s: rms_norm_reference(x, w, 1e-3, s), (x, weight, scale))
    else:
        assert torch.autograd.gradcheck(lambda x, s: rms_norm_reference(x, None, 1e-3, s), (x, scale))
