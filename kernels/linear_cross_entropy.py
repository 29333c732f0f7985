"""The output head and the weighted cross-entropy with z-loss as one operation, without ever holding all logits.

    z_i = W h_i,   loss_i = logsumexp(z_i) - z_i[target_i]
    objective = sum_i w_i * (loss_i + z_weight * logsumexp(z_i)^2) / denominator

Forward computes the gradients too, because a chunk's logits exist only then: for a chunk of tokens, the gradient G of
the objective takes the place of the logits z = H W^T in one buffer (kernels/cross_entropy.py), then dH = G W and
dW += G^T H. That is three matrix products per token, as many as with all logits in memory. Backward only multiplies by
the upstream gradient, in float32. With 16-bit inputs, z and G are held in 16 bits as in PyTorch's own path, and dW is
summed in float32 over all chunks, so that its error does not grow with their number.

The rows of the buffer are a multiple of 64 elements apart: all begin on a 128-byte line, and the kernel moves 16 bytes
at a time whatever the vocabulary. Larger chunks read and write dW (vocab x hidden, float32) less often; 4096 tokens
keep that traffic small beside the products, and the buffer below 1 GB for a vocabulary of 99,000 in 16 bits.

With a process group, every rank has the same tokens and its own rows of the head (vocabulary parallelism). Between
the products stands then one all-gather of 3 numbers per token (kernels/vocabulary_parallel.py), and the kernel runs
twice, before and after it. No rank ever holds, sends or receives logits of another's rows.

The operator sees plain tensors: under FSDP2 it must run inside the root's forward, where the (tied) head is gathered.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from titan_yulan.kernels.cross_entropy import (
    FLOATING,
    check_range,
    check_rows,
    cross_entropy_reference,
    forward_gradient_rows,
    forward_rows,
    row_variants,
)
from titan_yulan.kernels.runtime import Kernels, choose
from titan_yulan.kernels.variant import Variant
from titan_yulan.kernels.vocabulary_parallel import largest_shard, shard_of, sharded_rows

_CHUNK_ROWS = 4096  # on a GPU
_CHUNK_ELEMENTS = 1 << 21  # logits on a CPU; 8 MB in float32, which stay in its cache
_ROW_ALIGNMENT = 64  # elements


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor,
    z_weight: float = 0.0,
    *,
    denominator: Tensor | None = None,
    with_logsumexp: bool = False,
    chunk_rows: int | None = None,
    kernels: Kernels = "auto",
    group: torch.distributed.ProcessGroup | str | None = None,
    vocabulary_size: int | None = None,
) -> tuple[Tensor, ...]:
    """Weighted cross-entropy of `hidden @ weight.T`, with `group` over a head whose rows are spread over its ranks.

    Args:
        hidden: (tokens, hidden_size).
        weight: (vocab, hidden_size), hidden's type; the head, tied or not.
        targets: (tokens,) int64.
        token_weights: (tokens,) float32; 0 leaves a token out, whatever its target and logits.
        z_weight: weight of the squared log-partition (z-loss).
        denominator: one-element float32 tensor that divides the objective and the gradients; None for 1. It is not read
            on the host, and better given here than divided by afterwards: the gradient of 16-bit hidden states is then
            rounded once, not twice.
        with_logsumexp: also return each token's logsumexp.
        chunk_rows: tokens whose logits are held at a time; by default 4096 on a GPU and 2^21 logits on a CPU.
        kernels: `"auto"` runs the Triton kernel where it can, `"triton"` insists, `"reference"` does its part in plain
            PyTorch; chunks and matrix products are the same.

    Returns:
        objective: () sum over tokens of weight * (cross-entropy + z_weight * logsumexp^2), divided by the denominator;
            differentiable with respect to hidden and weight.
        cross_entropy: (tokens,) weight * cross-entropy, not divided; for reports, without gradient.
        logsumexp: (tokens,) if asked for, 0 where the weight is 0; for reports, without gradient.
        All in float32, or float64 if the input is. Nothing waits for the device.
        With `group`, these three are bitwise the same on all ranks. The gradient of weight is that of the rank's rows;
        the gradient of hidden is the rank's part of a sum over the group, which is left to the caller.

    Raises:
        TypeError: a type other than those above.
        ValueError: shapes or devices that do not fit, chunk_rows < 1, one of group and vocabulary_size without the
            other, a shard of another size than the above, or Triton insisted on where it cannot run.
        IndexError: a target outside the vocabulary, under TITAN_YULAN_CHECK_TARGETS=1 (which waits for the device;
            without it such a target is an error of PyTorch's or, where Triton runs, a loss that is NaN; with `group`,
            a loss that is infinite).
    """
    use_triton = choose(kernels, hidden.device)
    _check(hidden, weight, targets, token_weights, denominator, chunk_rows)
    if (group is None) != (vocabulary_size is None) or (weight.shape[0] == 0 and group is None):
        raise ValueError(
            f"weight has {weight.shape[0]} rows, vocabulary_size is {vocabulary_size}: a head that is cut over ranks "
            "needs both group and vocabulary_size, a whole head has rows and neither"
        )
    needed = torch.is_grad_enabled()  # without it parameters still say that they require gradients
    objective, cross_entropy, logsumexp, _, _ = torch.ops.titan_yulan.linear_cross_entropy_forward(
        hidden,
        weight,
        targets,
        token_weights,
        z_weight,
        denominator,
        chunk_rows,
        needed and hidden.requires_grad,
        needed and weight.requires_grad,
        use_triton,
        vocabulary_size,
        group if group is None or isinstance(group, str) else group.group_name,
    )
    return (objective, cross_entropy, logsumexp) if with_logsumexp else (objective, cross_entropy)


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor,
    z_weight: float = 0.0,
    *,
    denominator: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same in plain PyTorch under autograd, with all logits in memory: (objective, cross_entropy, logsumexp)."""
    logits = hidden @ weight.t()
    return cross_entropy_reference(logits, targets, token_weights, z_weight, denominator=denominator)


