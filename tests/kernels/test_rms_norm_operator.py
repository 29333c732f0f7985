"""`rms_norm` and `add_rms_norm` as operators: on the CPU, compiled, recomputed, faked; and the errors they raise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from tests.kernels.accuracy import DTYPES, results_of
from tests.kernels.operators import assert_same_compiled, forward_runs
from titan_yulan.kernels.add_rms_norm import add_rms_norm, add_rms_norm_reference
from titan_yulan.kernels.rms_norm import rms_norm, rms_norm_reference

EPS = 1e-3
OPERATORS = torch.ops.titan_yulan


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, residual, weight, scale, x_scale."""
    shapes = ((2, 3, 10), (2, 3, 10), (10,), (1,), ())
    return tuple(normal(seed, *shape, dtype=dtype) for seed, shape in enumerate(shapes))  # type: ignore[return-value]


def call(function: Callable[..., Any], *present: int, **options: Any) -> Callable[..., Any]:
    """`function` of those of `inputs()` whose positions are given, the others left out."""

    def with_gaps(*tensors: Tensor) -> Any:
        found = dict(zip(present, tensors, strict=True))
        x, residual, weight, scale, x_scale = (found.get(position) for position in range(5))
        if residual is None:
            return function(x, weight, EPS, scale, **options)
        return function(x, residual, weight, EPS, scale, x_scale, **options)

    return with_gaps


# Which of the inputs an operation gets.
NORMS = [(0, 2), (0, 2, 3)]
ADDS = [(0, 1, 2), (0, 1, 2, 3), (0, 1, 2, 4), (0, 1, 2, 3, 4)]
CASES = [(rms_norm, present) for present in NORMS] + [(add_rms_norm, present) for present in ADDS]


def selected(present: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    return tuple(inputs(dtype)[position] for position in present)


@pytest.mark.parametrize("rounding", [False, True])
@pytest.mark.parametrize(("function", "present"), CASES)
def test_backward_is_the_derivative_of_forward(
    function: Callable[..., Any], present: tuple[int, ...], rounding: bool
) -> None:
    # In float64 the rounding to x's type is none.
    operation = call(function, *present, round_before_weight=rounding)
    leaves = tuple(tensor.requires_grad_() for tensor in selected(present))
    assert torch.autograd.gradcheck(operation, leaves)


@pytest.mark.parametrize("present", ADDS)
def test_gradients_of_the_reference(present: tuple[int, ...]) -> None:
    leaves = tuple(tensor.requires_grad_() for tensor in selected(present))
    assert torch.autograd.gradcheck(call(add_rms_norm_reference, *present), leaves)


@pytest.mark.parametrize("rounding", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("function", "present"), CASES)
def test_operator_and_reference_agree(
    function: Callable[..., Any], present: tuple[int, ...], dtype: torch.dtype, rounding: bool
) -> None:
    tensors = selected(present, dtype)
    gradients = [normal(9 + i, 2, 3, 10, dtype=dtype) for i in range(1 if function is rms_norm else 2)]
    operator, reference = (
        results_of(call(function, *present, round_before_weight=rounding, kernels=kernels), tensors, gradients)
        for kernels in ("auto", "reference")
    )
    outputs = len(gradients)
    torch.testing.assert_close(operator[:outputs], reference[:outputs], rtol=0, atol=0)
    # Autograd rounds the rounded value's gradient to x's type too, and the operator does not.
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(operator[outputs:], reference[outputs:], rtol=tolerance, atol=2 * tolerance)


def test_known_sum_and_norm() -> None:
    x, residual = torch.tensor([[1.0, 2.0]]).double(), torch.tensor([[1.0, 0.0]]).double()
    weight = torch.tensor([1.0, 2.0]).double()
    for kernels in ("auto", "reference"):
        y, residual_out = add_rms_norm(x, residual, weight, 12.5, 10.0, 2.0, kernels=kernels)
        # 1 + 2 * 1 = 3 and 0 + 2 * 2 = 4: mean square 12.5, and eps 12.5 beside it: divisor 5
        torch.testing.assert_close(residual_out, torch.tensor([[3.0, 4.0]]).double())
        torch.testing.assert_close(y, torch.tensor([[6.0, 16.0]]).double())
    for kernels in ("auto", "reference"):
        torch.testing.assert_close(rms_norm(residual_out, weight, 12.5, 10.0, kernels=kernels), y)


def test_rounding_before_the_weight_is_that_of_hugging_face() -> None:
    x, weight = normal(0, 50, 64, dtype=torch.bfloat16), normal(1, 64, dtype=torch.bfloat16)
    expected = weight * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS)).to(torch.bfloat16)
    for kernels in ("auto", "reference"):
        assert torch.equal(rms_norm(x, weight, EPS, round_before_weight=True, kernels=kernels), expected)
        assert not torch.equal(rms_norm(x, weight, EPS, kernels=kernels), expected)


