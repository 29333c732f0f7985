"""Save and load the tensors of a run with torch.distributed.checkpoint, under our own commit protocol."""

from __future__ import annotations

import errno
import os
import pickle
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from titan_yulan.checkpoint import layout
from titan_yulan.checkpoint.files import CheckedReader, HashingWriter
from titan_yulan.checkpoint.layout import Checkpoint, TrainerState
from titan_yulan.errors import RunError, explain_os_error
from titan_yulan.parallel.process import World

# What a disk or a network says that may be well a moment later, or on another node.
_PASSING = {errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EINTR, errno.ENOMEM, errno.EMFILE, errno.ENFILE}


def save(
    folder: Path,
    tensors: dict[str, Any],
    state: TrainerState,
    config_toml: str,
    world: World,
    keep: int,
    losses: Mapping[int, float] | None = None,
) -> Path:
    """Write a checkpoint of `state.step`; on return it is complete and durable on all ranks' view of the disk.

    Args:
        folder: the run's `checkpoints` folder, the same file system for all ranks.
        tensors: nested dictionary of this rank's tensors (DTensors, or plain tensors that all ranks share).
        keep, losses: see `layout.prune`; the main rank's `losses` count.

    Raises:
        RunError: on every rank, if any rank could not write; the half-written folder is removed, nothing else is.
    """
    path = layout.step_folder(folder, state.step)
    if _is_saved(path, state, world):
        return path
    error = _attempt(world, path, lambda: _prepare(path) if world.is_main else None)
    writer = HashingWriter(path)
    if error is None:
        error = _attempt(world, path, lambda: _write(tensors, writer, world))
    if error is None:
        written: list[dict | None] = [None] * world.size
        dist.all_gather_object(written, writer.hashing.files, group=world.host)
        files = {name: summary for part in written if part for name, summary in part.items()}
        error = _attempt(world, path, lambda: layout.commit(path, files, state, config_toml) if world.is_main else None)
    if error is not None:
        _attempt(world, path, lambda: layout.remove(path) if world.is_main else None)
        raise RunError(f"the checkpoint of step {state.step} could not be written to {path}: {error}")
    error = _attempt(world, folder, lambda: layout.prune(folder, keep, state.step, losses) if world.is_main else None)
    if error is not None:
        raise RunError(f"{path} was written, but the checkpoints before it could not be deleted: {error}")
    return path


def _is_saved(path: Path, state: TrainerState, world: World) -> bool:
    """Whether a sound checkpoint of the same rows is there, to all ranks alike; skipped rows make another one of the
    same step."""
    checkpoint = Checkpoint(path, state.step)
    # rank 0 looks, in a way that never raises: what its own disk says must not keep it from the others
    if not world.agree(int(world.is_main and os.path.isfile(path / layout.MANIFEST))):
        return False
    if find_damage_together(checkpoint, world):
        return False
    try:
        same = replace(checkpoint.state(), versions=state.versions) == state
    except RunError:
        same = False
    return bool(world.agree(int(world.is_main and same)))


def _prepare(path: Path) -> None:
    """An own folder for the save. What cannot be removed from it, such as a file that is still open on NFS, may stay:
    without a manifest it is no checkpoint, and the new one names its files."""
    if path.exists():
        layout.remove(path)
    path.mkdir(parents=True, exist_ok=True)


def _write(tensors: dict[str, Any], writer: HashingWriter, world: World) -> None:
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
    """One line about a failure to write `path`; DCP wraps the ranks' own exceptions."""
    failures = getattr(error, "failures", None)
    if failures:
        first = next(iter(failures.values()))
        error = first[0] if isinstance(first, tuple) else first
    if isinstance(error, OSError):
        return explain_os_error(error, path)
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def newest_good(folder: Path, world: World, report: Callable[[str], None], verify: str = "full") -> Checkpoint | None:
    """The newest checkpoint that is sound; None if there is no checkpoint at all.

    Damaged ones are reported by name, left where they are, and passed over; the choice is the same on all ranks.

    Args:
        verify: `[checkpoint] verify`: "full", "sample" or "size" (`layout.hashed_files`).

    Raises:
        RunError: there are checkpoints, but none is sound.
    """
    listed: list[list[str]] = [[str(checkpoint.path) for checkpoint in layout.find_checkpoints(folder)]]
    dist.broadcast_object_list(listed, src=0, group=world.host)
    for name in reversed(listed[0]):
        checkpoint = Checkpoint(Path(name), int(Path(name).name.removeprefix("step-")))
        damage = find_damage_together(checkpoint, world, verify)
        if not damage:
            return checkpoint
        report(f"WARNING: checkpoint {checkpoint.path} is damaged and passed over: {'; '.join(damage)}")
    if listed[0]:
        raise RunError(
            f"none of the {len(listed[0])} checkpoints in {folder} is sound (see the warnings above); bring a copy of "
            "one back, or delete the run folder to start anew"
        )
    return None


