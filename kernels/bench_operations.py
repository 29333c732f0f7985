"""What the benchmark measures: per operation its inputs, its least traffic and work, and the implementations.

The mathematics of an operation is written once here, in plain PyTorch: in the inputs' type it is the peer `torch`,
compiled the peer `compile`, and in float64 what every implementation is checked against.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

EPS = 1e-6
Z_WEIGHT = 1e-4

# Columns of the keys, and of the values, of the model presets; the queries have as many as the hidden state.
KEYS = {"debug": 64, "yulan_mini_2b": 384, "llama3_8b": 1024}

Function = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Shape:
    """Sizes of a measurement; `dtype` is that of every floating tensor but weights of tokens and trained scalars."""

    tokens: int
    hidden: int
    intermediate: int
    vocab: int
    keys: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Operation:
    """One operation of `kernels/` as the benchmark sees it. A function takes `inputs` and returns a tuple of tensors.

    `rows` says of each input whether it has a row per token (else it is shared by all tokens); the first
    `differentiable` inputs get gradients. `traffic[mode](shape)` is the least number of bytes that have to move
    between the chip and its memory, `work[mode](shape)` the floating-point operations of the matrix products.
    Only the modes in `traffic` are measured.
    """

    name: str
    module: str  # file of this folder
    inputs: Callable[[Shape, Callable[..., Tensor]], list[Tensor]]
    rows: tuple[bool, ...]
    differentiable: int
    mathematics: Function
    ours: Callable[[str], Function]
    traffic: dict[str, Callable[[Shape], int]]
    work: dict[str, Callable[[Shape], int]] = field(default_factory=dict)
    # Mode -> share of the measured copy (or matrix product) rate to reach on an H100 or H200.
    targets: dict[str, float] = field(default_factory=dict)
    liger: Callable[[], Function] | None = None  # None: Liger has no such operation
    # Where a weight's gradient is a sum over chunks of tokens: our sum before its cast to the weight's type, and Liger
    # told to sum in float32 (its default is the weight's type).
    accumulated: Callable[[str], Function] | None = None
    liger_float32: Callable[[], Function] | None = None


def implementation(operation: Operation, name: str) -> Function:
    """The function to measure.

    Raises:
        ImportError: the peer is not installed, or the operation's file does not exist.
        ValueError: there is no implementation of that name.
    """
    if name == "torch":
        return operation.mathematics
    if name == "compile":
        torch.compiler.reset()  # else the number of kept variants runs into its limit
        return torch.compile(operation.mathematics, fullgraph=True, dynamic=False)
    if name in ("liger", "liger_float32") and (peer := getattr(operation, name)) is not None:
        return peer()
    if name in ("triton", "reference"):
        return operation.ours(name)
    raise ValueError(f"{operation.name} has no implementation {name!r}")


def _ours(module: str, function: str, kernels: str, *constants: Any, keep: int = 2) -> Function:
    """Of the outputs only the first `keep`; a loss per token, for reports, follows after the objective."""
    call = getattr(importlib.import_module(f"titan_yulan.kernels.{module}"), function)

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        outputs = call(*inputs, *constants, kernels=kernels)
        return outputs[:keep] if isinstance(outputs, tuple) else (outputs,)

    return run


class _InPlace(torch.autograd.Function):
    """The walk that the fused head makes over its logits: the loss, and the gradient written over the logits."""

    @staticmethod
    def forward(ctx, rows: Callable[..., Tensor], use_triton: bool, logits: Tensor, targets: Tensor, factors: Tensor):
        statistics = torch.empty((3, logits.shape[0]), dtype=torch.float32, device=logits.device)
        gradient = rows(logits, logits.shape[1], targets, factors, Z_WEIGHT, statistics, use_triton)
        ctx.save_for_backward(gradient)
        losses, maxima, sums = statistics.unbind()
        return (factors * (losses + Z_WEIGHT * (maxima + sums.log()).square())).sum()

    @staticmethod
    def backward(ctx, *_: Tensor) -> Any:
        """For the upstream gradient 1, as everywhere in the benchmark."""
        return None, None, ctx.saved_tensors[0], None, None


def _ours_in_place(kernels: str) -> Function:
    rows = importlib.import_module("titan_yulan.kernels.cross_entropy").forward_gradient_rows
    return lambda *inputs: (_InPlace.apply(rows, kernels == "triton", *inputs),)


def _accumulated_head_gradient(kernels: str) -> Function:
    importlib.import_module("titan_yulan.kernels.linear_cross_entropy")
    forward = torch.ops.titan_yulan.linear_cross_entropy_forward
    options = (Z_WEIGHT, None, None, True, True, kernels == "triton")
    return lambda *inputs: (forward(*inputs, *options)[4],)


def _ours_qkv(kernels: str) -> Function:
    """Split as in the attention; backward's putting the three gradients side by side is timed too."""
    project = importlib.import_module("titan_yulan.kernels.packed_linear").packed_linear

    def run(x: Tensor, query: Tensor, key: Tensor, value: Tensor, scales: Tensor) -> tuple[Tensor, ...]:
        weights = (query, key, value)
        return project(x, weights, scales, kernels=kernels).split([weight.shape[0] for weight in weights], dim=-1)

    return run


