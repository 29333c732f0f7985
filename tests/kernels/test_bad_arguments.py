"""Mistakes that no operation lets through to a kernel, beyond those that the tests of each operation list.

Memory that is not in order is no mistake for norms and SwiGLU, which copy it. Devices are a CPU and `meta` here; a GPU
and a CPU take the same check.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.kernels.operators import Calls
from titan_yulan.kernels import runtime
from titan_yulan.kernels.add_rms_norm import add_rms_norm
from titan_yulan.kernels.cross_entropy import cross_entropy
from titan_yulan.kernels.linear_cross_entropy import linear_cross_entropy
from titan_yulan.kernels.packed_linear import packed_linear
from titan_yulan.kernels.rms_norm import MAXIMUM_SIZE, rms_norm, row_configuration
from titan_yulan.kernels.runtime import Kernels
from titan_yulan.kernels.swiglu import swiglu, swiglu_packed

TOKENS, VOCAB = 6, 9
EVERYWHERE = pytest.mark.parametrize("kernels", ["auto", "reference"])
Refusal = tuple[dict[str, Any], type[Exception], str]


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@EVERYWHERE
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"residual": torch.ones(3, 8, device="meta")}, ValueError, r"residual has shape \(3, 8\) on meta"),
        ({"residual": torch.ones(3, 8, dtype=torch.int32)}, TypeError, r"residual is torch\.int32"),
        ({"x_scale": torch.ones(1, device="meta")}, ValueError, "a scale is on meta, x on cpu"),
        ({"scale": torch.ones(8)}, ValueError, r"a scale has shape \(\) or \(1,\), not \(8,\)"),  # no broadcasting
        ({"x": torch.ones(3, 8, dtype=torch.float8_e4m3fn)}, TypeError, r"x is torch\.float8_e4m3fn"),
        ({"weight": torch.ones(8, dtype=torch.int64)}, TypeError, r"weight is torch\.int64"),
        ({"x": torch.ones(3, 0), "weight": torch.ones(0)}, ValueError, r"weight of shape \(0,\)"),
    ],
)
def test_norms(kernels: Kernels, change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"x": torch.ones(3, 8), "residual": torch.ones(3, 8), "weight": torch.ones(8)}
    with pytest.raises(error, match=message):
        add_rms_norm(**(arguments | change), eps=1e-6, kernels=kernels)


def test_a_row_that_registers_do_not_hold() -> None:
    assert row_configuration(MAXIMUM_SIZE) == (MAXIMUM_SIZE, 16)
    with pytest.raises(ValueError, match=r'8193 columns: Triton takes 8192; choose kernels = "reference"'):
        row_configuration(MAXIMUM_SIZE + 1)


@EVERYWHERE
def test_swiglu(kernels: Kernels) -> None:
    with pytest.raises(TypeError, match=r"not torch\.float8_e5m2"):
        swiglu_packed(torch.ones(2, 4, dtype=torch.float8_e5m2), kernels=kernels)
    with pytest.raises(TypeError, match=r"gate is torch\.float32, up is torch\.int64"):
        swiglu(torch.ones(2), torch.ones(2, dtype=torch.int64), kernels=kernels)
    with pytest.raises(ValueError, match=r"up \(1, 4\) on cpu"):  # no broadcasting
        swiglu(torch.ones(2, 4), torch.ones(1, 4), kernels=kernels)


@EVERYWHERE
def test_norms_and_swiglu_take_memory_in_any_order(kernels: Kernels) -> None:
    x, residual, wide = normal(0, 8, 5).t(), normal(1, 5, 16)[:, ::2], normal(2, 16)
    weight = wide[::2]
    assert not any(tensor.is_contiguous() for tensor in (x, residual, weight))
    orderly = (x.contiguous(), residual.contiguous(), weight.contiguous())
    found = add_rms_norm(x, residual, weight, 1e-6, kernels=kernels)
    torch.testing.assert_close(found, add_rms_norm(*orderly, 1e-6))
    torch.testing.assert_close(rms_norm(x, weight, 1e-6, kernels=kernels), rms_norm(orderly[0], orderly[2], 1e-6))
    torch.testing.assert_close(swiglu(x, residual, kernels=kernels), swiglu(*orderly[:2]))
    torch.testing.assert_close(swiglu_packed(x, kernels=kernels), swiglu_packed(orderly[0]))


# Of what belongs to the tokens; the same for logits and for the fused head.
OF_TOKENS: list[Refusal] = [
    ({"targets": torch.zeros(TOKENS, dtype=torch.int32)}, TypeError, r"targets is torch\.int32"),
    ({"targets": torch.zeros(TOKENS, dtype=torch.int64, device="meta")}, ValueError, "targets is on meta"),
    ({"token_weights": torch.ones(TOKENS, device="meta")}, ValueError, "token_weights is on meta"),
    ({"token_weights": torch.ones(TOKENS, dtype=torch.bfloat16)}, TypeError, r"token_weights is torch\.bfloat16"),
    ({"token_weights": torch.ones(TOKENS - 1)}, ValueError, r"token_weights has shape \(5,\); 6 tokens"),
    ({"denominator": torch.ones(1, device="meta")}, ValueError, "denominator is on meta"),
    ({"denominator": torch.ones(1, dtype=torch.int64)}, ValueError, "denominator must be one floating-point"),
]


def tokens() -> dict[str, Any]:
    return {"targets": torch.arange(TOKENS), "token_weights": torch.ones(TOKENS)}


@EVERYWHERE
@pytest.mark.parametrize(("change", "error", "message"), OF_TOKENS)
def test_losses(kernels: Kernels, change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = tokens() | change
    with pytest.raises(error, match=message):
        cross_entropy(normal(0, TOKENS, VOCAB), **arguments, kernels=kernels)
    with pytest.raises(error, match=message):
        linear_cross_entropy(normal(0, TOKENS, 4), normal(1, VOCAB, 4), **arguments, kernels=kernels)


@pytest.mark.parametrize("wrong", [-1, VOCAB, 2**40])
def test_targets_outside_the_vocabulary_under_the_debug_flag(wrong: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TITAN_YULAN_CHECK_TARGETS", "1")
    arguments = tokens()
    arguments["targets"][[1, 4]] = wrong
    arguments["token_weights"][1] = 0
    logits, hidden, head = normal(0, TOKENS, VOCAB), normal(0, TOKENS, 4), normal(1, VOCAB, 4)
    message = rf"target {wrong} of token 4 is outside the vocabulary of {VOCAB} \(1 such\)"
    with pytest.raises(IndexError, match=message):
        cross_entropy(logits, **arguments)
    with pytest.raises(IndexError, match=message):
        linear_cross_entropy(hidden, head, **arguments)
    arguments["token_weights"][4] = 0
    assert cross_entropy(logits, **arguments)[0].isfinite()
    assert linear_cross_entropy(hidden, head, **arguments)[0].isfinite()


def test_an_old_gpu_runs_every_operation_without_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins: no machine of ours has such a GPU, and a fake tensor needs none to go the way that a real one goes.

    The fused head is one operator everywhere, which is told whether to run Triton by what `test_runtime.py` tests.
    """
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(runtime, "_capability", lambda index: (7, 5))
    # A PyTorch for CPUs cannot index a fake tensor of a GPU, which this reference does.
    monkeypatch.setitem(cross_entropy.__globals__, "cross_entropy_reference", lambda logits, *_, **__: (logits,))
    runtime._warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as caught, FakeTensorMode(), Calls() as calls:
        warnings.simplefilter("always")
        x, weight = torch.empty(TOKENS, 8, device="cuda"), torch.empty(8, device="cuda")
        head, scales = torch.empty(VOCAB, 8, device="cuda"), torch.empty(2, device="cuda")
        targets = torch.empty(TOKENS, dtype=torch.int64, device="cuda")
        for _ in range(2):
            results = [rms_norm(x, weight, 1e-6), *add_rms_norm(x, x, weight, 1e-6), swiglu(x, x), swiglu_packed(x)]
            results += [
                packed_linear(x, [head, head], scales),
                *cross_entropy(x, targets, torch.empty(TOKENS, device="cuda")),
            ]
            assert all(result.is_cuda for result in results)
    assert calls.count == {}
    expected = "cuda:0: compute capability 7.5 is below 8.0; the reference operations of PyTorch run instead"
    assert [str(warning.message)[: len(expected)] for warning in caught] == [expected]