def find_damage_together(checkpoint: Checkpoint, world: World, verify: str = "full") -> list[str]:
    """`layout.find_damage` with the files shared out among the ranks; the same answer on all of them."""
    try:
        hashed = layout.hashed_files(checkpoint, verify)
        # the files that take long come first, so that each rank has its share of them
        names = sorted(checkpoint.manifest(), key=lambda name: (name not in hashed, name))
        problems = layout.find_damage(checkpoint, names[world.rank :: world.size], hashed)
    except RunError as error:
        problems = [str(error)]
    found: list[list[str]] = [[] for _ in range(world.size)]
    dist.all_gather_object(found, problems, group=world.host)
    return sorted({problem for part in found for problem in part})


def load(checkpoint: Checkpoint, tensors: dict[str, Any], process_group: dist.ProcessGroup | None = None) -> None:
    """Read a checkpoint into the given tensors, in place, whatever layout it was written with.

    Raises:
        RunError: a tensor is missing or has another shape, or the index is damaged.
    """
    for name, (expected, found) in _shape_differences(checkpoint, tensors).items():
        raise RunError(
            f"checkpoint {checkpoint.path} belongs to another model: {name} has shape {found} there and {expected} here"
        )
    read_tensors(checkpoint, tensors, process_group)


def read_tensors(
    checkpoint: Checkpoint, tensors: dict[str, Any], process_group: dist.ProcessGroup | None = None
) -> None:
    """Fill the given tensors, whose names and shapes are known to be there; without a group: in this process alone.

    Raises:
        RunError: a file says that it cannot be read, here or (of a group) on another rank. Anything else, such as the
            loss of a peer, is a crash, which a restart may mend.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is meant
            dcp.load(
                tensors,
                storage_reader=CheckedReader(checkpoint),
                process_group=process_group,
                no_dist=process_group is None,
            )
    except (Exception, CheckpointException) as error:  # the latter is a BaseException
        reason = why_unreadable(error)
        if reason is None:
            raise
        raise RunError(f"checkpoint {checkpoint.path} cannot be loaded: {reason}") from error


def why_unreadable(error: BaseException) -> str | None:
    """What an error of loading says against the checkpoint's files, in a line; None if it says nothing of them.

    torch.distributed.checkpoint raises what failed on any rank in one exception on every rank, so all agree.
    """
    if isinstance(error, CheckpointException):
        reasons = (why_unreadable(failure) for failure, _ in error.failures.values())
        return next((reason for reason in reasons if reason is not None), None)
    if isinstance(error, OSError):
        speaks = not isinstance(error, (ConnectionError, TimeoutError)) and error.errno not in _PASSING
    else:
        # torch's reader of archives has no exception of its own
        speaks = isinstance(error, (RunError, ValueError, EOFError, pickle.UnpicklingError)) or (
            isinstance(error, RuntimeError) and "PytorchStreamReader" in str(error)
        )
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}" if speaks else None


def read_index(checkpoint: Checkpoint) -> Metadata:
    """Where each tensor lies, and its shape.

    Raises:
        RunError: the file is missing, or not the one in the manifest.
        OSError: it could not be read this time.
    """
    try:
        return CheckedReader(checkpoint).read_metadata()
    except OSError as error:
        if why_unreadable(error) is None:
            raise
        raise RunError(f"{checkpoint.path / layout.INDEX} cannot be read ({error})") from error


def _shape_differences(checkpoint: Checkpoint, tensors: dict[str, Any]) -> dict[str, tuple[str, str]]:
    stored = read_index(checkpoint).state_dict_metadata
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