@pytest.mark.parametrize("present", NORMS)
def test_opcheck_of_the_norm(present: tuple[int, ...]) -> None:
    x, weight, *scale = (tensor.requires_grad_() for tensor in selected(present, torch.float32))
    torch.library.opcheck(OPERATORS.rms_norm_forward, (x, weight, EPS, 0, *(scale or [None])))
    reciprocal = torch.ones(2, 3)
    backward = (x.detach() + 1, x.detach(), reciprocal, weight.detach(), 1, scale[0].detach() if scale else None)
    torch.library.opcheck(OPERATORS.rms_norm_backward, backward)


@pytest.mark.parametrize("present", [ADDS[0], ADDS[-1]])
def test_opcheck_of_addition_and_norm(present: tuple[int, ...]) -> None:
    x, residual, weight, *scales = (tensor.requires_grad_() for tensor in selected(present, torch.float32))
    scale, x_scale = scales or (None, None)
    torch.library.opcheck(OPERATORS.add_rms_norm_forward, (x, residual, weight, EPS, 0, scale, x_scale))
    given = [None if tensor is None else tensor.detach() for tensor in (scale, x if scales else None, x_scale)]
    for grad_residual_out in (None, x.detach() * 2):
        backward = (x.detach() + 1, residual.detach(), torch.ones(2, 3), weight.detach(), 0, grad_residual_out, *given)
        torch.library.opcheck(OPERATORS.add_rms_norm_backward, backward)


@pytest.mark.parametrize(("function", "present"), [CASES[1], CASES[-1]])
def test_compiles_as_one_graph(function: Callable[..., Any], present: tuple[int, ...]) -> None:
    assert_same_compiled(call(function, *present), selected(present, torch.float32), "aot_eager")


