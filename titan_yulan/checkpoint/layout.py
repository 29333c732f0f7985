"""Checkpoints on disk: names, the manifest that makes one exist, verification, and what to keep. No torch.

    checkpoints/step-00001200/
        __0_0.distcp ...    tensors (torch.distributed.checkpoint), hashed while written
        .metadata           where each tensor lies (a pickle: read only after its hash was checked)
        state.json          position, tapes, fingerprints (`TrainerState`)
        config.toml         the resolved configuration
        manifest.json       size and SHA-256 of every other file, and a SHA-256 of that table; renamed into place last
    checkpoints/best        a symbolic link to the one with the lowest validation loss, with [checkpoint] keep_best

A folder without a manifest is not a checkpoint: it is a save that did not finish.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from titan_yulan.config.paths import refuse_address
from titan_yulan.errors import RunError, UserError

MANIFEST = "manifest.json"
INDEX = ".metadata"
STATE = "state.json"
CONFIG = "config.toml"
BEST = "best"

# Of so many files of tensors, verify = "sample" reads one.
_SAMPLED = 8
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class TrainerState:
    """Everything about a run's position that is not a tensor.

    phase: name of the phase that the last step belonged to; phase_finished: whether that step was its last one.
    tapes: where each source's tape stands, in tokens.
    sources, tokenizer: fingerprints of the data that the position refers to.
    origin: where the run's own first phase began (step, row, token, tapes); not zero after `[phase] start_from`.
    skipped: steps whose rows were read but not trained on, in order; a step that is in the future is left out then.
    ledger: what was read of every source up to this position (`curriculum.ledger`).
    mixture_history: the changes of the mix up to this position (`curriculum.adaptive.Adjustment.to_json`).
    """

    step: int
    row: int
    token: int
    phase: str
    phase_finished: bool
    tapes: dict[str, int]
    sources: dict[str, str]
    tokenizer: str
    versions: dict[str, str]
    origin: dict[str, Any]
    skipped: list[int] = field(default_factory=list)
    ledger: dict[str, dict[str, Any]] = field(default_factory=dict)
    mixture_history: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint folder (its manifest exists)."""

    path: Path
    step: int

    def manifest(self) -> dict[str, dict]:
        """`{file name: {"size": bytes, "sha256": hex}}`.

        Raises:
            RunError: the manifest is damaged.
        """
        try:
            return _parse_manifest((self.path / MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunError(f"{self.path / MANIFEST} cannot be read ({error})") from error

    def state(self) -> TrainerState:
        """The trainer's state at this checkpoint."""
        try:
            return TrainerState(**json.loads((self.path / STATE).read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise RunError(f"{self.path / STATE} cannot be read ({error})") from error

    @property
    def is_best(self) -> bool:
        """Whether the link `best` leads to it."""
        link = self.path.parent / BEST
        return link.is_symlink() and str(link.readlink()) == self.path.name


def _parse_manifest(text: str) -> dict[str, dict]:
    """The table of files in a manifest; one without a hash of its table was written by an older version.

    Raises:
        ValueError: it is not as it was written.
    """
    content = json.loads(text)
    files = content.get("files") if isinstance(content, dict) else None
    if not isinstance(files, dict):
        raise ValueError("it has no table of files")
    for name, entry in files.items():
        if Path(name).name != name or not _is_summary(entry):
            raise ValueError(f"its entry for {name!r} is damaged")
    if content.get("sha256", _hash_table(files)) != _hash_table(files):
        raise ValueError("it is damaged: its SHA-256 differs from that of its table")
    return files


def _is_summary(entry: Any) -> bool:
    if not isinstance(entry, dict) or entry.keys() != {"size", "sha256"}:
        return False
    size, digest = entry["size"], entry["sha256"]
    return type(size) is int and size >= 0 and isinstance(digest, str) and bool(_SHA256.fullmatch(digest))


def _hash_table(files: dict[str, dict]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies; `folder`: a run's `checkpoints`."""
    return folder / f"step-{step:08d}"


def find_checkpoints(folder: Path) -> list[Checkpoint]:
    """Complete checkpoints of a run, oldest first."""
    found = [
        Checkpoint(path, int(path.name.removeprefix("step-")))
        for path in folder.glob("step-*")
        if path.name.removeprefix("step-").isdecimal() and (path / MANIFEST).is_file()
    ]
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in `path`: a step folder, the link `best`, or a run folder (then its newest).

    Raises:
        UserError: `path` is an address of an object store.
        RunError: there is no complete checkpoint.
    """
    if refusal := refuse_address(path):
        raise UserError(f"{path}: {refusal}")
    path = path.parent / path.readlink() if path.name == BEST and path.is_symlink() else path
    if (path / MANIFEST).is_file() and path.name.startswith("step-"):
        return Checkpoint(path, int(path.name.removeprefix("step-")))
    for folder in (path, path / "checkpoints"):
        if found := find_checkpoints(folder):
            return found[-1]
    raise RunError(f"{path} holds no complete checkpoint (a folder step-NNNNNNNN with a {MANIFEST})")


def hash_file(path: Path) -> str:
    """SHA-256 of a file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_damage(
    checkpoint: Checkpoint, names: Iterable[str] | None = None, hashed: Collection[str] | None = None
) -> list[str]:
    """What is wrong with a checkpoint's files: one line each, empty if all is well.

    Args:
        names: the files to look at; None: all.
        hashed: those of them whose every byte is compared, not the size alone; None: all.
    """
    try:
        files = checkpoint.manifest()
    except RunError as error:
        return [str(error)]
    checked = [
        _find_file_damage(checkpoint.path / name, files.get(name), hashed is None or name in hashed)
        for name in (files if names is None else names)
    ]
    return [problem for problem in checked if problem]


def _find_file_damage(path: Path, expected: dict | None, hashed: bool) -> str | None:
    try:
        if expected is None:
            return f"{path} is not in the manifest"
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != expected["size"]:
            return f"{path} has {path.stat().st_size} bytes instead of {expected['size']}"
        if hashed and hash_file(path) != expected["sha256"]:
            return f"{path} is damaged (its SHA-256 differs from the manifest's)"
    except OSError as error:
        return f"{path} cannot be read ({error})"
    return None


def hashed_files(checkpoint: Checkpoint, verify: str) -> set[str]:
    """The files whose every byte `[checkpoint] verify` compares; the same ones on every rank and at every start.

    "full": all; "sample": one in eight, drawn by a hash of the checkpoint's name and theirs; "size": none. The index,
    the state and the configuration are always among them: they steer all reading, and the index is a pickle.

    Raises:
        RunError: the manifest is damaged.
    """
    names = set(checkpoint.manifest())
    steering = names & {INDEX, STATE, CONFIG}
    if verify == "full":
        return names
    if verify == "size":
        return steering
    drawn = sorted(
        names - steering, key=lambda name: hashlib.sha256(f"{checkpoint.path.name}/{name}".encode()).digest()
    )
    return steering | set(drawn[: math.ceil(len(drawn) / _SAMPLED)])


def newest_readable(folder: Path, report: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint whose state and configuration are sound, for those who need no tensors."""
    for checkpoint in reversed(find_checkpoints(folder)):
        damage = find_damage(checkpoint, [STATE, CONFIG])
        if not damage:
            return checkpoint
        report(f"WARNING: checkpoint {checkpoint.path} is damaged and passed over: {'; '.join(damage)}")
    return None


def commit(path: Path, files: dict[str, dict], state: TrainerState, config_toml: str) -> None:
    """Write the small files, check all sizes, and make the checkpoint exist by renaming its manifest into place.

    Args:
        path: the folder that the tensors were written into.
        files: size and hash of every file written so far.

    Raises:
        RunError: a file is not as long as what was written.
        OSError: the disk is full, and the like.
    """
    for name, text in ((STATE, json.dumps(asdict(state), indent=2)), (CONFIG, config_toml)):
        _write_durably(path / name, text)
        files[name] = {"size": len(text.encode()), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    for name, expected in files.items():
        size = (path / name).stat().st_size
        if size != expected["size"]:
            raise RunError(f"{path / name} has {size} bytes after writing {expected['size']}; is the disk full?")
    temporary = path / (MANIFEST + ".tmp")
    manifest = {"format": 1, "sha256": _hash_table(files), "files": dict(sorted(files.items()))}
    _write_durably(temporary, json.dumps(manifest, indent=2))
    temporary.rename(path / MANIFEST)
    for folder in (path, path.parent):
        sync_folder(folder)


def _write_durably(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Make new names and renames in a folder survive a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Delete a checkpoint so that it is never seen half-deleted: its manifest goes first."""
    (path / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)  # what is left over is no checkpoint, and is removed at the next start


def remove_leftovers(folder: Path) -> list[Path]:
    """Delete step folders without a manifest (saves that did not finish); returns what was deleted."""
    leftovers = [path for path in folder.glob("step-*") if path.is_dir() and not (path / MANIFEST).is_file()]
    for path in leftovers:
        shutil.rmtree(path, ignore_errors=True)
    return leftovers


def best_checkpoint(folder: Path, losses: Mapping[int, float], step: int) -> Checkpoint | None:
    """The complete checkpoint up to `step` with the lowest loss, the first of equals; None if none has one.

    Args:
        losses: step -> validation loss.
    """
    measured = [
        checkpoint
        for checkpoint in find_checkpoints(folder)
        if checkpoint.step <= step and checkpoint.step in losses and not find_damage(checkpoint, [STATE])
    ]
    return min(measured, key=lambda checkpoint: losses[checkpoint.step], default=None)


def point_at_best(folder: Path, best: Checkpoint | None) -> None:
    """Let the link `best` lead to a checkpoint of the folder, without a moment in which it leads nowhere; None: there
    is no such link."""
    link = folder / BEST
    if best is None:
        link.unlink(missing_ok=True)
    elif not best.is_best:
        temporary = folder / f"{BEST}.tmp"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(best.path.name)
        temporary.replace(link)
        sync_folder(folder)


def prune(folder: Path, keep: int, step: int, losses: Mapping[int, float] | None = None) -> list[Path]:
    """Delete all but the newest `keep` checkpoints, every end of a phase and the best one, to which the link `best`
    leads before anything is deleted; returns what was deleted.

    Checkpoints of later steps than `step`, the run's own, are damaged ones that were passed over: they are left alone
    and do not count, else they would take the places of the sound ones.

    Args:
        losses: see `best_checkpoint`; None: there is no best one.
    """
    best = None if losses is None else best_checkpoint(folder, losses, step)
    point_at_best(folder, best)
    checkpoints = [checkpoint for checkpoint in find_checkpoints(folder) if checkpoint.step <= step]
    deleted = []
    for checkpoint in checkpoints[:-keep]:
        try:
            finished = checkpoint.state().phase_finished
        except RunError:
            continue  # damaged: left for inspection
        if not finished and checkpoint != best:
            remove(checkpoint.path)
            deleted.append(checkpoint.path)
    return deleted
