"""Weighted cross-entropy with z-loss on logits that exist in memory.

For a token with logits z (V of them), target t and weight w:

    m    = max(z)            s = sum(exp(z - m))            lse = m + log(s), the logarithm of the partition function
    loss = log(s) - (z_t - m)                               the cross-entropy; no difference of large numbers
    objective = w * (loss + z_weight * lse^2)               z-loss: PaLM, arXiv 2204.02311, section 5
    d objective / d z = w * (1 + 2 * z_weight * lse) * exp(z - m) / s - w * onehot(t)

so the gradient of a row sums to 2 * w * z_weight * lse. m and s are kept instead of lse: exp(z - m) / s is right to a
few units in the last place, exp(z - lse) only as far as a rounded lse allows.

One kernel, a row per program, made of two walks along the row; a launch takes the first, the second or both:

    forward            reads the row: loss, m, s
    gradient           reads the row and writes its gradient elsewhere (the backward operator)
    forward_gradient   the first walk, then the second, which writes the gradient over the logits and finds the row in
                       the L2 cache, so that memory sees one read and one write (the fused head and loss)

A row whose factor (weight times upstream gradient) is 0 is not read: its losses and its gradient are exactly 0 and its
target may be anything. A target outside the vocabulary of any other row makes the loss NaN on a GPU, rather than read
foreign memory; set TITAN_YULAN_CHECK_TARGETS=1 to get an error that names it, at the cost of a synchronisation a call.

The operators see plain tensors: FSDP2 gathers the head before it is used. They have no DTensor sharding.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn

from titan_yulan.kernels.runtime import Kernels, pointers, runs_triton, tl, triton, use_operator
from titan_yulan.kernels.variant import Variant, aligned_variant

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

_LOG2_E = tl.constexpr(1.4426950408889634)
_LOWEST = tl.constexpr(-3.4028234663852886e38)  # of float32; with -inf, the first step would be -inf - -inf


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    token_weights: Tensor,
    z_weight: float = 0.0,
    *,
    denominator: Tensor | None = None,
    kernels: Kernels = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted cross-entropy of logits, with z-loss.

    Args:
        logits: (tokens, vocab), columns side by side in memory, rows at any distance; not changed.
        targets: (tokens,) int64.
        token_weights: (tokens,) float32; 0 leaves a token out, whatever its target and logits.
        z_weight: weight of the squared log-partition (z-loss).
        denominator: one-element float32 tensor that divides the objective (and so the gradient); None for 1. Not read
            on the host; gets no gradient.
        kernels: `"auto"` runs Triton where it can, `"triton"` insists, `"reference"` is plain PyTorch under autograd.

    Returns:
        objective: () sum over tokens of weight * (cross-entropy + z_weight * logsumexp^2), divided by the denominator;
            differentiable with respect to the logits.
        cross_entropy: (tokens,) weight * cross-entropy, not divided; for reports, without gradient.
        logsumexp: (tokens,) of each token's logits, 0 where the weight is 0; for reports, without gradient.
        All in float32, or float64 if the logits are.

    Raises:
        TypeError: a type other than those above.
        ValueError: shapes, devices or strides that do not fit, or Triton insisted on where it cannot run.
        IndexError: a target outside the vocabulary, under TITAN_YULAN_CHECK_TARGETS=1.
    """
    operator = use_operator(kernels, logits.device)
    _check(logits, targets, token_weights, denominator)
    if not operator:
        return cross_entropy_reference(logits, targets, token_weights, z_weight, denominator=denominator)
    losses, statistics = torch.ops.titan_yulan.cross_entropy_forward(logits, targets, token_weights, z_weight)
    objective = losses.sum()
    if denominator is not None:
        objective = objective / denominator.detach().reshape(())
    plain, maxima, sums = statistics.unbind()
    return objective, token_weights.detach() * plain, maxima + sums.log()


