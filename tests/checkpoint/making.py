"""Checkpoints without tensors, by the real commit."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from titan_yulan.checkpoint.layout import Checkpoint, TrainerState, commit, step_folder


def make_state(step: int, **changes: Any) -> TrainerState:
    values: dict[str, Any] = {
        "step": step,
        "row": 8 * step,
        "token": 128 * step,
        "phase": "a",
        "phase_finished": False,
        "tapes": {},
        "sources": {"code": "fingerprint of code", "math": "fingerprint of math"},
        "tokenizer": "fingerprint of the tokenizer",
        "versions": {},
        "origin": {"step": 0, "row": 0, "token": 0, "tapes": {}},
    }
    return TrainerState(**{**values, **changes})


def make_checkpoint(
    folder: Path, step: int, text: str = "[run]\n", state: TrainerState | None = None, **changes: Any
) -> Checkpoint:
    """A complete checkpoint with one file of 1000 bytes in the place of the tensors."""
    path = step_folder(folder, step)
    path.mkdir(parents=True)
    content = bytes(range(250)) * 4
    (path / "__0_0.distcp").write_bytes(content)
    files = {"__0_0.distcp": {"size": 1000, "sha256": hashlib.sha256(content).hexdigest()}}
    commit(path, files, state or make_state(step, **changes), text)
    return Checkpoint(path, step)
