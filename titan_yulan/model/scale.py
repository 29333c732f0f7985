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
from titan_yulan.kernels.add_rms_norm import add_rms_norm
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


class RMSNorm(nn.Module):
    """RMSNorm whose output is multiplied by scalars, in the styles of the published code.

    `"llama"`: everything in float32, cast once. `"hugging_face"`: the normalised activation is rounded to its own type
    before the weight. `"gemma"`: the stored weight is the multiplier minus 1, and meets the normalised activation in
    the activation's precision.
    """

    def __init__(self, config: ModelConfig, upcast: bool = False) -> None:
        """`upcast`: take the input to float32 before and back after (the final norm), also in the gemma style."""
        super().__init__()
        self.eps = config.rms_norm_eps
        self.gemma = config.rms_norm_style == "gemma"
        self.round_before_weight = config.rms_norm_style == "hugging_face"
        self.rounded = config.scalar_precision == "compute"
        self.upcast = upcast
        self.kernels = cast(Kernels, config.kernels)
        self.weight = nn.Parameter(torch.full((config.hidden_size,), 0.0 if self.gemma else 1.0))

    def forward(self, x: Tensor, *factors: Alpha) -> Tensor:
        """(..., hidden) -> (..., hidden) in x's type, times every factor."""
        weight, scale = self._multipliers(x.dtype, factors)
        if not self.gemma:
            rounding = self.round_before_weight
            return rms_norm(x, weight, self.eps, scale, round_before_weight=rounding, kernels=self.kernels)
        wide = x.to(torch.promote_types(x.dtype, torch.float32)) if self.upcast else x
        normed = rms_norm_reference(wide, None, self.eps)
        return (normed * (1 + weight).to(normed.dtype) * scale).to(x.dtype)

    def add(self, x: Tensor, output: Tensor | None, output_factor: float, *factors: Alpha) -> tuple[Tensor, Tensor]:
        """The norm of x + output_factor * output, times every factor, and that sum: (..., hidden) each."""
        if output is None:
            return self(x, *factors), x
        if self.gemma:
            x = torch.add(x, output, alpha=output_factor)
            return self(x, *factors), x
        weight, scale = self._multipliers(x.dtype, factors)
        rounding = self.round_before_weight
        return add_rms_norm(
            output, x, weight, self.eps, scale, output_factor, round_before_weight=rounding, kernels=self.kernels
        )

    def _multipliers(self, dtype: torch.dtype, factors: tuple[Alpha, ...]) -> tuple[Tensor, Tensor | float]:
        if not self.rounded:
            return self.weight, combine(factors, None)
        return self.weight.to(dtype), combine(factors, dtype)
