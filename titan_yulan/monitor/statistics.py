"""Statistics of the inside of a model, taken now and then on the device: what they are, when they are due, and how the
ranks' parts become one.

Every quantity is a function of sums over all ranks. Each rank makes its summands, one all-reduce adds up those of all
quantities together, and every rank finishes them alike. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

# What is said of a vector or a matrix, in this order.
STATISTICS = ("variance", "mean", "rms")


@dataclass(frozen=True)
class Statistics:
    """Numbers of one step, alike on all ranks.

    names   n TensorBoard tags
    values  (n,) float32, on the device
    """

    names: tuple[str, ...]
    values: Tensor


@dataclass(frozen=True)
class Summands:
    """This rank's part of some statistics.

    names     n TensorBoard tags
    values    float64 of any shape, the same on every rank
    finish    from the sums of `values` over all ranks to the statistics, (n,) float64
    """

    names: tuple[str, ...]
    values: Tensor
    finish: Callable[[Tensor], Tensor]


def add_up(parts: Sequence[Summands], device: torch.device) -> Statistics:
    """The statistics of all parts, in one all-reduce; all ranks of the process group together, with the same parts."""
    flat = [part.values.to(device, non_blocking=True).flatten() for part in parts]
    total = torch.cat(flat)
    if dist.is_initialized():
        dist.all_reduce(total)
    sums = total.split([values.numel() for values in flat])
    finished = [part.finish(values.view(part.values.shape)) for part, values in zip(parts, sums, strict=True)]
    return Statistics(tuple(name for part in parts for name in part.names), torch.cat(finished).float())


def is_due(step: int, every: int) -> bool:
    """Whether step `step`, counted from 1, is one of every `every`; 0: none is."""
    return every > 0 and step % every == 0


def sampled_layers(layers: int, wanted: int) -> tuple[int, ...]:
    """`wanted` of `layers` blocks, evenly spread from the first to the last; all, if there are no more than that.

    Six of 56 are 0, 11, 22, 33, 44, 55, those that YuLan-Mini (arXiv 2412.17743) looked at. One is the last.
    """
    if wanted >= layers:
        return tuple(range(layers))
    if wanted == 1:
        return (layers - 1,)
    return tuple(index * (layers - 1) // (wanted - 1) for index in range(wanted))


def layer_tag(layer: int) -> str:
    """The end of a tag: layer_00 for the first block."""
    return f"layer_{layer:02d}"
