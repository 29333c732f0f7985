"""What the ranks of `test_sharding.py` run: norms and SwiGLU on DTensors and under FSDP2, beside the whole tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from tests.kernels.accuracy import results_of
from titan_yulan.kernels.add_rms_norm import add_rms_norm
from titan_yulan.kernels.rms_norm import rms_norm
from titan_yulan.kernels.swiglu import swiglu, swiglu_packed
from titan_yulan.parallel.process import World

EPS = 1e-3
ROWS, ONCE = "rows", "once"  # an input with the tokens, and one that every rank has as a whole


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cases() -> dict[str, tuple[Callable[..., Any], dict[Tensor, str], tuple[Placement, ...]]]:
    """Name -> (function, its inputs, placements of those with rows). No size divides by the number of ranks."""
    x, y, weight, one, two = normal(0, 5, 3, 10), normal(1, 5, 3, 10), normal(2, 10), normal(3, 1), normal(4, 1)
    by_token = (Shard(0), Shard(1), Replicate())
    anyhow = (*by_token, Shard(2))
    rows, pair, once = {x: ROWS}, {x: ROWS, y: ROWS}, {weight: ONCE}
    return {
        "norm": (lambda x, w: rms_norm(x, w, EPS), rows | once, by_token),
        "norm_scaled": (lambda x, w, s: rms_norm(x, w, EPS, s), rows | once | {one: ONCE}, by_token),
        "add": (lambda x, r, w: add_rms_norm(x, r, w, EPS), pair | once, by_token),
        "add_scaled": (lambda x, r, w, s: add_rms_norm(x, r, w, EPS, s), pair | once | {one: ONCE}, by_token),
        "add_x_scaled": (lambda x, r, w, s: add_rms_norm(x, r, w, EPS, None, s), pair | once | {two: ONCE}, by_token),
        "add_both_scaled": (
            lambda x, r, w, s, a: add_rms_norm(x, r, w, EPS, s, a),
            pair | once | {one: ONCE, two: ONCE},
            by_token,
        ),
        "swiglu": (swiglu, pair, anyhow),
        "swiglu_packed": (swiglu_packed, rows, by_token),
    }


def on_dtensors(world: World) -> dict[str, float]:
    """Case and placement -> largest difference of any output or gradient from the operation on whole tensors."""
    mesh = init_device_mesh("cpu", (world.size,))
    differences = {}
    for name, (function, inputs, placements) in cases().items():
        outputs = function(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        gradients = [normal(10 + i, *output.shape) for i, output in enumerate(outputs)]
        whole = results_of(function, tuple(inputs), gradients)
        for placement in placements:
            distributed = [
                distribute_tensor(tensor, mesh, [placement if kind == ROWS else Replicate()])
                for tensor, kind in inputs.items()
            ]
            incoming = [distribute_tensor(gradient, mesh, [placement]) for gradient in gradients]
            results = [cast(DTensor, result) for result in results_of(function, distributed, incoming)]
            # Rows stay where they are: nothing is gathered to run the operation.
            assert results[0].placements == (placement,) == results[len(outputs)].placements, (name, placement)
            differences[f"{name} {placement}"] = max(
                float((result.full_tensor() - other).abs().max()) for result, other in zip(results, whole, strict=True)
            )
    return differences


class Block(nn.Module):
    """A layer's feed-forward half with the three operations and two trained scalars."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.gate_up, self.down = (
            nn.Parameter(normal(seed, *shape)) for seed, shape in ((0, (10,)), (1, (14, 10)), (2, (10, 7)))
        )
        self.scale, self.output_scale = nn.Parameter(normal(3, 1)), nn.Parameter(normal(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        normed = rms_norm(x, self.weight, EPS, self.scale)
        output = swiglu_packed(normed @ self.gate_up.t()) @ self.down.t()
        y, residual = add_rms_norm(output, x, self.weight, EPS, None, self.output_scale)
        return y + residual


def under_fsdp(world: World) -> dict[str, float]:
    """Parameter -> largest difference of its gradient from that of one process, eager and compiled."""
    x = normal(20, 6, 10)
    alone = Block()
    alone(x).square().sum().backward()
    differences = {}
    for compiled in (False, True):
        block = Block()
        if compiled:
            block.compile(backend="aot_eager", fullgraph=True)
        fully_shard(block, mesh=init_device_mesh("cpu", (world.size,)))
        block(x.chunk(world.size)[world.rank]).square().sum().backward()
        for (name, parameter), other in zip(block.named_parameters(), alone.parameters(), strict=True):
            # FSDP averages over ranks.
            difference = cast(DTensor, parameter.grad).full_tensor() * world.size - cast(Tensor, other.grad)
            differences[f"{name} {compiled=}"] = float(difference.abs().max())
    return differences


def body(world: World) -> tuple[dict[str, float], dict[str, float]]:
    return on_dtensors(world), under_fsdp(world)
