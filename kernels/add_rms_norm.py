"""Residual addition and RMSNorm, one operation: the step from one layer's output to the next layer's normed input.

Forward, for a token's vectors of N elements: x, a layer's output, the residual stream before it, weight w and optional
scalars a and c:

    s = residual + a x, rounded to its type,   r = 1 / sqrt(mean(s^2) + eps),   h = r s,   y = c w h

Both s and y are results. The norm sees the rounded s, so that backward, which has only that, differentiates exactly
what forward computed.

Backward, with g = c w dy, and ds from whatever else reads s:

    d residual = r (g - h mean(g h)) + ds,   dx = a d residual,   da = sum of x d residual,   dw and dc as in `rms_norm`

Fused, x and the residual stream are read once and s and y written once (4 streams forward, 4 backward; one more
backward with a, two if it is trained), also across the boundary of two layers, where a compiler that works layer by
layer does not fuse. a is where YuLan-Mini's trained output scalars and muP's depth scaling (1.4 / sqrt(layers),
arXiv 2412.17743) meet the layer's output without rounding it in between. The order of sums is that of `rms_norm`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from titan_yulan.kernels.rms_norm import (
    BACKWARD_STAGES,
    backward_programs,
    check_rms_norm,
    compute_backward,
    compute_reciprocal,
    launch_sum,
    rms_norm_reference,
    row_configuration,
    row_launch,
    scalar,
)
from titan_yulan.kernels.runtime import (
    Kernels,
    check_alike,
    like_or_empty,
    or_empty,
    pointers,
    register_sharding,
    row_shardings,
    runs_triton,
    tl,
    triton,
    use_operator,
)
from titan_yulan.kernels.variant import Variant, aligned_variant


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    scale: Tensor | float | None = None,
    x_scale: Tensor | float | None = None,
    *,
    round_before_weight: bool = False,
    kernels: Kernels = "auto",
) -> tuple[Tensor, Tensor]:
    """The residual stream after adding a layer's output x to it, and its norm.

    Args:
        x: (..., size), a layer's output; float32, float16, bfloat16, or float64 (by the reference).
        residual: the stream before it; x's shape and type.
        weight, eps, scale, round_before_weight, kernels: as in `rms_norm`.
        x_scale: a number or one-element tensor by which x is multiplied before the addition; may need a gradient.

    Returns:
        y: (..., size), the norm of residual_out.
        residual_out: (..., size), residual + x_scale * x. Both in x's type.

    Raises:
        TypeError, ValueError: as `rms_norm`, and where x and residual differ in type, shape or device.
    """
    check_rms_norm(x, weight, eps, scale, x_scale)
    check_alike(residual=residual, x=x)
    if not use_operator(kernels, x.device):
        return add_rms_norm_reference(x, residual, weight, eps, scale, x_scale, round_before_weight)
    y, residual_out, _ = torch.ops.titan_yulan.add_rms_norm_forward(
        x, residual, weight, eps, int(round_before_weight), scalar(scale, x), scalar(x_scale, x)
    )
    return y, residual_out


class AddRMSNorm(nn.Module):
    """`add_rms_norm` with a trained `weight` (size,), 1 at first; raises what `add_rms_norm` raises."""

    def __init__(
        self, size: int, eps: float = 1e-6, *, round_before_weight: bool = False, kernels: Kernels = "auto"
    ) -> None:
        super().__init__()
        self.eps, self.round_before_weight, self.kernels = eps, round_before_weight, kernels
        self.weight = nn.Parameter(torch.ones(size))

    def forward(
        self, x: Tensor, residual: Tensor, scale: Tensor | float | None = None, x_scale: Tensor | float | None = None
    ) -> tuple[Tensor, Tensor]:
        """(..., size) twice -> y and residual_out, (..., size) each."""
        rounding, kernels = self.round_before_weight, self.kernels
        return add_rms_norm(
            x, residual, self.weight, self.eps, scale, x_scale, round_before_weight=rounding, kernels=kernels
        )


def add_rms_norm_reference(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    scale: Tensor | float | None = None,
    x_scale: Tensor | float | None = None,
    round_before_weight: bool = False,
) -> tuple[Tensor, Tensor]:
    """`add_rms_norm` in plain PyTorch, computed in the wider of float32 and x's type: (y, residual_out)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    residual_out = (residual + (wide if x_scale is None else wide * x_scale)).to(x.dtype)
    y = rms_norm_reference(residual_out, weight, eps, 1.0 if scale is None else scale, round_before_weight)
    return y, residual_out


