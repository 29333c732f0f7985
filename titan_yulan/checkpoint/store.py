"""Save and load the tensors of a run with torch.distributed.checkpoint, under our own commit protocol."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter

from titan_yulan.checkpoint import layout
from titan_yulan.checkpoint.layout import Checkpoint, TrainerState
from titan_yulan.errors import RunError, explain_os_error
from titan_yulan.parallel.process import World


class _HashingFile(io.RawIOBase):
    """Passes writes on to a file and hashes them on the way. Only appends: a seek would make the hash wrong."""

    def __init__(self, file: io.IOBase, errors: list[OSError]) -> None:
        self._file, self._hash, self._size, self._errors = file, hashlib.sha256(), 0, errors

    def write(self, data: Any) -> int:
        self._hash.update(data)
        self._size += memoryview(data).nbytes
        try:
            return self._file.write(data)  # type: ignore[attr-defined]
        except OSError as error:
            self._errors.append(error)
            raise

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        self._file.flush()

    def fileno(self) -> int:
        return self._file.fileno()

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False

    def summary(self) -> dict:
        return {"size": self._size, "sha256": self._hash.hexdigest()}


class _HashingFileSystem(FileSystem):
    def __init__(self) -> None:
        super().__init__()
        self.files: dict[str, dict] = {}
        self.errors: list[OSError] = []  # torch.save hides them behind an error of its own

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[io.IOBase]:
        with super().create_stream(path, mode) as stream:
            if "w" not in mode:
                yield stream
                return
            hashing = _HashingFile(stream, self.errors)
            yield hashing
            self.files[Path(path).name] = hashing.summary()

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        super().rename(path, new_path)
        if (summary := self.files.pop(Path(path).name, None)) is not None:
            self.files[Path(new_path).name] = summary


class _HashingWriter(FileSystemWriter):
    def __init__(self, path: Path) -> None:
        super().__init__(path, sync_files=True)
        self.hashing = _HashingFileSystem()
        self.fs = self.hashing


def save(folder: Path, tensors: dict[str, Any], state: TrainerState, config_toml: str, world: World, keep: int) -> Path:
    """Write a checkpoint of `state.step`; on return it is complete and durable on all ranks' view of the disk.

    Args:
        folder: the run's `checkpoints` folder, the same file system for all ranks.
        tensors: nested dictionary of this rank's tensors (DTensors, or plain tensors that all ranks share).

    Raises:
        RunError: on every rank, if any rank could not write; the half-written folder is removed, nothing else is.
    """
    path = layout.step_folder(folder, state.step)
    if world.agree(int(world.is_main and not layout.find_damage(Checkpoint(path, state.step)))):
        return path  # saved before: same run, same step, same content
    error = _attempt(world, path, lambda: _prepare(path) if world.is_main else None)
    writer = _HashingWriter(path)
    if error is None:
        error = _attempt(world, path, lambda: _write(tensors, writer, world))
    if error is None:
        written: list[dict | None] = [None] * world.size
        dist.all_gather_object(written, writer.hashing.files, group=world.host)
        files = {name: summary for part in written if part for name, summary in part.items()}
        error = _attempt(world, path, lambda: layout.commit(path, files, state, config_toml) if world.is_main else None)
    if error is not None:
        if world.is_main and path.exists():
            shutil.rmtree(path, ignore_errors=True)
        raise RunError(f"the checkpoint of step {state.step} could not be written to {path}: {error}")
    if world.is_main:
        layout.prune(folder, keep, state.step)
    return path


def _prepare(path: Path) -> None:
    if path.exists():
        layout.remove(path)
    path.mkdir(parents=True)


def _write(tensors: dict[str, Any], writer: _HashingWriter, world: World) -> None:
    """DCP's save; it gathers the failures of all ranks and raises them on each, here only a rank's own is raised."""
    try:
        dcp.save(tensors, storage_writer=writer, process_group=world.host)
    except CheckpointException as error:
        if writer.hashing.errors:
            raise writer.hashing.errors[0] from error
        if world.rank in error.failures:
            raise


def _attempt(world: World, path: Path, action: Callable[[], Any]) -> str | None:
    """Run an action on every rank; the reason of a failure anywhere, on every rank."""
    reason = None
    try:
        action()
    except (Exception, CheckpointException) as error:  # the latter is a BaseException
        reason = explain(error, path)
    reasons: list[str | None] = [None] * world.size
    dist.all_gather_object(reasons, reason, group=world.host)
    return next((reason for reason in reasons if reason), None)


def explain(error: BaseException, path: Path) -> str:
    """One line about a failure to write or read `path`; DCP wraps the ranks' own exceptions."""
    failures = getattr(error, "failures", None)
    if failures:
        first = next(iter(failures.values()))
        error = first[0] if isinstance(first, tuple) else first
    if isinstance(error, OSError):
        return explain_os_error(error, path)
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def newest_good(folder: Path, world: World, report: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that is sound; None if there is no checkpoint at all.

    Damaged ones are reported by name, left where they are, and passed over; the choice is the same on all ranks.

    Raises:
        RunError: there are checkpoints, but none is sound.
    """
    listed: list[list[str]] = [[str(checkpoint.path) for checkpoint in layout.find_checkpoints(folder)]]
    dist.broadcast_object_list(listed, src=0, group=world.host)
    for name in reversed(listed[0]):
        checkpoint = Checkpoint(Path(name), int(Path(name).name.removeprefix("step-")))
        damage = find_damage_together(checkpoint, world)
        if not damage:
            return checkpoint
        report(f"WARNING: checkpoint {checkpoint.path} is damaged and passed over: {'; '.join(damage)}")
    if listed[0]:
        raise RunError(
            f"none of the {len(listed[0])} checkpoints in {folder} is sound (see the warnings above); bring a copy of "
            "one back, or delete the run folder to start anew"
        )
    return None


def find_damage_together(checkpoint: Checkpoint, world: World) -> list[str]:
    """`layout.find_damage` with the files shared out among the ranks; the same answer on all of them."""
    try:
        mine = sorted(checkpoint.manifest())[world.rank :: world.size]
        problems = layout.find_damage(checkpoint, mine)
    except RunError as error:
        problems = [str(error)]
    found: list[list[str]] = [[] for _ in range(world.size)]
    dist.all_gather_object(found, problems, group=world.host)
    return sorted({problem for part in found for problem in part})


def load(checkpoint: Checkpoint, tensors: dict[str, Any], process_group: dist.ProcessGroup | None = None) -> None:
    """Read a checkpoint into the given tensors, in place, whatever layout it was written with.

    Raises:
        RunError: a tensor is missing or has another shape.
    """
    for name, (expected, found) in _shape_differences(checkpoint, tensors).items():
        raise RunError(
            f"checkpoint {checkpoint.path} belongs to another model: {name} has shape {found} there and {expected} here"
        )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is meant
            dcp.load(
                tensors,
                storage_reader=FileSystemReader(checkpoint.path),
                process_group=process_group,
                no_dist=process_group is None,
            )
    except (Exception, CheckpointException) as error:  # the latter is a BaseException
        raise RunError(f"checkpoint {checkpoint.path} cannot be loaded: {explain(error, checkpoint.path)}") from error


def _shape_differences(checkpoint: Checkpoint, tensors: dict[str, Any]) -> dict[str, tuple[str, str]]:
    stored = FileSystemReader(checkpoint.path).read_metadata().state_dict_metadata
    differences = {}
    for section, content in tensors.items():
        for name, tensor in content.items():
            entry = stored.get(f"{section}.{name}")
            found = tuple(entry.size) if entry is not None and hasattr(entry, "size") else "missing"
            if isinstance(tensor, Tensor) and found != tuple(tensor.shape):
                differences[name] = (str(tuple(tensor.shape)), str(found))
        for key, entry in stored.items():
            if key.startswith(f"{section}.") and key.removeprefix(f"{section}.") not in content:
                differences[key.removeprefix(f"{section}.")] = ("missing", str(tuple(getattr(entry, "size", ()))))
    return differences
