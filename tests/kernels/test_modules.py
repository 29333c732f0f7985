"""The modules: parameters under the names that checkpoints use, and the results of their functions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tests.kernels.accuracy import results_of
from titan_yulan.kernels.add_rms_norm import AddRMSNorm, add_rms_norm
from titan_yulan.kernels.rms_norm import RMSNorm, rms_norm
from titan_yulan.kernels.runtime import Kernels
from titan_yulan.kernels.swiglu import SwiGLU, swiglu, swiglu_packed

EPS = 1e-3
ROUNDINGS = pytest.mark.parametrize("rounding", [False, True])
KERNELS = pytest.mark.parametrize("kernels", ["auto", "reference"])


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("make", [RMSNorm, AddRMSNorm])
def test_state_and_first_value(make: type[nn.Module]) -> None:
    module = make(7)
    assert list(module.state_dict()) == ["weight"] == [name for name, _ in module.named_parameters()]
    assert torch.equal(module.get_parameter("weight"), torch.ones(7))
    module.load_state_dict(nn.RMSNorm(7).state_dict())
    with torch.device("meta"):
        assert make(7).get_parameter("weight").is_meta


def test_a_fresh_norm_is_that_of_pytorch() -> None:
    x, residual = normal(0, 3, 7, dtype=torch.float32), normal(1, 3, 7, dtype=torch.float32)
    torch.testing.assert_close(RMSNorm(7, EPS)(x), nn.RMSNorm(7, EPS)(x))
    y, residual_out = AddRMSNorm(7, EPS)(x, residual)
    torch.testing.assert_close((y, residual_out), (nn.RMSNorm(7, EPS)(x + residual), x + residual))


@KERNELS
def test_rounding_before_the_weight_is_the_norm_of_hugging_face_to_the_bit(kernels: Kernels) -> None:
    theirs = LlamaRMSNorm(64, EPS).to(torch.bfloat16)
    theirs.weight = nn.Parameter(normal(1, 64))
    x = normal(0, 50, 64)
    for rounding in (True, False):
        ours = RMSNorm(64, EPS, round_before_weight=rounding, kernels=kernels).to(torch.bfloat16)
        ours.load_state_dict(theirs.state_dict())
        assert torch.equal(ours(x), theirs(x)) == rounding


@KERNELS
@ROUNDINGS
def test_norms_pass_everything_on(kernels: Kernels, rounding: bool) -> None:
    """Values and the weight's gradient, at inputs at which each option makes a difference."""
    x, residual, weight, gradient = (normal(seed, 50, 64) for seed in range(4))
    weight, scale, x_scale = weight[0], normal(5, 1), normal(6, 1)
    options: dict[str, Any] = {"round_before_weight": rounding, "kernels": kernels}
    norm, add_norm = RMSNorm(64, EPS, **options), AddRMSNorm(64, EPS, **options)
    for module in (norm, add_norm):
        module.weight = nn.Parameter(weight)
    for given in ((x,), (x, scale)):
        expected = results_of(
            lambda w, given=given: rms_norm(given[0], w, EPS, *given[1:], **options), [weight], [gradient]
        )
        y = norm(*given)
        assert torch.equal(y, expected[0])
        assert torch.equal(torch.autograd.grad(y, norm.weight, gradient)[0], expected[1])
    for scales in ((), (scale,), (scale, x_scale)):
        assert_equal(add_norm(x, residual, *scales), add_rms_norm(x, residual, weight, EPS, *scales, **options))
    other = RMSNorm(64, EPS, round_before_weight=not rounding)
    other.weight = norm.weight
    assert not torch.equal(other(x), norm(x))


def assert_equal(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))


@KERNELS
def test_swiglu(kernels: Kernels) -> None:
    gate, up = normal(0, 5, 6), normal(1, 5, 6)
    assert torch.equal(SwiGLU(kernels=kernels)(gate, up), swiglu(gate, up))
    assert torch.equal(SwiGLU(True, kernels)(gate), swiglu_packed(gate))
    assert not SwiGLU().state_dict()


def test_the_choice_of_kernels_reaches_the_function() -> None:
    x = torch.ones(2, 4)
    for module, inputs in (
        (RMSNorm(4, kernels="triton"), (x,)),
        (AddRMSNorm(4, kernels="triton"), (x, x)),
        (SwiGLU(kernels="triton"), (x, x)),
        (SwiGLU(True, "triton"), (x,)),
    ):
        with pytest.raises(ValueError, match='kernels = "triton" on cpu'):
            module(*inputs)


def test_wrong_inputs_of_a_module() -> None:
    x = torch.ones(2, 4)
    with pytest.raises(ValueError, match=r"weight of shape \(5,\) does not fit x of shape \(2, 4\)"):
        RMSNorm(5)(x)
    for module, inputs in ((SwiGLU(), (x,)), (SwiGLU(True), (x, x))):
        with pytest.raises(TypeError, match="positional argument"):
            module(*inputs)
