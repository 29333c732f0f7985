"""What every operation needs to know of the machine: is Triton there, and does it run for these tensors.

Triton is imported here and nowhere else, so that the files of the operations also load where there is none (macOS), and
their plain-PyTorch references with them. Three ways to run an operation:

- a CUDA device of compute capability 8.0 or newer: the Triton kernels, compiled at their first launch;
- the CPU under TRITON_INTERPRET=1: the same kernels, one program after the other in numpy (for tests);
- the CPU otherwise: the operators with the reference's arithmetic, so that compilation, activation checkpointing and
  sharding see the same operators as on a GPU.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

Kernels = Literal["auto", "triton", "reference"]


class _MissingLanguage:
    """Stands for `triton.language`, of which only this much is evaluated when an operation's file is imported."""

    constexpr = int


class _MissingTriton:
    """Stands for `triton`: kernels stay plain functions that nothing calls."""

    @staticmethod
    def jit(function: Callable[..., Any] | None = None, **_: Any) -> Callable[..., Any]:
        return function if function is not None else lambda decorated: decorated


triton: Any = _MissingTriton()
tl: Any = _MissingLanguage()
HAVE_TRITON = True
try:
    triton, tl = importlib.import_module("triton"), importlib.import_module("triton.language")
except ImportError:
    HAVE_TRITON = False

INTERPRETED = HAVE_TRITON and os.environ.get("TRITON_INTERPRET") == "1"


@torch.compiler.assume_constant_result
def choose(kernels: Kernels, device: torch.device) -> bool:
    """Whether Triton runs for tensors on `device`.

    Args:
        kernels: `"reference"` never; `"auto"` where it can; `"triton"` insists.
        device: where the tensors are. A CUDA device on a machine that has none can only come from a fake tensor and
            counts as one that can.

    Raises:
        ValueError: another word than these three; or `"triton"` where Triton cannot run, with the reason.
    """
    if kernels not in ("auto", "triton", "reference"):
        raise ValueError(f'kernels = "{kernels}": choose "auto", "triton" or "reference"')
    if kernels == "reference":
        return False
    reason = _why_not(device.type, device.index)
    if reason is None:
        return True
    if kernels == "triton":
        raise ValueError(f'kernels = "triton" on {device}: {reason}; choose "auto" or "reference"')
    if device.type == "cuda":
        _warn_once(f"{device}: {reason}; the reference operations of PyTorch run instead of the Triton kernels")
    return False


def check_alike(**pair: Tensor) -> None:
    """Two tensors, named by keyword, must have one type, shape and device.

    Raises:
        TypeError: two types.
        ValueError: two shapes or devices.
    """
    (first, a), (second, b) = pair.items()
    if a.dtype != b.dtype:
        raise TypeError(f"{first} is {a.dtype}, {second} is {b.dtype}: both must have one type")
    if a.shape != b.shape or a.device != b.device:
        raise ValueError(
            f"{first} has shape {tuple(a.shape)} on {a.device}, {second} {tuple(b.shape)} on {b.device}: both must be "
            "the same"
        )


def use_operator(kernels: Kernels, device: torch.device) -> bool:
    """Whether a public function calls its registered operator; if not, it calls the reference under plain autograd.

    The operator is called where Triton runs, and with `"auto"` also on the CPU (and on meta tensors), where its
    implementation is the reference's arithmetic. Raises what `choose` raises.
    """
    return choose(kernels, device) or (kernels == "auto" and device.type in ("cpu", "meta"))


def runs_triton(x: Tensor) -> bool:
    """Whether an operator's implementation, called with `x`, launches kernels; float64 is the reference's."""
    return x.dtype != torch.float64 and (x.is_cuda or INTERPRETED)


def register_sharding(operator: Any, strategies: Callable[..., Any]) -> None:
    """Tell DTensor how `operator` may be sharded; nothing to do in a PyTorch built without distributed.

    `strategies(*arguments)` returns pairs (placements of the outputs, one per argument with None for what is no
    tensor), one pair for each way to place the operator along one dimension of a device mesh; see `row_shardings`.
    """
    if torch.distributed.is_available():
        from torch.distributed.tensor.experimental import register_sharding as register

        register(operator)(strategies)


def row_shardings(
    dimensions: Iterable[int], outputs: str, inputs: str, arguments: Sequence[object]
) -> list[tuple[list[Any], list[Any]]]:
    """Ways to shard an operator that treats rows alike: not at all, or along one of `dimensions`.

    DTensor keys its cache of these on all arguments from the first integer one on, but on tensors alone before it. An
    operator whose results depend on which optional tensors it gets must therefore have an integer argument before them.

    Args:
        dimensions: dimensions of the tensors of rows that may be sharded.
        outputs: a letter for each output: "x" has the rows, "w" is the same on every rank, "p" is a sum over rows, of
            which a rank with some of the rows has a part.
        inputs: a letter for each argument, "." for what is no tensor.
        arguments: the operator's arguments; those that are None have no placement, whatever their letter.
    """
    from torch.distributed.tensor import Partial, Replicate, Shard

    def place(letter: str, dimension: int | None) -> Any:
        if letter == "w" or dimension is None:
            return Replicate()
        return Shard(dimension) if letter == "x" else Partial()

    def place_input(letter: str, argument: object, dimension: int | None) -> Any:
        return None if letter == "." or argument is None else place(letter, dimension)

    return [
        (
            [place(letter, dimension) for letter in outputs],
            [place_input(letter, argument, dimension) for letter, argument in zip(inputs, arguments, strict=True)],
        )
        for dimension in (None, *dimensions)
    ]


def or_empty(result: Tensor | None, like: Tensor) -> Tensor:
    """A result that is not there as an empty tensor: operators return a fixed number of tensors."""
    return like.new_empty(0) if result is None else result


def like_or_empty(tensor: Tensor | None, like: Tensor) -> Tensor:
    """A tensor with the shape and type of `tensor`, the fake of `or_empty` of its gradient."""
    return like.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape)


def pointers(**types: str) -> dict[str, str]:
    """`Variant.types` of pointer arguments from the types they point to: x="bf16" -> {"x": "*bf16"}."""
    return {name: f"*{kind}" for name, kind in types.items()}


def _why_not(device_type: str, index: int | None) -> str | None:
    """Why Triton does not run on a device; None if it does."""
    if not HAVE_TRITON:
        return "Triton is not installed"
    if device_type == "cpu":
        return None if INTERPRETED else "Triton needs a GPU (or TRITON_INTERPRET=1, for tests)"
    if device_type != "cuda":
        return "the Triton kernels are for CUDA devices"
    if not torch.cuda.is_available():
        return None
    capability = _capability(index)
    return None if capability >= (8, 0) else f"compute capability {capability[0]}.{capability[1]} is below 8.0"


@cache
def _capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=3)
