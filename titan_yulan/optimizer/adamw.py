"""AdamW over sharded and replicated parameters, and clipping by the global gradient norm."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from titan_yulan.config.model import ModelConfig
from titan_yulan.config.sections import OptimizerSection
from titan_yulan.optimizer.groups import assign, group_table


def build_adamw(model: nn.Module, model_config: ModelConfig, section: OptimizerSection) -> torch.optim.AdamW:
    """Fused AdamW with the groups of `group_table`; its state exists from the start (zeros), ready to be loaded into.

    Each group carries `multiplier`; `set_learning_rate` sets the rates.
    """
    table = group_table(model_config, section)
    parameters = dict(model.named_parameters())
    names = assign(parameters, table)
    groups: list[dict[str, Any]] = []
    for group in table:
        members = [parameters[name] for name in names[group.name]]
        # one fused call cannot mix sharded (DTensor) and replicated (plain) tensors
        sharded = [p for p in members if isinstance(p, DTensor)]
        replicated = [p for p in members if not isinstance(p, DTensor)]
        options = {"weight_decay": group.weight_decay, "multiplier": group.learning_rate}
        groups += [{"params": part, **options} for part in (sharded, replicated) if part]
    optimizer = torch.optim.AdamW(groups, lr=section.learning_rate, betas=section.betas, eps=section.eps, fused=True)
    for parameter in parameters.values():
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
        }
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set every group's rate to its multiplier of `learning_rate`."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["multiplier"]


def step_unless(optimizer: torch.optim.AdamW, refused: Tensor) -> None:
    """Update, or leave every bit of weights, moments and step counts as it is.

    Args:
        refused: () float32, 1 to leave all as it is (whatever the gradients are), 0 to update. The fused step reads it
            on the device, through the attribute `found_inf` that torch.amp.GradScaler made for it.
    """
    device = optimizer.param_groups[0]["params"][0].device
    if device != refused.device:
        refused = refused.to(device)  # weights in the host's memory: torch would copy it there without waiting
    optimizer.found_inf = refused  # type: ignore[attr-defined]
    optimizer.step()


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's tensors by `PARAMETER.exp_avg`, `.exp_avg_sq`, `.step`; the very tensors, for saving and loading."""
    state = {}
    for name, parameter in model.named_parameters():
        if parameter not in optimizer.state:
            raise ValueError(f"{name} is not what the optimizer was built with; is its weight gathered?")
        state |= {f"{name}.{key}": value for key, value in optimizer.state[parameter].items()}
    return state


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale all gradients so that their global 2-norm is at most `max_norm`.

    Returns:
        () float32, the norm before clipping; not finite if any gradient is not (the gradients are then unusable).
    """
    gradients: dict[tuple, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is None:
            continue
        if isinstance(parameter.grad, DTensor):
            grad = parameter.grad
            sharded = tuple(i for i, placement in enumerate(grad.placements) if not isinstance(placement, Replicate))
            gradients.setdefault((grad.device_mesh, sharded), []).append(grad.to_local())
        else:
            gradients.setdefault((None, ()), []).append(parameter.grad)
    total: Tensor | None = None
    for (mesh, sharded), tensors in gradients.items():
        # in double: a float32 sum of millions of squares is off by 1e-5, and differently for every way to shard
        square = torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float64)).square().sum()
        for dim in sharded:
            dist.all_reduce(square, group=mesh.get_group(dim))
        total = square if total is None else total + square
    if total is None:
        raise ValueError("no parameter has a gradient")
    norm = total.sqrt().float()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for tensors in gradients.values():
        torch._foreach_mul_(tensors, scale.to(tensors[0].device))
    return norm
