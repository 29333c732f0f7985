"""`data.hashing` for tensors, on any device: the same bits and the same numbers.

PyTorch has no unsigned 64-bit arithmetic on every device; int64 wraps around the same way, and only the shift differs.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


GOLDEN = _signed(0x9E3779B97F4A7C15)
POSITION = _signed(0xD6E8FEB86659FD93)
_M1 = _signed(0xBF58476D1CE4E5B9)
_M2 = _signed(0x94D049BB133111EB)


def shift(values: Tensor, n: int) -> Tensor:
    """Logical shift right of int64 (PyTorch's is arithmetic)."""
    return (values >> n) & ((1 << (64 - n)) - 1)


def mix(values: Tensor) -> Tensor:
    """`hashing.mix`: int64 in, int64 out, any shape."""
    values = (values ^ shift(values, 30)) * _M1
    values = (values ^ shift(values, 27)) * _M2
    return values ^ shift(values, 31)


def bits(key: int | Tensor, counters: Tensor) -> Tensor:
    """`hashing.bits`: 64 random bits for each counter, int64; one key for all, or a tensor with one for each."""
    start = _signed(key) if isinstance(key, int) else key
    return mix(start + (counters + 1) * GOLDEN)


def uniform(key: int | Tensor, counters: Tensor) -> Tensor:
    """`hashing.uniform`: a float64 in [0, 1) for each counter, exactly the same."""
    return shift(bits(key, counters), 11).to(torch.float64) * 2.0**-53
