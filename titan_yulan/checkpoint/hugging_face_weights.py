"""The tensors of a Hugging Face folder into the parameters of a decoder, however the ranks share it.

Each rank reads the parts that it holds from the memory-mapped files, so none ever holds more than one part beside its
own. torch.distributed.checkpoint's HuggingFaceStorageReader would do for matrices, but it takes every .safetensors file
of the folder, whatever the index says, and refuses a scalar of shape () for a parameter of shape (1,).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from titan_yulan.checkpoint.hugging_face import EMBEDDING, HEAD, HuggingFaceFolder
from titan_yulan.errors import RunError
from titan_yulan.model.sharding import local
from titan_yulan.parallel.parallelize import part_of


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
    from safetensors import SafetensorError

    try:
        failure = _fill(folder, parameters)
    except (OSError, SafetensorError) as error:
        failure = str(error)
    failures = [failure]
    if group is not None:
        failures = [None] * dist.get_world_size(group)
        dist.all_gather_object(failures, failure, group=group)
    if reason := next((reason for reason in failures if reason), None):
        raise RunError(f"{folder.path} cannot be loaded: {reason}")


def _fill(folder: HuggingFaceFolder, parameters: Mapping[str, Tensor]) -> str | None:
    from safetensors import safe_open  # as in `hugging_face.py`

    with ExitStack() as files:
        opened = {
            file: files.enter_context(safe_open(file, framework="pt"))
            for file in sorted({tensor.file for tensor in folder.tensors.values()})
        }

        def read(name: str, layout: Tensor) -> Tensor:
            """This rank's part of a stored tensor, for a parameter laid out as `layout`."""
            stored = folder.tensors[name]
            if not stored.shape:
                return opened[stored.file].get_tensor(name)[None]
            return opened[stored.file].get_slice(name)[_region(layout)]

        for name, parameter in parameters.items():
            if local(parameter).numel():
                local(parameter).copy_(read(name, parameter))
        embedding = parameters[EMBEDDING]
        if HEAD in folder.tensors and HEAD not in parameters and local(embedding).numel():
            head = read(HEAD, embedding).to(local(embedding))
            if not torch.equal(head, local(embedding)):
                return f"model.tie_word_embeddings is true, and its {HEAD} is not {EMBEDDING}; set that key to false"
    return None


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
