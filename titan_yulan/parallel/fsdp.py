"""FSDP2 for the matrices, replicas for the scalars and norm weights.

WeSaR scalars and norm weights stay outside FSDP, replicated in float32: FSDP2 would cast them to the compute type
(0.034503 becomes 0.034424 in bfloat16), shard tensors of one element, and gather hundreds of tiny tensors. Their
gradients, of which every rank has a summand, are added up over all ranks in one all-reduce a step.
"""

from __future__ import annotations

from itertools import pairwise
from typing import cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from titan_yulan.config.sections import ParallelSection
from titan_yulan.model import Decoder
from titan_yulan.parallel.mesh import Mesh


class ShardedDecoder(Decoder, FSDPModule):
    """What `fully_shard` makes of a decoder, for type checkers: it swaps the class of the module in place."""


def shard_decoder(decoder: Decoder, section: ParallelSection, mesh: Mesh) -> ShardedDecoder:
    """Shard the matrices of every block, and those of the root, over the mesh; in place.

    The embedding and the head, tied or not, are the root's: gathered once for the whole pass, because they are needed
    first and last.
    """
    replicated = {parameter for name, parameter in decoder.named_parameters() if is_replicated(name)}
    on_gpu = mesh.fsdp.device_type == "cuda"
    policy = MixedPrecisionPolicy(
        param_dtype=getattr(torch, section.compute_dtype), reduce_dtype=getattr(torch, section.reduce_dtype)
    )
    offload = CPUOffloadPolicy(pin_memory=on_gpu) if section.cpu_offload else OffloadPolicy()

    def shard(module: nn.Module, free_after_forward: bool) -> None:
        fully_shard(
            module,
            mesh=mesh.fsdp,
            mp_policy=policy,
            offload_policy=offload,
            reshard_after_forward=free_after_forward,
            ignored_params=replicated,
        )

    for block in decoder.model.layers:
        shard(block, section.reshard_after_forward)
    shard(decoder, False)
    for module in _sharded_modules(decoder):
        # losses are divided by the global denominator before backward, so gradients are summed, not averaged
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    blocks = [cast(FSDPModule, block) for block in decoder.model.layers]
    for block, following in pairwise(blocks):
        # backward finds the order by itself; forward, the host being ahead of the device, only when told
        block.set_modules_to_forward_prefetch([following])
    return cast(ShardedDecoder, decoder)


def synchronize_next_backward(decoder: ShardedDecoder, section: ParallelSection, last: bool) -> None:
    """Say before a micro-batch's backward whether its gradients are to be reduced; `last`: the last of a step."""
    if section.synchronize == "last":
        decoder.set_is_last_backward(last)
        decoder.set_requires_gradient_sync(last)


def reshard(decoder: nn.Module) -> None:
    """Free the gathered weights of every block and the root. A forward pass without backward leaves them gathered, and
    then the parameters are plain tensors in the compute type: nothing to save or to train."""
    for module in _sharded_modules(decoder):
        module.reshard()


def _sharded_modules(decoder: nn.Module) -> list[FSDPModule]:
    return [module for module in decoder.modules() if isinstance(module, FSDPModule)]


def is_replicated(name: str) -> bool:
    """Whether a parameter is a WeSaR scalar or a norm weight."""
    return name.endswith("_alpha") or "norm" in name


def sum_replicated_gradients(decoder: nn.Module) -> None:
    """Add up the gradients of the replicated parameters over all ranks, in one all-reduce."""
    gradients = [p.grad for p in decoder.parameters() if not isinstance(p, DTensor) and p.grad is not None]
    if not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    parts = flat.split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])
