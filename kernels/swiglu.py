"""SwiGLU, one operation: y = silu(gate) * up, element by element (Shazeer, arXiv 2002.05202, equation 6).

Forward, with s = sigmoid(gate):    y = gate s up
Backward:                           d gate = dy up s (1 + gate (1 - s)),   d up = dy gate s

Everything is computed in float32 and rounded once, at the store. Gate and up come as two tensors (`swiglu`), or as the
two halves of the last dimension of one (`swiglu_packed`), as one matrix product of the concatenated weights makes them.

The kernels go through the elements of y in flat blocks, whatever the size of a row: at 4,800 columns a power-of-two
block per row would leave 41 % of its threads without work. Where a row ends matters only for packed inputs; the number
of columns is a compile-time constant, so that the compiler still proves 16-byte accesses.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from titan_yulan.kernels.runtime import (
    Kernels,
    check_alike,
    pointers,
    register_sharding,
    row_shardings,
    runs_triton,
    tl,
    triton,
    use_operator,
)
from titan_yulan.kernels.variant import Variant

_BLOCK, _WARPS = 1024, 4  # 8 elements a thread: one 16-byte access per tensor in 16-bit types


def swiglu(gate: Tensor, up: Tensor, *, kernels: Kernels = "auto") -> Tensor:
    """silu(gate) * up.

    Args:
        gate: any shape; float32, float16, bfloat16, or float64 (by the reference).
        up: same shape and type.
        kernels: see `runtime.choose`; `"reference"` is plain autograd.

    Returns:
        Same shape and type.

    Raises:
        TypeError: a type that is not floating, or two types.
        ValueError: two shapes or devices, or Triton insisted on where it cannot run.
    """
    _check(gate)
    check_alike(gate=gate, up=up)
    if not use_operator(kernels, gate.device):
        return swiglu_reference(gate, up)
    return torch.ops.titan_yulan.swiglu_forward(gate, up)


def swiglu_packed(gate_up: Tensor, *, kernels: Kernels = "auto") -> Tensor:
    """silu(gate) * up of the two halves of the last dimension.

    Args:
        gate_up: (..., 2 * intermediate), gate before up; types as in `swiglu`.
        kernels: see `runtime.choose`; `"reference"` is plain autograd.

    Returns:
        (..., intermediate) in gate_up's type.

    Raises:
        TypeError: a type that is not floating.
        ValueError: an odd last dimension, or Triton insisted on where it cannot run.
    """
    _check(gate_up)
    if gate_up.ndim == 0 or gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up of shape {tuple(gate_up.shape)} does not have two halves")
    if not use_operator(kernels, gate_up.device):
        return swiglu_reference(*gate_up.chunk(2, dim=-1))
    return torch.ops.titan_yulan.swiglu_packed_forward(gate_up)


class SwiGLU(nn.Module):
    """`swiglu`, or `swiglu_packed` if `packed`, as a module without parameters; raises what they raise."""

    def __init__(self, packed: bool = False, kernels: Kernels = "auto") -> None:
        super().__init__()
        self.packed, self.kernels = packed, kernels

    def forward(self, *inputs: Tensor) -> Tensor:
        """gate and up, or gate_up if packed -> (..., intermediate)."""
        return (swiglu_packed if self.packed else swiglu)(*inputs, kernels=self.kernels)


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up in plain PyTorch, cast once at the end.

    Args:
        gate: any shape and floating type; passed through x * sigmoid(x).
        up: same shape and type.

    Returns:
        Same shape and type, computed in the wider of float32 and the inputs' type.
    """
    wide = torch.promote_types(gate.dtype, torch.float32)
    return (functional.silu(gate.to(wide)) * up.to(wide)).to(gate.dtype)


def _check(tensor: Tensor) -> None:
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise TypeError(f"SwiGLU takes float32, float16, bfloat16 and float64, not {tensor.dtype}")


