"""How near an operation's results are to float64, and how near is near enough; shared by the tests of the kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def results_of(function: Callable[..., Any], inputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
    """The outputs of `function(*inputs)`, then the gradients of all inputs for the `gradients` of the outputs."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    incoming = [gradient.to(output.dtype) for output, gradient in zip(outputs, gradients, strict=True)]
    return [*(output.detach() for output in outputs), *torch.autograd.grad(outputs, leaves, incoming)]


def assert_accurate(
    function: Callable[..., Any],
    peer: Callable[..., Any],
    exact: Callable[..., Any],
    inputs: Sequence[Tensor],
    gradients: Sequence[Tensor],
) -> None:
    """`function` against float64 of `exact`, every output and every gradient.

    In float32 no element is further off than 4 units in the last place of the largest element. In 16-bit types the
    error (the norm of the difference over the norm of the result) is at most 1.05 times that of `peer`, PyTorch's own
    operators in the same type, plus 1e-4.
    """
    dtype = inputs[0].dtype
    gradients = [gradient.to(dtype) for gradient in gradients]
    ours = results_of(function, inputs, gradients)
    theirs = results_of(peer, inputs, gradients)
    truth = results_of(exact, [tensor.double() for tensor in inputs], gradients)
    for position, (our, their, true) in enumerate(zip(ours, theirs, truth, strict=True)):
        assert our.shape == true.shape and our.dtype == their.dtype, f"result {position}"
        if dtype == torch.float32:
            limit = 4 * torch.finfo(torch.float32).eps * true.abs().max()
            assert (our.double() - true).abs().max() <= limit, f"result {position}"
        else:
            assert error(our, true) <= 1.05 * error(their, true) + 1e-4, f"result {position}"


def error(result: Tensor, true: Tensor) -> float:
    """Norm of the difference over the norm of `true`."""
    return float((result.double() - true).norm() / true.norm())
