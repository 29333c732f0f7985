"""Multipliers of activations: WeSaR's trained scalars and the constants of muP, applied without rounding the scalar.

A scalar such as 0.034503 is 0.034424 in bfloat16, so it stays in float32 until it meets the activation; the product is
rounded once, to the activation's type. With `scalar_precision = "compute"` the scalars are rounded to that type first,
as in the published bfloat16 training of YuLan-Mini.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from titan_yulan.config.model import ModelConfig
from titan_yulan.kernels.rms_norm import rms_norm, rms_norm_reference
from titan_yulan.kernels.runtime import Kernels

# A trained scalar of shape (1,), or the number 1 where the configuration has none.
Alpha = nn.Parameter | float


def make_alpha(config: ModelConfig, name: str) -> Alpha:
    """The scalar `name` at its initial value, float32 of shape (1,); the number 1 where the model has no such scalar.

    The published shape of some is (); one element in one dimension is what FSDP2 can shard.
    """
    is_norm = name.endswith("norm_alpha")
    if not config.wesar or (is_norm and not config.norm_alphas):
        return 1.0
    return nn.Parameter(torch.full((1,), config.initial_alpha(name), dtype=torch.float32))


def combine(factors: tuple[Alpha | Tensor, ...], rounded_to: torch.dtype | None) -> Tensor | float:
    """Product of numbers and one-element tensors; the tensors are first rounded to `rounded_to` unless it is None."""
    number, product = 1.0, None
    for factor in factors:
        if not isinstance(factor, Tensor):
            number *= factor
            continue
        # Back in its own type, the rounded value is multiplied without a second rounding.
        value = factor if rounded_to is None else factor.to(rounded_to).to(factor.dtype)
        product = value if product is None else product * value
    if product is None:
        return number
    return product if number == 1.0 else product * number


def multiply(x: Tensor, *factors: Alpha, rounded: bool) -> Tensor:
    """x times every factor, rounded once to x's type: (...,) -> (...,).

    Args:
        x: activations of any floating type.
        factors: trained scalars of shape (1,) and numbers.
        rounded: round the scalars to x's type first.
    """
    factor = combine(factors, x.dtype if rounded else None)
    if not isinstance(factor, Tensor):
        return x if factor == 1.0 else x * factor
    # Type promotion multiplies in float32 and keeps x itself, not a float32 copy of it, for the scalar's gradient.
    return (x * factor).to(x.dtype)


def add_multiple(residual: Tensor, x: Tensor, *factors: Alpha, rounded: bool) -> Tensor:
    """residual + x times every factor, rounded once to the residual's type; shapes as in `multiply`."""
    factor = combine(factors, x.dtype if rounded else None)
    if not isinstance(factor, Tensor):
        return torch.add(residual, x, alpha=factor)
    return (residual + x * factor).to(residual.dtype)


class RMSNorm(nn.Module):
    """RMSNorm whose output is multiplied by scalars, in the two styles of the published code.

    `"llama"`: everything in float32, cast once. `"gemma"`: the stored weight is the multiplier minus 1, and meets the
    normalised activation in the activation's precision.
    """

    def __init__(self, config: ModelConfig, upcast: bool = False) -> None:
        """`upcast`: take the input to float32 before and back after (the final norm), also in the gemma style."""
        super().__init__()
        self.eps = config.rms_norm_eps
        self.gemma = config.rms_norm_style == "gemma"
        self.rounded = config.scalar_precision == "compute"
        self.upcast = upcast
        self.kernels = cast(Kernels, config.kernels)
        self.weight = nn.Parameter(torch.full((config.hidden_size,), 0.0 if self.gemma else 1.0))

    def forward(self, x: Tensor, *factors: Alpha) -> Tensor:
        """(..., hidden) -> (..., hidden) in x's type, times every factor."""
        rounded_to = x.dtype if self.rounded else None
        scale = combine(factors, rounded_to)
        weight = self.weight if rounded_to is None else self.weight.to(rounded_to)
        if not self.gemma:
            return rms_norm(x, weight, self.eps, scale, kernels=self.kernels)
        wide = x.to(torch.promote_types(x.dtype, torch.float32)) if self.upcast else x
        normed = rms_norm_reference(wide, None, self.eps)
        return (normed * (1 + weight).to(normed.dtype) * scale).to(x.dtype)
