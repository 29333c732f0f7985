"""Re-balancing between phases (`[phase] rebalance_rms`): WeSaR's matrices get one magnitude, their scalars the rest.

A matrix enters the model as alpha * W with a trained scalar alpha (WeSaR, arXiv 2410.05052). Adam moves every weight by
about the learning rate, whatever its size, so that the size of W decides how fast alpha * W turns. YuLan-Mini (arXiv
2412.17743) re-split the product before every phase; the code and the target are not published, and the authors saw no
significant effect. With s = RMS(W) / target:

    W     <- W / s        gradient * s      first moment * s     second moment * s^2
    bias  <- bias / s     gradient * s      first moment * s     second moment * s^2
    alpha <- alpha * s    gradient / s      first moment / s     second moment / s^2

(alpha multiplies W x + bias.) Gate and up share a scalar and are scaled together, by their joint RMS. What has no
scalar of its own stays: norms, the embedding, the head (whose scalar belongs to the final norm's output).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from titan_yulan.errors import RunError, UserError
from titan_yulan.model.sharding import copies, local

# The scalar's name -> its matrices', both below the module that has the scalar.
_MATRICES = {
    "q_proj_alpha": ("q_proj",),
    "k_proj_alpha": ("k_proj",),
    "v_proj_alpha": ("v_proj",),
    "o_proj_alpha": ("o_proj",),
    "gate_up_proj_alpha": ("mlp.gate_proj", "mlp.up_proj"),
    "down_proj_alpha": ("mlp.down_proj",),
}


@torch.no_grad()
def rebalance(decoder: nn.Module, optimizer: torch.optim.Optimizer, rms: float) -> None:
    """Give every matrix with a WeSaR scalar the root mean square `rms`, in place; all ranks together.

    The function of the model stays, up to the rounding of float32, as do the directions m / sqrt(v) of Adam. What
    changes is the next step: W moves by the same learning rate times direction as it would have, which is s times as
    much in alpha * W, and alpha likewise, 1 / s times as much in alpha * W (exactly so for an epsilon of 0; otherwise
    W's direction is that of epsilon / s, alpha's that of epsilon * s). Weight decay shrinks alpha * W as before. The
    global gradient norm is another afterwards, and clipping with it.

    Args:
        decoder: its weights not gathered (`parallel.fsdp.reshard`).
        optimizer: AdamW with the state of `build_adamw`.
        rms: root mean square of every such matrix afterwards, over all of its shards.

    Raises:
        UserError: the model has no WeSaR scalars.
        RunError: a matrix is all zero, or not finite.
    """
    parameters = dict(decoder.named_parameters())
    groups = _groups(parameters)
    if not groups:
        raise UserError("phase.rebalance_rms: the model has no WeSaR scalars (model.wesar = false); remove the key")
    for (scalar, members), found in zip(groups.items(), _root_mean_squares(parameters, groups), strict=True):
        if not 0 < found < math.inf:
            raise RunError(f"phase.rebalance_rms: the root mean square of {' and '.join(members)} is {found}")
        scale = found / rms
        for member in members:
            _multiply(parameters[f"{member}.weight"], optimizer, 1 / scale)
            if f"{member}.bias" in parameters:
                _multiply(parameters[f"{member}.bias"], optimizer, 1 / scale)
        _multiply(parameters[scalar], optimizer, scale)


def _groups(parameters: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Full name of each scalar -> full names of the projections that it multiplies."""
    groups = {}
    for name in parameters:
        module, _, scalar = name.rpartition(".")
        if scalar in _MATRICES:
            groups[name] = [f"{module}.{matrix}" for matrix in _MATRICES[scalar]]
    return groups


def _root_mean_squares(parameters: Mapping[str, Tensor], groups: Mapping[str, list[str]]) -> list[float]:
    """Of each group's matrices together; summed over all ranks at once, so that all scale by the very same numbers."""
    squares, counts = [], []
    weights = [[parameters[f"{member}.weight"] for member in members] for members in groups.values()]
    for group in weights:
        # in double: a float32 sum of millions of squares is off by 1e-5, and differently for every way to shard
        norms = torch._foreach_norm([local(weight) for weight in group], 2, dtype=torch.float64)
        squares.append(torch.stack(norms).square().sum() / copies(group[0]))
        counts.append(sum(weight.numel() for weight in group))
    total = torch.stack(squares)
    if isinstance(weights[0][0], DTensor):
        dist.all_reduce(total)
    return (total.cpu() / torch.tensor(counts, dtype=torch.float64)).sqrt().tolist()


def _multiply(parameter: Tensor, optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Scale a parameter, and its moments as those of gradients that are divided by the factor."""
    state = optimizer.state[parameter]
    local(parameter).mul_(factor)
    local(state["exp_avg"]).div_(factor)
    local(state["exp_avg_sq"]).div_(factor).div_(factor)
