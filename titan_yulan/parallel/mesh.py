"""The ranks as a mesh, and the groups of ranks that work together.

Ranks are numbered with tensor fastest, then context, shard, replicate: the ranks that talk most are neighbours. All
`DeviceMesh`es here are slices of one root, which FSDP2 demands where parameters are already tensor-parallel DTensors.
FSDP2 cuts weights over shard x context together (a context rank reads the same rows, but its gradients are its own), so
the root has one dimension, "fsdp", for both: to flatten two of them later needs a private method, and slicing the
result is deprecated. Dimensions of one rank are left out, because each would cost as many process groups as there are
ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from titan_yulan.parallel.degrees import Degrees


@dataclass(frozen=True)
class Mesh:
    """This rank's place in the layout.

    Attributes:
        fsdp: for `fully_shard`: ("replicate", "fsdp") when there are replicas (HSDP), else ("fsdp",).
        tensor: for tensor-parallel DTensors; None when tensor is 1.
        tensor_group: the ranks that hold the other parts of this rank's matrices; None when it is alone.
        context_group: the ranks that hold the other slices of this rank's rows, in the order of their slices; None when
            it is alone.
        loss_group: the ranks whose losses and token counts add up to the global batch's: replicate x shard x context
            (tensor ranks all hold the same sums).
        world_group: all ranks.
    """

    degrees: Degrees
    rank: int
    fsdp: DeviceMesh
    tensor: DeviceMesh | None
    tensor_group: dist.ProcessGroup | None
    context_group: dist.ProcessGroup | None
    loss_group: dist.ProcessGroup
    world_group: dist.ProcessGroup

    @property
    def data_rank(self) -> int:
        """Which part of a global batch this rank reads."""
        return self.rank // (self.degrees.context * self.degrees.tensor)

    @property
    def data_size(self) -> int:
        return self.degrees.data

    @property
    def context_rank(self) -> int:
        return self.rank // self.degrees.tensor % self.degrees.context

    @property
    def context_size(self) -> int:
        return self.degrees.context

    @property
    def tensor_rank(self) -> int:
        return self.rank % self.degrees.tensor

    @property
    def tensor_size(self) -> int:
        return self.degrees.tensor


_BUILT: dict[tuple[Degrees, str], Mesh] = {}


def build_mesh(degrees: Degrees, device_type: str) -> Mesh:
    """The mesh of all ranks; all ranks call it together, after the process group's start.

    A layout that comes back at a later phase gets the same mesh: process groups are never freed, and each holds memory.
    """
    built = _BUILT.get((degrees, device_type))
    if built is None or built.world_group is not dist.group.WORLD:
        built = _BUILT[degrees, device_type] = _build(degrees, device_type)
    return built


def _build(degrees: Degrees, device_type: str) -> Mesh:
    sizes = {"replicate": degrees.replicate, "fsdp": degrees.shard * degrees.context, "tensor": degrees.tensor}
    named = {name: size for name, size in sizes.items() if size > 1 or name == "fsdp"}
    root = init_device_mesh(device_type, tuple(named.values()), mesh_dim_names=tuple(named))
    tensor = root["tensor"] if "tensor" in named else None
    ranks = torch.arange(degrees.ranks).view(degrees.data, degrees.context, degrees.tensor)
    context_group = None
    if degrees.context > 1:
        context_group = _own_group(ranks.movedim(1, 2).flatten(0, 1))
    return Mesh(
        degrees=degrees,
        rank=dist.get_rank(),
        fsdp=root["replicate", "fsdp"] if "replicate" in named else root["fsdp"],
        tensor=tensor,
        tensor_group=None if tensor is None else tensor.get_group(),
        context_group=context_group,
        loss_group=_own_group(ranks.flatten(0, 1).T),
        world_group=_world(),
    )


def _own_group(partition: torch.Tensor) -> dist.ProcessGroup:
    """This rank's group; each row of `partition` is the ranks of one."""
    if len(partition) == 1:
        return _world()
    own = next(ranks for ranks in partition.tolist() if dist.get_rank() in ranks)
    # made by its members alone: every rank making every group costs a barrier for each
    group = dist.new_group(own, use_local_synchronization=True)
    if not isinstance(group, dist.ProcessGroup):
        raise RuntimeError(f"rank {dist.get_rank()} is not in its own group {own}")
    return group


def _world() -> dist.ProcessGroup:
    group = dist.group.WORLD
    if group is None:
        raise RuntimeError("the process group is not started (parallel.process.start)")
    return group
