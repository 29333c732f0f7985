"""Tensors of others' files into the parameters and moments of a run, however the ranks share them.

Each rank reads the parts that it holds from memory-mapped files, one file at a time, so none ever holds more than one
part beside its own. torch.distributed.checkpoint's HuggingFaceStorageReader would do for matrices, but it takes every
.safetensors file of the folder, whatever the index says, and refuses a scalar of shape () for one of shape (1,).
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from titan_yulan.checkpoint.hugging_face import EMBEDDING, HEAD, HuggingFaceFolder, StoredTensor
from titan_yulan.errors import RunError
from titan_yulan.model.sharding import local
from titan_yulan.parallel.parallelize import part_of

# Reads this rank's part of a stored tensor, for one that is laid out as the second.
Read = Callable[[StoredTensor, Tensor], Tensor]


@torch.no_grad()
def load_hugging_face(
    folder: HuggingFaceFolder, parameters: Mapping[str, Tensor], group: dist.ProcessGroup | None = None
) -> None:
    """Fill every parameter in place, in its own type; all ranks together.

    Args:
        folder: one whose tensors are this model's (`check_tensors`).
        parameters: the decoder's by name, plain or DTensors (`Learner.tensors()["model"]`).
        group: of all ranks, for their agreement about failures; None: this process is alone.

    Raises:
        RunError: on every rank, if any could not read its parts, or a tied model's head is not its embedding.
    """

    def fill() -> str | None:
        fill_tensors((folder.tensors[name], parameter) for name, parameter in parameters.items())
        return _why_not_tied(folder, parameters)

    together(folder.path, fill, group)


def together(path: Path, action: Callable[[], str | None], group: dist.ProcessGroup | None) -> None:
    """Read files below `path`; if that fails on a rank, it fails on all. `action` may return a reason itself.

    Raises:
        RunError: on every rank alike, with the first reason.
    """
    try:
        failure = action()
    except (OSError, pickle.UnpicklingError, RuntimeError) as error:  # torch's reader of archives has none of its own
        failure = str(error).partition("\n")[0]
    failures = [failure]
    if group is not None:
        failures = [None] * dist.get_world_size(group)
        dist.all_gather_object(failures, failure, group=group)
    if reason := next((reason for reason in failures if reason), None):
        raise RunError(f"{path} cannot be loaded: {reason}")


def fill_tensors(pairs: Iterable[tuple[StoredTensor, Tensor]]) -> None:
    """Copy this rank's part of each stored tensor into its tensor, file by file."""
    by_file: dict[Path, list[tuple[StoredTensor, Tensor]]] = {}
    for stored, tensor in pairs:
        if local(tensor).numel():
            by_file.setdefault(stored.file, []).append((stored, tensor))
    for file, members in sorted(by_file.items()):
        with opened(file) as read:
            for stored, tensor in members:
                local(tensor).copy_(read(stored, tensor))


def _why_not_tied(folder: HuggingFaceFolder, parameters: Mapping[str, Tensor]) -> str | None:
    embedding = parameters[EMBEDDING]
    if HEAD in parameters or HEAD not in folder.tensors or not local(embedding).numel():
        return None
    with opened(folder.tensors[HEAD].file) as read:
        head = read(folder.tensors[HEAD], embedding).to(local(embedding))
    if torch.equal(head, local(embedding)):
        return None
    return f"model.tie_word_embeddings is true, and its {HEAD} is not {EMBEDDING}; set that key to false"


@contextmanager
def opened(file: Path) -> Iterator[Read]:
    """A file of tensors, mapped into memory while it is open; of `torch.save`, only tensors and plain values."""
    if file.suffix == ".safetensors":
        with _opened_safetensors(file) as read:
            yield read
        return
    content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)

    def read_view(stored: StoredTensor, layout: Tensor) -> Tensor:
        whole = content[stored.key] if stored.key else content
        return whole.reshape(layout.shape)[_region(layout)]  # a view: scalars have no dimension, others may be flat

    yield read_view


@contextmanager
def _opened_safetensors(file: Path) -> Iterator[Read]:
    from safetensors import SafetensorError, safe_open  # as in `hugging_face.py`

    try:
        with safe_open(file, framework="pt") as content:

            def read(stored: StoredTensor, layout: Tensor) -> Tensor:
                if not stored.shape:
                    return content.get_tensor(stored.key)[None]
                return content.get_slice(stored.key)[_region(layout)]

            yield read
    except SafetensorError as error:
        raise OSError(str(error)) from error


def _region(layout: Tensor) -> tuple[slice, ...]:
    """Which part of the whole tensor this rank holds, not empty."""
    if not isinstance(layout, DTensor):
        return (slice(None),) * layout.ndim
    slices = []
    for dim, size in enumerate(layout.shape):
        shape = [1] * layout.ndim
        shape[dim] = size
        places = part_of(torch.arange(size).view(shape).expand(layout.shape), layout)  # a view: nothing of that size
        first = int(places[(0,) * layout.ndim])
        slices.append(slice(first, first + places.shape[dim]))
    return tuple(slices)
