"""RMSNorm, one operation: the vector of each token divided by its root mean square, times a weight.

Zhang and Sennrich, arXiv 1910.07467, equation 4. Forward, for a token's vector x of N elements, weight w and an
optional scalar c:

    r = 1 / sqrt(mean(x^2) + eps),   h = r x,   y = c w h

Backward, with g = c w dy:

    dx = r (g - h mean(g h)),   A = sum over tokens of dy h,   dw = c A,   dc = sum over columns of w A

c is where constant and trained multipliers meet the norm without being rounded (YuLan-Mini's `ln_scale` and WeSaR
scalars, arXiv 2412.17743). Everything is computed in float32 and rounded once, at the store. `round_before_weight`
rounds h to x's type before the weight, as Hugging Face's Llama does; that rounding is the identity in backward.

Sums over tokens have a fixed order: each of P programs adds up every P-th row, then one kernel adds the P partial sums.
P depends on the number of rows alone, so results repeat bit for bit and do not depend on the GPU's size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from titan_yulan.kernels.runtime import (
    Kernels,
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

MAXIMUM_SIZE = 8192  # a program holds a whole row in registers; of longer ones, some would spill to memory
BACKWARD_STAGES = 2  # rows of the backward kernel under way: one computed, one being loaded
_SUM_ROWS, _SUM_COLUMNS, _SUM_WARPS = 64, 32, 4  # tile of the kernel that adds the partial sums


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    scale: Tensor | float | None = None,
    *,
    round_before_weight: bool = False,
    kernels: Kernels = "auto",
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight * scale over the last dimension.

    Args:
        x: (..., size); float32, float16, bfloat16, or float64 (by the reference).
        weight: (size,), any floating type.
        eps: added to the mean square.
        scale: a number, or a tensor of one element that may need a gradient.
        round_before_weight: Hugging Face's rounding, see the head of this file.
        kernels: see `runtime.choose`; `"reference"` is plain autograd.

    Returns:
        (..., size) in x's type.

    Raises:
        TypeError: a type that is not floating.
        ValueError: shapes or devices that do not fit, or Triton insisted on where it cannot run.
    """
    check_rms_norm(x, weight, eps, scale)
    if not use_operator(kernels, x.device):
        return rms_norm_reference(x, weight, eps, 1.0 if scale is None else scale, round_before_weight)
    return torch.ops.titan_yulan.rms_norm_forward(x, weight, eps, int(round_before_weight), scalar(scale, x))[0]


class RMSNorm(nn.Module):
    """`rms_norm` with a trained `weight` (size,), 1 at first; raises what `rms_norm` raises."""

    def __init__(
        self, size: int, eps: float = 1e-6, *, round_before_weight: bool = False, kernels: Kernels = "auto"
    ) -> None:
        super().__init__()
        self.eps, self.round_before_weight, self.kernels = eps, round_before_weight, kernels
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor, scale: Tensor | float | None = None) -> Tensor:
        """(..., size) -> (..., size)."""
        rounding = self.round_before_weight
        return rms_norm(x, self.weight, self.eps, scale, round_before_weight=rounding, kernels=self.kernels)


