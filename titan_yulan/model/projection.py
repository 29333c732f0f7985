"""Projections of one input: separate parameters with their scalars, one matrix product (`kernels/packed_linear.py`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from titan_yulan.kernels.packed_linear import packed_linear
from titan_yulan.kernels.runtime import Kernels
from titan_yulan.model.scale import Alpha, combine
from titan_yulan.model.sharding import local


def project(
    x: Tensor,
    projections: Sequence[nn.Linear],
    factors: Sequence[tuple[Alpha, ...]],
    *,
    rounded: bool,
    kernels: Kernels,
) -> Tensor:
    """The outputs of all projections side by side, each times its factors: (..., in) -> (..., sum of out).

    Args:
        x: activations in the projections' type.
        projections: with or without bias, all alike.
        factors: for each projection, trained scalars of shape (1,) and numbers.
        rounded: round the scalars to x's type first.
        kernels: who computes, see `packed_linear`.
    """
    products = [combine(part, x.dtype if rounded else None) for part in factors]
    scales = None
    if any(isinstance(product, Tensor) or product != 1.0 for product in products):
        wide = torch.promote_types(x.dtype, torch.float32)
        scales = torch.cat([p if isinstance(p, Tensor) else x.new_full((1,), p, dtype=wide) for p in products])
    weights = [local(projection.weight) for projection in projections]
    biases = [local(projection.bias) for projection in projections if projection.bias is not None]
    if len(projections) == 1 and scales is None:
        return functional.linear(x, weights[0], *biases)
    return packed_linear(x, weights, scales, biases, kernels=kernels)
