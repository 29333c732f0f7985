"""What every test of a Triton kernel needs: the device it runs on, and an interpreter that rounds as a GPU does."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _cast(builder: Any, source: Any, target: Any) -> Any:
    """`InterpreterBuilder.cast_impl` with bfloat16 rounded to nearest, ties to even; the interpreter truncates.

    The interpreter keeps bfloat16 as the upper half of a float32, in uint16.
    """
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    kinds = (source.dtype.scalar, target.scalar)
    if kinds == (tl.bfloat16, tl.float32):
        wide = (source.data.astype(np.uint32) << 16).view(np.float32)
        return TensorHandle(wide, tl.float32)
    if kinds == (tl.float32, tl.bfloat16):
        bits = np.ascontiguousarray(source.data).view(np.uint32)
        # In uint32 this wraps for no finite number; a NaN, which it could turn into something else, is set apart.
        rounded = ((bits + (np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1)))) >> 16).astype(np.uint16)
        return TensorHandle(np.where(np.isnan(source.data), np.uint16(0x7FC0), rounded), tl.bfloat16)
    return _cast.original(builder, source, target)  # type: ignore[attr-defined]


if INTERPRETED:
    from triton.runtime.interpreter import InterpreterBuilder

    _cast.original = InterpreterBuilder.cast_impl  # type: ignore[attr-defined]
    InterpreterBuilder.cast_impl = _cast  # type: ignore[method-assign]


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run: CPU tensors under the interpreter, else the GPU (for which they are compiled)."""
    return torch.device("cpu" if INTERPRETED else "cuda")
