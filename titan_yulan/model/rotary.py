"""Rotary position embedding (Su et al., arXiv 2104.09864), half-split layout as in Llama."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_tables(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of position * theta^(-2j / head_dim), j = 0 .. head_dim/2 - 1.

    Args:
        positions: integer positions, (..., seq).
        head_dim: width of one head, even.
        theta: base of the frequencies.
        dtype: float64 computes in float64; any other type in float32, and the result is cast to it.

    Returns:
        Two tensors (..., seq, 1, head_dim / 2); the 1 stands for the heads.
    """
    wide = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, head_dim, 2, device=positions.device).to(wide) / head_dim
    angles = positions.to(wide)[..., None] * (1.0 / theta**exponents)
    return angles.cos().to(dtype).unsqueeze(-2), angles.sin().to(dtype).unsqueeze(-2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x_j, x_{j + head_dim/2}) by its position's angle.

    Args:
        x: (batch, seq, heads, head_dim).
        cos, sin: (seq, 1, head_dim / 2) or (batch, seq, 1, head_dim / 2); where they are wider than x, so is the
            arithmetic.

    Returns:
        (batch, seq, heads, head_dim) in x's type.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
