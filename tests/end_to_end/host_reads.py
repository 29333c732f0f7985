"""Counts where the host asks for a value of a tensor, which on a GPU makes it wait for the device.

Two of PyTorch's modes see every call in this thread, backward pass included:

    TorchDispatchMode  operators whose result or its shape depends on data (PyTorch tags them so): item, nonzero, equal,
                       masked_select, indexing with a mask, ...
    TorchFunctionMode  what leaves PyTorch without an operator (tolist, numpy, cpu), and what brings numbers of the
                       host in (torch.tensor), for which a GPU waits unless the memory is pinned

Nothing on a CPU tells tensors of the host's own from those that would be on the device. So each read carries the line
of the package that asked, and a test names the places that only ever read the host's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import titan_yulan

_PACKAGE = str(Path(next(iter(titan_yulan.__path__))))
_DATA_DEPENDENT = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
# `item` and the conversions of one element arrive as the operator `_local_scalar_dense`
_LEAVE = {"tolist", "numpy", "cpu", "cuda", "__array__", "pin_memory"}
_ENTER = {"tensor", "as_tensor", "from_numpy", "asarray"}


class Read(NamedTuple):
    """What was called, by which function of the package, in which step."""

    what: str
    place: str
    step: int


class HostReads:
    """Within `with`, every read is noted in `found`."""

    def __init__(self, step: Callable[[], int]) -> None:
        self.found: list[Read] = []
        self._modes = (_Functions(self._note), _Operators(self._note))
        self._step = step

    def _note(self, what: str) -> None:
        frame = sys._getframe(2)
        while frame is not None and not frame.f_code.co_filename.startswith(_PACKAGE):
            frame = frame.f_back
        place = ""
        if frame is not None:
            file = Path(frame.f_code.co_filename).relative_to(_PACKAGE).as_posix()
            place = f"{file}:{frame.f_code.co_name}"
        self.found.append(Read(what, place, self._step()))

    def __enter__(self) -> HostReads:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)


class _Operators(TorchDispatchMode):
    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__()
        self._note = note

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _DATA_DEPENDENT & set(func.tags) and not _has_static_shape(func, args):
            self._note(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def _has_static_shape(func: Any, args: Any) -> bool:
    """Indexing is tagged because of masks; with whole numbers its shape is known."""
    if func.overloadpacket not in (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_):
        return False
    return not any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])


class _Functions(TorchFunctionMode):
    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__()
        self._note = note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _LEAVE or name in _ENTER:
            self._note(name)
        return func(*args, **(kwargs or {}))
