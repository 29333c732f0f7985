"""`--config NAME`: which file is meant."""

from __future__ import annotations

import difflib
from pathlib import Path

from titan_yulan.errors import UserError


def find(name: str, root: Path) -> Path:
    """The configuration file that `name` means: an existing path, or a file name anywhere below root/train_configs.

    Raises:
        UserError: there is no such file (the nearest names are listed), or several (they are listed).
    """
    if Path(name).is_file():
        return Path(name)
    folder = Path(root) / "train_configs"
    files = sorted(folder.rglob("*.toml"))
    matches = [file for file in files if file.name == name]
    if len(matches) == 1:
        return matches[0]
    if matches:
        listed = ", ".join(str(file) for file in matches)
        raise UserError(f"--config {name}: {len(matches)} files have this name: {listed}; write the path of one")
    close = difflib.get_close_matches(Path(name).name, dict.fromkeys(file.name for file in files), 3, cutoff=0.5)
    nearest = f"did you mean {', '.join(close)}?" if close else f"files there: {len(files)}"
    raise UserError(f"--config {name}: no such file, here or below {folder}; {nearest}")
