"""`swiglu` and `swiglu_packed` as operators: on the CPU, compiled, recomputed, faked; and the errors they raise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.kernels.accuracy import DTYPES, results_of
from tests.kernels.operators import assert_same_compiled, forward_runs
from titan_yulan.kernels.swiglu import swiglu, swiglu_packed

OPERATORS = torch.ops.titan_yulan
CASES = [(swiglu, 2), (swiglu_packed, 1)]  # and the number of inputs


def normal(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn((2, 3, 10), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(("function", "count"), CASES)
def test_backward_is_the_derivative_of_forward(function: Callable[..., Tensor], count: int) -> None:
    assert torch.autograd.gradcheck(function, tuple(normal(seed).requires_grad_() for seed in range(count)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("function", "count"), CASES)
def test_operator_and_reference_agree(function: Callable[..., Tensor], count: int, dtype: torch.dtype) -> None:
    inputs = [normal(seed, dtype) for seed in range(count)]
    gradient = normal(9, dtype)[..., : 10 // (3 - count)]
    operator, reference = (
        results_of(lambda *i, kernels=kernels: function(*i, kernels=kernels), inputs, (gradient,))
        for kernels in ("auto", "reference")
    )
    assert torch.equal(operator[0], reference[0])
    torch.testing.assert_close(operator, reference, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)


def test_memory_that_is_not_in_order() -> None:
    gate, up = (normal(seed).mT for seed in range(2))
    ones = torch.ones(1, 1, 1, dtype=torch.float64)
    for function, inputs, columns in ((swiglu, (gate, up), 3), (swiglu_packed, (gate[..., 1:],), 1)):
        gradients = (ones.expand(2, 10, columns),)
        operator = results_of(function, inputs, gradients)
        torch.testing.assert_close(operator, results_of(function, [i.contiguous() for i in inputs], gradients))
        assert all(result.is_contiguous() for result in operator)


def test_opcheck() -> None:
    gate, up = (normal(seed, torch.float32).requires_grad_() for seed in range(2))
    torch.library.opcheck(OPERATORS.swiglu_forward, (gate, up))
    torch.library.opcheck(OPERATORS.swiglu_packed_forward, (gate,))
    gate, up = gate.detach(), up.detach()
    torch.library.opcheck(OPERATORS.swiglu_backward, (gate + 1, gate, up.mT.contiguous().mT))
    torch.library.opcheck(OPERATORS.swiglu_packed_backward, (up[..., :5], gate))


@pytest.mark.parametrize(("function", "count"), CASES)
def test_compiles_as_one_graph(function: Callable[..., Tensor], count: int) -> None:
    def block(*tensors: Tensor) -> Tensor:
        return torch.cat([function(*tensors)] * (3 - count), dim=-1)

    assert_same_compiled(block, [normal(seed, torch.float32) for seed in range(count)], "aot_eager")


@pytest.mark.parametrize(("function", "count"), CASES)
def test_activation_checkpointing(function: Callable[..., Tensor], count: int) -> None:
    def block(*tensors: Tensor) -> Tensor:
        return function(*(2 * tensor for tensor in tensors)).sin()

    operator = (OPERATORS.swiglu_forward if count == 2 else OPERATORS.swiglu_packed_forward).default
    inputs = [normal(seed, torch.float32) for seed in range(count)]
    assert forward_runs(block, inputs, operator, keep=False) == 2
    assert forward_runs(block, inputs, operator, keep=True) == 1


@pytest.mark.parametrize("device", ["cuda", "meta", "cpu"])
def test_fake_tensors(device: str) -> None:
    """Shapes, types and devices without any memory; a GPU need not exist for its fakes."""
    with FakeTensorMode():
        gate = torch.empty(2, 4, 10, dtype=torch.bfloat16, device=device)
        up = torch.empty(2, 10, 4, dtype=torch.bfloat16, device=device).mT
        y, half = swiglu(gate, up), swiglu_packed(up)
        backward = (*OPERATORS.swiglu_backward(y, gate, up), OPERATORS.swiglu_packed_backward(half, up))
        assert half.shape == (2, 4, 5)
        for result in (y, *backward):
            assert result.shape == gate.shape
        for result in (y, half, *backward):
            assert (result.dtype, result.device.type) == (torch.bfloat16, device) and result.is_contiguous()


@pytest.mark.parametrize(
    ("function", "arguments", "error", "message"),
    [
        (swiglu, (torch.ones(2, dtype=torch.int32),) * 2, TypeError, r"not torch\.int32"),
        (swiglu, (torch.ones(2), torch.ones(2).double()), TypeError, r"gate is torch\.float32, up is torch\.float64"),
        (swiglu, (torch.ones(2), torch.ones(3)), ValueError, r"gate has shape \(2,\) on cpu, up \(3,\) on cpu"),
        (swiglu, (torch.ones(2), torch.ones(2, device="meta")), ValueError, r"up \(2,\) on meta"),
        (swiglu_packed, (torch.ones(2, dtype=torch.bool),), TypeError, r"not torch\.bool"),
        (swiglu_packed, (torch.ones(2, 3),), ValueError, r"\(2, 3\) does not have two halves"),
        (swiglu_packed, (torch.ones(()),), ValueError, r"\(\) does not have two halves"),
    ],
)
def test_wrong_arguments(
    function: Callable[..., Any], arguments: tuple[Tensor, ...], error: type[Exception], message: str
) -> None:
    for kernels in ("auto", "reference"):
        with pytest.raises(error, match=message):
            function(*arguments, kernels=kernels)
    with pytest.raises(ValueError, match='choose "auto", "triton" or "reference"'):
        function(*(torch.ones(2) for _ in arguments), kernels="fast")