def _check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor,
    denominator: Tensor | None,
    chunk_rows: int | None,
) -> None:
    if hidden.dtype not in FLOATING:
        raise TypeError(f"hidden is {hidden.dtype}; the head takes float32, float16, bfloat16 and float64")
    if weight.dtype != hidden.dtype:
        raise TypeError(f"weight is {weight.dtype}, hidden is {hidden.dtype}: both must have one type")
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        shapes = f"hidden has shape {tuple(hidden.shape)}, weight {tuple(weight.shape)}"
        raise ValueError(f"{shapes}; they must be (tokens, hidden_size) and (vocab, hidden_size)")
    if weight.device != hidden.device:
        raise ValueError(f"weight is on {weight.device}, hidden is on {hidden.device}")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows = {chunk_rows} must be at least 1")
    check_rows(hidden.shape[0], targets, token_weights, denominator, hidden)


def variants(hidden: int, intermediate: int, vocab: int) -> list[Variant]:
    """What runs on a GPU on the buffer of logits, for the whole vocabulary and for one cut over 2 and 6 ranks."""
    result = row_variants(vocab, _row_stride(vocab), ("forward", "forward_gradient"))
    for ranks in (2, 6):
        part = largest_shard(vocab, ranks)
        result += row_variants(part, _row_stride(part), ("forward", "gradient"), f"_of_{ranks}_parts")
    return result


def _row_stride(vocab: int) -> int:
    return (vocab + _ROW_ALIGNMENT - 1) // _ROW_ALIGNMENT * _ROW_ALIGNMENT


def _rows_at_a_time(hidden: Tensor, vocab: int, chunk_rows: int | None) -> int:
    if chunk_rows is None:
        chunk_rows = _CHUNK_ROWS if hidden.is_cuda else _CHUNK_ELEMENTS // vocab
    return max(1, min(chunk_rows, hidden.shape[0]))


def _whole_rows(
    logits: Tensor,
    vocab: int,
    targets: Tensor,
    factors: Tensor,
    z_weight: float,
    statistics: Tensor,
    need_gradient: bool,
    use_triton: bool,
) -> Tensor:
    """What `sharded_rows` does where this rank has all columns: both in one launch."""
    if need_gradient:
        return forward_gradient_rows(logits, vocab, targets, factors, z_weight, statistics, use_triton)
    forward_rows(logits, vocab, targets, factors, statistics, use_triton)
    return logits[:, :0]


def _outer_products_(total: Tensor, gradient: Tensor, hidden: Tensor, first: bool) -> None:
    """total (vocab, hidden_size) += gradient^T hidden in total's type, float32 where they have 16 bits; = if first."""
    left, beta = gradient.t(), 0 if first else 1
    if gradient.dtype == total.dtype:
        torch.addmm(total, left, hidden, beta=beta, out=total)
    elif total.is_cuda:
        torch.addmm(total, left, hidden, out_dtype=total.dtype, beta=beta, out=total)
    else:
        torch.addmm(total, left.to(total.dtype), hidden.to(total.dtype), beta=beta, out=total)