def cross_entropy_reference(
    logits: Tensor,
    targets: Tensor,
    token_weights: Tensor,
    z_weight: float = 0.0,
    *,
    denominator: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`cross_entropy` in plain PyTorch under autograd, computed in the wider of float32 and the logits' type."""
    compute = torch.promote_types(logits.dtype, torch.float32)
    live = token_weights != 0
    weights = token_weights.detach().to(compute)
    # Rows left out are replaced before anything is computed from them: 0 * inf would be NaN.
    wide = torch.where(live[:, None], logits, 0).to(compute)
    lse = torch.where(live, wide.logsumexp(1), 0)
    picked = wide.gather(1, targets.masked_fill(~live, 0)[:, None])[:, 0]
    losses = weights * torch.where(live, lse - picked, 0)
    objective = (losses + z_weight * weights * lse.square()).sum()
    if denominator is not None:
        objective = objective / denominator.detach().reshape(())
    return objective, losses.detach(), lse.detach()


def check_rows(rows: int, targets: Tensor, token_weights: Tensor, denominator: Tensor | None, like: Tensor) -> None:
    """Raise TypeError or ValueError unless what belongs to `rows` tokens fits them and the device of `like`."""
    for name, tensor in (("targets", targets), ("token_weights", token_weights)):
        if tensor.shape != (rows,):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; {rows} tokens need ({rows},)")
    if targets.dtype != torch.int64:
        raise TypeError(f"targets is {targets.dtype}; it must be torch.int64")
    if token_weights.dtype != torch.float32 and token_weights.dtype != torch.promote_types(like.dtype, torch.float32):
        raise TypeError(f"token_weights is {token_weights.dtype}; it must be torch.float32")
    if denominator is not None and (denominator.numel() != 1 or not denominator.is_floating_point()):
        raise ValueError(f"denominator must be one floating-point number, not {tuple(denominator.shape)}")
    others = {"targets": targets, "token_weights": token_weights, "denominator": denominator}
    for name, tensor in others.items():
        if tensor is not None and tensor.device != like.device:
            raise ValueError(f"{name} is on {tensor.device}, the logits are on {like.device}")


def _check(logits: Tensor, targets: Tensor, token_weights: Tensor, denominator: Tensor | None) -> None:
    if logits.dtype not in FLOATING:
        raise TypeError(f"logits is {logits.dtype}; cross-entropy takes float32, float16, bfloat16 and float64")
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits has shape {tuple(logits.shape)}; it must be (tokens, vocab)")
    if logits.stride(1) != 1 and logits.shape[1] > 1:
        raise ValueError(f"logits has strides {logits.stride()}; a row must be contiguous: call .contiguous()")
    check_rows(logits.shape[0], targets, token_weights, denominator, logits)


def check_range(targets: Tensor, token_weights: Tensor, vocab: int) -> None:
    """Under TITAN_YULAN_CHECK_TARGETS=1, raise IndexError for a target that counts and is outside the vocabulary.

    Only then, because it makes the host wait for the device.
    """
    if os.environ.get("TITAN_YULAN_CHECK_TARGETS") != "1":
        return
    wrong = torch.nonzero((token_weights != 0) & ((targets < 0) | (targets >= vocab)))
    if wrong.numel():
        token = int(wrong[0])
        target = int(targets[token])
        raise IndexError(f"target {target} of token {token} is outside the vocabulary of {vocab} ({len(wrong)} such)")


# The arithmetic on rows, in PyTorch and in Triton. `width` is how many columns of a row may be touched: more than the
# vocabulary where the rows are padded, so that a kernel needs no narrow access at their ends.


def forward_rows(
    logits: Tensor, vocab: int, targets: Tensor, factors: Tensor, statistics: Tensor, use_triton: bool
) -> None:
    """Fill `statistics` (3, rows) with loss, m and s of each row (0, 0 and 1 where the factor is 0).

    `logits` is (rows, width) with width >= vocab; what the columns behind the vocabulary hold does not matter.
    """
    if use_triton:
        _launch(logits, vocab, targets, factors, statistics, 0.0, forward=True, gradients=None)
    else:
        _statistics_in_torch(logits[:, :vocab], targets, factors, statistics)


def forward_gradient_rows(
    logits: Tensor,
    vocab: int,
    targets: Tensor,
    factors: Tensor,
    z_weight: float,
    statistics: Tensor,
    use_triton: bool,
) -> Tensor:
    """`forward_rows`, and the gradient of sum(factors * (loss + z_weight * lse^2)) as (rows, vocab) in logits' type.

    Triton writes it over the logits (and zeros behind the vocabulary).
    """
    if use_triton:
        _launch(logits, vocab, targets, factors, statistics, z_weight, forward=True, gradients=logits)
        return logits[:, :vocab]
    exponentials = _statistics_in_torch(logits[:, :vocab], targets, factors, statistics)
    return _gradient_in_torch(exponentials, targets, factors, z_weight, statistics).to(logits.dtype)


def gradient_rows(
    logits: Tensor,
    vocab: int,
    targets: Tensor,
    factors: Tensor,
    z_weight: float,
    statistics: Tensor,
    use_triton: bool,
) -> Tensor:
    """The gradient as `forward_gradient_rows` gives it, for `statistics` that are known.

    They may be those of longer rows, of which the logits are some columns; a target of -1 is then in none of these.
    """
    if use_triton:
        _launch(logits, vocab, targets, factors, statistics, z_weight, forward=False, gradients=logits)
        return logits[:, :vocab]
    exponentials = (logits[:, :vocab].to(statistics.dtype) - statistics[1][:, None]).exp_()
    return _gradient_in_torch(exponentials, targets, factors, z_weight, statistics).to(logits.dtype)


def _statistics_in_torch(logits: Tensor, targets: Tensor, factors: Tensor, statistics: Tensor) -> Tensor:
    """Fills `statistics`; returns exp(z - m)."""
    dead = factors == 0
    wide = logits.to(statistics.dtype)
    maxima = wide.amax(1)
    exponentials = (wide - maxima[:, None]).exp_()
    sums = exponentials.sum(1)
    picked = wide.gather(1, targets.masked_fill(dead, 0)[:, None])[:, 0]
    statistics[0] = (sums.log() - (picked - maxima)).masked_fill_(dead, 0)
    statistics[1] = maxima.masked_fill_(dead, 0)
    statistics[2] = sums.masked_fill_(dead, 1)
    return exponentials


def _gradient_in_torch(
    exponentials: Tensor, targets: Tensor, factors: Tensor, z_weight: float, statistics: Tensor
) -> Tensor:
    """The gradient, in the place of exp(z - m); a target of -1 is in none of the columns."""
    _, maxima, sums = statistics.unbind()
    dead = factors == 0
    share = factors * (1 + 2 * z_weight * (maxima + sums.log())) / sums
    exponentials.mul_(share[:, None]).masked_fill_(dead[:, None], 0)
    none = dead | (targets == -1)
    return exponentials.scatter_add_(1, targets.masked_fill(none, 0)[:, None], -factors.masked_fill(none, 0)[:, None])


@triton.jit
def _maximum_and_sum(logits, VOCAB: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """m and s of the row at `logits`. Every lane keeps its own m and s, so that nothing waits before the end."""
    maxima = tl.full([BLOCK], _LOWEST, tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, WIDTH, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        values = tl.load(logits + columns, mask=columns < WIDTH, other=float("-inf"), eviction_policy="evict_last")
        values = values.to(tl.float32)
        if VOCAB < WIDTH:
            values = tl.where(columns < VOCAB, values, float("-inf"))
        # exp(old - new maximum) where the maximum grows, exp(value - maximum) where not: one exponential for both
        smaller = tl.exp2(-tl.abs(values - maxima) * _LOG2_E)
        sums = tl.where(values > maxima, sums * smaller + 1.0, sums + smaller)
        maxima = tl.maximum(maxima, values)
    maximum = tl.max(maxima, 0)
    return maximum, tl.sum(sums * tl.exp2((maxima - maximum) * _LOG2_E), 0)


@triton.jit
def _write_gradient(
    logits, gradients, target, factor, maximum, total, z_weight,
    VOCAB: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of the row at `logits` to `gradients`, which may be the same place; 0 behind the vocabulary."""
    share = factor * (1.0 + 2.0 * tl.cast(z_weight, tl.float32) * (maximum + tl.log(total))) / total
    for start in range(0, WIDTH, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        valid = columns < WIDTH
        values = tl.load(logits + columns, mask=valid, other=float("-inf"), eviction_policy="evict_first")
        gradient = tl.exp2((values.to(tl.float32) - maximum) * _LOG2_E) * share
        gradient = tl.where(columns == target, gradient - factor, gradient)
        if VOCAB < WIDTH:
            gradient = tl.where(columns < VOCAB, gradient, 0.0)
        tl.store(gradients + columns, gradient.to(gradients.dtype.element_ty), mask=valid)


@triton.jit
def _row_kernel(
    logits, targets, factors, losses, maxima, sums, gradients, z_weight,
    VOCAB: tl.constexpr, WIDTH: tl.constexpr, STRIDE: tl.constexpr, GRADIENT_STRIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row. Without `losses`, m and s are given; without `gradients`, none is written.

    Where m and s are given, the target may be in none of the columns: -1.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * STRIDE
    if gradients is not None:
        gradients += row * GRADIENT_STRIDE
    factor = tl.load(factors + row)
    if factor == 0.0:
        if losses is not None:
            tl.store(losses + row, 0.0)
            tl.store(maxima + row, 0.0)
            tl.store(sums + row, 1.0)
        if gradients is not None:
            for start in range(0, WIDTH, BLOCK):
                columns = start + tl.arange(0, BLOCK)
                tl.store(gradients + columns, tl.zeros([BLOCK], gradients.dtype.element_ty), mask=columns < WIDTH)
    else:
        target = tl.load(targets + row)
        if losses is None:
            maximum, total = tl.load(maxima + row), tl.load(sums + row)
        else:
            picked = tl.load(logits + target, mask=(target >= 0) & (target < VOCAB), other=float("nan")).to(tl.float32)
            maximum, total = _maximum_and_sum(logits, VOCAB, WIDTH, BLOCK)
            tl.store(losses + row, tl.log(total) - (picked - maximum))
            tl.store(maxima + row, maximum)
            tl.store(sums + row, total)
            tl.debug_barrier()  # every warp has read the target's logit before one of them may overwrite it
        if gradients is not None:
            _write_gradient(logits, gradients, target, factor, maximum, total, z_weight, VOCAB, WIDTH, BLOCK)


def _configuration(width: int) -> tuple[int, int]:
    """(columns at a time, warps): 16 to 32 columns a thread, without spilling registers.

    Wide blocks hold few rows in flight, 2 on each multiprocessor, so that the second walk finds them in the L2 cache.
    """
    if width >= 32768:
        return 8192, 8
    if width >= 4096:
        return 4096, 8
    return max(128, min(2048, 1 << (width - 1).bit_length())), 4


def _launch(
    logits: Tensor,
    vocab: int,
    targets: Tensor,
    factors: Tensor,
    statistics: Tensor,
    z_weight: float,
    *,
    forward: bool,
    gradients: Tensor | None,
) -> None:
    rows, width = logits.shape
    if rows == 0:
        return
    block, warps = _configuration(width)
    losses, maxima, sums = statistics.unbind()
    with torch.cuda.device_of(logits):
        _row_kernel[(rows,)](
            logits, targets, factors, losses if forward else None, maxima, sums, gradients, z_weight,
            VOCAB=vocab, WIDTH=width, STRIDE=logits.stride(0),
            GRADIENT_STRIDE=0 if gradients is None else gradients.stride(0), BLOCK=block, num_warps=warps,
        )  # fmt: skip


def row_variants(vocab: int, width: int, names: tuple[str, ...], suffix: str = "") -> list[Variant]:
    """The launches named, for bfloat16 rows of `width` columns side by side in memory, `vocab` of them valid."""
    block, warps = _configuration(width)
    types = pointers(logits="bf16", targets="i64", factors="fp32", losses="fp32", maxima="fp32", sums="fp32")
    types |= pointers(gradients="bf16") | {"z_weight": "fp32"}
    constants = {"VOCAB": vocab, "WIDTH": width, "STRIDE": width, "GRADIENT_STRIDE": width, "BLOCK": block}
    absent = {"forward": ("gradients",), "gradient": ("losses",), "forward_gradient": ()}
    # Rows whose number of columns 8 does not divide begin anywhere: 16 bytes at a time are not to be had.
    launch: dict[str, int | bool] = {"warps": warps, "stages": 3, "bulk": width % 8 == 0}
    return [aligned_variant(n + suffix, _row_kernel, types, constants, absent[n], **launch) for n in names]


def variants(hidden: int, intermediate: int, vocab: int) -> list[Variant]:
    """What the operators launch on a GPU for contiguous logits of a model's vocabulary."""
    return row_variants(vocab, vocab, ("forward", "gradient"))


@torch.library.custom_op("titan_yulan::cross_entropy_forward", mutates_args=())
def _forward(logits: Tensor, targets: Tensor, token_weights: Tensor, z_weight: float) -> tuple[Tensor, Tensor]:
    """(tokens,) weight * (loss + z_weight * lse^2), and (3, tokens) loss, m and s."""
    check_range(targets, token_weights, logits.shape[1])
    compute = torch.promote_types(logits.dtype, torch.float32)
    statistics = logits.new_empty((3, logits.shape[0]), dtype=compute)
    factors = token_weights.to(compute).contiguous()
    forward_rows(logits, logits.shape[1], targets.contiguous(), factors, statistics, runs_triton(logits))
    plain, maxima, sums = statistics.unbind()
    return factors * (plain + z_weight * (maxima + sums.log()).square()), statistics


@_forward.register_fake
def _(logits: Tensor, targets: Tensor, token_weights: Tensor, z_weight: float) -> tuple[Tensor, Tensor]:
    compute = torch.promote_types(logits.dtype, torch.float32)
    rows = logits.shape[0]
    return logits.new_empty((rows,), dtype=compute), logits.new_empty((3, rows), dtype=compute)


@torch.library.custom_op("titan_yulan::cross_entropy_backward", mutates_args=())
def _backward(
    grad_losses: Tensor, logits: Tensor, targets: Tensor, token_weights: Tensor, statistics: Tensor, z_weight: float
) -> Tensor:
    """(tokens, vocab) gradient, contiguous."""
    factors = grad_losses * token_weights
    if runs_triton(logits):
        gradients = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        rows = (targets.contiguous(), factors, statistics, z_weight)
        _launch(logits, logits.shape[1], *rows, forward=False, gradients=gradients)
        return gradients
    exponentials = (logits.to(statistics.dtype) - statistics[1][:, None]).exp_()
    return _gradient_in_torch(exponentials, targets, factors, z_weight, statistics).to(logits.dtype).contiguous()


@_backward.register_fake
def _(grad_losses, logits, targets, token_weights, statistics, z_weight):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _setup_context(ctx, inputs, output) -> None:
    logits, targets, token_weights, ctx.z_weight = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(logits, targets, token_weights, output[1])


def _differentiate(ctx, grad_losses: Tensor | None, _: Tensor | None):
    if grad_losses is None:
        return None, None, None, None
    gradient = torch.ops.titan_yulan.cross_entropy_backward(grad_losses, *ctx.saved_tensors, ctx.z_weight)
    return gradient, None, None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)


class CrossEntropy(nn.Module):
    """`cross_entropy` with its settings; returns (objective, cross_entropy, logsumexp)."""

    def __init__(self, z_weight: float = 0.0, kernels: Kernels = "auto") -> None:
        super().__init__()
        self.z_weight = z_weight
        self.kernels: Kernels = kernels

    def forward(
        self, logits: Tensor, targets: Tensor, token_weights: Tensor, *, denominator: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return cross_entropy(
            logits, targets, token_weights, self.z_weight, denominator=denominator, kernels=self.kernels
        )

    def extra_repr(self) -> str:
        return f"z_weight={self.z_weight}, kernels={self.kernels!r}"
