"""The tensors of a universal checkpoint of DeepSpeed into a decoder and its AdamW, however the ranks share them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from titan_yulan.checkpoint.hugging_face_weights import fill_tensors, load_hugging_face, together
from titan_yulan.checkpoint.universal import UniversalFolder


@torch.no_grad()
def load_universal(
    folder: UniversalFolder,
    parameters: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    group: dist.ProcessGroup | None = None,
) -> None:
    """Fill every parameter, its moments and its step in place; all ranks together.

    DeepSpeed's Adam and torch's AdamW keep the same two averages, so the next update is the same.

    Args:
        folder: one whose tensors are this model's (`check_universal`).
        parameters, optimizer: `Learner.tensors()["model"]` and `["optimizer"]`.
        group: of all ranks; None: this process is alone.

    Raises:
        RunError: on every rank, if any could not read its parts.
    """
    load_hugging_face(folder.weights, parameters, group)

    def fill() -> None:
        for kind, moment in folder.moments.items():
            fill_tensors((moment.tensors[name], optimizer[f"{name}.{kind}"]) for name in parameters)
        for name in parameters:
            optimizer[f"{name}.step"].fill_(read_step(folder, name))

    together(folder.path, fill, group)


def read_step(folder: UniversalFolder, name: str) -> float:
    """Updates that Adam has made to a parameter: of its file, which holds a number, a tensor or a dictionary with one;
    else the steps that the state has behind it.

    Raises:
        OSError, RuntimeError, pickle.UnpicklingError: the file cannot be read.
    """
    if name not in folder.steps:
        return float(folder.progress.trained)
    return _number(folder.steps[name])


def _number(file: Path) -> float:
    content = torch.load(file, map_location="cpu", weights_only=True)
    value = content.get("param") if isinstance(content, dict) else content
    if isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1):
        return float(value)
    raise RuntimeError(f"{file} holds no number of steps; without that file, Adam's step is that of the folder's name")
