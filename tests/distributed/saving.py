"""What two ranks run to save under faults: the real writer, with a limit on the size of files as the fault."""

from __future__ import annotations

import os
import pickle
import resource
import shutil
from pathlib import Path
from typing import Any, NoReturn

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
    found["again"] = _save_again(world, folder)
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


def _save_again(world: World, folder: Path) -> dict[str, tuple[bool, bool, list[str]]]:
    """A step that is saved already, as it is; with a state that rank 0 alone cannot read; and where a file cannot be
    deleted. For each: whether the manifest is the same file as before, whether all is sound, and what is left over."""
    path = step_folder(folder, 4)

    def outcome() -> tuple[bool, bool, list[str]]:
        dist.barrier()
        before = (path / MANIFEST).stat().st_ino, (path / MANIFEST).stat().st_mtime_ns
        dist.barrier()
        save(world, folder, 4, keep=2)
        dist.barrier()
        after = (path / MANIFEST).stat().st_ino, (path / MANIFEST).stat().st_mtime_ns
        sound = not find_damage(Checkpoint(path, 4))
        hidden = sorted(item.name for item in path.iterdir() if item.name.startswith("."))
        dist.barrier()
        return before == after, sound, hidden

    found = {"as it is": outcome()}
    read, delete = Checkpoint.state, shutil.rmtree
    if world.is_main:
        Checkpoint.state = _unreadable  # type: ignore[method-assign]
    found["unreadable state"] = outcome()
    if world.is_main:
        (path / ".nfs0001").write_text("open elsewhere")
        shutil.rmtree = lambda *_, **__: None  # type: ignore[assignment]
    found["a file that stays"] = outcome()
    Checkpoint.state, shutil.rmtree = read, delete  # type: ignore[method-assign]
    dist.barrier()
    (path / ".nfs0001").unlink(missing_ok=True)
    return found


def _unreadable(checkpoint: Checkpoint) -> NoReturn:
    raise RunError(f"{checkpoint.path} cannot be read")


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


def die_while_loading(world: World, folder: Path) -> None:
    """Rank 1 ends in the middle of a load, without a word; rank 0 writes down what it met."""
    save(world, folder, 1)
    (checkpoint,) = find_checkpoints(folder)
    tensors = make_tensors(world, 0)
    if world.rank == 1:
        store.CheckedReader.read_data = lambda *_: os._exit(7)  # type: ignore[method-assign]
    try:
        store.load(checkpoint, tensors, world.host)
    except BaseException as error:
        (folder / "met").write_text(type(error).__name__)
        raise