def _ours_gate_up(kernels: str) -> Function:
    project = importlib.import_module("titan_yulan.kernels.packed_linear").packed_linear
    activate = importlib.import_module("titan_yulan.kernels.swiglu").swiglu_packed
    return lambda x, gate, up: (activate(project(x, (gate, up), kernels=kernels), kernels=kernels),)


def _liger(function: str) -> Any:
    return getattr(importlib.import_module("liger_kernel.ops"), function).apply


# --- the mathematics --------------------------------------------------------------------------------------------------


def _rms_norm(x: Tensor, weight: Tensor) -> tuple[Tensor]:
    return (functional.rms_norm(x, weight.shape, weight, EPS),)


def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return functional.rms_norm(total, weight.shape, weight, EPS), total


def _swiglu(gate: Tensor, up: Tensor) -> tuple[Tensor]:
    return (functional.silu(gate) * up,)


def _swiglu_packed(gate_up: Tensor) -> tuple[Tensor]:
    gate, up = gate_up.chunk(2, dim=-1)
    return (functional.silu(gate) * up,)


def _qkv(x: Tensor, query: Tensor, key: Tensor, value: Tensor, scales: Tensor) -> tuple[Tensor, ...]:
    parts = zip((query, key, value), scales.split(1), strict=True)
    return tuple((functional.linear(x, weight) * scale).to(x.dtype) for weight, scale in parts)


def _gate_up(x: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor]:
    return _swiglu(functional.linear(x, gate), functional.linear(x, up))


def _cross_entropy(logits: Tensor, targets: Tensor, token_weights: Tensor) -> tuple[Tensor]:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = functional.cross_entropy(wide, targets, reduction="none") + Z_WEIGHT * wide.logsumexp(1).square()
    return ((losses * token_weights).sum(),)


def _linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor) -> tuple[Tensor]:
    return _cross_entropy(hidden @ weight.t(), targets, token_weights)


# --- Liger ------------------------------------------------------------------------------------------------------------


def _liger_rms_norm() -> Function:
    call = _liger("LigerRMSNormFunction")
    return lambda x, weight: (call(x, weight, EPS),)


def _liger_add_rms_norm() -> Function:
    call = _liger("LigerFusedAddRMSNormFunction")
    return lambda x, residual, weight: call(x, residual, weight, EPS)


def _liger_swiglu() -> Function:
    call = _liger("LigerSiLUMulFunction")
    return lambda gate, up: (call(gate, up),)


def _liger_swiglu_packed() -> Function:
    call = _liger("LigerFusedGateUpSiLUMulFunction")
    return lambda gate_up: (call(gate_up),)


def _liger_cross_entropy() -> Function:
    """With all weights 1; without `token_weights`, which Liger does not have."""
    call = _liger("LigerCrossEntropyFunction")
    return lambda logits, targets, _: (call(logits, targets, None, -100, Z_WEIGHT, 0.0, "sum")[0],)


