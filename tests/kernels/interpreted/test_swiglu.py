"""SwiGLU's kernels, on two tensors and on the halves of one, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.kernels.accuracy import DTYPES, assert_accurate, results_of
from titan_yulan.kernels.swiglu import swiglu, swiglu_packed, swiglu_reference

# (tokens, columns): rows longer and shorter than the kernels' blocks, and sizes that no 16-byte access divides
SHAPES = [(3, 4800), (1, 4800), (7, 130), (9, 48), (1, 1), (5, 1), (3, 1333)]


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    """Other numbers for every test, the same in every run."""
    return torch.Generator().manual_seed(sum(map(ord, request.node.name)))


def normal(generator: torch.Generator, device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def peer(gate: Tensor, up: Tensor) -> Tensor:
    return functional.silu(gate) * up


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu(device: torch.device, generator: torch.Generator, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    gate, up, dy = (2 * normal(generator, device, dtype, *shape) for _ in range(3))
    assert_accurate(lambda g, u: swiglu(g, u, kernels="triton"), peer, swiglu_reference, (gate, up), (dy,))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu_packed(
    device: torch.device, generator: torch.Generator, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    rows, columns = shape
    gate_up = 2 * normal(generator, device, dtype, rows, 2 * columns)
    assert_accurate(
        lambda packed: swiglu_packed(packed, kernels="triton"),
        lambda packed: peer(*packed.chunk(2, dim=-1)),
        lambda packed: swiglu_reference(*packed.chunk(2, dim=-1)),
        (gate_up,),
        (normal(generator, device, dtype, rows, columns),),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_and_separate_are_the_same_arithmetic(
    device: torch.device, generator: torch.Generator, dtype: torch.dtype
) -> None:
    gate_up, dy = normal(generator, device, dtype, 5, 2 * 48), normal(generator, device, dtype, 5, 48)
    y, gradient = results_of(lambda packed: swiglu_packed(packed, kernels="triton"), (gate_up,), (dy,))
    separate = results_of(lambda g, u: swiglu(g, u, kernels="triton"), gate_up.chunk(2, dim=-1), (dy,))
    assert torch.equal(y, separate[0]) and torch.equal(gradient, torch.cat(separate[1:], dim=-1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_large_gates(device: torch.device, dtype: torch.dtype) -> None:
    """silu(z) is z for a large z and 0 for a large negative one, and no exponential overflows into a NaN."""
    gate = torch.tensor([100.0, 6e4, -200.0, -6e4], device=device).to(dtype)
    up = torch.tensor([0.5, 0.5, 2.0, 2.0], device=device).to(dtype)
    y, grad_gate, grad_up = results_of(
        lambda g, u: swiglu(g, u, kernels="triton"), (gate, up), (torch.ones_like(gate),)
    )
    past = torch.tensor([True, True, False, False], device=device)
    for result, expected in ((y, gate * up), (grad_gate, up), (grad_up, gate)):
        torch.testing.assert_close(result, torch.where(past, expected, 0.0))


def test_memory_that_is_not_in_order(device: torch.device, generator: torch.Generator) -> None:
    """Inputs transposed, and a gradient without strides, as `sum` makes them."""
    gate, up = (normal(generator, device, torch.float32, 48, 3, 2).permute(2, 1, 0) for _ in range(2))
    ones = torch.ones(1, 1, 1, device=device)
    for call, inputs, columns in ((swiglu, (gate, up), 48), (swiglu_packed, (gate,), 24)):
        gradients = (ones.expand(2, 3, columns),)
        ours = results_of(lambda *i, call=call: call(*i, kernels="triton"), inputs, gradients)
        other = results_of(lambda *i, call=call: call(*i, kernels="reference"), inputs, gradients)
        torch.testing.assert_close(ours, other)
        assert all(tensor.is_contiguous() for tensor in ours)


def test_results_repeat_bit_for_bit(device: torch.device, generator: torch.Generator) -> None:
    gate, up, dy = (normal(generator, device, torch.bfloat16, 9, 130) for _ in range(3))
    first, second = (results_of(lambda g, u: swiglu(g, u, kernels="triton"), (gate, up), (dy,)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_rows(device: torch.device) -> None:
    empty, packed = torch.empty(0, 48, device=device), torch.empty(2, 0, 96, device=device)
    results = results_of(lambda g, u: swiglu(g, u, kernels="triton"), (empty, empty), (empty,))
    assert [tuple(result.shape) for result in results] == [(0, 48)] * 3
    results = results_of(lambda p: swiglu_packed(p, kernels="triton"), (packed,), (packed[..., :48],))
    assert [tuple(result.shape) for result in results] == [(2, 0, 48), (2, 0, 96)]


def test_offsets_beyond_32_bits(device: torch.device, generator: torch.Generator) -> None:
    """On a GPU with more than 2^31 elements; the interpreter, for which that is too much, goes through the test."""
    rows = 2**30 // 4800 + 5 if device.type == "cuda" else 5
    packed = torch.ones(rows, 9600, dtype=torch.bfloat16, device=device)
    packed[-5:] = normal(generator, device, torch.bfloat16, 5, 9600)
    packed.requires_grad_()
    y = swiglu_packed(packed, kernels="triton")
    (gradient,) = torch.autograd.grad(y, packed, y.detach())
    last = results_of(lambda p: swiglu_packed(p, kernels="triton"), (packed[-5:],), (y[-5:].detach(),))
    assert torch.equal(y[-5:], last[0]) and torch.equal(gradient[-5:], last[1])
