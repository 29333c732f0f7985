"""What two ranks run to save under faults: the real writer, with a limit on the size of files as the fault."""

from __future__ import annotations

import os
import pickle
import resource
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard, distribute_tensor

from tests.distributed.bodies import full, state_of
from titan_yulan.checkpoint import store
from titan_yulan.checkpoint.layout import INDEX, MANIFEST, Checkpoint, find_checkpoints, find_damage, step_folder
from titan_yulan.errors import RunError
from titan_yulan.parallel.degrees import Degrees
from titan_yulan.parallel.mesh import build_mesh
from titan_yulan.parallel.process import World


def make_tensors(world: World, seed: int) -> dict[str, Any]:
    """240 kB, half of it in each rank's file."""
    mesh = build_mesh(Degrees(1, world.size, 1, 1), "cpu").fsdp
    values = torch.randn(60_001, generator=torch.Generator().manual_seed(seed))
    return {"model": {"w": distribute_tensor(values, mesh, [Shard(0)]), "alpha": torch.tensor([0.5 + seed])}}


def save(world: World, folder: Path, step: int, keep: int = 9, finished: bool = False) -> None:
    store.save(folder, make_tensors(world, step), state_of(step, finished), "text = 1\n", world, keep)


def failure(world: World, folder: Path, limited_rank: int) -> dict[str, Any]:
    """One rank's disk takes no more than 64 kB a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if world.rank == limited_rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, before[1]))
    try:
        save(world, folder, 2)
        message = "saved"
    except RunError as error:
        message = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    dist.barrier()
    visible = [checkpoint.step for checkpoint in find_checkpoints(folder)]
    return {"message": message, "visible": visible, "left": step_folder(folder, 2).exists()}


def damage(path: Path) -> None:
    """Flip one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def protocol(world: World, folder: Path) -> dict[str, Any]:
    """Saves, failures, damage, and what is chosen and kept then."""
    found: dict[str, Any] = {}
    save(world, folder, 1)
    found["failures"] = [failure(world, folder, rank) for rank in (1, 0)]
    for step in (2, 3, 4):
        save(world, folder, step)
    found["sound"] = [find_damage(checkpoint) for checkpoint in find_checkpoints(folder)]
    dist.barrier()
    if world.is_main:
        damage(step_folder(folder, 4) / "__1_0.distcp")
        (step_folder(folder, 3) / MANIFEST).write_text("{")
    dist.barrier()
    lines: list[str] = []
    chosen = store.newest_good(folder, world, lines.append)
    found["chosen"] = (chosen.step if chosen else None, lines)
    by_size = store.newest_good(folder, world, print, verify="size")
    found["chosen by size"] = by_size.step if by_size else None
    # the run goes on from step 2, with checkpoints of later steps in the way that cannot be read
    save(world, folder, 3, keep=1)
    dist.barrier()
    found["after 3"] = [(c.step, bool(find_damage(c))) for c in find_checkpoints(folder)]
    dist.barrier()
    save(world, folder, 4, keep=2)
    dist.barrier()
    found["after 4"] = [(c.step, bool(find_damage(c))) for c in find_checkpoints(folder)]
    chosen = store.newest_good(folder, world, lines.append)
    assert chosen is not None
    loaded = make_tensors(world, 0)
    store.load(chosen, loaded, world.host)
    found["loaded"] = full(loaded["model"]), full(make_tensors(world, chosen.step)["model"])
    found["wrong"] = _messages(world, chosen)
    found["planted"] = _planted(world, chosen, folder / "planted")
    empty = folder / "nothing"
    found["nothing"] = store.newest_good(empty, world, lines.append)
    return found


class Planted:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.path,)


def _planted(world: World, checkpoint: Checkpoint, mark: Path) -> tuple[str, bool]:
    """What loading says of an index that somebody has replaced, and whether that index was unpickled."""
    dist.barrier()
    if world.is_main:
        (checkpoint.path / INDEX).write_bytes(pickle.dumps(Planted(mark)))
    dist.barrier()
    message = "loaded"
    try:
        store.load(checkpoint, make_tensors(world, 0), world.host)
    except RunError as error:
        message = str(error)
    dist.barrier()
    return message, mark.exists()


def _messages(world: World, checkpoint: Checkpoint) -> list[str]:
    """What loading into another model says."""
    messages = []
    for tensors in ({"w": torch.zeros(7)}, {"other": torch.zeros(1)}):
        try:
            store.load(checkpoint, {"model": tensors}, world.host)
        except RunError as error:
            messages.append(str(error))
    return messages
