"""Several projections of one input as one matrix product, each times a scalar, without keeping anything packed.

    y = x [s_1 W_1; s_2 W_2; ...]^T + [s_1 b_1; s_2 b_2; ...]

The weights stay separate parameters (q, k and v; gate and up; or a single one with its scalar) and meet only here: the
packed matrix is made, used, dropped, and made again in backward. Plain autograd would keep it, a second copy of the
model's weights, or keep the unscaled outputs for the gradients of the scalars. With P the packed matrix:

    dx = dy P,   G = dy^T x,   dW_i = s_i G_i,   ds_i = <G_i, W_i>   (biases alike, with G = sum of dy over tokens)

so the gradient of a scalar costs no activation. docs/kernels.md has the memory and the errors measured against scaling
the outputs instead. One product for all parts also makes one sum of dx, where separate ones add theirs up in memory.

The products are PyTorch's (cuBLAS). What Triton does is the last line of backward: dW_i over G_i and the sum of
G_i W_i in one pass, a program's partial sums added up in a fixed order. Scaled weights are rounded once to the compute
type, and in backward the product G is, so results repeat bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from titan_yulan.kernels.runtime import Kernels, or_empty, pointers, runs_triton, tl, triton, use_operator
from titan_yulan.kernels.variant import Variant

_BLOCK, _WARPS = 2048, 4  # 16 elements a thread: two 16-byte accesses per tensor in 16-bit types
_PROGRAMS = 528  # partial sums of one weight; 4 for each of an H100's 132 processors


def packed_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Tensor | None = None,
    biases: Sequence[Tensor] = (),
    *,
    kernels: Kernels = "auto",
) -> Tensor:
    """x times all weights, side by side in the last dimension.

    Args:
        x: (..., in); float32, float16, bfloat16 or float64.
        weights: (out_i, in) each, x's type.
        scales: (number of weights,), the multiplier of each weight and its bias, float32 or wider; None for 1.
        biases: (out_i,) each, x's type; none or one per weight.
        kernels: see `runtime.choose`; `"reference"` is plain autograd.

    Returns:
        (..., sum of out_i) in x's type.

    Raises:
        TypeError: a type that is not floating, or weights and biases of another type than x.
        ValueError: shapes or devices that do not fit, or Triton insisted on where it cannot run.
    """
    _check(x, weights, scales, biases)
    if not use_operator(kernels, x.device):
        return packed_linear_reference(x, weights, scales, biases)
    return torch.ops.titan_yulan.packed_linear_forward(x, list(weights), scales, list(biases))


def packed_linear_reference(
    x: Tensor, weights: Sequence[Tensor], scales: Tensor | None = None, biases: Sequence[Tensor] = ()
) -> Tensor:
    """`packed_linear` in plain PyTorch under autograd."""
    return functional.linear(x, _pack(weights, scales), _pack(biases, scales) if biases else None)


def _pack(parts: Sequence[Tensor], scales: Tensor | None) -> Tensor:
    """The parts below each other, each times its scale in the wider type, rounded once to their own."""
    if scales is None:
        return parts[0] if len(parts) == 1 else torch.cat(list(parts))
    scaled = [(part * scale).to(part.dtype) for part, scale in zip(parts, scales.split(1), strict=True)]
    return scaled[0] if len(scaled) == 1 else torch.cat(scaled)


def _pack_once(parts: Sequence[Tensor], scales: Tensor | None) -> Tensor:
    """`_pack` without autograd: one pass over each part, and nothing in between."""
    if scales is None:
        return _pack(parts, None)
    sizes = [part.shape[0] for part in parts]
    packed = parts[0].new_empty((sum(sizes), *parts[0].shape[1:]))
    for part, place, scale in zip(parts, packed.split(sizes), scales.split(1), strict=True):
        torch.mul(part, scale, out=place)
    return packed


def _packed(parts: Sequence[Tensor], scales: Tensor | None) -> Tensor:
    """`_pack` without autograd: a scaled part goes through memory once, straight to its place."""
    if scales is None:
        return _pack(parts, None)
    sizes = [part.shape[0] for part in parts]
    packed = parts[0].new_empty((sum(sizes), *parts[0].shape[1:]))
    for place, part, scale in zip(packed.split(sizes), parts, scales.split(1), strict=True):
        torch.mul(part, scale, out=place)  # in the wider type, rounded at the store
    return packed


def _check(x: Tensor, weights: Sequence[Tensor], scales: Tensor | None, biases: Sequence[Tensor]) -> None:
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise TypeError(f"x is {x.dtype}; a projection takes float32, float16, bfloat16 and float64")
    if not weights or len(biases) not in (0, len(weights)):
        raise ValueError(f"{len(weights)} weights and {len(biases)} biases; give weights, and a bias for each or none")
    for tensor in (*weights, *biases):
        if tensor.dtype != x.dtype:
            raise TypeError(f"a weight or bias is {tensor.dtype}, x is {x.dtype}: all must have one type")
        if tensor.device != x.device:
            raise ValueError(f"a weight or bias is on {tensor.device}, x on {x.device}")
    shapes = [tuple(weight.shape) for weight in weights]
    if x.ndim == 0 or any(len(shape) != 2 or shape[1] != x.shape[-1] for shape in shapes):
        raise ValueError(f"weights of shapes {shapes} do not fit x of shape {tuple(x.shape)}")
    if biases and [tuple(bias.shape) for bias in biases] != [shape[:1] for shape in shapes]:
        raise ValueError(f"biases of shapes {[tuple(b.shape) for b in biases]} do not fit weights of shapes {shapes}")
    if scales is not None and (scales.shape != (len(weights),) or scales.device != x.device):
        raise ValueError(
            f"scales of shape {tuple(scales.shape)} on {scales.device}; {len(weights)} weights need one each"
        )


@triton.jit(do_not_specialize=["steps"])
def _scale_gradient_kernel(gradient, weight, scale, partials, elements, steps, BLOCK: tl.constexpr):
    """gradient *= scale in place, and each program's sum of gradient * weight before that."""
    factor = tl.load(scale).to(tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for step in tl.range(0, steps):
        block = step * tl.num_programs(0) + tl.program_id(0)
        places = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        valid = places < elements
        values = tl.load(gradient + places, mask=valid, other=0.0).to(tl.float32)
        total += values * tl.load(weight + places, mask=valid, other=0.0).to(tl.float32)
        tl.store(gradient + places, (values * factor).to(gradient.dtype.element_ty), mask=valid)
    tl.store(partials + tl.program_id(0), tl.sum(total, 0))


def _launch_scale_gradient(gradient: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Multiply `gradient` by `scale` in place; returns (1,) float32, sum of gradient * weight before that."""
    blocks = triton.cdiv(gradient.numel(), _BLOCK)
    programs = min(blocks, _PROGRAMS)
    partials = gradient.new_empty(programs, dtype=torch.float32)
    if programs:
        with torch.cuda.device_of(gradient):
            _scale_gradient_kernel[(programs,)](
                gradient, weight.contiguous(), scale, partials, gradient.numel(), triton.cdiv(blocks, programs),
                BLOCK=_BLOCK, num_warps=_WARPS,
            )  # fmt: skip
    return partials.sum(0, keepdim=True)


def _scale_gradient(gradient: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """`_launch_scale_gradient` where Triton runs, else the same in PyTorch."""
    if runs_triton(gradient):
        return _launch_scale_gradient(gradient, weight, scale)
    wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    product = (wide * weight).sum().reshape(1)
    gradient.copy_(wide * scale)
    return product


# A schema with lists of tensors has no DTensor sharding: under tensor parallelism the operator sees local tensors.


@torch.library.custom_op(
    "titan_yulan::packed_linear_forward",
    mutates_args=(),
    schema="(Tensor x, Tensor[] weights, Tensor? scales, Tensor[] biases) -> Tensor",
)
def _forward(x: Tensor, weights: list[Tensor], scales: Tensor | None, biases: list[Tensor]) -> Tensor:
    return functional.linear(x, _pack_once(weights, scales), _pack_once(biases, scales) if biases else None)


@_forward.register_fake
def _(x: Tensor, weights: list[Tensor], scales: Tensor | None, biases: list[Tensor]) -> Tensor:
    return x.new_empty((*x.shape[:-1], sum(weight.shape[0] for weight in weights)))


@torch.library.custom_op(
    "titan_yulan::packed_linear_backward",
    mutates_args=(),
    schema="(Tensor grad_y, Tensor x, Tensor[] weights, Tensor? scales, Tensor[] biases, bool need_x, "
    "bool need_weights) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    grad_y: Tensor,
    x: Tensor,
    weights: list[Tensor],
    scales: Tensor | None,
    biases: list[Tensor],
    need_x: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, packed dW, ds, packed db); empty what is not there or not needed."""
    rows, grad_rows = x.reshape(-1, x.shape[-1]), grad_y.reshape(-1, grad_y.shape[-1])
    grad_x = grad_y @ _pack_once(weights, scales) if need_x else None
    if not need_weights:
        return or_empty(grad_x, x), x.new_empty(0), or_empty(None, x), x.new_empty(0)
    grad_weight = grad_rows.t() @ rows
    grad_bias = grad_rows.sum(0) if biases else None
    if scales is None:
        return or_empty(grad_x, x), grad_weight, x.new_empty(0), or_empty(grad_bias, x)
    sizes = [weight.shape[0] for weight in weights]
    parts = zip(grad_weight.split(sizes), weights, scales.split(1), strict=True)
    products = torch.cat([_scale_gradient(*part) for part in parts])
    if grad_bias is not None:
        parts = zip(grad_bias.split(sizes), biases, scales.split(1), strict=True)
        products = products + torch.cat([_scale_gradient(*part) for part in parts])
    return or_empty(grad_x, x), grad_weight, products.to(scales.dtype), or_empty(grad_bias, x)


@_backward.register_fake
def _(grad_y, x, weights, scales, biases, need_x, need_weights):
    rows = sum(weight.shape[0] for weight in weights) if need_weights else 0
    empty = x.new_empty(0)
    return (
        x.new_empty(x.shape) if need_x else empty,
        x.new_empty((rows, x.shape[-1])) if need_weights else x.new_empty(0),
        scales.new_empty(scales.shape) if need_weights and scales is not None else x.new_empty(0),
        x.new_empty(rows if biases else 0),
    )


def _save(ctx, inputs, output) -> None:
    x, weights, scales, biases = inputs
    ctx.count, ctx.biased = len(weights), bool(biases)
    ctx.save_for_backward(x, scales, *weights, *biases)


def _differentiate(ctx, grad_y: Tensor):
    x, scales, *parts = ctx.saved_tensors
    weights, biases = parts[: ctx.count], parts[ctx.count :]
    need_x = ctx.needs_input_grad[0]
    need_weights = any(tensor is not None and tensor.requires_grad for tensor in (*weights, *biases, scales))
    grad_x, grad_weight, grad_scales, grad_bias = torch.ops.titan_yulan.packed_linear_backward(
        grad_y, x, weights, scales, biases, need_x, need_weights
    )
    sizes = [weight.shape[0] for weight in weights]
    nothing = [None] * ctx.count
    return (
        grad_x if need_x else None,
        list(grad_weight.split(sizes)) if need_weights else nothing,
        grad_scales if need_weights and scales is not None else None,
        (list(grad_bias.split(sizes)) if need_weights else nothing) if ctx.biased else [],
    )


_forward.register_autograd(_differentiate, setup_context=_save)


def variants(hidden: int, intermediate: int, vocab: int) -> list[Variant]:
    """What runs in Triton, as launched in bfloat16, for ahead-of-time compilation; the same for every size."""
    types = pointers(gradient="bf16", weight="bf16", scale="fp32", partials="fp32")
    aligned = ("gradient", "weight", "scale", "partials", "elements")
    types |= {"elements": "i32", "steps": "i32"}
    return [Variant("scale_gradient", _scale_gradient_kernel, types, {"BLOCK": _BLOCK}, aligned, _WARPS)]
