"""The reference SwiGLU: values, types, gradients."""

from __future__ import annotations

import math

import pytest
import torch

from titan_yulan.kernels.swiglu import swiglu_reference


def test_known_values() -> None:
    gate, up = torch.tensor([0.0, math.log(3.0), -math.log(3.0)]).double(), torch.tensor([5.0, 4.0, 4.0]).double()
    # sigmoid(log 3) = 3/4
    expected = torch.tensor([0.0, 3 * math.log(3.0), -math.log(3.0)], dtype=torch.float64)
    torch.testing.assert_close(swiglu_reference(gate, up), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_rounds_once(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    gate, up = (3 * torch.randn(4, 1000, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    exact = gate.double() / (1 + (-gate.double()).exp()) * up.double()
    y = swiglu_reference(gate, up)
    assert y.dtype == dtype
    tolerance = {torch.bfloat16: 2**-8, torch.float32: 1e-6, torch.float64: 1e-13}[dtype]
    torch.testing.assert_close(y.double(), exact, rtol=1.01 * tolerance, atol=1e-35)


def test_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = tuple(torch.randn(3, 5, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(swiglu_reference, inputs)