@torch.library.custom_op("titan_yulan::linear_cross_entropy_forward", mutates_args=())
def _forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor,
    z_weight: float,
    denominator: Tensor | None,
    chunk_rows: int | None,
    need_hidden: bool,
    need_weight: bool,
    use_triton: bool,
    vocabulary_size: int | None = None,
    group: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """objective, cross_entropy, logsumexp, dH in hidden's type, dW in float32; a gradient not needed is empty."""
    rows, vocab = hidden.shape[0], weight.shape[0]
    check_range(targets, token_weights, vocabulary_size or vocab)
    compute = torch.promote_types(hidden.dtype, torch.float32)
    targets, weights = targets.contiguous(), token_weights.to(compute).contiguous()
    divisor = None if denominator is None else denominator.to(compute).reshape(())
    factors = weights if divisor is None else weights / divisor
    shard = None if group is None or vocabulary_size is None else shard_of(vocabulary_size, group, vocab)
    chunk = _rows_at_a_time(hidden, vocab if shard is None else shard.largest, chunk_rows)
    buffer = hidden.new_empty((chunk, _row_stride(vocab)))
    statistics = hidden.new_empty((3, rows), dtype=compute)
    grad_hidden = hidden.new_empty(hidden.shape if need_hidden else (0,))
    grad_weight = hidden.new_zeros(weight.shape if need_weight and rows == 0 else (0,), dtype=compute)
    if need_weight and rows:
        grad_weight = hidden.new_empty(weight.shape, dtype=compute)
    how = (need_hidden or need_weight, use_triton and compute == torch.float32)
    for start in range(0, rows, chunk):
        part = slice(start, min(start + chunk, rows))
        logits, h = buffer[: part.stop - start], hidden[part]
        torch.mm(h, weight.t(), out=logits[:, :vocab])
        of_rows = (targets[part], factors[part], z_weight, statistics[:, part], *how)
        gradient = _whole_rows(logits, vocab, *of_rows) if shard is None else sharded_rows(logits, shard, *of_rows)
        if need_hidden:
            torch.mm(gradient, weight, out=grad_hidden[part])
        if need_weight:
            _outer_products_(grad_weight, gradient, h, first=start == 0)
    losses, maxima, sums = statistics.unbind()
    lse = maxima + sums.log()
    cross_entropy = weights * losses
    objective = (cross_entropy + z_weight * weights * lse.square()).sum()
    return objective if divisor is None else objective / divisor, cross_entropy, lse, grad_hidden, grad_weight


@_forward.register_fake
def _(hidden, weight, targets, token_weights, z_weight, denominator, chunk_rows, need_hidden, need_weight, *_):
    compute = torch.promote_types(hidden.dtype, torch.float32)
    return (
        hidden.new_empty((), dtype=compute),
        hidden.new_empty((hidden.shape[0],), dtype=compute),
        hidden.new_empty((hidden.shape[0],), dtype=compute),
        hidden.new_empty(hidden.shape if need_hidden else (0,)),
        hidden.new_empty(weight.shape if need_weight else (0,), dtype=compute),
    )


@torch.library.custom_op("titan_yulan::linear_cross_entropy_backward", mutates_args=())
def _backward(
    grad_objective: Tensor, grad_hidden: Tensor, grad_weight: Tensor, weight_type: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Both gradients times the upstream one, in float32, cast once to the types of hidden and weight."""
    factor = grad_objective.reshape(1)  # of one dimension: a scalar would be rounded to 16 bits before the product
    scaled_weight = torch.empty_like(grad_weight, dtype=weight_type)
    return (
        torch.mul(grad_hidden, factor, out=torch.empty_like(grad_hidden)),
        torch.mul(grad_weight, factor, out=scaled_weight),
    )


@_backward.register_fake
def _(grad_objective, grad_hidden, grad_weight, weight_type):
    return torch.empty_like(grad_hidden), torch.empty_like(grad_weight, dtype=weight_type)


def _setup_context(ctx, inputs, output) -> None:
    ctx.need_hidden, ctx.need_weight = inputs[7:9]
    ctx.weight_type = inputs[1].dtype
    ctx.set_materialize_grads(False)  # else backward would be given zeros as large as the head
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[3:])


def _differentiate(ctx, grad_objective: Tensor | None, *_: Tensor | None):
    nothing = (None,) * 10
    if grad_objective is None:
        return (None, None, *nothing)
    grad_hidden, grad_weight = torch.ops.titan_yulan.linear_cross_entropy_backward(
        grad_objective, *ctx.saved_tensors, ctx.weight_type
    )
    return (grad_hidden if ctx.need_hidden else None, grad_weight if ctx.need_weight else None, *nothing)


_forward.register_autograd(_differentiate, setup_context=_setup_context)


class LinearCrossEntropy(nn.Module):
    """`linear_cross_entropy` with its settings; returns (objective, cross_entropy). The head is given at each call."""

    def __init__(self, z_weight: float = 0.0, chunk_rows: int | None = None, kernels: Kernels = "auto") -> None:
        super().__init__()
        self.z_weight, self.chunk_rows = z_weight, chunk_rows
        self.kernels: Kernels = kernels

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        token_weights: Tensor,
        *,
        denominator: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        return linear_cross_entropy(
            hidden,
            weight,
            targets,
            token_weights,
            self.z_weight,
            denominator=denominator,
            chunk_rows=self.chunk_rows,
            kernels=self.kernels,
        )

    def extra_repr(self) -> str:
        return f"z_weight={self.z_weight}, chunk_rows={self.chunk_rows}, kernels={self.kernels!r}"
