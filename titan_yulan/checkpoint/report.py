"""`titan-yulan checkpoint list|verify|prune`."""

from __future__ import annotations

from pathlib import Path

from titan_yulan.checkpoint.layout import (
    MANIFEST,
    STATE,
    Checkpoint,
    find_checkpoints,
    find_damage,
    open_checkpoint,
    remove,
)
from titan_yulan.errors import RunError, UserError


def checkpoints_of(folder: Path) -> list[Checkpoint]:
    """A checkpoint folder's one, or all complete ones of a run folder, oldest first.

    Raises:
        RunError: there is none.
    """
    if (folder / MANIFEST).is_file():
        return [open_checkpoint(folder)]
    return find_checkpoints(folder / "checkpoints") or find_checkpoints(folder) or [open_checkpoint(folder)]


def list_checkpoints(folder: Path) -> list[str]:
    """A line per complete checkpoint of a run, oldest first.

    Raises:
        RunError: there is none.
    """
    lines = [f"{'step':>10} {'tokens':>16} {'GiB':>8}  phase"]
    for checkpoint in checkpoints_of(folder):
        try:
            state = checkpoint.state()
            size = sum(entry["size"] for entry in checkpoint.manifest().values()) / 2**30
        except RunError as error:
            lines.append(f"{checkpoint.step:>10} damaged: {error}")
            continue
        finished = " (end of phase)" if state.phase_finished else ""
        best = " (lowest validation loss)" if checkpoint.is_best else ""
        lines.append(f"{state.step:>10} {state.token:>16,} {size:>8.3f}  {state.phase}{finished}{best}")
    return lines


def verify_checkpoints(folder: Path) -> tuple[list[str], bool]:
    """A line per checkpoint, with every missing, short or altered file; and whether all are sound.

    Raises:
        RunError: there is no checkpoint.
    """
    lines, sound = [], True
    for checkpoint in checkpoints_of(folder):
        damage = find_damage(checkpoint)
        sound = sound and not damage
        lines.append(f"{checkpoint.path}: {'; '.join(damage) if damage else 'sound'}")
    return lines, sound


def prune_checkpoints(folder: Path, keep: int, delete: bool) -> list[str]:
    """Delete all but the newest `keep` sound checkpoints, the ends of phases, the best one and what is damaged; a line
    for each.

    Every byte of the newest ones is verified first, so that what stays can be loaded.

    Args:
        delete: False only says what would be deleted.

    Raises:
        UserError: `keep` is less than 1.
        RunError: there is no checkpoint.
    """
    if keep < 1:
        raise UserError(f"--keep {keep}: at least 1 checkpoint has to be kept")
    lines, sound = [], 0
    for checkpoint in reversed(checkpoints_of(folder)):
        damage = find_damage(checkpoint, None if sound < keep else [STATE])
        if damage:
            lines.append(f"{checkpoint.path}: kept, damaged: {'; '.join(damage)}")
        elif sound < keep:
            sound += 1
            lines.append(f"{checkpoint.path}: kept, sound")
        elif checkpoint.state().phase_finished:
            lines.append(f"{checkpoint.path}: kept, end of phase {checkpoint.state().phase!r}")
        elif checkpoint.is_best:
            lines.append(f"{checkpoint.path}: kept, lowest validation loss")
        else:
            lines.append(f"{checkpoint.path}: {'deleted' if delete else 'would be deleted'}")
            if delete:
                remove(checkpoint.path)
    return lines[::-1]
