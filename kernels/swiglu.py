"""SwiGLU, one operation: y = silu(gate) * up, element by element (Shazeer, arXiv 2002.05202)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up in plain PyTorch, cast once at the end.

    Args:
        gate: any shape and floating type; passed through x * sigmoid(x).
        up: same shape and type.

    Returns:
        Same shape and type, computed in the wider of float32 and the inputs' type.
    """
    wide = torch.promote_types(gate.dtype, torch.float32)
    return (functional.silu(gate.to(wide)) * up.to(wide)).to(gate.dtype)