# The kernels. N is the number of columns of y where the inputs are packed: `gate` and `up` are then the same tensor,
# whose rows are 2 N long, with up N elements after gate. N is 0 for two tensors, whose rows need no telling apart.
# The mask does not break up 16-byte accesses as long as Triton finds `elements` to be a multiple of 16.


@triton.jit
def _locate(N: tl.constexpr, BLOCK: tl.constexpr):
    """(index in y, index in gate) of this program's elements: in 64 bits, but with the division by N in 32."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    inside = tl.arange(0, BLOCK)
    source = first + inside
    if N > 0:
        row = first // N
        column = (first - row * N).to(tl.int32) + inside
        source = row * (2 * N) + (column // N * (2 * N) + column % N)
    return first + inside, source


@triton.jit
def _forward_kernel(gate, up, y, elements, N: tl.constexpr, BLOCK: tl.constexpr):
    out, source = _locate(N, BLOCK)
    valid = out < elements
    g = tl.load(gate + source, mask=valid, other=0.0).to(tl.float32)
    u = tl.load(up + N + source, mask=valid, other=0.0).to(tl.float32)
    tl.store(y + out, (g * tl.sigmoid(g) * u).to(y.dtype.element_ty), mask=valid)


@triton.jit
def _backward_kernel(grad_y, gate, up, grad_gate, grad_up, elements, N: tl.constexpr, BLOCK: tl.constexpr):
    out, source = _locate(N, BLOCK)
    valid = out < elements
    dy = tl.load(grad_y + out, mask=valid, other=0.0).to(tl.float32)
    g = tl.load(gate + source, mask=valid, other=0.0).to(tl.float32)
    u = tl.load(up + N + source, mask=valid, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    tl.store(grad_gate + source, (dy * u * s * (1 + g * (1 - s))).to(grad_gate.dtype.element_ty), mask=valid)
    tl.store(grad_up + N + source, (dy * g * s).to(grad_up.dtype.element_ty), mask=valid)


def _launch_forward(gate: Tensor, up: Tensor, columns: int) -> Tensor:
    """`columns` is N of the kernels."""
    y = gate.new_empty((*gate.shape[:-1], columns) if columns else gate.shape)
    if y.numel():
        with torch.cuda.device_of(y):
            _forward_kernel[(-(-y.numel() // _BLOCK),)](
                gate, up, y, y.numel(), N=columns, BLOCK=_BLOCK, num_warps=_WARPS
            )  # fmt: skip
    return y


def _launch_backward(
    grad_y: Tensor, gate: Tensor, up: Tensor, grad_gate: Tensor, grad_up: Tensor, columns: int
) -> None:
    if grad_y.numel():
        with torch.cuda.device_of(grad_y):
            _backward_kernel[(-(-grad_y.numel() // _BLOCK),)](
                grad_y, gate, up, grad_gate, grad_up, grad_y.numel(), N=columns, BLOCK=_BLOCK, num_warps=_WARPS
            )  # fmt: skip


# The same in PyTorch: what the operators do on a CPU, and for float64.


def _compute_backward(grad_y: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(gate.dtype, torch.float32)
    dy, g = grad_y.to(wide), gate.to(wide)
    s = torch.sigmoid(g)
    grad_gate = dy * up * s * (1 + g * (1 - s))
    return grad_gate.to(gate.dtype), (dy * g * s).to(gate.dtype)


# The operators.


@torch.library.custom_op("titan_yulan::swiglu_forward", mutates_args=(), schema="(Tensor gate, Tensor up) -> Tensor")
def _forward(gate: Tensor, up: Tensor) -> Tensor:
    if runs_triton(gate):
        return _launch_forward(gate.contiguous(), up.contiguous(), 0)
    return swiglu_reference(gate, up).contiguous()


@_forward.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.custom_op(
    "titan_yulan::swiglu_backward",
    mutates_args=(),
    schema="(Tensor grad_y, Tensor gate, Tensor up) -> (Tensor, Tensor)",
)
def _backward(grad_y: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """(d gate, d up)."""
    if runs_triton(gate):
        grad_gate, grad_up = gate.new_empty(gate.shape), gate.new_empty(gate.shape)
        _launch_backward(grad_y.contiguous(), gate.contiguous(), up.contiguous(), grad_gate, grad_up, 0)
        return grad_gate, grad_up
    grad_gate, grad_up = _compute_backward(grad_y, gate, up)
    return grad_gate.contiguous(), grad_up.contiguous()


@_backward.register_fake
def _(grad_y: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


@torch.library.custom_op("titan_yulan::swiglu_packed_forward", mutates_args=(), schema="(Tensor gate_up) -> Tensor")
def _packed_forward(gate_up: Tensor) -> Tensor:
    if runs_triton(gate_up):
        gate_up = gate_up.contiguous()
        return _launch_forward(gate_up, gate_up, gate_up.shape[-1] // 2)
    return swiglu_reference(*gate_up.chunk(2, dim=-1)).contiguous()


@_packed_forward.register_fake
def _(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


@torch.library.custom_op(
    "titan_yulan::swiglu_packed_backward", mutates_args=(), schema="(Tensor grad_y, Tensor gate_up) -> Tensor"
)
def _packed_backward(grad_y: Tensor, gate_up: Tensor) -> Tensor:
    """d gate_up."""
    if runs_triton(gate_up):
        gate_up, result = gate_up.contiguous(), gate_up.new_empty(gate_up.shape)
        _launch_backward(grad_y.contiguous(), gate_up, gate_up, result, result, gate_up.shape[-1] // 2)
        return result
    return torch.cat(_compute_backward(grad_y, *gate_up.chunk(2, dim=-1)), dim=-1)


@_packed_backward.register_fake
def _(grad_y: Tensor, gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, grad_y: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.titan_yulan.swiglu_backward(grad_y, *ctx.saved_tensors)


def _packed_differentiate(ctx, grad_y: Tensor) -> Tensor:
    return torch.ops.titan_yulan.swiglu_packed_backward(grad_y, *ctx.saved_tensors)


_forward.register_autograd(_differentiate, setup_context=_save)
_packed_forward.register_autograd(_packed_differentiate, setup_context=_save)


def _register_shardings() -> None:
    operators = torch.ops.titan_yulan
    # Two tensors may be sharded along any dimension, packed ones not along the one that has the halves.
    for operator, outputs, inputs, whole in (
        (operators.swiglu_forward, "x", "xx", 0),
        (operators.swiglu_backward, "xx", "xxx", 0),
        (operators.swiglu_packed_forward, "x", "x", 1),
        (operators.swiglu_packed_backward, "x", "xx", 1),
    ):

        def strategies(*arguments, outputs=outputs, inputs=inputs, whole=whole):
            return row_shardings(range(arguments[0].ndim - whole), outputs, inputs, arguments)

        register_sharding(operator.default, strategies)


_register_shardings()


def variants(hidden: int, intermediate: int, vocab: int) -> list[Variant]:
    """Every kernel as launched in bfloat16 at this intermediate size, and at those of 2 and 6 tensor-parallel ranks."""
    forward = pointers(gate="bf16", up="bf16", y="bf16") | {"elements": "i32"}
    backward = pointers(grad_y="bf16", gate="bf16", up="bf16", grad_gate="bf16", grad_up="bf16") | {"elements": "i32"}
    columns = {"forward": 0, "backward": 0, "packed_forward": intermediate, "packed_backward": intermediate}
    for ranks in (2, 6):
        if intermediate % ranks == 0:
            columns[f"packed_forward_of_{ranks}_parts"] = columns[f"packed_backward_of_{ranks}_parts"] = (
                intermediate // ranks
            )
    result = []
    for name, n in columns.items():
        kernel, types = (_forward_kernel, forward) if "forward" in name else (_backward_kernel, backward)
        constants = {"N": n, "BLOCK": _BLOCK}
        result.append(Variant(name, kernel, types, constants, tuple(types), _WARPS, bulk=n % 8 == 0))
    return result