def test_compiles_with_inductor_for_any_number_of_tokens() -> None:
    x, weight, scale = selected(NORMS[1], torch.float32)

    def neighbours(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        return 2 * rms_norm(x + 1, weight, EPS, scale).relu()

    assert_same_compiled(neighbours, (x, weight, scale), "inductor", dynamic=True)


@pytest.mark.parametrize(("function", "present"), [CASES[1], CASES[-1]])
def test_activation_checkpointing(function: Callable[..., Any], present: tuple[int, ...]) -> None:
    operator = (OPERATORS.rms_norm_forward if function is rms_norm else OPERATORS.add_rms_norm_forward).default

    def block(*tensors: Tensor) -> Tensor:
        results = call(function, *present)(*(2 * tensor for tensor in tensors))
        return results.sin() if isinstance(results, Tensor) else results[0].sin() * results[1].cos()

    tensors = selected(present, torch.float32)
    assert forward_runs(block, tensors, operator, keep=False) == 2
    assert forward_runs(block, tensors, operator, keep=True) == 1


@pytest.mark.parametrize("device", ["cuda", "meta", "cpu"])
def test_fake_tensors(device: str) -> None:
    """Shapes, types and devices without any memory; a GPU need not exist for its fakes."""
    with FakeTensorMode():
        x, residual, weight = (
            torch.empty(shape, dtype=torch.bfloat16, device=device) for shape in ((4, 10), (10, 4), 10)
        )
        residual, scale = residual.t(), torch.empty(1, device=device)
        y, residual_out = add_rms_norm(x, residual, weight, EPS, scale, scale)
        z = rms_norm(residual, weight, EPS, scale)
        reciprocal = scale.new_empty(4)
        backward = OPERATORS.rms_norm_backward(y, x, reciprocal, weight, 0, scale)
        add_backward = OPERATORS.add_rms_norm_backward(y, x, reciprocal, weight, 0, z, scale, x, scale)
        found = (y, residual_out, z, *backward, *add_backward)
        like = (x, x, x, x, weight, scale, x, x, weight, scale, scale)
        for result, expected in zip(found, like, strict=True):
            assert (result.shape, result.dtype, result.device.type) == (expected.shape, expected.dtype, device)
            assert result.is_contiguous()


@pytest.mark.parametrize("trained", [False, True])
def test_x_is_kept_only_for_the_gradient_of_its_multiplier(trained: bool) -> None:
    x, residual, weight, scale, x_scale = (tensor.requires_grad_() for tensor in inputs())
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        add_rms_norm(x, residual, weight, EPS, scale, x_scale if trained else x_scale.detach())
    assert any(torch.equal(tensor, x) for tensor in kept) == trained
    assert sum(tensor.shape == x.shape for tensor in kept) == 1 + trained


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(3, 8, dtype=torch.int64)}, TypeError, r"x is torch\.int64"),
        ({"weight": torch.ones(8, dtype=torch.complex64)}, TypeError, r"weight is torch\.complex64"),
        ({"weight": torch.ones(7)}, ValueError, r"weight of shape \(7,\) does not fit x of shape \(3, 8\)"),
        ({"weight": torch.ones(1, 8)}, ValueError, r"weight of shape \(1, 8\)"),
        ({"x": torch.ones(())}, ValueError, r"x of shape \(\)"),
        ({"weight": torch.ones(8, device="meta")}, ValueError, "weight is on meta, x on cpu"),
        ({"eps": -1e-6}, ValueError, "eps = -1e-06 must not be negative"),
        ({"eps": float("nan")}, ValueError, "eps = nan"),
        ({"scale": torch.ones(8)}, ValueError, r"shape \(\) or \(1,\), not \(8,\)"),
        ({"scale": torch.ones(1, device="meta")}, ValueError, "a scale is on meta, x on cpu"),
        ({"kernels": "fast"}, ValueError, 'choose "auto", "triton" or "reference"'),
        ({"residual": torch.ones(3, 8).double()}, TypeError, r"residual is torch\.float64, x is torch\.float32"),
        ({"residual": torch.ones(8)}, ValueError, r"residual has shape \(8,\) on cpu, x \(3, 8\) on cpu"),
        ({"x_scale": torch.ones(2)}, ValueError, r"shape \(\) or \(1,\), not \(2,\)"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "x": torch.ones(3, 8),
        "residual": torch.ones(3, 8),
        "weight": torch.ones(8),
        "eps": EPS,
    }
    arguments |= change
    with pytest.raises(error, match=message):
        add_rms_norm(**arguments)
    if not {"residual", "x_scale"} & change.keys():
        del arguments["residual"]
        with pytest.raises(error, match=message):
            rms_norm(**arguments)


def test_a_multiplier_may_be_a_number() -> None:
    x, _, weight, _, _ = inputs()
    for kernels in ("auto", "reference"):
        torch.testing.assert_close(
            rms_norm(x, weight, EPS, 0.25, kernels=kernels), 0.25 * rms_norm_reference(x, weight, EPS)
        )
        assert torch.equal(rms_norm(x, weight, EPS, 1, kernels=kernels), rms_norm_reference(x, weight, EPS))