def _liger_linear_cross_entropy(accumulation: torch.dtype | None = None) -> Function:
    call = _liger("LigerFusedLinearCrossEntropyFunction")
    options = (None, None, -100, Z_WEIGHT, 0.0, "sum", None, False, accumulation)
    return lambda hidden, weight, targets, _: (call(hidden, weight, targets, *options)[0],)


# --- inputs, traffic and work -----------------------------------------------------------------------------------------


def _norm_inputs(tensors: int, shape: Shape, normal: Callable[..., Tensor]) -> list[Tensor]:
    return [*(normal(shape.tokens, shape.hidden) for _ in range(tensors)), normal(shape.hidden, mean=1.0)]


def _projection(shape: Shape, normal: Callable[..., Tensor], *fields: str) -> list[Tensor]:
    """x, and a weight for each of the fields that names its rows."""
    weights = [normal(getattr(shape, field), shape.hidden, deviation=shape.hidden**-0.5) for field in fields]
    return [normal(shape.tokens, shape.hidden), *weights]


def _qkv_inputs(shape: Shape, normal: Callable[..., Tensor]) -> list[Tensor]:
    scales = normal(3, mean=0.5, deviation=0.1, dtype=torch.float32)
    return [*_projection(shape, normal, "hidden", "keys", "keys"), scales]


def _targets(shape: Shape, normal: Callable[..., Tensor]) -> list[Tensor]:
    noise = normal(shape.tokens, dtype=torch.float32)
    return [(noise.abs() * 1e6).long() % shape.vocab, torch.ones_like(noise)]


def _logits(shape: Shape, normal: Callable[..., Tensor]) -> list[Tensor]:
    return [normal(shape.tokens, shape.vocab, deviation=2.0), *_targets(shape, normal)]


def _head(shape: Shape, normal: Callable[..., Tensor]) -> list[Tensor]:
    weight = normal(shape.vocab, shape.hidden, deviation=2.0 / shape.hidden**0.5)
    return [normal(shape.tokens, shape.hidden), weight, *_targets(shape, normal)]


def _streams(field: str, **counts: int) -> dict[str, Callable[[Shape], int]]:
    """Mode -> bytes of that many reads and writes of a (tokens, `field`) tensor."""

    def size(count: int, shape: Shape) -> int:
        return count * shape.tokens * getattr(shape, field) * shape.dtype.itemsize

    return {mode: partial(size, count) for mode, count in counts.items()}


def _work(products: int, columns: Callable[[Shape], int], shape: Shape) -> int:
    return products * 2 * shape.tokens * shape.hidden * columns(shape)


def _projections(columns: Callable[[Shape], int], results: Callable[[Shape], int]) -> dict[str, Any]:
    """`traffic` and `work` of projections to `columns` in all, of which `results` columns come out.

    Forward: x and the weights in, the results out; backward: these two and the results' gradient in, two gradients out.
    """

    def traffic(inputs: int, outputs: int, shape: Shape) -> int:
        own = (shape.tokens + columns(shape)) * shape.hidden
        return (inputs * own + outputs * shape.tokens * results(shape)) * shape.dtype.itemsize

    return {
        "traffic": {"fwd": partial(traffic, 1, 1), "bwd": partial(traffic, 2, 1), "fwd_bwd": partial(traffic, 3, 2)},
        "work": {mode: partial(_work, n, columns) for mode, n in (("fwd", 1), ("bwd", 2), ("fwd_bwd", 3))},
    }


def _head_traffic(passes: int, shape: Shape) -> int:
    """The head's weight and the hidden states once in, and once out as gradients; no logits."""
    return passes * (shape.vocab + shape.tokens) * shape.hidden * shape.dtype.itemsize


