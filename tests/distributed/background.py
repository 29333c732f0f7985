"""What ranks run to save in the background: real writes and real limits, held at a gate so that nothing is left to
chance."""

from __future__ import annotations

import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from tests.distributed import bodies
from tests.distributed.bodies import full, state_of
from tests.distributed.saving import make_tensors
from titan_yulan.checkpoint import files, store
from titan_yulan.checkpoint.layout import INDEX, Checkpoint, find_checkpoints, step_folder
from titan_yulan.checkpoint.saver import Saver
from titan_yulan.config import to_toml
from titan_yulan.config.sections import (
    ActivationCheckpointSection,
    CheckpointSection,
    CompileSection,
    ParallelSection,
)
from titan_yulan.errors import RunError
from titan_yulan.optimizer.adamw import build_adamw, optimizer_state
from titan_yulan.parallel import process
from titan_yulan.parallel.degrees import resolve_degrees
from titan_yulan.parallel.fsdp import sum_replicated_gradients
from titan_yulan.parallel.mesh import build_mesh
from titan_yulan.parallel.parallelize import build_decoder
from titan_yulan.parallel.process import World


def _silent(_: str) -> None:
    pass


@contextmanager
def held_writes() -> Iterator[threading.Event]:
    """Tensors are written only once the event is set."""
    gate, write = threading.Event(), store._write

    def wait_and_write(*arguments: Any) -> None:
        assert gate.wait(60)
        write(*arguments)

    with mock.patch.object(store, "_write", wait_and_write):
        yield gate
        gate.set()


def in_the_background(world: World, folder: Path) -> dict[str, Any]:
    """Everything that two ranks are asked to do, in one start."""
    found: dict[str, Any] = {}
    found["snapshot"] = snapshot(world, folder / "snapshot")
    found["order"] = order(world, folder / "order")
    found["failures"] = [failure(world, folder / f"failure-{rank}", rank) for rank in (0, 1)]
    found["prune"] = unpruned(world, folder / "prune")
    different(world, folder / "different")
    return found


# divisible for two tensor-parallel ranks
MODEL = replace(bodies.MODEL, num_key_value_heads=2, intermediate_size=14)
LAYOUTS = {
    "sharded and tensor-parallel": replace(bodies.PARALLEL, tensor=2),
    "replicas of shards": replace(bodies.PARALLEL, data_replicate=2),
}


class Small:
    """A sharded model and its optimizer, without the rest of a trainer."""

    def __init__(self, world: World, seed: int, section: ParallelSection = bodies.PARALLEL) -> None:
        mesh = build_mesh(resolve_degrees(section, world.size, MODEL, bodies.LENGTH), "cpu")
        plain = ActivationCheckpointSection(), CompileSection()
        self.decoder = build_decoder(MODEL, section, mesh, seed, world.device, *plain)
        self.optimizer = build_adamw(self.decoder, MODEL, bodies.OPTIMIZER)

    def tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        return {
            "model": dict(self.decoder.named_parameters()),
            "optimizer": optimizer_state(self.decoder, self.optimizer),
        }

    def train(self) -> dict[str, torch.Tensor]:
        """Two steps; all tensors after them."""
        for _ in range(2):
            tokens = torch.arange(8).reshape(2, 4)
            self.decoder(tokens, head=lambda hidden, weight: (hidden @ weight.T).square().sum()).backward()
            sum_replicated_gradients(self.decoder)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self.everything()

    def everything(self) -> dict[str, torch.Tensor]:
        return full({f"{section}.{name}": t for section, part in self.tensors().items() for name, t in part.items()})


def hashes(path: Path) -> dict[str, str]:
    """Of the files of tensors; the index holds a random identifier of the save."""
    manifest = Checkpoint(path, 1).manifest()
    return {name: entry["sha256"] for name, entry in manifest.items() if name != INDEX}


def snapshot(world: World, folder: Path) -> dict[str, Any]:
    """A save in the background, during which the model is trained, against one that training waits for."""
    found: dict[str, Any] = {}
    lines: list[str] = []
    small = Small(world, seed=3)
    before = small.train()
    Saver(folder / "waited", world, CheckpointSection(asynchronous=False), lines.append).save(
        small.tensors(), state_of(1), ""
    )
    saver = Saver(folder, world, CheckpointSection(), lines.append)
    with held_writes():
        saver.save(small.tensors(), state_of(1), "")
        after = small.train()
        found["in flight"] = saver.in_flight, [c.step for c in find_checkpoints(folder)]
    saver.join()
    found["joined"] = saver.in_flight, [c.step for c in find_checkpoints(folder)]
    found["hashes"] = hashes(step_folder(folder, 1)), hashes(step_folder(folder / "waited", 1))
    memory = [copy.data_ptr() for copy in saver._copies["optimizer"].values()]
    saver.save(small.tensors(), state_of(2), "")
    saver.join()
    found["memory"] = memory, [copy.data_ptr() for copy in saver._copies["optimizer"].values()]
    loaded = []
    for step in (1, 2):
        other = Small(world, seed=4)
        store.load(Checkpoint(step_folder(folder, step), step), other.tensors(), world.host)
        loaded.append(other.everything())
    found["expected"], found["loaded"], found["lines"] = [before, after], loaded, lines
    return found


