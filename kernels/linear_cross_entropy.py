"""The output head and the cross-entropy with z-loss as one operation, without ever holding all logits.

loss_i = logsumexp(z_i) - z_i[target_i],  z_i = W h_i,  plus z_weight * logsumexp(z_i)^2 for the objective.
The gradients of a chunk of rows are computed with its logits, so only one chunk's logits exist at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 21  # logits held at a time; 8 MB in float32, which stays in a CPU's cache


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor, z_weight: float
) -> tuple[Tensor, Tensor]:
    """Weighted cross-entropy of `hidden @ weight.T`.

    Args:
        hidden: (tokens, hidden_size).
        weight: (vocab, hidden_size).
        targets: (tokens,) int64.
        token_weights: (tokens,) float32; 0 leaves a token out.
        z_weight: weight of the squared log-partition (z-loss).

    Returns:
        objective: () sum over tokens of weight * (cross-entropy + z_weight * logsumexp^2), differentiable.
        cross_entropy: (tokens,) weight * cross-entropy, for reports only (no gradient).
        Both in float32, or float64 if the input is.
    """
    if not torch.is_grad_enabled():  # else autograd would still say that parameters need gradients
        hidden, weight = hidden.detach(), weight.detach()
    objective, cross_entropy = _LinearCrossEntropy.apply(hidden, weight, targets, token_weights, z_weight)
    return objective, cross_entropy


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, token_weights, z_weight):
        compute = torch.promote_types(hidden.dtype, torch.float32)
        chunk = max(1, _CHUNK_ELEMENTS // weight.shape[0])
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=compute) if need_weight else None
        objective = torch.zeros((), dtype=compute, device=hidden.device)
        cross_entropy = torch.empty(hidden.shape[0], dtype=compute, device=hidden.device)
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            h, t, w = hidden[part], targets[part], token_weights[part].to(compute)
            logits = (h @ weight.t()).to(compute)
            lse = logits.logsumexp(1)
            losses = lse - logits.gather(1, t[:, None])[:, 0]
            objective += (w * (losses + z_weight * lse.square())).sum()
            cross_entropy[part] = w * losses
            if need_hidden or need_weight:
                # d objective / d z = w * ((1 + 2 z lse) softmax(z) - onehot(target))
                grad = (logits - lse[:, None]).exp_().mul_((w * (1 + 2 * z_weight * lse))[:, None])
                grad.scatter_add_(1, t[:, None], -w[:, None])
                grad = grad.to(hidden.dtype)
                if grad_hidden is not None:
                    grad_hidden[part] = grad @ weight
                if grad_weight is not None:
                    grad_weight += grad.t() @ h
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        ctx.mark_non_differentiable(cross_entropy)
        return objective, cross_entropy

    @staticmethod
    def backward(ctx, *grad_outputs):
        grad_objective = grad_outputs[0]
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * grad_objective.to(grad_hidden.dtype),
            None if grad_weight is None else grad_weight * grad_objective.to(grad_weight.dtype),
            None,
            None,
            None,
        )
