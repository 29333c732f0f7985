"""One kernel with one launch configuration: what ahead-of-time compilation and the resource table are made of."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Variant:
    """A Triton kernel exactly as an operation's launcher starts it on a GPU at one model size.

    `kernel` is the `triton.JITFunction` (typed `Any`, so that this file imports without Triton). Every argument of the
    kernel appears either in `types`, with Triton's name of its type (`"*bf16"`, `"*fp32"`, `"*i64"`, `"i32"`,
    `"fp32"`), or in `constants`, with the value of a `tl.constexpr` argument. `divisible_by_16` names the arguments
    (pointers, integers) that the just-in-time compiler finds to be multiples of 16: pointers to tensors from PyTorch's
    allocator always are. `bulk` says that the kernel streams tensors of the model's size, so that its global accesses
    must be 16 bytes wide. `name` is unique within the operation and is the row's key in the resource table.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    divisible_by_16: tuple[str, ...] = ()
    warps: int = 4
    stages: int = 1
    bulk: bool = field(default=True, kw_only=True)


def aligned_variant(
    name: str, kernel: Any, types: dict[str, str], constants: dict[str, Any], absent: Iterable[str] = (), **launch: Any
) -> Variant:
    """A variant whose pointers are all aligned; of `types`, the arguments `absent` are None. `launch`: `Variant`'s."""
    present = {argument: kind for argument, kind in types.items() if argument not in absent}
    pointers = tuple(argument for argument, kind in present.items() if kind.startswith("*"))
    return Variant(name, kernel, present, constants | dict.fromkeys(absent), pointers, **launch)