def layouts(world: World, folder: Path) -> dict[str, tuple[dict[str, str], dict[str, str]]]:
    """By layout, the hashes of what was written in the background and of what was waited for; one saver for all
    layouts, as in a run whose phases differ."""
    saver = Saver(folder, world, CheckpointSection(keep=9), _silent)
    found = {}
    for step, (name, section) in enumerate(LAYOUTS.items()):
        tensors = Small(world, 3, section).tensors()
        saver.save(tensors, state_of(step), "")
        saver.join()
        store.save(folder / "waited", tensors, state_of(step), "", world, keep=9)
        found[name] = hashes(step_folder(folder, step)), hashes(step_folder(folder / "waited", step))
    return found


def order(world: World, folder: Path) -> list[str]:
    """What happens when a save is asked for while another one is on its way."""
    events: list[str] = []
    saver = Saver(folder, world, CheckpointSection(), lambda line: events.append(line.split(":")[0][-1] + " saved"))
    join, save = saver.join, store.save

    def open_and_join() -> None:
        if saver.in_flight:
            events.append("waiting")
            gate.set()
        join()

    def begin_and_save(*arguments: Any) -> Path:
        if arguments[2].step == 2:
            events.append("2 begins")
        return save(*arguments)

    with (
        held_writes() as gate,
        mock.patch.object(saver, "join", open_and_join),
        mock.patch.object(store, "save", begin_and_save),
    ):
        saver.save(make_tensors(world, 1), state_of(1), "")
        saver.save(make_tensors(world, 2), state_of(2), "")
        join()
    return events


def failure(world: World, folder: Path, limited: int) -> dict[str, Any]:
    """One rank's disk takes no more than 64 kB a file while a checkpoint is written."""
    saver = Saver(folder, world, CheckpointSection(), _silent)
    saver.save(make_tensors(world, 1), state_of(1), "")
    saver.join()
    found: dict[str, Any] = {"messages": []}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if world.rank == limited:
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, before[1]))

    def message(action: Callable[[], None]) -> None:
        try:
            action()
            found["messages"].append("")
        except RunError as error:
            found["messages"].append(str(error))

    try:
        for tell in (saver.join, lambda: saver.save(make_tensors(world, 3), state_of(3), "")):
            saver.save(make_tensors(world, 2), state_of(2), "")
            message(tell)
            found["left"] = step_folder(folder, 2).exists(), [c.step for c in find_checkpoints(folder)]
        waiting = Saver(folder, world, CheckpointSection(asynchronous=False), _silent)
        message(lambda: waiting.save(make_tensors(world, 2), state_of(2), ""))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    message(saver.join)  # told before, not again
    saver.save(make_tensors(world, 2), state_of(2), "")
    message(saver.join)
    dist.barrier()
    found["after"] = [c.step for c in find_checkpoints(folder)]
    return found


def unpruned(world: World, folder: Path) -> tuple[str, list[int]]:
    """A checkpoint that cannot be deleted."""
    saver = Saver(folder, world, CheckpointSection(keep=1), _silent)
    saver.save(make_tensors(world, 1), state_of(1), "")
    saver.join()
    message = ""
    with mock.patch.object(store.layout, "prune", side_effect=PermissionError(13, "Permission denied")):
        saver.save(make_tensors(world, 2), state_of(2), "")
        try:
            saver.join()
        except RunError as error:
            message = str(error)
    return message, [c.step for c in find_checkpoints(folder)]


def different(world: World, folder: Path) -> None:
    """Two checkpoints that differ in known places, and one that has another tensor."""
    config = bodies.run_config()
    other = replace(config, run=replace(config.run, seed=config.run.seed + 1))
    tensors = make_tensors(world, 1)
    store.save(folder / "a", tensors, state_of(1), to_toml(config), world, keep=9)
    store.save(folder / "same", tensors, state_of(1), to_toml(config), world, keep=9)
    tensors["model"]["alpha"] += 0.25
    if world.rank == 1:
        tensors["model"]["w"].to_local()[-1] = 1000.0
    store.save(folder / "b", tensors, state_of(2), to_toml(other), world, keep=9)
    tensors = {"model": {"alpha": torch.ones(2), "beta": torch.ones(1)}}
    store.save(folder / "c", tensors, state_of(1), to_toml(config), world, keep=9)


def die_while_saving(folder: Path) -> None:
    """In a process of its own: a checkpoint, then one whose first bytes are written when the process is killed."""
    world = process.start()
    saver = Saver(folder, world, CheckpointSection(), _silent)
    saver.save(make_tensors(world, 1), state_of(1), "")
    saver.join()
    write = files._HashingFile.write

    def write_and_hang(self: Any, data: Any) -> int:
        written = write(self, data)
        self.flush()
        print("writing", flush=True)
        threading.Event().wait()
        return written

    with mock.patch.object(files._HashingFile, "write", write_and_hang):
        saver.save(make_tensors(world, 2), state_of(2), "")
        print("training", flush=True)
        threading.Event().wait()