# The kernels. Pointers to what an operation does not have are None, which Triton resolves when it compiles.


@triton.jit
def _forward_kernel(
    x, residual, weight, scale, x_scale, y, residual_out, reciprocal,
    N: tl.constexpr, EPS: tl.constexpr, ROUND_FIRST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row per program. `reciprocal` receives r of every row, in float32."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    valid = columns < N
    offsets = row * N + columns
    values = tl.load(x + offsets, mask=valid, other=0.0).to(tl.float32)
    if x_scale is not None:
        values *= tl.load(x_scale).to(tl.float32)
    values += tl.load(residual + offsets, mask=valid, other=0.0).to(tl.float32)
    rounded = values.to(residual_out.dtype.element_ty)
    tl.store(residual_out + offsets, rounded, mask=valid)
    values = rounded.to(tl.float32)
    r = tl.rsqrt(tl.sum(values * values, 0) / N + EPS)
    tl.store(reciprocal + row, r)
    result = values * r
    if ROUND_FIRST:
        result = result.to(y.dtype.element_ty).to(tl.float32)
    result *= tl.load(weight + columns, mask=valid, other=0.0).to(tl.float32)
    if scale is not None:
        result *= tl.load(scale).to(tl.float32)
    tl.store(y + offsets, result.to(y.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["rows"])
def _backward_kernel(
    grad_y, grad_residual_out, residual_out, reciprocal, weight, scale, x, x_scale,
    grad_residual, grad_x, partials, x_scale_partials, rows,
    N: tl.constexpr, ROUND_FIRST: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Rows p, p + P, p + 2 P, ... by program p, which leaves their A in row p of `partials`, (P, N).

    `grad_x` is there with `x_scale`, `x` and `x_scale_partials`, (P,), if that needs a gradient.
    """
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    valid = columns < N
    multiplier = tl.load(weight + columns, mask=valid, other=0.0).to(tl.float32)
    if scale is not None:
        multiplier *= tl.load(scale).to(tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    x_scale_total = tl.zeros([BLOCK], dtype=tl.float32)
    for row in tl.range(program, rows, tl.num_programs(0), num_stages=STAGES):
        offsets = tl.cast(row, tl.int64) * N + columns
        dy = tl.load(grad_y + offsets, mask=valid, other=0.0).to(tl.float32)
        values = tl.load(residual_out + offsets, mask=valid, other=0.0)
        r = tl.load(reciprocal + row)
        h = values.to(tl.float32) * r
        if ROUND_FIRST:
            total += dy * h.to(values.dtype).to(tl.float32)
        else:
            total += dy * h
        g = dy * multiplier
        gradient = (g - h * (tl.sum(g * h, 0) / N)) * r
        if grad_residual_out is not None:
            gradient += tl.load(grad_residual_out + offsets, mask=valid, other=0.0).to(tl.float32)
        tl.store(grad_residual + offsets, gradient.to(grad_residual.dtype.element_ty), mask=valid)
        if x_scale is not None:
            scaled = gradient * tl.load(x_scale).to(tl.float32)
            tl.store(grad_x + offsets, scaled.to(grad_x.dtype.element_ty), mask=valid)
        if x is not None:
            x_scale_total += gradient * tl.load(x + offsets, mask=valid, other=0.0).to(tl.float32)
    tl.store(partials + program * N + columns, total, mask=valid)
    if x is not None:
        tl.store(x_scale_partials + program, tl.sum(x_scale_total, 0))


# How they are launched.

_Gradients = tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None]


def _launch_forward(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, rounding: int, scale: Tensor | None, x_scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    x = x.contiguous()
    y, residual_out = torch.empty_like(x), torch.empty_like(x)
    reciprocal = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    block, warps = row_configuration(x.shape[-1])
    if x.numel():
        with torch.cuda.device_of(x):
            _forward_kernel[(reciprocal.numel(),)](
                x, residual.contiguous(), weight.contiguous(), scale, x_scale, y, residual_out, reciprocal,
                N=x.shape[-1], EPS=eps, ROUND_FIRST=bool(rounding), BLOCK=block, num_warps=warps,
            )  # fmt: skip
    return y, residual_out, reciprocal


def _launch_backward(
    grad_y: Tensor, residual_out: Tensor, reciprocal: Tensor, weight: Tensor, rounding: int,
    grad_residual_out: Tensor | None, scale: Tensor | None, x: Tensor | None, x_scale: Tensor | None,
) -> _Gradients:  # fmt: skip
    """(d residual, dx, dw, dc, da), None where there is nothing to differentiate."""
    residual_out, weight = residual_out.contiguous(), weight.contiguous()
    grad_residual = torch.empty_like(residual_out)
    grad_x = None if x_scale is None else torch.empty_like(residual_out)
    size, rows = weight.numel(), reciprocal.numel()
    # Without rows there is nothing to launch, and the sum over no partial sums is 0.
    partials = residual_out.new_empty(backward_programs(rows), size, dtype=torch.float32)
    x_scale_partials = None if x is None else partials.new_empty(partials.shape[0])
    block, warps = row_configuration(size)
    if residual_out.numel():
        with torch.cuda.device_of(residual_out):
            _backward_kernel[(partials.shape[0],)](
                grad_y.contiguous(), None if grad_residual_out is None else grad_residual_out.contiguous(),
                residual_out, reciprocal.contiguous(), weight, scale, None if x is None else x.contiguous(), x_scale,
                grad_residual, grad_x, partials, x_scale_partials,
                rows, N=size, ROUND_FIRST=bool(rounding), BLOCK=block, STAGES=BACKWARD_STAGES, num_warps=warps,
            )  # fmt: skip
    grad_weight, grad_scale = launch_sum(partials, weight, scale)
    grad_x_scale = None
    if x_scale is not None and x_scale_partials is not None:
        grad_x_scale = x_scale_partials.sum().to(x_scale.dtype).reshape(x_scale.shape)
    return grad_residual, grad_x, grad_weight, grad_scale, grad_x_scale


# The same in PyTorch: what the operators do on a CPU, and for float64.


def _compute_forward(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, rounding: int, scale: Tensor | None, x_scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    y, residual_out = add_rms_norm_reference(x, residual, weight, eps, scale, x_scale, bool(rounding))
    return y.contiguous(), residual_out.contiguous(), compute_reciprocal(residual_out, eps)


def _compute_backward(
    grad_y: Tensor, residual_out: Tensor, reciprocal: Tensor, weight: Tensor, rounding: int,
    grad_residual_out: Tensor | None, scale: Tensor | None, x: Tensor | None, x_scale: Tensor | None,
) -> _Gradients:  # fmt: skip
    gradient, grad_weight, grad_scale = compute_backward(grad_y, residual_out, reciprocal, weight, rounding, scale)
    if grad_residual_out is not None:
        gradient = gradient + grad_residual_out
    grad_x = grad_x_scale = None
    if x_scale is not None:
        grad_x = (gradient * x_scale).to(residual_out.dtype).contiguous()
        if x is not None:
            grad_x_scale = (gradient * x).sum().to(x_scale.dtype).reshape(x_scale.shape)
    return gradient.to(residual_out.dtype).contiguous(), grad_x, grad_weight, grad_scale, grad_x_scale


# The operators. `rounding` is round_before_weight as an integer: `runtime.row_shardings` says why.


@torch.library.custom_op(
    "titan_yulan::add_rms_norm_forward",
    mutates_args=(),
    schema="(Tensor x, Tensor residual, Tensor weight, float eps, int rounding, Tensor? scale, Tensor? x_scale)"
    " -> (Tensor, Tensor, Tensor)",
)
def _forward(x: Tensor, *arguments) -> tuple[Tensor, Tensor, Tensor]:
    """(y, residual_out, r of every row)."""
    return (_launch_forward if runs_triton(x) else _compute_forward)(x, *arguments)


@_forward.register_fake
def _(x: Tensor, *_) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=wide)


@torch.library.custom_op(
    "titan_yulan::add_rms_norm_backward",
    mutates_args=(),
    schema="(Tensor grad_y, Tensor residual_out, Tensor reciprocal, Tensor weight, int rounding, "
    "Tensor? grad_residual_out, Tensor? scale, Tensor? x, Tensor? x_scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward(grad_y: Tensor, residual_out: Tensor, *arguments) -> tuple[Tensor, ...]:
    """(d residual, dx, dw, dc, da); empty what is not there, and dx if it equals d residual."""
    backward = _launch_backward if runs_triton(residual_out) else _compute_backward
    return tuple(or_empty(gradient, residual_out) for gradient in backward(grad_y, residual_out, *arguments))


@_backward.register_fake
def _(grad_y: Tensor, residual_out: Tensor, reciprocal: Tensor, weight: Tensor, *arguments) -> tuple[Tensor, ...]:
    _, _, scale, x, x_scale = arguments
    return (
        residual_out.new_empty(residual_out.shape),
        like_or_empty(None if x_scale is None else residual_out, residual_out),
        weight.new_empty(weight.shape),
        like_or_empty(scale, residual_out),
        like_or_empty(None if x is None else x_scale, residual_out),
    )


def _save(ctx, inputs, output) -> None:
    x, _, weight, _, ctx.rounding, scale, x_scale = inputs
    _, residual_out, reciprocal = output
    # x costs memory and is needed for nothing but da.
    ctx.save_for_backward(
        residual_out, reciprocal, weight, scale, x_scale, x if x_scale is not None and ctx.needs_input_grad[6] else None
    )
    ctx.mark_non_differentiable(reciprocal)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_y: Tensor | None, grad_residual_out: Tensor | None, _) -> tuple[Tensor | None, ...]:
    residual_out, reciprocal, weight, scale, x_scale, x = ctx.saved_tensors
    if grad_y is None:  # nothing used the norm, for once
        grad_y = torch.zeros_like(residual_out)
    grad_residual, grad_x, grad_weight, grad_scale, grad_x_scale = torch.ops.titan_yulan.add_rms_norm_backward(
        grad_y, residual_out, reciprocal, weight, ctx.rounding, grad_residual_out, scale, x, x_scale
    )
    return (
        grad_residual if x_scale is None else grad_x,
        grad_residual,
        grad_weight,
        None,
        None,
        None if scale is None else grad_scale,
        None if x is None else grad_x_scale,
    )


_forward.register_autograd(_differentiate, setup_context=_save)


def _shard_forward(*arguments):
    return row_shardings(range(arguments[0].ndim - 1), "xxx", "xxw..ww", arguments)


def _shard_backward(*arguments):
    x_scale, x, scale = arguments[:-4:-1]
    outputs = ["x", "w" if x_scale is None else "x", "p", "w" if scale is None else "p", "w" if x is None else "p"]
    return row_shardings(range(arguments[0].ndim - 1), "".join(outputs), "xxxw.xwxw", arguments)


register_sharding(torch.ops.titan_yulan.add_rms_norm_forward.default, _shard_forward)
register_sharding(torch.ops.titan_yulan.add_rms_norm_backward.default, _shard_backward)


def variants(hidden: int, intermediate: int, vocab: int) -> list[Variant]:
    """Every kernel as launched, named as in `rms_norm`, whose kernel adds the partial sums.

    `_scaled` has a trained multiplier of x, `_scaled_by_constant` one without a gradient.
    """
    forward = pointers(x="bf16", residual="bf16", weight="fp32", scale="fp32", x_scale="fp32", y="bf16")
    forward |= pointers(residual_out="bf16", reciprocal="fp32")
    backward = pointers(grad_y="bf16", grad_residual_out="bf16", residual_out="bf16", reciprocal="fp32", weight="fp32")
    backward |= pointers(scale="fp32", x="bf16", x_scale="fp32", grad_residual="bf16", grad_x="bf16", partials="fp32")
    backward |= pointers(x_scale_partials="fp32") | {"rows": "i32"}
    trained = ("x", "x_scale_partials")
    multiplier = (*trained, "x_scale", "grad_x")
    result = []
    for name, absent in (
        ("forward", ("x_scale",)),
        ("forward_scaled", ()),
        ("forward_rounded", ("x_scale", "scale")),
        ("forward_bf16_weight", ("x_scale",)),
        ("backward", multiplier),
        ("backward_scaled", ()),
        ("backward_scaled_by_constant", trained),
        ("backward_rounded", (*multiplier, "scale")),
        ("backward_bf16_weight", multiplier),
    ):
        kernel, types, constants = _forward_kernel, forward, {"EPS": 1e-6}
        if name.startswith("backward"):
            kernel, types, constants = _backward_kernel, backward, {"STAGES": BACKWARD_STAGES}
        types = types | pointers(weight="bf16" if name.endswith("bf16_weight") else "fp32")
        row = {"N": hidden, "BLOCK": row_configuration(hidden)[0], "ROUND_FIRST": name.endswith("rounded")}
        result.append(aligned_variant(name, kernel, types, row | constants, absent, **row_launch(hidden)))
    return result
