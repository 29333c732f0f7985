"""The packed projection on any device: against plain autograd, as an operator, and what it keeps for backward."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from tests.kernels.accuracy import DTYPES, assert_accurate, results_of
from tests.kernels.operators import assert_same_compiled, forward_runs
from titan_yulan.kernels.packed_linear import packed_linear, packed_linear_reference
from titan_yulan.kernels.runtime import Kernels

OUT = (8, 4, 4)


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def make(dtype: torch.dtype, device: str, scaled: bool, biased: bool, tokens: int = 15) -> list[Tensor]:
    """x, three weights, then scales and three biases where asked for: leaves that need gradients."""
    generator = torch.Generator().manual_seed(tokens)

    def draw(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, kind).requires_grad_()

    leaves = [draw(tokens, 16), *(draw(rows, 16) for rows in OUT)]
    if scaled:
        leaves.append(draw(len(OUT), kind=torch.promote_types(dtype, torch.float32)))
    return [*leaves, *(draw(rows) for rows in OUT)] if biased else leaves


def apply(function: Any, scaled: bool, *leaves: Tensor) -> Tensor:
    x, weights, rest = leaves[0], leaves[1:4], leaves[4:]
    return function(x, weights, rest[0] if scaled else None, rest[1:] if scaled else rest)


@pytest.mark.parametrize("tokens", [15, 1])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_float64_as_closely_as_plain_autograd(
    dtype: torch.dtype, scaled: bool, biased: bool, tokens: int, device: str
) -> None:
    leaves = make(dtype, device, scaled, biased, tokens)
    plain = partial(apply, packed_linear_reference, scaled)
    upstream = torch.randn(tokens, sum(OUT), generator=torch.Generator().manual_seed(1)).to(device, dtype)
    if dtype == torch.float32:  # of few bits, so that products, whose rounding is not ours, are exact
        *leaves, upstream = ((8 * tensor.detach()).round() / 8 for tensor in (*leaves, upstream))
    assert_accurate(partial(apply, packed_linear, scaled), plain, plain, leaves, [upstream])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_the_operator_packs_the_bits_that_autograd_packs(dtype: torch.dtype, kind: torch.dtype, device: str) -> None:
    leaves = [leaf.detach() for leaf in make(dtype, device, True, True)]
    leaves[4] = leaves[4].to(kind)
    results = (apply(function, True, *leaves) for function in (packed_linear, packed_linear_reference))
    assert torch.equal(*results)


def test_memory_that_is_not_in_order_and_no_tokens(device: str) -> None:
    """Everything transposed or with gaps, and a gradient without strides, as `sum` makes it."""
    x, *rest = [leaf.detach() for leaf in make(torch.float32, device, True, True, tokens=30)]
    spread = [x.view(16, 6, 5).permute(2, 1, 0), *(w.t().contiguous().t() for w in rest[:3])]
    spread += [rest[3], *(b.repeat_interleave(2)[::2] for b in rest[4:])]
    assert not any(tensor.is_contiguous() for tensor in (*spread[:4], *spread[5:]))
    upstream = [torch.ones((), device=device).expand(5, 6, sum(OUT))]
    runs = [results_of(partial(apply, packed_linear, True), spread, upstream) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    orderly = [tensor.contiguous() for tensor in spread]
    torch.testing.assert_close(runs[0], results_of(partial(apply, packed_linear_reference, True), orderly, upstream))
    empty = [x[:0], *rest]
    y, dx, *others = results_of(partial(apply, packed_linear, True), empty, [torch.ones(0, sum(OUT), device=device)])
    assert (y.shape, dx.shape) == ((0, sum(OUT)), (0, 16)) and not any(other.any() for other in others)


def test_gradients_of_the_reference(device: str) -> None:
    leaves = make(torch.float64, device, True, True, tokens=3)
    assert torch.autograd.gradcheck(partial(apply, packed_linear_reference, True), leaves)
    assert torch.autograd.gradcheck(partial(apply, packed_linear, True), leaves)


@pytest.mark.parametrize(("scaled", "biased"), [(True, True), (False, False)])
def test_packed_linear_operator_passes_opcheck(scaled: bool, biased: bool, device: str) -> None:
    x, *rest = make(torch.float32, device, scaled, biased)
    arguments = (x, rest[:3], rest[3] if scaled else None, rest[4:] if scaled else rest[3:])
    torch.library.opcheck(torch.ops.titan_yulan.packed_linear_forward.default, arguments)
    detached = [a.detach() if isinstance(a, Tensor) else a and [part.detach() for part in a] for a in arguments]
    grad_y = torch.randn(x.shape[0], sum(OUT), device=device)
    backward = torch.ops.titan_yulan.packed_linear_backward.default
    torch.library.opcheck(backward, (grad_y, *detached, True, True), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("scaled", [False, True])
def test_packed_linear_compiles_to_one_graph(scaled: bool, device: str) -> None:
    leaves = make(torch.float32, device, scaled, True)
    assert_same_compiled(partial(apply, packed_linear, scaled), leaves, "aot_eager")


@pytest.mark.parametrize("keep", [False, True])
def test_packed_linear_under_selective_checkpointing(keep: bool, device: str) -> None:
    operator = torch.ops.titan_yulan.packed_linear_forward.default
    leaves = make(torch.float32, device, True, True)
    assert forward_runs(partial(apply, packed_linear, True), leaves, operator, keep) == (1 if keep else 2)


def test_nothing_packed_or_unscaled_is_kept_for_backward(device: str) -> None:
    leaves = make(torch.float32, device, True, True)
    known = {leaf.untyped_storage().data_ptr() for leaf in leaves}

    def kept(function: Any) -> int:
        foreign: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                foreign[storage.data_ptr()] = storage.nbytes()
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            apply(function, True, *leaves)
        return sum(foreign.values())

    assert kept(packed_linear) == 0
    assert kept(packed_linear_reference) >= 4 * 16 * sum(OUT)  # the packed weights


def test_weights_that_need_no_gradient_get_none(device: str) -> None:
    x, *rest = make(torch.float32, device, True, True)
    frozen = [leaf.detach() for leaf in rest]
    packed_linear(x, frozen[:3], frozen[3], frozen[4:]).sum().backward()
    assert x.grad is not None
    (first, *_) = leaves = make(torch.float32, device, False, False)
    packed_linear(first.detach(), leaves[1:4]).sum().backward()
    assert first.grad is None and all(leaf.grad is not None for leaf in leaves[1:4])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x, w, s, b: (x.int(), w, s, b), TypeError, "x is torch.int32"),
        (lambda x, w, s, b: (x, [w[0].bfloat16(), *w[1:]], s, b), TypeError, "bfloat16, x is torch.float32"),
        (lambda x, w, s, b: (x, [], s, b), ValueError, "0 weights and 3 biases"),
        (lambda x, w, s, b: (x, w, s, b[:1]), ValueError, "3 weights and 1 biases"),
        (lambda x, w, s, b: (x[:, :9], w, s, b), ValueError, "do not fit x of shape"),
        (lambda x, w, s, b: (x, w, s, b[::-1]), ValueError, "biases of shapes"),
        (lambda x, w, s, b: (x, w, s[:2], b), ValueError, "scales of shape (2,)"),
        (lambda x, w, s, b: (x, [w[0].to("meta"), *w[1:]], s, b), ValueError, "is on meta, x on"),
    ],
)
def test_packed_linear_refuses(change: Any, error: type[Exception], message: str, device: str) -> None:
    x, *rest = make(torch.float32, device, True, True)
    with pytest.raises(error) as raised:
        packed_linear(*change(x, rest[:3], rest[3], rest[4:]))
    assert message in str(raised.value)


def test_packed_linear_insists_on_triton_or_refuses(device: str) -> None:
    x, *weights = (leaf.detach() for leaf in make(torch.float32, device, False, False))
    with pytest.raises(ValueError, match='choose "auto", "triton" or "reference"'):
        packed_linear(x, weights, kernels=cast(Kernels, "liger"))
    with pytest.raises(ValueError, match='kernels = "triton" on cpu'):
        packed_linear(x.cpu(), [weight.cpu() for weight in weights], kernels="triton")
