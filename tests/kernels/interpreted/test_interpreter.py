"""The interpreter as the conftest beside this file repairs it; without that, the other tests here prove little."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def _copy_through_float32(source, target, count, BLOCK: tl.constexpr, EXPLICIT: tl.constexpr):
    index = tl.arange(0, BLOCK)
    value = tl.load(source + index, mask=index < count, other=0.0).to(tl.float32)
    if EXPLICIT:
        value = value.to(target.dtype.element_ty)
    tl.store(target + index, value, mask=index < count)


def copied(source: torch.Tensor, dtype: torch.dtype, explicit: bool) -> torch.Tensor:
    target = torch.full_like(source, float("nan"), dtype=dtype)
    _copy_through_float32[(1,)](source, target, source.numel(), BLOCK=2048, EXPLICIT=explicit)  # type: ignore[index]
    return target


@pytest.mark.parametrize("explicit", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_down_rounds_as_pytorch_does(device: torch.device, dtype: torch.dtype, explicit: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2000, generator=generator) * torch.logspace(-6, 4, 2000)
    ties = 1 + torch.tensor([2**-8, 3 * 2**-8, 2**-9, 2**-8 + 2**-20, 2**-11, 3 * 2**-11])
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3e38, 3.4e38, 1e-40])
    source = torch.cat([values, ties, -ties, special]).to(device)
    torch.testing.assert_close(copied(source, dtype, explicit), source.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_a_cast_up_is_exact(device: torch.device) -> None:
    bits = torch.arange(-(2**15), 2**15, 37, dtype=torch.int32).to(torch.int16)
    source = bits.view(torch.bfloat16).to(device)
    torch.testing.assert_close(copied(source, torch.float32, False), source.float(), rtol=0, atol=0, equal_nan=True)
