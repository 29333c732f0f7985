"""The rule of re-balancing once more, from the names of whole tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def scalar_of(name: str) -> str | None:
    """The scalar that carries a parameter's magnitude: the rule once more, written the other way round."""
    block, _, rest = name.partition(".self_attn.")
    if rest and rest.split(".")[0] in ("q_proj", "k_proj", "v_proj", "o_proj"):
        return f"{block}.self_attn.{rest.split('.')[0]}_alpha"
    block, _, rest = name.partition(".mlp.")
    if rest:
        return f"{block}.down_proj_alpha" if rest.startswith("down") else f"{block}.gate_up_proj_alpha"
    return None


def scales(weights: dict[str, Tensor], rms: float) -> dict[str, float]:
    """RMS / target by scalar."""
    members: dict[str, list[Tensor]] = {}
    for name, weight in weights.items():
        scalar = scalar_of(name)
        if scalar and name.endswith(".weight"):
            members.setdefault(scalar, []).append(weight.double().flatten())
    return {scalar: float(torch.cat(parts).square().mean().sqrt()) / rms for scalar, parts in members.items()}


def factor_of(name: str, by_scalar: dict[str, float]) -> float:
    """What a parameter is multiplied by."""
    scalar = scalar_of(name)
    return 1 / by_scalar[scalar] if scalar else by_scalar.get(name, 1.0)
