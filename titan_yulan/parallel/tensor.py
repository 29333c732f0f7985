"""Tensor parallelism: which part of every matrix a rank holds (Megatron-LM, arXiv 1909.08053).

    q, k, v, gate, up (weights and biases)      rows: every rank computes its own heads and columns of the MLP
    o, down                                     columns: every rank computes a summand of the output
    embedding and head                          rows: every rank has a part of the vocabulary

A matrix becomes a DTensor, so that checkpoints, the optimizer and FSDP2 know of which whole it is a part. The forward
pass takes the local parts and asks a `RankSharding` for what the ranks exchange. Scalars and norm weights stay whole.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from titan_yulan.parallel.fsdp import is_replicated

_BY_ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head")
_BY_COLUMNS = ("o_proj", "down_proj")


def sharded_dimension(name: str) -> int:
    """The dimension along which the parameter `name` (not a replicated one) is cut."""
    module = name.split(".")[-2]
    if module in _BY_ROWS:
        return 0
    if module in _BY_COLUMNS:
        return 1
    raise KeyError(f"no rule how tensor parallelism cuts the parameter {name!r}")


def distribute_parameters(decoder: nn.Module, mesh: DeviceMesh) -> None:
    """Make every matrix of a decoder on the meta device a DTensor over `mesh`, of which this rank holds its part.

    Parts are those of `torch.chunk`; the last ranks have less where the number of ranks does not divide a size.
    """
    rank, size = mesh.get_local_rank(), mesh.size()
    for name, parameter in list(decoder.named_parameters()):
        if is_replicated(name):
            continue
        dim = sharded_dimension(name)
        chunks = parameter.chunk(size, dim)
        part = chunks[rank] if rank < len(chunks) else parameter.narrow(dim, 0, 0)
        local = torch.empty(part.shape, dtype=parameter.dtype, device=parameter.device)
        whole = DTensor.from_local(
            local, mesh, [Shard(dim)], run_check=False, shape=parameter.shape, stride=parameter.stride()
        )
        module, _, attribute = name.rpartition(".")
        setattr(decoder.get_submodule(module), attribute, nn.Parameter(whole))
