"""A decoder laid out over the ranks, in the one order that works:

    tensor parallelism  ->  activation checkpointing  ->  torch.compile, per block  ->  FSDP2, per block

It is made on the meta device, so that no rank ever holds more than its parts, and filled at the end.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from titan_yulan.config.model import ModelConfig
from titan_yulan.config.sections import ActivationCheckpointSection, CompileSection, ParallelSection
from titan_yulan.model import Decoder
from titan_yulan.model.initialise import initial_value
from titan_yulan.parallel.activation_checkpoint import apply_activation_checkpoint
from titan_yulan.parallel.compile import compile_layers
from titan_yulan.parallel.fsdp import ShardedDecoder, is_replicated, shard_decoder
from titan_yulan.parallel.mesh import Mesh
from titan_yulan.parallel.sharding import RankSharding
from titan_yulan.parallel.tensor import distribute_parameters


def build_decoder(
    config: ModelConfig,
    section: ParallelSection,
    mesh: Mesh,
    seed: int,
    device: torch.device,
    activation_checkpoint: ActivationCheckpointSection,
    compile: CompileSection,
) -> ShardedDecoder:
    """The decoder over the ranks of `mesh`, in float32, initialised alike for every layout."""
    with torch.device("meta"):
        decoder = Decoder(config)
    decoder.model.sharding = RankSharding(mesh, config.vocab_size)
    if mesh.tensor is not None:
        distribute_parameters(decoder, mesh.tensor)
    apply_activation_checkpoint(decoder.model.layers, activation_checkpoint)
    compile_layers(decoder.model.layers, compile)
    sharded = shard_decoder(decoder, section, mesh)
    sharded.to_empty(device="cpu" if section.cpu_offload else device)
    for name, parameter in sharded.named_parameters():
        if section.cpu_offload and is_replicated(name):
            parameter.data = parameter.data.to(device)  # FSDP2 moves only what it shards
        # drawn on the run's device wherever the parameter lives: another kind of device draws other numbers
        _fill(parameter, initial_value(name, parameter.shape, config, seed, device))
    return sharded


@torch.no_grad()
def _fill(parameter: nn.Parameter, whole: Tensor) -> None:
    """Copy this rank's part of a whole tensor into a parameter."""
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    local.copy_(part_of(whole, parameter))


def part_of(whole: Tensor, layout: Tensor) -> Tensor:
    """What this rank holds of a whole tensor that is laid out as `layout`: all of it, if that is no DTensor."""
    if not isinstance(layout, DTensor):
        return whole
    mesh, part = layout.device_mesh, whole
    # the tensor-parallel dimension is the last of the mesh and cuts first; FSDP2 cuts what it left
    for index in reversed(range(mesh.ndim)):
        placement = layout.placements[index]
        if isinstance(placement, Replicate):
            continue
        dim: int = placement.dim  # type: ignore[attr-defined]  # Shard and _StridedShard have no common class
        chunks = part.chunk(mesh.size(index), dim)
        rank = mesh.get_local_rank(index)
        part = chunks[rank] if rank < len(chunks) else part.narrow(dim, 0, 0)
    return part
