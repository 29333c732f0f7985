"""What tensors a file of `torch.save` holds, without torch and without running what is in it.

Such a file is an uncompressed zip: a pickle `data.pkl` that describes the objects, and one record of bytes for each
storage. A pickle may name any function of Python to be called when it is read; this reader knows the few names that
tensors, dictionaries and numbers are made of, puts descriptions in the place of tensors, and refuses every other name
(what `torch.load(weights_only=True)` does too, with which the tensors themselves are read later).
"""

from __future__ import annotations

import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from titan_yulan.errors import UserError

_INDEX = "data.pkl"

# torch's classes of storages: the type's name as safetensors writes it, and bytes of an element.
_STORAGES = {
    "FloatStorage": ("F32", 4),
    "BFloat16Storage": ("BF16", 2),
    "HalfStorage": ("F16", 2),
    "DoubleStorage": ("F64", 8),
    "LongStorage": ("I64", 8),
    "IntStorage": ("I32", 4),
    "ShortStorage": ("I16", 2),
    "CharStorage": ("I8", 1),
    "ByteStorage": ("U8", 1),
    "BoolStorage": ("BOOL", 1),
}


@dataclass(frozen=True)
class PickledTensor:
    """A tensor of the file: its storage is the record `record`, its first element at byte `offset` of that."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str
    element_size: int
    record: str
    offset: int

    @property
    def reach(self) -> int:
        """Bytes of the storage up to the end of the last element."""
        if not math.prod(self.shape):
            return 0
        last = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return self.offset + (last + 1) * self.element_size


def read_pickle(file: Path) -> Any:
    """The object in a file of `torch.save`, with a `PickledTensor` for each tensor.

    Raises:
        UserError: the file is no such zip (cut off, or written by PyTorch before 1.6), lacks bytes of a tensor, or
            names something else than tensors and plain values.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            sizes = {entry.filename.partition("/")[2]: entry.file_size for entry in archive.infolist()}
            root = archive.namelist()[0].partition("/")[0] if sizes else ""
            with archive.open(f"{root}/{_INDEX}") as stream:
                return _Reader(stream, file, sizes).load()
    except UserError:
        raise
    except Exception as error:  # bytes that are no pickle of torch.save may end in any of them
        raise UserError(
            f"{file} is damaged, incomplete, or not of PyTorch 1.6 or newer ({error}); download or copy it again"
        ) from error


def content_is_zero(file: Path, tensor: PickledTensor) -> bool:
    """Whether all bytes of a small tensor are zero (of the part of its storage that it spans)."""
    with zipfile.ZipFile(file) as archive:
        root = archive.namelist()[0].partition("/")[0]
        return not any(archive.read(f"{root}/{tensor.record}")[tensor.offset : tensor.reach])


class _Reader(pickle.Unpickler):
    """Nothing that a pickle can name is reachable but the functions of `_names`, none of which does anything."""

    def __init__(self, stream: Any, file: Path, sizes: dict[str, int]) -> None:
        super().__init__(stream)
        self._file, self._sizes = file, sizes
        self._names: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch", "Size"): tuple,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
            **{("torch", name): description for name, description in _STORAGES.items()},
        }

    def find_class(self, module_name: str, global_name: str, /) -> Callable[..., Any]:
        return self._names.get((module_name, global_name)) or self._refuse(f"{module_name}.{global_name}")

    def _refuse(self, name: str) -> NoReturn:
        raise UserError(
            f"{self._file} is a pickle that calls {name}; files of tensors and plain values are read, nothing in them "
            "is run. Take weights from a source that you trust, if there are any as .safetensors"
        )

    def persistent_load(self, pid: Any, /) -> tuple[str, int, str]:
        kind, (dtype, element_size), key, *_ = pid
        if kind != "storage":
            raise ValueError(f"a reference to {kind!r}")
        return dtype, element_size, f"data/{key}"

    def _tensor(self, storage: tuple[str, int, str], offset: int, shape: Any, stride: Any, *_: Any) -> PickledTensor:
        dtype, element_size, record = storage
        tensor = PickledTensor(tuple(shape), tuple(stride), dtype, element_size, record, offset * element_size)
        if self._sizes.get(record, -1) < tensor.reach:
            raise ValueError(f"{record} has {self._sizes.get(record, 0)} bytes, its tensor {tensor.reach}")
        return tensor
