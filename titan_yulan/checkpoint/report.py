"""`titan-yulan checkpoint list|verify`."""

from __future__ import annotations

from pathlib import Path

from titan_yulan.checkpoint.layout import MANIFEST, Checkpoint, find_checkpoints, find_damage, open_checkpoint
from titan_yulan.errors import RunError


def _checkpoints(folder: Path) -> list[Checkpoint]:
    if (folder / MANIFEST).is_file():
        return [open_checkpoint(folder)]
    return find_checkpoints(folder / "checkpoints") or find_checkpoints(folder) or [open_checkpoint(folder)]


def list_checkpoints(folder: Path) -> list[str]:
    """A line per complete checkpoint of a run, oldest first.

    Raises:
        RunError: there is none.
    """
    lines = [f"{'step':>10} {'tokens':>16} {'GiB':>8}  phase"]
    for checkpoint in _checkpoints(folder):
        try:
            state = checkpoint.state()
            size = sum(entry["size"] for entry in checkpoint.manifest().values()) / 2**30
        except RunError as error:
            lines.append(f"{checkpoint.step:>10} damaged: {error}")
            continue
        finished = " (end of phase)" if state.phase_finished else ""
        lines.append(f"{state.step:>10} {state.token:>16,} {size:>8.3f}  {state.phase}{finished}")
    return lines


def verify_checkpoints(folder: Path) -> tuple[list[str], bool]:
    """A line per checkpoint, with every missing, short or altered file; and whether all are sound.

    Raises:
        RunError: there is no checkpoint.
    """
    lines, sound = [], True
    for checkpoint in _checkpoints(folder):
        damage = find_damage(checkpoint)
        sound = sound and not damage
        lines.append(f"{checkpoint.path}: {'; '.join(damage) if damage else 'sound'}")
    return lines, sound
