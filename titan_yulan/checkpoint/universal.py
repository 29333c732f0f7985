"""A checkpoint of DeepSpeed in its universal layout as the start of a run: weights, Adam's moments, and how far it was.

    config.json                             the model, as in a Hugging Face folder
    trainer_state.json                      of Hugging Face's Trainer: global_step, epoch (may be missing; its
                                            global_step may be 0, to count anew)
    latest_universal                        the name of the next line's folder
    global_step243198_universal/zero/
        model.norm.weight/                  a folder for each parameter, under the decoder's own names
            fp32.pt                         the master weight
            exp_avg.pt, exp_avg_sq.pt       Adam's moments
            step.pt                         Adam's step (may be missing: then it is that of the folder's name)
        ...

The layout is DeepSpeed's (Lian et al., arXiv 2406.18820; `ds_to_universal.py` writes it), and
huggingface.co/yulan-team/YuLan-Mini-Before-Annealing is published in it. A file of `torch.save` holds a tensor, or a
dictionary with it under "param"; ZeRO-3 leaves it flat. No torch here; `universal_state.py` reads the tensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from titan_yulan.checkpoint.hugging_face import (
    CONFIG,
    HuggingFaceFolder,
    StoredTensor,
    check_hugging_face,
    check_tensors,
    check_types,
    parameter_shapes,
    read_json,
    read_model,
)
from titan_yulan.checkpoint.pickled import PickledTensor, read_pickle
from titan_yulan.config.sections import RunConfig
from titan_yulan.curriculum.position import Position
from titan_yulan.errors import UserError

LATEST = "latest_universal"
_TENSORS = "zero"
TRAINER = "trainer_state.json"
WEIGHT, MOMENTS, STEP = "fp32", ("exp_avg", "exp_avg_sq"), "step"
_WRAPPED = "param"  # the key of the tensor, where a file holds a dictionary


@dataclass(frozen=True)
class Progress:
    """How far a state was trained.

    step: that the run is to begin at, zero where trainer_state.json was made to say so.
    trained: steps that the state has behind it.
    tokens: trained on, as its trainer counted them; None: it did not.
    epoch: as Hugging Face's Trainer counts; YuLan-Mini's counts its curriculum's phases so.
    phase_began: step at which its phase began, in YuLan-Mini's config.json.
    """

    step: int
    trained: int
    tokens: int | None = None
    epoch: float | None = None
    phase_began: int | None = None

    def position(self, config: RunConfig) -> Position:
        """Where a run of `config` begins from here. Rows, and tokens where they are not known, are counted as if every
        step before had been one of the first phase's batches: nothing but the count of rows itself depends on them."""
        first = config.phases[0]
        rows = self.step * first.batch.rows(first.sequence_length)
        tokens = rows * first.sequence_length if self.tokens is None else self.tokens
        return Position(self.step, rows, tokens)


@dataclass(frozen=True)
class UniversalFolder:
    """Weights and the state of their optimizer, of DeepSpeed or exported by us; `steps` are the files of Adam's steps,
    by parameter, for those that have their own."""

    path: Path
    weights: HuggingFaceFolder
    moments: Mapping[str, HuggingFaceFolder]
    steps: Mapping[str, Path]
    progress: Progress


def is_universal(path: str | Path) -> bool:
    """Whether a folder is one of these: it has a file `latest_universal`, or is itself what that would name."""
    return path != "" and ((Path(path) / LATEST).is_file() or (Path(path) / _TENSORS).is_dir())


def read_progress(path: str | Path) -> Progress:
    """How far the state in a folder was trained: global_step of trainer_state.json, else of the folder's name.

    YuLan-Mini's tutorial has its readers set the counters of trainer_state.json to zero, to begin a schedule of their
    own: then the run counts from zero, and only Adam goes on counting.

    Raises:
        UserError: the two differ in another way, or neither says it.
    """
    root, states = _places(Path(path))
    found = re.search(r"global_step(\d+)", states.name)
    named = int(found[1]) if found else None
    trainer = read_json(root / TRAINER) if (root / TRAINER).is_file() else {}
    step = trainer.get("global_step", named)
    if not isinstance(step, int) or step < 0 or (named is not None and step not in (0, named)):
        raise UserError(
            f"{root / TRAINER} says global_step {trainer.get('global_step')}, and the states are in {states}: take "
            "files of one step, or write into that file which step it is"
        )
    config = read_json(root / CONFIG) if (root / CONFIG).is_file() else {}
    return Progress(
        step,
        trained=step if named is None else named,
        tokens=trainer.get("num_input_tokens_seen") or None,
        epoch=trainer.get("epoch"),
        phase_began=config.get("num_steps_trained_before_this_epoch"),
    )


def _places(path: Path) -> tuple[Path, Path]:
    """The folder of config.json, and that of the states."""
    if not (path / LATEST).is_file():
        return path.resolve().parent, path
    name = (path / LATEST).read_text(encoding="utf-8").strip()
    if not name or Path(name).name != name or not (path / name / _TENSORS).is_dir():
        raise UserError(
            f"{path / LATEST} names {name!r}, and {path / name / _TENSORS} is not there. Finish the download; or begin "
            f"from the weights alone, in a folder without {LATEST}"
        )
    return path, path / name


def open_universal(path: str | Path) -> UniversalFolder:
    """Read config.json, the counters, and what every file of a tensor holds.

    Raises:
        UserError: the model is not supported, or a file is missing, damaged, or holds something else than a tensor.
    """
    root, states = _places(Path(path))
    model = read_model(root / CONFIG)
    shapes = parameter_shapes(model)
    folders = sorted(folder for folder in (states / _TENSORS).iterdir() if folder.is_dir())

    def read(kind: str) -> HuggingFaceFolder:
        files = {folder.name: folder / f"{kind}.pt" for folder in folders}
        found = {name: _read_header(file, shapes.get(name)) for name, file in files.items() if file.is_file()}
        check_types(states / _TENSORS / "*" / f"{kind}.pt", found)
        return HuggingFaceFolder(root if kind == WEIGHT else states / _TENSORS / "*" / f"{kind}.pt", model, found)

    steps = {folder.name: folder / f"{STEP}.pt" for folder in folders if (folder / f"{STEP}.pt").is_file()}
    for file in steps.values():
        read_pickle(file)
    moments = {kind: read(kind) for kind in MOMENTS}
    return UniversalFolder(Path(path), read(WEIGHT), moments, steps, read_progress(path))


def _read_header(file: Path, shape: tuple[int, ...] | None) -> StoredTensor:
    """`shape`: the parameter's, which a flat tensor of as many elements stands for."""
    content = read_pickle(file)
    key = _WRAPPED if isinstance(content, dict) else ""
    tensor: Any = content.get(key) if isinstance(content, dict) else content
    if not isinstance(tensor, PickledTensor):
        raise UserError(
            f"{file} holds neither a tensor nor a dictionary with one under {_WRAPPED!r}; take the "
            "files that DeepSpeed's ds_to_universal.py wrote"
        )
    stored = StoredTensor(file, tensor.shape, tensor.dtype, key)
    if shape is not None and stored.shape == (math.prod(shape),):
        return replace(stored, shape=shape)
    return stored


def check_universal(config: RunConfig, folder: UniversalFolder, allow_changes: Collection[str] = ()) -> list[str]:
    """The state must be of the very model of `[model]`: weights and both moments of every parameter.

    Returns:
        Lines to print.

    Raises:
        UserError: listing every difference.
    """
    notices = check_hugging_face(config, folder.weights, allow_changes)
    for moment in folder.moments.values():
        check_tensors(moment, folder.weights.model)
    return notices
