"""The state of the optimizer in an exported folder, beside the weights of `--format yulan`:

    optimizer/exp_avg/, optimizer/exp_avg_sq/    Adam's moments in float32, each a folder like that of the weights
    optimizer/state.json                         the checkpoint's position, and how often Adam had updated

What reads DeepSpeed's states reads this (`universal_state.load_universal`): the next update is the same to the bit. No
torch here.
"""

from __future__ import annotations

from pathlib import Path

from titan_yulan.checkpoint.hugging_face import check_tensors, open_hugging_face, read_json
from titan_yulan.checkpoint.universal import MOMENTS, Progress, UniversalFolder
from titan_yulan.errors import UserError

FOLDER = "optimizer"
STATE = "state.json"
UPDATES = "optimizer_updates"


def has_state(path: str | Path) -> bool:
    """Whether a folder has the state of an optimizer in this format."""
    return path != "" and (Path(path) / FOLDER / STATE).is_file()


def read_exported_progress(path: str | Path) -> Progress:
    """How far the state in a folder was trained.

    Raises:
        UserError: state.json is damaged.
    """
    file = Path(path) / FOLDER / STATE
    values = read_json(file)
    step, token, updates = (values.get(key) for key in ("step", "token", UPDATES))
    if not isinstance(step, int) or not isinstance(token, int) or not isinstance(updates, int):
        raise UserError(f"{file} does not say step, token and {UPDATES}; export again")
    return Progress(step, trained=updates, tokens=token)


def open_exported_state(path: str | Path) -> UniversalFolder:
    """Weights, both moments and position of an exported folder.

    Raises:
        UserError: a file is missing or damaged, or the moments are not those of the weights.
    """
    path = Path(path)
    weights = open_hugging_face(path)
    moments = {kind: open_hugging_face(path / FOLDER / kind) for kind in MOMENTS}
    for moment in moments.values():
        check_tensors(moment, weights.model)
    return UniversalFolder(path, weights, moments, {}, read_exported_progress(path))
