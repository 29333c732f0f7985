"""Tensors of a checkpoint into safetensors files: read in groups, multiplied and cast in parts, written as a stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from titan_yulan.checkpoint.fold import Target
from titan_yulan.checkpoint.layout import Checkpoint
from titan_yulan.checkpoint.read_parts import read_parts
from titan_yulan.checkpoint.safetensors_files import Layout, in_file_order, split_into_files, write_file, write_index
from titan_yulan.errors import UserError

# Values that are multiplied and cast at a time.
_PART = 2**22


@dataclass(frozen=True)
class TensorFiles:
    """What is to be written into one folder.

    section: of the checkpoint (`Learner.tensors`), in which the targets' sources are looked up.
    targets, layouts: by the name of the tensor to write.
    shard_size: largest size of one file in bytes; a tensor that is larger has a file of its own.
    """

    checkpoint: Checkpoint
    section: str
    targets: Mapping[str, Target]
    layouts: Mapping[str, Layout]
    folder: Path
    shard_size: int

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(layout.size for layout in self.layouts.values())

    def write(self, report: Callable[[str], None]) -> None:
        """Write the files and their index; a line for each.

        Raises:
            UserError: a value is beyond the range of its type.
            RunError: the checkpoint cannot be read.
            OSError: the disk is full, and the like.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        files = split_into_files(self.layouts, self.shard_size)
        for file, members in files.items():
            names = in_file_order(members, self.layouts)
            path = self.folder / file
            write_file(path, {name: self.layouts[name] for name in names}, self._values(names))
            report(f"{self.folder.name}/{file}: {len(names)} tensors, {path.stat().st_size / 1e6:,.1f} MB")
        write_index(self.folder, files, self.layouts)

    def _values(self, names: list[str]) -> Iterator[Tensor]:
        """The values of these targets in their order, cast, in parts."""
        sources = [source for name in names if (source := self.targets[name].source)]
        read = read_parts(self.checkpoint, sources, self.section)
        for name in names:
            target, dtype = self.targets[name], self.layouts[name].dtype
            if target.source is None:
                yield torch.zeros(target.shape, dtype=dtype)
                continue
            _, stored = next(read)
            for part in stored.view(-1).split(_PART):
                yield _cast(name, part, target, dtype)


def _cast(name: str, part: Tensor, target: Target, dtype: torch.dtype) -> Tensor:
    if target.factor != 1.0 or target.offset != 0.0:
        part = (part.double() + target.offset) * target.factor
    cast = part.to(dtype)
    if not torch.equal(cast.isfinite(), part.isfinite()):
        raise UserError(f"--dtype: {name} has values beyond the range of {dtype}; choose bfloat16 or float32")
    return cast