def rms_norm_reference(
    x: Tensor, weight: Tensor | None, eps: float, scale: Tensor | float = 1.0, round_before_weight: bool = False
) -> Tensor:
    """`rms_norm` in plain PyTorch, computed in the wider of float32 and x's type; also without a weight (None)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    y = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    if round_before_weight:
        y = y.to(x.dtype).to(y.dtype)
    if weight is not None:
        y = y * weight
    if isinstance(scale, Tensor) or scale != 1.0:
        y = y * scale
    return y.to(x.dtype)


def scalar(value: Tensor | float | None, x: Tensor) -> Tensor | None:
    """A multiplier as the operators take it: one element on x's device, or None for the number 1."""
    if value is None or (not isinstance(value, Tensor) and value == 1.0):
        return None
    if not isinstance(value, Tensor):
        return torch.full((1,), value, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    return value


def check_rms_norm(x: Tensor, weight: Tensor, eps: float, *scales: Tensor | float | None) -> None:
    """Raise what `rms_norm` says it raises."""
    for name, tensor in (("x", x), ("weight", weight)):
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            raise TypeError(f"{name} is {tensor.dtype}; RMSNorm takes float32, float16, bfloat16 and float64")
    if weight.numel() == 0 or x.ndim == 0 or weight.shape != x.shape[-1:]:
        raise ValueError(f"weight of shape {tuple(weight.shape)} does not fit x of shape {tuple(x.shape)}")
    if weight.device != x.device:
        raise ValueError(f"weight is on {weight.device}, x on {x.device}")
    if not eps >= 0:
        raise ValueError(f"eps = {eps} must not be negative")
    for scale in scales:
        if isinstance(scale, Tensor) and (scale.ndim > 1 or scale.numel() != 1):
            raise ValueError(f"a scale has shape () or (1,), not {tuple(scale.shape)}")
        if isinstance(scale, Tensor) and scale.device != x.device:
            raise ValueError(f"a scale is on {scale.device}, x on {x.device}")


# The kernels. `scale` is None where there is none, which Triton resolves when it compiles.


@triton.jit
def _forward_kernel(
    x, weight, scale, y, reciprocal,
    N: tl.constexpr, EPS: tl.constexpr, ROUND_FIRST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row per program. `reciprocal` receives r of every row, in float32."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    valid = columns < N
    values = tl.load(x + row * N + columns, mask=valid, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(values * values, 0) / N + EPS)
    tl.store(reciprocal + row, r)
    result = values * r
    if ROUND_FIRST:
        result = result.to(y.dtype.element_ty).to(tl.float32)
    result *= tl.load(weight + columns, mask=valid, other=0.0).to(tl.float32)
    if scale is not None:
        result *= tl.load(scale).to(tl.float32)
    tl.store(y + row * N + columns, result.to(y.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["rows"])
def _backward_kernel(
    grad_y, x, reciprocal, weight, scale, grad_x, partials, rows,
    N: tl.constexpr, ROUND_FIRST: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Rows p, p + P, p + 2 P, ... by program p, which leaves their A in row p of `partials`, (P, N)."""
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    valid = columns < N
    multiplier = tl.load(weight + columns, mask=valid, other=0.0).to(tl.float32)
    if scale is not None:
        multiplier *= tl.load(scale).to(tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for row in tl.range(program, rows, tl.num_programs(0), num_stages=STAGES):
        offsets = tl.cast(row, tl.int64) * N + columns
        dy = tl.load(grad_y + offsets, mask=valid, other=0.0).to(tl.float32)
        values = tl.load(x + offsets, mask=valid, other=0.0)
        r = tl.load(reciprocal + row)
        h = values.to(tl.float32) * r
        if ROUND_FIRST:
            total += dy * h.to(values.dtype).to(tl.float32)
        else:
            total += dy * h
        g = dy * multiplier
        gradient = (g - h * (tl.sum(g * h, 0) / N)) * r
        tl.store(grad_x + offsets, gradient.to(grad_x.dtype.element_ty), mask=valid)
    tl.store(partials + program * N + columns, total, mask=valid)


@triton.jit(do_not_specialize=["programs"])
def _sum_kernel(
    partials, weight, scale, grad_weight, scale_partials, programs,
    N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dw of BLOCK columns per program from the P partial sums, and those columns' share of dc, (N / BLOCK,)."""
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = columns < N
    total = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for start in tl.range(0, programs, ROWS):
        rows = start + tl.arange(0, ROWS)
        mask = (rows < programs)[:, None] & valid[None, :]
        total += tl.load(partials + rows[:, None] * N + columns[None, :], mask=mask, other=0.0)
    sums = tl.sum(total, 0)
    if scale is not None:
        loaded = tl.load(weight + columns, mask=valid, other=0.0).to(tl.float32)
        tl.store(scale_partials + tl.program_id(0), tl.sum(sums * loaded, 0))
        sums *= tl.load(scale).to(tl.float32)
    tl.store(grad_weight + columns, sums.to(grad_weight.dtype.element_ty), mask=valid)


# How they are launched.


def row_configuration(size: int) -> tuple[int, int]:
    """(block, warps): a row in one block, 16 elements a thread, which are two 16-byte accesses in 16-bit types."""
    if size > MAXIMUM_SIZE:
        raise ValueError(f'RMSNorm over {size} columns: Triton takes {MAXIMUM_SIZE}; choose kernels = "reference"')
    block = max(32, 1 << (size - 1).bit_length())
    return block, max(1, block // 512)


def backward_programs(rows: int) -> int:
    """Programs of the backward kernel, P: 2 or 4 for each of an H100's 132 processors; more means more partial sums."""
    return min(rows, 264 if rows < 8192 else 528)


def _launch_forward(
    x: Tensor, weight: Tensor, eps: float, rounding: int, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    y = torch.empty_like(x)
    reciprocal = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    block, warps = row_configuration(x.shape[-1])
    if x.numel():
        with torch.cuda.device_of(x):
            _forward_kernel[(reciprocal.numel(),)](
                x, weight.contiguous(), scale, y, reciprocal,
                N=x.shape[-1], EPS=eps, ROUND_FIRST=bool(rounding), BLOCK=block, num_warps=warps,
            )  # fmt: skip
    return y, reciprocal


def _launch_backward(
    grad_y: Tensor, x: Tensor, reciprocal: Tensor, weight: Tensor, rounding: int, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    x, weight = x.contiguous(), weight.contiguous()
    grad_x = torch.empty_like(x)
    size, rows = weight.numel(), reciprocal.numel()
    # Without rows there is nothing to launch, and the sum over no partial sums is 0.
    partials = x.new_empty(backward_programs(rows), size, dtype=torch.float32)
    block, warps = row_configuration(size)
    if rows:
        with torch.cuda.device_of(x):
            _backward_kernel[(partials.shape[0],)](
                grad_y.contiguous(), x, reciprocal.contiguous(), weight, scale, grad_x, partials,
                rows, N=size, ROUND_FIRST=bool(rounding), BLOCK=block, STAGES=BACKWARD_STAGES, num_warps=warps,
            )  # fmt: skip
    return grad_x, *launch_sum(partials, weight, scale)


def launch_sum(partials: Tensor, weight: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """dw and dc (None without a scale) from the partial sums of A, (P, N) in float32."""
    programs, size = partials.shape
    grad_weight = torch.empty_like(weight)
    scale_partials = None if scale is None else partials.new_empty(-(-size // _SUM_COLUMNS))
    with torch.cuda.device_of(partials):
        _sum_kernel[(-(-size // _SUM_COLUMNS),)](
            partials, weight, scale, grad_weight, scale_partials,
            programs, N=size, ROWS=_SUM_ROWS, BLOCK=_SUM_COLUMNS, num_warps=_SUM_WARPS,
        )  # fmt: skip
    if scale is None or scale_partials is None:
        return grad_weight, None
    return grad_weight, scale_partials.sum().to(scale.dtype).reshape(scale.shape)


# The same in PyTorch: what the operators do on a CPU, and for float64.


def _compute_forward(
    x: Tensor, weight: Tensor, eps: float, rounding: int, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    y = rms_norm_reference(x, weight, eps, 1.0 if scale is None else scale, bool(rounding))
    return y.contiguous(), compute_reciprocal(x, eps)


def compute_reciprocal(x: Tensor, eps: float) -> Tensor:
    """r of every row: (..., size) -> (...), in the wider of float32 and x's type."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.rsqrt(wide.square().mean(dim=-1) + eps).contiguous()


def compute_backward(
    grad_y: Tensor, x: Tensor, reciprocal: Tensor, weight: Tensor, rounding: int, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dx (not yet rounded to x's type), dw and dc (None without a scale)."""
    wide, r = reciprocal.dtype, reciprocal.unsqueeze(-1)
    c = 1.0 if scale is None else scale.to(wide)
    dy, h = grad_y.to(wide), x.to(wide) * r
    g = dy * (weight.to(wide) * c)
    grad_x = (g - h * (g * h).mean(dim=-1, keepdim=True)) * r
    rounded = h.to(x.dtype).to(wide) if rounding else h
    a = (dy * rounded).reshape(-1, weight.numel()).sum(0)
    grad_scale = None if scale is None else (a * weight).sum().to(scale.dtype).reshape(scale.shape)
    return grad_x, (a * c).to(weight.dtype), grad_scale


# The operators. `rounding` is round_before_weight as an integer: `runtime.row_shardings` says why.


@torch.library.custom_op(
    "titan_yulan::rms_norm_forward",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, float eps, int rounding, Tensor? scale) -> (Tensor, Tensor)",
)
def _forward(x: Tensor, weight: Tensor, eps: float, rounding: int, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """(y, r of every row)."""
    return (_launch_forward if runs_triton(x) else _compute_forward)(x, weight, eps, rounding, scale)


@_forward.register_fake
def _(x: Tensor, weight: Tensor, eps: float, rounding: int, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=wide)


@torch.library.custom_op(
    "titan_yulan::rms_norm_backward",
    mutates_args=(),
    schema="(Tensor grad_y, Tensor x, Tensor reciprocal, Tensor weight, int rounding, Tensor? scale)"
    " -> (Tensor, Tensor, Tensor)",
)
def _backward(
    grad_y: Tensor, x: Tensor, reciprocal: Tensor, weight: Tensor, rounding: int, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dw, dc); dc is empty without a scale."""
    backward = _launch_backward if runs_triton(x) else compute_backward
    grad_x, grad_weight, grad_scale = backward(grad_y, x, reciprocal, weight, rounding, scale)
    return grad_x.to(x.dtype).contiguous(), grad_weight, or_empty(grad_scale, x)


@_backward.register_fake
def _(
    grad_y: Tensor, x: Tensor, reciprocal: Tensor, weight: Tensor, rounding: int, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), like_or_empty(scale, x)


def _save(ctx, inputs, output) -> None:
    x, weight, _, ctx.rounding, scale = inputs
    ctx.save_for_backward(x, output[1], weight, scale)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, grad_y: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x, reciprocal, weight, scale = ctx.saved_tensors
    grad_x, grad_weight, grad_scale = torch.ops.titan_yulan.rms_norm_backward(
        grad_y, x, reciprocal, weight, ctx.rounding, scale
    )
    return grad_x, grad_weight, None, None, None if scale is None else grad_scale


_forward.register_autograd(_differentiate, setup_context=_save)


def _shard_forward(*arguments):
    return row_shardings(range(arguments[0].ndim - 1), "xx", "xw..w", arguments)


def _shard_backward(*arguments):
    outputs = "xpw" if arguments[-1] is None else "xpp"
    return row_shardings(range(arguments[0].ndim - 1), outputs, "xxxw.w", arguments)


register_sharding(torch.ops.titan_yulan.rms_norm_forward.default, _shard_forward)
register_sharding(torch.ops.titan_yulan.rms_norm_backward.default, _shard_backward)


def row_launch(size: int) -> dict[str, int | bool]:
    """`Variant`'s account of a launch with a row in a block: accesses are wide with 8 elements a thread or more."""
    block, warps = row_configuration(size)
    return {"warps": warps, "bulk": size % 8 == 0 and block >= 256 * warps}


def variants(hidden: int, intermediate: int, vocab: int) -> list[Variant]:
    """Every kernel as launched in bfloat16, with float32 weights and a scale; `_rounded`: without a scale."""
    tile = {"N": hidden, "ROWS": _SUM_ROWS, "BLOCK": _SUM_COLUMNS}
    result = []
    for suffix, w in (("", "fp32"), ("_rounded", "fp32"), ("_bf16_weight", "bf16")):
        row = {"N": hidden, "BLOCK": row_configuration(hidden)[0], "ROUND_FIRST": suffix == "_rounded"}
        forward = pointers(x="bf16", weight=w, scale="fp32", y="bf16", reciprocal="fp32")
        backward = pointers(grad_y="bf16", x="bf16", reciprocal="fp32", weight=w, scale="fp32", grad_x="bf16")
        backward |= pointers(partials="fp32") | {"rows": "i32"}
        total = pointers(partials="fp32", weight=w, scale="fp32", grad_weight=w, scale_partials="fp32")
        for name, kernel, types, constants, launch in (
            ("forward", _forward_kernel, forward, row | {"EPS": 1e-6}, row_launch(hidden)),
            ("backward", _backward_kernel, backward, row | {"STAGES": BACKWARD_STAGES}, row_launch(hidden)),
            ("sum", _sum_kernel, total | {"programs": "i32"}, tile, {"warps": _SUM_WARPS, "bulk": False}),
        ):
            absent = [argument for argument in types if suffix == "_rounded" and argument.startswith("scale")]
            result.append(aligned_variant(name + suffix, kernel, types, constants, absent, **launch))
    return result
