"""The decoder laid out over the ranks: FSDP2 for the matrices, replicas for the scalars and norm weights.

WeSaR scalars and norm weights stay outside FSDP, replicated in float32: FSDP2 would cast them to the compute type
(0.034503 becomes 0.034424 in bfloat16), shard tensors of one element, and gather hundreds of tiny tensors. Their
gradients are summed over all ranks in one all-reduce a step.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from titan_yulan.config.model import ModelConfig
from titan_yulan.config.sections import ParallelSection
from titan_yulan.model import Decoder
from titan_yulan.model.initialise import initial_value
from titan_yulan.parallel.process import World


class ShardedDecoder(Decoder, FSDPModule):
    """What `fully_shard` makes of a decoder, for type checkers: it swaps the class of the module in place."""


def build_decoder(config: ModelConfig, section: ParallelSection, world: World, seed: int) -> ShardedDecoder:
    """The decoder, sharded per block over the ranks, in float32, initialised alike for every number of ranks."""
    with torch.device("meta"):
        decoder = Decoder(config)
    replicated = {parameter for name, parameter in decoder.named_parameters() if is_replicated(name)}
    policy = MixedPrecisionPolicy(
        param_dtype=getattr(torch, section.compute_dtype), reduce_dtype=getattr(torch, section.reduce_dtype)
    )
    for block in decoder.model.layers:
        fully_shard(
            block,
            mesh=world.mesh,
            mp_policy=policy,
            reshard_after_forward=section.reshard_after_forward,
            ignored_params=replicated,
        )
    # the root holds the embedding and the head: needed first and last, so not resharded in between
    fully_shard(decoder, mesh=world.mesh, mp_policy=policy, reshard_after_forward=False, ignored_params=replicated)
    for module in decoder.modules():
        if isinstance(module, FSDPModule):
            # losses are divided by the global denominator before backward, so gradients are summed, not averaged
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    decoder.to_empty(device=world.device)
    for name, parameter in decoder.named_parameters():
        _fill(parameter, initial_value(name, parameter.shape, config, seed, world.device))
    return cast(ShardedDecoder, decoder)


def reshard(decoder: nn.Module) -> None:
    """Free the gathered weights of every block and the root. A forward pass without backward leaves them gathered, and
    then the parameters are plain tensors in the compute type: nothing to save or to train."""
    for module in decoder.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def is_replicated(name: str) -> bool:
    """Whether a parameter is a WeSaR scalar or a norm weight."""
    return name.endswith("_alpha") or "norm" in name


@torch.no_grad()
def _fill(parameter: nn.Parameter, full: Tensor) -> None:
    """Copy this rank's part of a full tensor into a parameter."""
    if not isinstance(parameter, DTensor):
        parameter.copy_(full)
        return
    local = parameter.to_local()
    mesh = parameter.device_mesh
    part = full
    for dim, placement in enumerate(parameter.placements):
        if isinstance(placement, Shard):
            chunks = part.chunk(mesh.size(dim), dim=placement.dim)  # as FSDP2 cuts, uneven at the end
            index = mesh.get_local_rank(dim)
            part = chunks[index] if index < len(chunks) else part.narrow(placement.dim, 0, 0)
    local.copy_(part)


def sum_replicated_gradients(decoder: nn.Module) -> None:
    """Add up the gradients of the replicated parameters over all ranks, in one all-reduce."""
    gradients = [p.grad for p in decoder.parameters() if not isinstance(p, DTensor) and p.grad is not None]
    if not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    parts = flat.split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])
