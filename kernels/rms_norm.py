"""RMSNorm, one operation: y = x / sqrt(mean(x^2) + eps) * weight * scale over the last dimension.

`scale` is where the constant and trained multipliers of a norm's output meet it (YuLan-Mini's `ln_scale` and the WeSaR
scalars, arXiv 2412.17743), so that nothing between the norm and its multipliers is rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm_reference(x: Tensor, weight: Tensor | None, eps: float, scale: Tensor | float = 1.0) -> Tensor:
    """RMSNorm in plain PyTorch (Zhang and Sennrich, arXiv 1910.07467, equation 4), cast once at the end.

    Args:
        x: (..., size), any floating type.
        weight: (size,), or None for no weight.
        eps: added to the mean square.
        scale: a number, or a tensor of one element that may need a gradient; multiplies the output.

    Returns:
        (..., size) in x's type, computed in the wider of float32 and x's type.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    y = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight
    if isinstance(scale, Tensor) or scale != 1.0:
        y = y * scale
    return y.to(x.dtype)