OPERATIONS = {
    operation.name: operation
    for operation in (
        Operation(
            name="rms_norm",
            module="rms_norm",
            inputs=partial(_norm_inputs, 1),
            rows=(True, False),
            differentiable=2,
            mathematics=_rms_norm,
            ours=lambda kernels: _ours("rms_norm", "rms_norm", kernels, EPS),
            liger=_liger_rms_norm,
            traffic=_streams("hidden", fwd=2, bwd=3, fwd_bwd=5),
            targets={"fwd": 0.92},
        ),
        Operation(
            name="add_rms_norm",
            module="add_rms_norm",
            inputs=partial(_norm_inputs, 2),
            rows=(True, True, False),
            differentiable=3,
            mathematics=_add_rms_norm,
            ours=lambda kernels: _ours("add_rms_norm", "add_rms_norm", kernels, EPS),
            liger=_liger_add_rms_norm,
            traffic=_streams("hidden", fwd=4, bwd=4, fwd_bwd=8),
            targets={"fwd": 0.92, "bwd": 0.85},
        ),
        Operation(
            name="swiglu",
            module="swiglu",
            inputs=lambda shape, normal: [normal(shape.tokens, shape.intermediate) for _ in range(2)],
            rows=(True, True),
            differentiable=2,
            mathematics=_swiglu,
            ours=lambda kernels: _ours("swiglu", "swiglu", kernels),
            liger=_liger_swiglu,
            traffic=_streams("intermediate", fwd=3, bwd=5, fwd_bwd=8),
            targets={"fwd": 0.92, "bwd": 0.87},
        ),
        Operation(
            name="swiglu_packed",
            module="swiglu",
            inputs=lambda shape, normal: [normal(shape.tokens, 2 * shape.intermediate)],
            rows=(True,),
            differentiable=1,
            mathematics=_swiglu_packed,
            ours=lambda kernels: _ours("swiglu", "swiglu_packed", kernels),
            liger=_liger_swiglu_packed,
            traffic=_streams("intermediate", fwd=3, bwd=5, fwd_bwd=8),
            targets={"fwd": 0.92, "bwd": 0.87},
        ),
        Operation(
            name="packed_linear_qkv",
            module="packed_linear",
            inputs=_qkv_inputs,
            rows=(True, False, False, False, False),
            differentiable=5,
            mathematics=_qkv,
            ours=_ours_qkv,
            **_projections(*2 * [lambda shape: shape.hidden + 2 * shape.keys]),
        ),
        # Without its activation, packed would stand against separate only with a copy that the decoder does not make.
        Operation(
            name="packed_linear_gate_up",
            module="swiglu",  # the projections have no scalars here, so their own kernel does not run
            inputs=lambda shape, normal: _projection(shape, normal, "intermediate", "intermediate"),
            rows=(True, False, False),
            differentiable=3,
            mathematics=_gate_up,
            ours=_ours_gate_up,
            **_projections(lambda shape: 2 * shape.intermediate, lambda shape: shape.intermediate),
        ),
        Operation(
            name="cross_entropy",
            module="cross_entropy",
            inputs=_logits,
            rows=(True, True, True),
            differentiable=1,
            mathematics=_cross_entropy,
            ours=lambda kernels: _ours("cross_entropy", "cross_entropy", kernels, Z_WEIGHT, keep=1),
            liger=_liger_cross_entropy,
            traffic=_streams("vocab", fwd=1, fwd_bwd=2),
        ),
        Operation(
            name="cross_entropy_in_place",
            module="cross_entropy",
            inputs=_logits,
            rows=(True, True, True),
            differentiable=1,
            mathematics=_cross_entropy,
            ours=_ours_in_place,
            liger=_liger_cross_entropy,
            traffic=_streams("vocab", fwd_bwd=2),
            targets={"fwd_bwd": 0.83},
        ),
        Operation(
            name="linear_cross_entropy",
            module="linear_cross_entropy",
            inputs=_head,
            rows=(True, False, True, True),
            differentiable=2,
            mathematics=_linear_cross_entropy,
            ours=lambda kernels: _ours("linear_cross_entropy", "linear_cross_entropy", kernels, Z_WEIGHT, keep=1),
            liger=_liger_linear_cross_entropy,
            traffic={"fwd": partial(_head_traffic, 1), "fwd_bwd": partial(_head_traffic, 2)},
            work={mode: partial(_work, n, lambda shape: shape.vocab) for mode, n in (("fwd", 1), ("fwd_bwd", 3))},
            targets={"fwd_bwd": 1 / 1.22},
            accumulated=_accumulated_head_gradient,
            liger_float32=partial(_liger_linear_cross_entropy, torch.float32),
        ),
    )
}
